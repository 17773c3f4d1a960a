"""Functions that the families of Hugging Face transformers share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput

from vision_plugin.hooks._adapter import Dimensions


def sizes(config: Any, **others: Any) -> Dimensions:
    """Return the sizes that a vision configuration has under the usual names.

    Args:
        config: Configuration of the vision tower.
        **others: Further fields of Dimensions, or values that replace the usual ones.
    """
    fields: dict[str, Any] = {
        "d_model": config.hidden_size,
        "n_heads": config.num_attention_heads,
        "n_layers": config.num_hidden_layers,
        "d_mlp": getattr(config, "intermediate_size", None),
        "image_size": pair(getattr(config, "image_size", 0)),
        "patch_size": pair(config.patch_size),
        "eps": config.layer_norm_eps,
        "act_fn": config.hidden_act,
        "n_channels": config.num_channels,
    }
    return Dimensions(**{**fields, **others})


def pair(size: Any) -> tuple[int, int]:
    """Return height and width from one number or two."""
    if isinstance(size, Iterable):
        height, width = size
        return int(height), int(width)
    return int(size), int(size)


def linear_head(module: nn.Module, *names: str) -> str | None:
    """Return the first of these names under which the module has a linear layer."""
    return next((n for n in names if isinstance(getattr(module, n, None), nn.Linear)), None)


def image_result(
    logits: Tensor | None, last_hidden_state: Tensor, pooler_output: Tensor | None
) -> ImageClassifierOutput:
    """Return an output that a bridge can use and that keeps what the native one would drop."""
    result = ImageClassifierOutput(logits=logits)
    result["last_hidden_state"] = last_hidden_state
    if pooler_output is not None:
        result["pooler_output"] = pooler_output
    return result
