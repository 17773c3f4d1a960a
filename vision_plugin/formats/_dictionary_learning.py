"""dictionary_learning's classes, which sae-for-vlm bundles: `ae.pt` beside `config.json`.

The SAE in the file takes raw activations: before saving, the trainer folds its normalisation of
the input into the biases and the threshold.
"""

from __future__ import annotations

import logging
import re

import torch
from torch import Tensor

from vision_plugin._shown import shown
from vision_plugin.formats._checkpoint import (
    RawCheckpoint,
    ReadOptions,
    check_shapes,
    matrix_shape,
)
from vision_plugin.formats._errors import CorruptCheckpointError, RefusedCheckpointError
from vision_plugin.formats._stock import StockCheckpoint

# How sae-for-vlm names the folder of a run: dataset, model, layer and attachment point.
_RUN = re.compile(r"_activations_(?P<model>[\w.-]+?)_(?P<layer>\d{1,3})_post_mlp_residual")
_MODELS = {
    "clip-vit-large-patch14-336": "openai/clip-vit-large-patch14-336",
    "siglip-so400m-patch14-384": "google/siglip-so400m-patch14-384",
}
logger = logging.getLogger(__name__)

_MAX_GROUPS = 1_000
_LINEAR = ("encoder.weight", "encoder.bias", "decoder.weight")
_MATRICES = ("W_enc", "b_enc", "W_dec", "b_dec")
_BY_ACTIVATION = {"topk": "AutoEncoderTopK", "batchtopk": "BatchTopKSAE"}


def describes(raw: RawCheckpoint) -> bool:
    """Return whether dictionary_learning wrote this."""
    trainer = raw.settings.get("trainer")
    if isinstance(trainer, dict) and "dict_class" in trainer:
        return True
    names = set(raw.tensors)
    return not raw.settings and (
        {*_LINEAR, "bias"} == names
        or {*_LINEAR, "b_dec", "k"} <= names
        or {*_MATRICES, "k", "group_sizes"} <= names
        or {*_MATRICES, "threshold"} == names
        or {"encoder.weight", "gate_bias", "mag_bias", "r_mag"} <= names
    )


def to_stock(raw: RawCheckpoint, options: ReadOptions) -> StockCheckpoint:
    """Translate one of dictionary_learning's classes.

    Raises:
        RefusedCheckpointError: The class has no stock counterpart, or cannot be told.
    """
    name = _class_name(raw, options)
    metadata: dict[str, object] = {
        "input_normalization": "none",
        "dict_class": name,
        **_place(raw),
    }
    match name:
        case "AutoEncoder":
            tensors = raw.take(*_LINEAR, "bias")
            stock = _with_unit_decoder(_from_linear(tensors, tensors["bias"]))
            return StockCheckpoint("standard", stock, True, metadata=metadata)
        case "AutoEncoderNew":
            tensors = raw.take(*_LINEAR, "decoder.bias")
            stock = _from_linear(tensors, tensors["decoder.bias"])
            return StockCheckpoint("standard", stock, False, metadata=metadata)
        case "AutoEncoderTopK":
            tensors = raw.take(*_LINEAR, "b_dec", "k", optional=["threshold"])
            stock = _from_linear(tensors, tensors["b_dec"])
            if options.activation == "batchtopk":  # its own encode(use_threshold=True)
                return _thresholded(stock, tensors, options, metadata)
            k = _scalar(tensors["k"], "k")
            return StockCheckpoint("topk", stock, True, k=int(k), metadata=metadata)
        case "BatchTopKSAE":
            tensors = raw.take(*_LINEAR, "b_dec", "k", "threshold")
            stock = _from_linear(tensors, tensors["b_dec"])
            return _thresholded(stock, tensors, options, metadata)
        case "MatroyshkaBatchTopKSAE" | "MatryoshkaBatchTopKSAE":
            tensors = raw.take(*_MATRICES, "k", "threshold", optional=["group_sizes"])
            if "group_sizes" in tensors:
                metadata["group_sizes"] = _group_sizes(tensors["group_sizes"])
            stock = {key: tensors[key] for key in _MATRICES}
            return _thresholded(stock, tensors, options, metadata)
        case "JumpReluAutoEncoder":
            tensors = raw.take(*_MATRICES, "threshold")
            return StockCheckpoint("jumprelu", tensors, False, metadata=metadata)
        case "GatedAutoEncoder":
            return StockCheckpoint("gated", _from_gated(raw), True, metadata=metadata)
    raise RefusedCheckpointError(f"dictionary_learning's {shown(name)} has no stock counterpart.")


