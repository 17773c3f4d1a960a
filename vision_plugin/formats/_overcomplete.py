"""overcomplete's state dicts, which record neither the class nor k nor a running threshold."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from vision_plugin.formats._checkpoint import (
    RawCheckpoint,
    ReadOptions,
    check_shapes,
    matrix_shape,
)
from vision_plugin.formats._errors import CorruptCheckpointError, RefusedCheckpointError
from vision_plugin.formats._stock import StockCheckpoint

WEIGHT, BIAS = "encoder.final_block.0.weight", "encoder.final_block.0.bias"
ROWS, MULTIPLIER = "dictionary._weights", "dictionary.multiplier"
_NORM = "encoder.final_block.1."
_BATCH_NORM = [
    _NORM + name
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
]
_BATCH_NORM_EPS = 1e-5  # torch's default, which the library never changes
_ROW_EPS = 1e-8


def describes(raw: RawCheckpoint) -> bool:
    """Return whether overcomplete wrote this."""
    return {WEIGHT, ROWS} <= set(raw.tensors) and not raw.settings


def to_stock(raw: RawCheckpoint, options: ReadOptions) -> StockCheckpoint:
    """Translate SAE, TopKSAE, BatchTopKSAE or JumpSAE, as it computes in eval mode.

    Raises:
        RefusedCheckpointError: The file does not say which of them it is, or its encoder is more
            than one linear map (with or without batch norm).
    """
    unknown = [name for name in raw.tensors if name.startswith("encoder.mlp_blocks.")]
    if unknown:
        raise RefusedCheckpointError("its encoder has hidden layers; SAELens's are linear.")
    is_jump = "thresholds" in raw.tensors
    optional = [MULTIPLIER, "thresholds"]
    if _NORM + "weight" in raw.tensors:
        if _NORM + "running_mean" not in raw.tensors:
            raise RefusedCheckpointError(
                "its encoder ends in a layer norm, whose scale depends on the sample."
            )
        optional += _BATCH_NORM
    tensors = raw.take(WEIGHT, BIAS, ROWS, optional=optional)
    d_sae, d_in = matrix_shape(tensors, WEIGHT)
    per_latent = (BIAS, "thresholds", *_BATCH_NORM[:4])
    check_shapes(tensors, {ROWS: (d_sae, d_in), **dict.fromkeys(per_latent, (d_sae,))})
    check_multiplier(tensors)
    decoder = normalized_rows(tensors[ROWS], options.row_normalization or "l2")
    if MULTIPLIER in tensors:
        decoder = decoder * tensors[MULTIPLIER].exp()
    weight, bias = _with_batch_norm_folded(tensors)
    stock = {
        "W_enc": weight.T,
        "b_enc": bias,
        "W_dec": decoder,
        "b_dec": torch.zeros_like(decoder[0]),
    }
    activation = options.activation or ("jumprelu" if is_jump else None)
    metadata: dict[str, object] = {
        "input_normalization": "none",
        "row_normalization": options.row_normalization or "l2",
    }
    if is_jump != (activation == "jumprelu"):
        raise RefusedCheckpointError(
            f"thresholds in the file: {is_jump}; they go with activation='jumprelu' alone, but "
            f"activation={activation!r}."
        )
    if activation == "jumprelu":
        stock["threshold"] = tensors["thresholds"].exp()
        return StockCheckpoint(
            "jumprelu", stock, False, threshold_is_inclusive=True, metadata=metadata
        )
    return with_activation(stock, activation, options, metadata)


def with_activation(
    stock: dict[str, Tensor],
    activation: str | None,
    options: ReadOptions,
    metadata: dict[str, object],
) -> StockCheckpoint:
    """Return the SAE with the sparsifier that the caller named."""
    if activation == "relu":
        return StockCheckpoint("standard", stock, False, metadata=metadata)
    if activation == "topk" and options.k is not None:
        return StockCheckpoint("topk", stock, False, k=options.k, metadata=metadata)
    if activation == "batchtopk" and options.threshold is not None:
        stock["threshold"] = torch.full_like(stock["b_enc"], float(options.threshold))
        return StockCheckpoint(
            "jumprelu", stock, False, threshold_is_inclusive=True, metadata=metadata
        )
    raise RefusedCheckpointError(
        "an overcomplete state dict holds neither the class, nor top_k, nor BatchTopK's "
        "running_threshold, and the three classes compute different things from the same tensors. "
        "Say which: activation='topk' with k=sae.top_k, activation='batchtopk' with "
        "threshold=float(sae.running_threshold), or activation='relu' for the plain SAE."
    )


def check_multiplier(tensors: dict[str, Tensor]) -> None:
    """Raise if the dictionary's multiplier is not one number.

    Raises:
        CorruptCheckpointError: It has more, or none.
    """
    if MULTIPLIER in tensors and tensors[MULTIPLIER].shape not in ((), (1,)):
        raise CorruptCheckpointError(
            f"{MULTIPLIER} has shape {tuple(tensors[MULTIPLIER].shape)}; it must be one number."
        )


def normalized_rows(rows: Float[Tensor, "d_sae d_in"], how: str) -> Float[Tensor, "d_sae d_in"]:
    """Return the dictionary's rows as its layer normalises them in eval mode.

    Args:
        rows: Stored rows; training leaves them un-normalised until the next forward pass.
        how: `l2` or `l1` (each row to norm 1), `max_l2` or `max_l1` (the largest), or `identity`.
    """
    if how == "identity":
        return rows
    norms: Tensor = rows.norm(p=1 if how.endswith("l1") else 2, dim=1, keepdim=True)
    if how.startswith("max_"):
        return rows / norms.amax()
    return rows / (norms + _ROW_EPS)


def _with_batch_norm_folded(tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    weight, bias = tensors[WEIGHT], tensors[BIAS]
    if _NORM + "weight" not in tensors:
        return weight, bias
    gain, shift, mean, variance = (tensors[name].to(torch.float64) for name in _BATCH_NORM[:4])
    scale = gain / (variance + _BATCH_NORM_EPS).sqrt()
    folded_weight = weight.to(torch.float64) * scale[:, None]
    folded_bias = (bias.to(torch.float64) - mean) * scale + shift
    return folded_weight.to(weight.dtype), folded_bias.to(bias.dtype)
