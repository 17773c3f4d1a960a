"""ViT-Prisma's SAEs: a pickled `VisionModelSAERunnerConfig` beside the tensors, or `config.json`.

Prisma descends from an early SAELens and computes the same: per-sample normalisation (layer norm
with the unbiased std and eps 1e-5, or a constant norm), then `b_dec` is subtracted, then the
encoder runs; decoding goes in the reverse order.
"""

from __future__ import annotations

from vision_plugin._shown import shown
from vision_plugin.formats._checkpoint import RawCheckpoint, ReadOptions, whole_number
from vision_plugin.formats._errors import RefusedCheckpointError
from vision_plugin.formats._stock import Normalization, StockCheckpoint

_WEIGHTS = ("W_enc", "W_dec", "b_dec")
_NORMALIZATIONS: dict[object, Normalization] = {
    "layer_norm": "layer_norm",
    "constant_norm_rescale": "constant_norm_rescale",
}


def describes(raw: RawCheckpoint) -> bool:
    """Return whether Prisma wrote this."""
    return {"hook_point_layer", "layer_subtype"} <= set(raw.settings)


def to_stock(raw: RawCheckpoint, options: ReadOptions) -> StockCheckpoint:
    """Translate a standard, top-k or gated Prisma SAE.

    Raises:
        RefusedCheckpointError: It is a transcoder, or SAELens has no stock counterpart of its
            architecture or activation function.
    """
    if raw.setting("is_transcoder", bool, default=False):
        raise RefusedCheckpointError(
            "it is a transcoder with an input bias, top-k and a skip connection, which no stock "
            "SAELens transcoder has."
        )
    architecture = raw.setting("architecture", str, default="standard")
    activation = raw.setting("activation_fn_str", str)
    # Prisma treats every other value, also the null that it published, as the identity.
    raw.setting("normalize_activations", (str, bool, type(None)))
    normalization = _NORMALIZATIONS.get(raw.text("normalize_activations"), "none")
    metadata = {**_metadata(raw), "input_normalization": normalization}
    if architecture == "gated":
        tensors = raw.take(*_WEIGHTS, "b_gate", "b_mag", "r_mag", optional=["b_enc"])
        tensors.pop("b_enc", None)  # the file holds it, but nothing uses it
        if activation != "relu":
            raise RefusedCheckpointError(
                f"its gated encoder uses {shown(activation)}; SAELens's uses ReLU."
            )
        return StockCheckpoint("gated", tensors, True, normalization, metadata=metadata)
    if architecture != "standard":
        raise RefusedCheckpointError(
            f"its architecture is {shown(architecture)}; supported are standard and gated."
        )
    tensors = raw.take(*_WEIGHTS, "b_enc")
    if activation == "relu":
        return StockCheckpoint("standard", tensors, True, normalization, metadata=metadata)
    if activation == "topk":
        k = whole_number(raw.setting("activation_fn_kwargs", dict).get("k", options.k), "k")
        return StockCheckpoint("topk", tensors, True, normalization, k=k, metadata=metadata)
    raise RefusedCheckpointError(
        f"its activation function is {shown(activation)}; supported are relu and topk."
    )


def _metadata(raw: RawCheckpoint) -> dict[str, object]:
    layer = raw.setting("hook_point_layer", int)
    model = raw.text("model_name")
    if model is not None and model.startswith("open-clip:"):
        model = "open_clip:hf-hub:" + model.removeprefix("open-clip:")
    if raw.setting("cls_token_only", bool, default=False):
        tokens = "cls"
    else:
        tokens = "patch" if raw.setting("use_patches_only", bool, default=False) else "all"
    # Prisma's hook_normalized comes after weight and bias, where the bridge has hook_out.
    place = (raw.text("layer_subtype") or "").replace("hook_normalized", "hook_out")
    return {
        "model_name": model,
        "hook_name": f"blocks.{layer}.{place}",
        "hook_head_index": raw.setting("hook_point_head_index", int, default=None),
        "tokens": tokens,
    }
