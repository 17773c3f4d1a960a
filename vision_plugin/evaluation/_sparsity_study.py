"""``vision-plugin sparsity``: L0 and fidelity by layer, kind of token and place in the image.

This is the study of *Steering CLIP's vision transformer with sparse autoencoders* (arXiv
2504.08729): how many latents of each layer's SAE fire on the CLS token, the registers and the
patches, where in the image they fire, and how much of the activation they explain there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vision_plugin._disk import whole_folder, write_json
from vision_plugin._ours import STUDY, check_replaceable
from vision_plugin._paths import local_path
from vision_plugin._progress import Progress
from vision_plugin.evaluation._config import SparsityStudyConfig
from vision_plugin.evaluation._facts import Facts
from vision_plugin.evaluation._loop import Group, Loop, Subject
from vision_plugin.evaluation._offer import ImageBatch, Place
from vision_plugin.evaluation._sparsity_plot import figure_of, text_of
from vision_plugin.evaluation._sparsity_result import (
    KindStudy,
    SAEStudy,
    SparsityStudy,
)
from vision_plugin.images import read_batches
from vision_plugin.metrics import MetricSet, l0_map
from vision_plugin.models import VisionBridge, load_model
from vision_plugin.models.dictionary import Dictionary
from vision_plugin.models.site import Site

METRICS = ("sparsity", "fvu")
JSON, PLOT, TABLE = "sparsity.json", "sparsity.png", "sparsity.txt"
FILES = (JSON, PLOT, TABLE)
"""Names of all files in a study's folder.

Examples:
    >>> vp.evaluation.FILES
    ('sparsity.json', 'sparsity.png', 'sparsity.txt')