def _place(raw: RawCheckpoint) -> dict[str, object]:
    """Return model and hook, from the run's folder or else its config."""
    for folder in raw.path.parts:
        found = _RUN.search(folder)
        if found is not None:
            return {
                "model_name": _MODELS.get(found["model"], found["model"]),
                "hook_name": f"blocks.{int(found['layer'])}.hook_resid_post",
            }
    trainer = raw.settings.get("trainer")
    name = trainer.get("lm_name") if isinstance(trainer, dict) else None
    return {"model_name": name if isinstance(name, str) and name else None}


def _class_name(raw: RawCheckpoint, options: ReadOptions) -> str:
    trainer = raw.settings.get("trainer")
    if isinstance(trainer, dict) and isinstance(trainer.get("dict_class"), str):
        return str(trainer["dict_class"])
    names = set(raw.tensors)
    if "bias" in names:
        return "AutoEncoder"
    if "gate_bias" in names:
        return "GatedAutoEncoder"
    if "group_sizes" in names:
        return "MatryoshkaBatchTopKSAE"
    if {*_MATRICES, "threshold"} == names:
        return "JumpReluAutoEncoder"
    if options.activation in _BY_ACTIVATION:
        return _BY_ACTIVATION[options.activation]
    raise RefusedCheckpointError(
        "BatchTopKSAE and AutoEncoderTopK have the same tensors, and there is no config.json "
        "beside the file to name the class. Add it, or pass activation='batchtopk' or 'topk'."
    )


def _group_sizes(tensor: Tensor) -> list[int]:
    if tensor.numel() > _MAX_GROUPS or tensor.is_floating_point():
        raise CorruptCheckpointError(
            f"group_sizes holds {tensor.numel()} values of {tensor.dtype}; expected at most "
            f"{_MAX_GROUPS} whole numbers."
        )
    return [int(size) for size in tensor.flatten()]


def _from_linear(tensors: dict[str, Tensor], bias: Tensor) -> dict[str, Tensor]:
    d_sae, d_in = matrix_shape(tensors, "encoder.weight")
    check_shapes(tensors, {"encoder.bias": (d_sae,), "decoder.weight": (d_in, d_sae)})
    return {
        "W_enc": tensors["encoder.weight"].T,
        "b_enc": tensors["encoder.bias"],
        "W_dec": tensors["decoder.weight"].T,
        "b_dec": bias,
    }


def _from_gated(raw: RawCheckpoint) -> dict[str, Tensor]:
    tensors = raw.take(
        "encoder.weight", "decoder.weight", "decoder_bias", "gate_bias", "mag_bias", "r_mag"
    )
    d_sae, d_in = matrix_shape(tensors, "encoder.weight")
    check_shapes(tensors, {"decoder.weight": (d_in, d_sae)})
    return {
        "W_enc": tensors["encoder.weight"].T,
        "W_dec": tensors["decoder.weight"].T,
        "b_dec": tensors["decoder_bias"],
        "b_gate": tensors["gate_bias"],
        "b_mag": tensors["mag_bias"],
        "r_mag": tensors["r_mag"],
    }


def _with_unit_decoder(stock: dict[str, Tensor]) -> dict[str, Tensor]:
    """Move the decoder's norms into the latents, as AutoEncoder.from_pretrained does."""
    norms = stock["W_dec"].norm(dim=-1)
    if torch.allclose(norms, torch.ones_like(norms)) or bool((norms == 0).any()):
        return stock
    return stock | {
        "W_dec": stock["W_dec"] / norms[:, None],
        "W_enc": stock["W_enc"] * norms,
        "b_enc": stock["b_enc"] * norms,
    }


def _thresholded(
    stock: dict[str, Tensor],
    tensors: dict[str, Tensor],
    options: ReadOptions,
    metadata: dict[str, object],
) -> StockCheckpoint:
    """Return `relu(h) * (relu(h) > threshold)` for one scalar, which is JumpReLU's own rule.

    The library starts the scalar at -1 and sets it after a thousand steps; a negative one acts as
    plain ReLU, as a threshold of 0 does.
    """
    if options.threshold is not None:
        scalar = float(options.threshold)
    elif "threshold" in tensors:
        scalar = _scalar(tensors["threshold"], "threshold")
    else:
        raise RefusedCheckpointError("the file holds no threshold; pass threshold=.")
    if scalar < 0:
        logger.warning("The threshold was not set in training (%g): plain ReLU is used.", scalar)
    threshold = torch.full_like(stock["b_enc"], max(scalar, 0.0))
    if "k" in tensors:
        metadata["trained_k"] = int(_scalar(tensors["k"], "k"))
    return StockCheckpoint("jumprelu", stock | {"threshold": threshold}, True, metadata=metadata)


def _scalar(tensor: Tensor, name: str) -> float:
    if tensor.numel() != 1 or not bool(torch.isfinite(tensor).all()):
        raise CorruptCheckpointError(f"{name} has {tensor.numel()} values; expected a finite one.")
    return float(tensor)
