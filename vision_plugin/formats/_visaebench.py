"""VISAEBench's files: tensors under its own or overcomplete's names, beside a JSON or YAML config.

Its SAEs expect `(a - mean) / std` of the activations, but the file does not hold the statistics;
give `input_mean` and `input_std` to have them folded in.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from vision_plugin._shown import shown
from vision_plugin.formats import _overcomplete
from vision_plugin.formats._checkpoint import (
    RawCheckpoint,
    ReadOptions,
    check_shapes,
    matrix_shape,
    whole_number,
)
from vision_plugin.formats._errors import CorruptCheckpointError, RefusedCheckpointError
from vision_plugin.formats._stock import StockCheckpoint

_DEFAULT_JUMP_THRESHOLD = 0.01
_RUNNING = "_running_threshold"
_JUMP_NAMES = ("jump_thresholds", "thresholds")
# The models that VISAEBench's backbones load.
_MODELS = {
    "clip_vitb16": "openai/clip-vit-base-patch16",
    "siglip_vitb16": "google/siglip-base-patch16-224",
    "dinov2_vitb14": "facebook/dinov2-base",
    "mae_vitb16": "timm:vit_base_patch16_224.mae",
    "deit_vitb16": "timm:deit_base_patch16_224",
}
_LAST_LAYER = 11


def describes(raw: RawCheckpoint) -> bool:
    """Return whether this is a checkpoint for VISAEBench."""
    names = set(raw.tensors)
    if {_overcomplete.WEIGHT, _overcomplete.ROWS} <= names:
        return bool(raw.settings)
    if not {"encoder.weight", "encoder.bias", "decoder.weight"} <= names:
        return False
    same_layout = raw.tensors["encoder.weight"].shape == raw.tensors["decoder.weight"].shape
    return same_layout and bool({"activation", "sae_type", "architecture"} & set(raw.settings))


def to_stock(raw: RawCheckpoint, options: ReadOptions) -> StockCheckpoint:
    """Translate VISAEBench's GenericSAE, reading config keys in its order of precedence.

    Raises:
        RefusedCheckpointError: VISAEBench has no such activation, or the thresholds have
            overcomplete's name, which stores logarithms that VISAEBench reads as they are.
    """
    activation = _activation(raw)
    stock = _weights(raw, options)
    metadata = {**_metadata(raw), "trained_k": raw.setting("k", int, default=None)}
    if activation == "topk":
        k = whole_number(raw.settings.get("k", options.k), "k")
        return StockCheckpoint("topk", stock, False, k=k, metadata=metadata)
    if activation == "batchtopk":
        stock["threshold"] = torch.full_like(stock["b_enc"], _threshold(raw, options))
        return StockCheckpoint(
            "jumprelu", stock, False, threshold_is_inclusive=True, metadata=metadata
        )
    if activation == "jumprelu":
        found = [raw.tensors[name] for name in _JUMP_NAMES if name in raw.tensors]
        default = torch.full_like(stock["b_enc"], _DEFAULT_JUMP_THRESHOLD)
        stock["threshold"] = found[0] if found else default
        return StockCheckpoint("jumprelu", stock, False, metadata=metadata)
    raise RefusedCheckpointError(
        f"its activation is {shown(activation)}; VISAEBench has topk, batchtopk and jumprelu."
    )


def _activation(raw: RawCheckpoint) -> str:
    for name in ("activation", "sae_type", "architecture"):
        if name in raw.settings:
            return str(raw.setting(name, str)).lower()
    return "topk"


def _weights(raw: RawCheckpoint, options: ReadOptions) -> dict[str, Tensor]:
    extra = [_RUNNING, *_JUMP_NAMES]
    if _overcomplete.WEIGHT in raw.tensors:
        if "thresholds" in raw.tensors:
            raise RefusedCheckpointError(
                "its `thresholds` are logarithms if overcomplete's JumpSAE wrote them, and "
                "VISAEBench would read them as they are. Pass format='overcomplete' for the SAE "
                "that was trained."
            )
        tensors = raw.take(
            _overcomplete.WEIGHT,
            _overcomplete.BIAS,
            _overcomplete.ROWS,
            optional=[_overcomplete.MULTIPLIER, *extra],
        )
        shape = matrix_shape(tensors, _overcomplete.WEIGHT)
        check_shapes(tensors, {_overcomplete.ROWS: shape, _overcomplete.BIAS: shape[:1]})
        _overcomplete.check_multiplier(tensors)
        # VISAEBench uses the stored rows; overcomplete would normalise them.
        rows = _overcomplete.normalized_rows(
            tensors[_overcomplete.ROWS], options.row_normalization or "identity"
        )
        if _overcomplete.MULTIPLIER in tensors:
            rows = rows * tensors[_overcomplete.MULTIPLIER].exp()
        encoder, bias = tensors[_overcomplete.WEIGHT], tensors[_overcomplete.BIAS]
        decoder_bias = None
    else:
        tensors = raw.take(
            "encoder.weight",
            "encoder.bias",
            "decoder.weight",
            optional=["decoder.bias", *extra],
        )
        encoder, bias, rows = (
            tensors[name] for name in ("encoder.weight", "encoder.bias", "decoder.weight")
        )
        decoder_bias = tensors.get("decoder.bias")
        matrix_shape(tensors, "encoder.weight")
        matrix_shape(tensors, "decoder.weight")
    if decoder_bias is None:
        decoder_bias = torch.zeros_like(rows[0])
    return {"W_enc": encoder.T, "b_enc": bias, "W_dec": rows, "b_dec": decoder_bias}


def _threshold(raw: RawCheckpoint, options: ReadOptions) -> float:
    if options.threshold is not None:
        return float(options.threshold)
    if raw.settings.get("threshold") is not None:
        return float(raw.setting("threshold", (int, float)))
    running = raw.tensors.get(_RUNNING)
    if running is None:
        return 0.0
    if running.numel() != 1:
        raise CorruptCheckpointError(f"{_RUNNING} must be one number.")
    return float(running)


def _metadata(raw: RawCheckpoint) -> dict[str, object]:
    backbone = raw.text("backbone")
    layer = raw.setting("layer", int, default=None)
    if layer is None:
        found = re.search(r"layer_(\d{1,3})\b", raw.text("activation_dir") or "")
        layer = int(found[1]) if found else None
    hook = None if layer is None else f"blocks.{layer}.hook_resid_post"
    if backbone == "dinov2_vitb14":  # its helper applies the final norm to what it returns
        hook = "ln_final.hook_out" if layer == _LAST_LAYER else None
    return {
        "model_name": _MODELS.get(backbone or "", backbone),
        "hook_name": hook,
        "tokens": "patch",
        "input_normalization": "standardize: (x - mean) / std, statistics not in the file",
    }