"""
ALL = "all"
"""Name of the row of all selected tokens together, if they are of several kinds."""


def sparsity_study(
    cfg: SparsityStudyConfig,
    *,
    saes: Mapping[str, Dictionary] | None = None,
    model: VisionBridge | None = None,
    images: Any = None,
    progress: bool = True,
) -> SparsityStudy:
    """Study SAEs of one model, and write the table, the plot and the JSON.

    The model runs once per batch of images, for all SAEs.

    Args:
        cfg: SAEs and images to study, and where to write.
        saes: SAEs by their names in the result, in place of ``cfg.saes``.
        model: A loaded model, in place of ``cfg.model_name``.
        images: An image source, in place of ``cfg.images``.
        progress: Whether to show a progress bar on a terminal, or log a line every half minute.

    Raises:
        ValueError: the SAEs, the model or the images are missing or do not fit together.
        FileExistsError: the output folder holds anything but an earlier study.

    Examples:
        >>> cfg = vp.evaluation.SparsityStudyConfig(
        ...     saes=("runs/sae",), images="demo:8", output_path="l0"
        ... )
        >>> study = vp.evaluation.sparsity_study(cfg, model=model)
        >>> 0 < study.saes[0].kinds["all"].sparsity.l0 <= 8
        True
    """
    if cfg.output_path is not None:
        check_replaceable(local_path(cfg.output_path), STUDY)
    named: Mapping[str, Any] = {path: path for path in cfg.saes} if saes is None else saes
    saes = {name: cfg.open_sae(sae) for name, sae in named.items()}
    if model is None:
        name = cfg.model_name or _common_model(saes)
        model = load_model(name, device=cfg.device)
    result = _study(cfg, saes, model, Facts(cfg.open_images(images)), progress=progress)
    if cfg.output_path is not None:
        write_study(result, local_path(cfg.output_path))
    return result


def _study(
    cfg: SparsityStudyConfig,
    saes: Mapping[str, Dictionary],
    model: VisionBridge,
    facts: Facts,
    *,
    progress: bool,
) -> SparsityStudy:
    subjects = [
        Subject(path, Place(_site(path, sae, model, cfg.tokens), sae, facts))
        for path, sae in saes.items()
    ]
    for subject in subjects:
        _add_metrics(subject, cfg.dense_above)
    loop = Loop(subjects)
    bad: dict[str, str] = {}
    n_images = 0
    with Progress(len(facts.images), "studying", shown=progress) as shown:
        at_once = loop.images_at_once(cfg.batch_size)
        for images in read_batches(facts.images, at_once, bad):
            pixels = model.preprocess(list(images.values()))
            loop.feed(ImageBatch(list(images), pixels))
            n_images += len(images)
            shown.advance(len(images))
    if n_images == 0:
        raise ValueError("none of the images could be read: mend images=")
    found = [_result(subject) for subject in subjects]
    return SparsityStudy(
        config=cfg,
        model_name=str(model.cfg.model_name),
        n_images=n_images,
        bad_images=bad,
        saes=tuple(sorted(found, key=lambda one: -1 if one.layer is None else one.layer)),
    )


def _add_metrics(subject: Subject, dense_above: float) -> None:
    """Add to a subject a pair of metrics for each kind of its tokens, and one for all of them."""
    kinds = subject.site.token_kinds
    assert kinds is not None
    rows_of = {
        kind: torch.tensor([row for row, own in enumerate(kinds) if own == kind])
        for kind in dict.fromkeys(kinds)
    }
    if len(rows_of) > 1:
        rows_of[ALL] = torch.arange(len(kinds))
    for rows in rows_of.values():
        known = subject.known() | {"token_kinds": [kinds[row] for row in rows.tolist()]}
        metrics = MetricSet(METRICS, known, options={"sparsity": {"dense_above": dense_above}})
        for metric in metrics.metrics.values():
            metric.to(subject.site.model.device)
        subject.groups.append(Group(metrics, tokens=rows))


def _result(subject: Subject) -> SAEStudy:
    site = subject.site
    assert site.token_kinds is not None
    kinds = {}
    for group in subject.groups:
        assert group.tokens is not None
        own = {site.token_kinds[row] for row in group.tokens.tolist()}
        kind = own.pop() if len(own) == 1 else ALL
        found = group.metrics.compute()
        kinds[kind] = KindStudy(kind, found["sparsity"], found["fvu"])
    layer = re.search(r"(?:^|\.)blocks\.(\d+)\.", site.hook_name)
    patch_map = None
    if "patch" in kinds:
        layout = site.model.token_layout()
        patches = ["patch"] * layout.n_patches
        patch_map = l0_map(kinds["patch"].sparsity, patches, layout.grid).cpu()
    return SAEStudy(
        sae=subject.key,
        hook_name=site.hook_name,
        layer=int(layer.group(1)) if layer else None,
        d_sae=int(subject.dictionary.cfg.d_sae),
        tokens=site.tokens,
        kinds=kinds,
        patch_map=patch_map,
    )


def _site(path: str, sae: Dictionary, model: VisionBridge, tokens: str | None) -> Site:
    """Return the site of an SAE; an error names the SAE."""
    try:
        site = Site.of(model, sae, tokens=tokens)
        model.token_layout().indices(site.tokens)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return site


def _common_model(saes: Mapping[str, Dictionary]) -> str:
    names = {path: sae.cfg.metadata.get("model_name") for path, sae in saes.items()}
    first = next(iter(names))
    for path, name in names.items():
        if not name:
            raise ValueError(f"{path} does not say which model it was trained on: give model_name=")
        if name != names[first]:
            raise ValueError(
                f"{path} was trained on {name}, but {first} on {names[first]}: a study is of one "
                "model, so run one for each, or give model_name= if both are the same"
            )
    return str(names[first])


def write_study(result: SparsityStudy, folder: Path) -> None:
    """Write the JSON, the plot and the table into a folder, all of them or none.

    Args:
        result: A study.
        folder: Folder for its three files.

    Raises:
        FileExistsError: the folder holds anything but an earlier study.

    Examples:
        >>> from pathlib import Path
        >>> cfg = vp.evaluation.SparsityStudyConfig(
        ...     saes=("runs/sae",), images="demo:8", output_path=None
        ... )
        >>> vp.evaluation.write_study(
        ...     vp.evaluation.sparsity_study(cfg, model=model), Path("written")
        ... )
        >>> sorted(file.name for file in Path("written").iterdir())
        ['sparsity.json', 'sparsity.png', 'sparsity.txt']
    """
    with whole_folder(folder, replaces=STUDY) as made:
        write_json(result.to_dict(), made / JSON)
        (made / TABLE).write_text(text_of(result), encoding="utf-8")
        figure_of(result).savefig(made / PLOT, dpi=150)
