"""Registration of the plugin's loader and releases with SAELens; see `releases.yaml`."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any

import yaml

_LOADER = "vision_plugin"


def register() -> None:
    """Make `SAE.from_pretrained("vision-clip-b-32-resid-post", "blocks.11")` and its like work.

    It adds one loader to SAELens's two loader tables and our releases to its directory. Calling it
    again changes nothing, and existing entries of SAELens or other packages stay.

    Examples:
        >>> from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
        >>> vp.formats.register()
        >>> "vision-clip-b-32-resid-post" in get_pretrained_saes_directory()
        True
    """
    from sae_lens.loading.pretrained_sae_loaders import (
        NAMED_PRETRAINED_SAE_CONFIG_GETTERS,
        NAMED_PRETRAINED_SAE_LOADERS,
    )
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    from vision_plugin.formats._loaders import hub_config, hub_converter

    NAMED_PRETRAINED_SAE_LOADERS.setdefault(_LOADER, hub_converter())
    NAMED_PRETRAINED_SAE_CONFIG_GETTERS.setdefault(_LOADER, hub_config)
    directory = get_pretrained_saes_directory()
    for name, release in read_releases().items():
        if name not in directory:
            directory[name] = _lookup(name, release)


@cache
def read_releases() -> dict[str, dict[str, Any]]:
    """Return the table of named releases: name -> repo_id, model, source, metadata, saes.

    Examples:
        >>> vp.formats.read_releases()["vision-clip-b-32-resid-post"]["model"]
        'open_clip:hf-hub:laion/CLIP-ViT-B-32-DataComp.XL-s13B-b90K'
    """
    text = files("vision_plugin.formats").joinpath("releases.yaml").read_text(encoding="utf-8")
    releases: dict[str, dict[str, Any]] = yaml.safe_load(text)
    return releases


def _lookup(name: str, release: dict[str, Any]) -> Any:
    from sae_lens.loading.pretrained_saes_directory import PretrainedSAELookup

    saes = release["saes"]
    metadata = {**release.get("metadata", {}), "release": name}
    return PretrainedSAELookup(
        release=name,
        repo_id=release["repo_id"],
        model=release["model"],
        conversion_func=_LOADER,
        saes_map={sae["id"]: sae["path"] for sae in saes},
        # SAELens's own defaults where the authors state no figure.
        expected_var_explained={sae["id"]: sae.get("variance_explained", 1.0) for sae in saes},
        expected_l0={sae["id"]: sae.get("l0", 0.0) for sae in saes},
        # As SAELens's own table has it for an SAE that Neuronpedia does not show.
        neuronpedia_id=dict.fromkeys((sae["id"] for sae in saes), None),
        norm_scaling_factor={},
        config_overrides={"metadata": metadata},
    )
