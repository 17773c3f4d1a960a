"""Whether a dictionary and a model fit together: what its metadata names, widths, signatures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from vision_plugin.models.dictionary import Dictionary, d_out

_TOLERANCE = 0.01


def hook_names(dictionary: Dictionary) -> tuple[str, str]:
    """Return the hooks that a dictionary reads and writes, from its metadata.

    Raises:
        ValueError: the metadata names no hook.
    """
    metadata = dictionary.cfg.metadata
    hook_name = metadata.get("hook_name")
    if not hook_name:
        raise ValueError(
            "this SAE does not say which hook it belongs to: set sae.cfg.metadata.hook_name, for "
            "example 'blocks.10.hook_resid_post'"
        )
    return str(hook_name), str(metadata.get("hook_name_out") or hook_name)


def trained_tokens(dictionary: Dictionary) -> str:
    """Return the kind of token that a dictionary was trained on; ``"all"`` where it is unknown."""
    tokens = dictionary.cfg.metadata.get("tokens") or "all"
    return "all" if str(tokens).startswith("random:") else str(tokens)


def check_fit(model: Any, dictionary: Dictionary, *, check_model: bool = True) -> None:
    """Raise if a dictionary and a model do not fit together.

    Args:
        model: A VisionBridge.
        dictionary: A dictionary whose metadata names a hook of the model.
        check_model: Whether to compare the signature of the weights too, if the dictionary has one.

    Raises:
        ValueError: the widths or the models differ; the message names both sides.
    """
    metadata, name = dictionary.cfg.metadata, model.cfg.model_name
    hook_in = metadata["hook_name"]
    _check_width(dictionary.cfg.d_in, hook_in, model)
    hook_out = metadata.get("hook_name_out")
    if hook_out:
        _check_width(d_out(dictionary), hook_out, model)
    trained_on = metadata.get("model_signature")
    if check_model and trained_on and not has_signature(model, trained_on):
        raise ValueError(
            f"this SAE was trained on {metadata.get('model_name') or 'another model'}, whose "
            f"weights differ from the weights of {name}: load that model, or use the SAE anyway "
            "with check_model=False"
        )


def signature(model: Any) -> list[float]:
    """Return the norms of eight weight matrices spread over a model's tower, to tell checkpoints.

    The embedding and the blocks count, not heads or a text tower: a tower is the same one inside
    a CLIP, inside a LLaVA and alone. Norms survive a change of dtype or device, which hashes of
    the bytes would not.

    Args:
        model: A VisionBridge.
    """
    adapter, module = model.adapter, model.native
    paths = adapter.paths(model.original_model)
    parts = tuple(adapter.native_path(f"{path}.") for path in (paths.embed, paths.blocks))
    tower = [p for name, p in module.named_parameters() if p.ndim >= 2 and name.startswith(parts)]
    return _norms(tower or _matrices(module))


def has_signature(model: Any, trained_on: Sequence[float]) -> bool:
    """Return whether a signature is the one of a model's tower.

    Signatures were once made of a whole module, text tower included: those are recognised too.
    """
    if same_signature(trained_on, signature(model)):
        return True
    return same_signature(trained_on, _norms(_matrices(model.native)))


def _matrices(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.ndim >= 2]


def _norms(matrices: list[nn.Parameter]) -> list[float]:
    step = max(1, len(matrices) // 8)
    with torch.no_grad():
        return [round(float(p.float().norm()), 4) for p in matrices[::step][:8]]


def same_signature(trained_on: Sequence[float], here: Sequence[float]) -> bool:
    """Return whether two signatures belong to the same weights."""
    if len(trained_on) != len(here):
        return False
    pairs = zip(trained_on, here, strict=True)
    return all(abs(a - b) <= _TOLERANCE * max(abs(a), abs(b)) for a, b in pairs)


def hook_width(model: Any, hook_name: str) -> int | None:
    """Return the width of the activation at a hook; None where its name does not tell."""
    cfg = model.cfg
    if re.search(r"mlp\.hook_(pre|post)$|mlp\.(in\.hook_out|out\.hook_in)$", hook_name):
        return int(cfg.d_mlp)
    if re.search(r"attn\.hook_(q|k|v|z)$", hook_name):
        return int(cfg.n_heads * cfg.d_head)
    if re.search(r"hook_(resid_(pre|mid|post)|attn_out|mlp_out|embed)$|^ln_final", hook_name):
        return int(cfg.d_model)
    return None


def _check_width(width_of_dictionary: int, hook_name: str, model: Any) -> None:
    width = hook_width(model, hook_name)
    if width is not None and width != width_of_dictionary:
        raise ValueError(
            f"the SAE works on {width_of_dictionary} dimensions, but {hook_name} of "
            f"{model.cfg.model_name} has {width}: the SAE belongs to another model or hook"
        )
