"""Presets: settings for an architecture on a backbone, from ``presets.yaml``."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

BY_RULE = "by rule"
_SOURCED = ("measured", "published")
_TRANSCODERS = ("transcoder", "skip_transcoder")


@dataclass(frozen=True)
class Preset:
    """Settings that train an SAE of an architecture on a backbone.

    Examples:
        >>> found = vp.sae.presets()[0]
        >>> found.name, found.architecture, found.kind
        ('clip-vit-b-32', 'standard', 'published')
    """

    name: str
    """Name of the backbone, for example ``clip-vit-b-32``."""
    architecture: str
    """Architecture of the SAE, for example ``topk``."""
    run: dict[str, Any]
    """Fields of ``VisionSAERunnerConfig`` except ``sae``."""
    sae: dict[str, Any]
    """Fields of the SAE's configuration."""
    source: str
    """Where the numbers come from, or ``by rule``."""
    kind: str
    """``measured``, ``published`` or ``by rule``."""


def backbones() -> list[str]:
    """Return the names of the backbones that have presets."""
    return list(_table()["backbones"])


def architectures() -> list[str]:
    """Return the architectures that have presets."""
    return list(_table()["architectures"])


def preset(name: str, *, architecture: str) -> Preset:
    """Return a preset.

    Args:
        name: Name of the backbone; ``-`` and ``_`` mean the same.
        architecture: Architecture of the SAE; ``-`` and ``_`` mean the same.

    Raises:
        ValueError: the backbone or the architecture has no preset; the message lists near names.

    Examples:
        >>> vp.sae.preset("clip-vit-b-32", architecture="batchtopk").sae
        {'d_in': 768, 'd_sae': 12288}
    """
    table = _table()
    name = _known(name.replace("_", "-"), backbones(), "preset")
    architecture = _known(architecture.replace("-", "_"), architectures(), "architecture")
    backbone, learning = table["backbones"][name], table["architectures"][architecture]
    sourced = [kind for kind in _SOURCED if architecture in backbone.get(kind, {})]
    kind = sourced[0] if sourced else BY_RULE
    found: dict[str, Any] = backbone[kind][architecture] if sourced else {}
    merged: dict[str, Any] = {**table["common"], **learning, **found}
    merged["sae"] = {**learning.get("sae", {}), **found.get("sae", {})}
    return _preset(name, architecture, backbone, merged, kind)


def presets() -> list[Preset]:
    """Return every preset.

    Examples:
        >>> len({preset.name for preset in vp.sae.presets()}) > 1
        True
    """
    return [preset(n, architecture=a) for n in backbones() for a in architectures()]


def _preset(
    name: str, architecture: str, backbone: Mapping[str, Any], merged: dict[str, Any], kind: str
) -> Preset:
    d_sae = merged.pop("expansion") * backbone["d_model"]
    layer = backbone["n_layers"] - 2
    source = merged.pop("source", BY_RULE)
    sae = {"d_in": backbone["d_model"], "d_sae": d_sae, **merged.pop("sae")}
    run = {
        "model_name": backbone["model_name"],
        "hook_name": f"blocks.{layer}.hook_resid_post",
        **merged,
    }
    if architecture in _TRANSCODERS:
        run["hook_name"] = f"blocks.{layer}.ln2.hook_out"
        run["hook_name_out"] = f"blocks.{layer}.hook_mlp_out"
        sae["d_out"] = backbone["d_model"]
    return Preset(name, architecture, run, sae, source, kind)


@cache
def _table() -> dict[str, Any]:
    text = files("vision_plugin.sae").joinpath("presets.yaml").read_text(encoding="utf-8")
    table: dict[str, Any] = yaml.safe_load(text)
    return table


def _known(wanted: str, there_are: list[str], what: str) -> str:
    if wanted in there_are:
        return wanted
    near = difflib.get_close_matches(wanted, there_are, n=3)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise ValueError(f"no {what} is named {wanted!r}: {hint}There are {', '.join(there_are)}")
