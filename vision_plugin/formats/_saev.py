"""saev's files: one line of JSON, then a torch archive of the state dict.

Until August 2025 saev subtracted `b_dec` from the input; files of that time have no schema, or
schema 1 with the activation's name under `cls`. We follow the code that wrote the file; the
current saev does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from vision_plugin._shown import shown
from vision_plugin.formats._checkpoint import RawCheckpoint, ReadOptions, whole_number
from vision_plugin.formats._errors import CorruptCheckpointError, RefusedCheckpointError
from vision_plugin.formats._stock import StockCheckpoint

_THRESHOLD = "activation.threshold"
_LAST_SCHEMA = 5


def describes(raw: RawCheckpoint) -> bool:
    """Return whether saev wrote this."""
    return raw.header is not None


def to_stock(raw: RawCheckpoint, options: ReadOptions) -> StockCheckpoint:
    """Translate saev's Relu, BatchTopK and (on request) TopK activations.

    Raises:
        RefusedCheckpointError: It is a TopK without `negative_latents="clip"`, its threshold is
            missing, or its schema is newer than this reader.
    """
    header = raw.header or {}
    schema = header.get("schema", 0)
    if type(schema) is not int or not 0 <= schema <= _LAST_SCHEMA:
        raise RefusedCheckpointError(
            f"its schema is {shown(schema)}; known are 0 to {_LAST_SCHEMA}."
        )
    name, parameters = _activation(header, schema)
    tensors = raw.take("W_enc", "b_enc", "W_dec", "b_dec", optional=[_THRESHOLD])
    threshold = tensors.pop(_THRESHOLD, None)
    _check_announced_shape(header, tuple(tensors["W_enc"].shape))
    subtracts = schema <= 1
    metadata: dict[str, Any] = {"input_normalization": "none", "schema": schema or None}
    if name == "Relu":
        return StockCheckpoint("standard", tensors, subtracts, metadata=metadata)
    if name == "TopK":
        if options.negative_latents == "refuse":
            raise RefusedCheckpointError(
                "saev's TopK keeps the k largest pre-activations even where they are negative; "
                "SAELens's sets those to zero, and no stock architecture keeps them. If that "
                "difference is acceptable, pass negative_latents='clip'; samples whose k largest "
                "are all positive are then exact."
            )
        metadata["negative_latents"] = "clipped"
        k = whole_number(parameters.get("top_k", options.k), "top_k")
        return StockCheckpoint("topk", tensors, subtracts, k=k, metadata=metadata)
    if name == "BatchTopK":
        if "top_k" in parameters:
            metadata["trained_k"] = whole_number(parameters["top_k"], "top_k")
        if options.threshold is not None:
            threshold = torch.tensor(float(options.threshold))
        if threshold is None:
            raise RefusedCheckpointError(
                "it is a BatchTopK from before saev stored thresholds; without one a latent "
                "depends on the other samples of the batch. Estimate one and pass threshold=."
            )
        if threshold.numel() != 1:
            raise CorruptCheckpointError(f"{_THRESHOLD} must be one number.")
        # h > threshold, and h > 0 where the threshold is not positive: SAELens's JumpReLU.
        tensors["threshold"] = torch.full_like(tensors["b_enc"], max(float(threshold), 0.0))
        return StockCheckpoint("jumprelu", tensors, subtracts, metadata=metadata)
    raise RefusedCheckpointError(
        f"its activation is {shown(name)}; supported: Relu, TopK, BatchTopK."
    )


def _activation(header: Mapping[str, Any], schema: int) -> tuple[str, Mapping[str, Any]]:
    if schema == 0:
        if "d_vit" not in header:
            raise CorruptCheckpointError("its header was not written by saev.")
        return "Relu", {}
    config = header.get("cfg")
    if not isinstance(config, dict):
        raise CorruptCheckpointError("its header has no cfg.")
    if schema == 1:
        name = header.get("cls")
        if name not in ("Relu", "TopK", "BatchTopK"):
            raise RefusedCheckpointError(
                "it is from the few hours when saev wrote schema 1 both with and without "
                "subtracting b_dec, and it does not say which. Re-save it with saev's dump()."
            )
        return str(name), config
    activation = config.get("activation")
    if not isinstance(activation, dict) or not isinstance(activation.get("params", {}), dict):
        raise CorruptCheckpointError("its header has no activation.")
    name = activation.get("cls")
    if not isinstance(name, str):
        raise CorruptCheckpointError(f"its activation is {shown(name)}, not a name.")
    return name, activation.get("params", {})


def _check_announced_shape(header: Mapping[str, Any], shape: tuple[int, ...]) -> None:
    stated = header.get("cfg")
    config = stated if isinstance(stated, dict) else header
    d_in = whole_number(config.get("d_model", config.get("d_vit")), "d_in")
    d_sae = config.get("d_sae")
    if d_sae is None:
        d_sae = d_in * whole_number(config.get("exp_factor"), "exp_factor")
    if (d_in, whole_number(d_sae, "d_sae")) != shape:
        raise CorruptCheckpointError(
            f"its header announces d_in={d_in} and d_sae={d_sae}, its W_enc is {shape}."
        )
