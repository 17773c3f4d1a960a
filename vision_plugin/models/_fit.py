"""Whether an SAE belongs to a model: hook, width, and the weights it was trained on."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

_TOLERANCE = 0.01


def check_fit(model: Any, sae: Any, *, check_model: bool = True) -> None:
    """Raise where an SAE and a model do not fit together.

    Args:
        model: A VisionBridge.
        sae: A ``sae_lens.SAE`` whose metadata names a hook of the model.
        check_model: Compare the weights' signature as well, where the SAE carries one.

    Raises:
        ValueError: naming what the SAE needs and what the model has.
    """
    metadata, name = sae.cfg.metadata, model.cfg.model_name
    hook_in = metadata["hook_name"]
    _check_width(sae.cfg.d_in, hook_in, model)
    hook_out = metadata.get("hook_name_out")
    if hook_out:
        _check_width(getattr(sae.cfg, "d_out", sae.cfg.d_in), hook_out, model)
    trained_on = metadata.get("model_signature")
    if check_model and trained_on and not _same_signature(trained_on, signature(model.native)):
        raise ValueError(
            f"this SAE was trained on {metadata.get('model_name') or 'another model'}, whose "
            f"weights are not those of {name}. Load that model, or attach it all the same with "
            "check_model=False"
        )


def signature(module: nn.Module) -> list[float]:
    """Norms of eight weight matrices spread over a model, to tell checkpoints apart.

    Norms survive a change of dtype or device, which hashes of the bytes would not.
    """
    matrices = [p for p in module.parameters() if p.ndim >= 2]
    step = max(1, len(matrices) // 8)
    with torch.no_grad():
        return [round(float(p.float().norm()), 4) for p in matrices[::step][:8]]


def hook_width(model: Any, hook_name: str) -> int | None:
    """Width of the activation at a hook; None where the name does not tell."""
    cfg = model.cfg
    if re.search(r"mlp\.hook_(pre|post)$|mlp\.(in\.hook_out|out\.hook_in)$", hook_name):
        return int(cfg.d_mlp)
    if re.search(r"attn\.hook_(q|k|v|z)$", hook_name):
        return int(cfg.n_heads * cfg.d_head)
    if re.search(r"hook_(resid_(pre|mid|post)|attn_out|mlp_out|embed)$|^ln_final", hook_name):
        return int(cfg.d_model)
    return None


def _check_width(d_sae_side: int, hook_name: str, model: Any) -> None:
    width = hook_width(model, hook_name)
    if width is not None and width != d_sae_side:
        raise ValueError(
            f"the SAE works on {d_sae_side} dimensions, but {hook_name} of "
            f"{model.cfg.model_name} has {width}: it belongs to another model or hook"
        )


def _same_signature(trained_on: list[float], here: list[float]) -> bool:
    if len(trained_on) != len(here):
        return False
    pairs = zip(trained_on, here, strict=True)
    return all(abs(a - b) <= _TOLERANCE * max(abs(a), abs(b)) for a, b in pairs)
