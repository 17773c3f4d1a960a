"""``vision-plugin name``: names of an SAE's features, each checked on other images."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from vision_plugin._ours import check_replaceable_file
from vision_plugin._paths import local_path
from vision_plugin.cli._console import console
from vision_plugin.cli._flags import as_flags, parse

logger = logging.getLogger(__name__)

SHOWN = 20


def run(arguments: Sequence[str]) -> None:
    """Name features from flags, print the best checked ones, and write names.json."""
    from vision_plugin.lens import NAMES_FILE, NAMES_KIND, NamesConfig

    cfg = parse(
        NamesConfig,
        arguments,
        command="name",
        description="Name an SAE's features by decoder directions, CLIP-Dissect, labels, steering "
        "or captions, and check each name on images that it was not made from.",
    )
    place = local_path(cfg.output_path) if cfg.output_path else local_path(cfg.sae)
    place = place / NAMES_FILE if place.is_dir() else place
    writes = cfg.output_path is not None or place.name == NAMES_FILE
    if writes:
        check_replaceable_file(place, NAMES_KIND)
    names = compute(cfg)
    out = console()
    out.print(names.table(SHOWN))
    out.print(names.summary_table())
    for pair, found in names.agreement.items():
        if found.get("same") is not None:
            one, other = pair.split("|")
            out.print(f"{one} and {other} give {found['same']:.0%} of latents the same name.")
    for method, why in names.left_out.items():
        out.print(f"Left out: {method}: {as_flags(why, NamesConfig)}")
    if writes:
        out.print(f"All names and checks: {names.save(place)}", soft_wrap=True)
    else:
        out.print("Nothing is written: --output-path names a file for the names")


def compute(cfg: Any) -> Any:
    """Return the names that the flags ask for."""
    from vision_plugin.lens import NameSettings, name_features
    from vision_plugin.models import load_model, load_vlm

    sae = cfg.open_sae(cfg.sae)
    if cfg.vlm is None:
        model = cfg.open_model(sae, where=cfg.sae)
    else:
        model = load_vlm(cfg.vlm, device=cfg.device)
    options = {f.name: asdict(cfg)[f.name] for f in fields(NameSettings)}
    return name_features(
        model,
        sae,
        cfg.open_images(),
        vocabulary=cfg.vocabulary,
        judge=None if cfg.judge is None else load_model(cfg.judge, device=cfg.device),
        captioner=cfg.captioner,
        check_model=cfg.check_model,
        **options,
    )


def resolve_latents(given: Sequence[int | str], sae: Any, where: str | None) -> tuple[int, ...]:
    """Return numbers of latents, of which some are given by the names of features.

    Args:
        given: Numbers, or ``name:WORD`` for every latent whose name has that word.
        sae: The SAE, whose names must be its own.
        where: Folder of the SAE, beside which ``names.json`` lies.

    Raises:
        ValueError: a latent is neither, no feature has such a name, or the names are another SAE's.
        FileNotFoundError: the SAE has no names yet.
    """
    named = [text for text in given if isinstance(text, str) and not text.isdigit()]
    bad = [text for text in named if not text.startswith("name:")]
    if bad:
        raise ValueError(f"latents={bad[0]!r} is no latent: write a number, or name:WORD")
    if not named:
        return tuple(int(latent) for latent in given)
    from vision_plugin.lens import read_names

    folder = None if where is None else local_path(where)
    if folder is None or not folder.is_dir():
        raise ValueError(
            f"latents={named[0]!r} needs names beside the SAE's folder, and {where} is none: give "
            "latents as numbers"
        )
    names = read_names(Path(folder), sae=sae)
    found: list[int] = []
    for latent in given:
        is_name = isinstance(latent, str) and latent.startswith("name:")
        found += names.find(str(latent)[5:]) if is_name else [int(latent)]
    return tuple(dict.fromkeys(found))


def names_beside(where: str, sae: Any) -> dict[int, str]:
    """Return the names in an SAE's folder, by latent; none where there are none of this SAE."""
    from vision_plugin.lens import NAMES_FILE, read_names

    folder = local_path(where)
    if not (folder / NAMES_FILE).is_file():
        return {}
    try:
        return dict(read_names(folder, sae=sae).texts())
    except ValueError as error:
        logger.warning("no names are shown: %s", error)
        return {}
