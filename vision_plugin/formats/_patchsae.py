"""PatchSAE's ReLU SAEs: `{cfg | config, state_dict}` as a torch file or a gzipped pickle."""

from __future__ import annotations

from vision_plugin.formats._checkpoint import RawCheckpoint, ReadOptions
from vision_plugin.formats._errors import RefusedCheckpointError
from vision_plugin.formats._stock import StockCheckpoint

# `block_layer` may count from the end; these are the blocks of the backbones PatchSAE trains on.
_N_BLOCKS = {
    "openai/clip-vit-base-patch16": 12,
    "openai/clip-vit-base-patch32": 12,
    "openai/clip-vit-large-patch14": 24,
    "openai/clip-vit-large-patch14-336": 24,
}


def describes(raw: RawCheckpoint) -> bool:
    """Return whether PatchSAE wrote this."""
    return {"W_enc", "b_enc", "W_dec", "b_dec"} <= set(raw.tensors) and (
        {"block_layer", "module_name"} <= set(raw.settings)
        or raw.settings_class == "src.sae_training.config.ViTSAERunnerConfig"
        or {"d_in", "l1_coefficient", "gated_sae"} <= set(raw.settings)
    )


def to_stock(raw: RawCheckpoint, options: ReadOptions) -> StockCheckpoint:
    """Translate `relu((x - b_dec) W_enc + b_enc)`, which is the standard architecture.

    Raises:
        RefusedCheckpointError: It is the gated variant, which PatchSAE cannot run itself.
    """
    del options
    if raw.setting("gated_sae", bool, default=False):
        raise RefusedCheckpointError(
            "it is PatchSAE's gated variant, whose forward pass that project does not implement; "
            "its meaning is unknown."
        )
    tensors = raw.take("W_enc", "b_enc", "W_dec", "b_dec")
    return StockCheckpoint("standard", tensors, True, metadata=_metadata(raw))


def _metadata(raw: RawCheckpoint) -> dict[str, object]:
    model = raw.text("model_name")
    layer = raw.setting("block_layer", int, default=None)
    if layer is not None and layer < 0:
        layer = layer + _N_BLOCKS[model] if model in _N_BLOCKS else None
    is_residual = raw.text("module_name") == "resid"
    return {
        "model_name": model,
        "hook_name": f"blocks.{layer}.hook_resid_post"
        if is_residual and layer is not None
        else None,
        "tokens": "cls" if raw.settings.get("class_token") is True else "all",
        "input_normalization": "none",
    }
