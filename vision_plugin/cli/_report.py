"""``vision-plugin report``: the HTML feature browser."""

from __future__ import annotations

import webbrowser
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vision_plugin._inputs import Inputs
from vision_plugin._ours import REPORT, check_replaceable
from vision_plugin._paths import local_path
from vision_plugin.cli._console import console
from vision_plugin.cli._flags import parse
from vision_plugin.cli._name import resolve_latents
from vision_plugin.cli._report_files import (
    read_feature_names,
    read_scores,
    read_spoken,
    read_study,
    read_training,
)
from vision_plugin.cli._steer import STRENGTH


@dataclass(frozen=True, kw_only=True)
class ReportConfig(Inputs):
    """SAE to report on, and where to write the pages."""

    sae: str
    """Folder of the SAE, or any checkpoint that ``vp.load_sae`` reads."""
    output_path: str = "report"
    """Folder of the pages; an earlier report in it is replaced."""
    evaluation: str | None = None
    """JSON of ``vision-plugin eval``; by default ``evaluation.json`` beside the SAE, if any."""
    names: str | None = None
    """Names from ``vision-plugin name``; by default ``names.json`` beside the SAE, if any."""
    features: tuple[int, ...] = ()
    """Numbers of the latents to report; all by default."""
    compare: tuple[str, ...] = ()
    """SAEs at hooks of the same model to compare with, or ``neurons``."""
    concepts: tuple[str, ...] = ()
    """Texts whose probabilities are compared before and while each feature is held."""
    strengths: tuple[float, ...] = ()
    """Values to hold features at, for a curve over strengths; it needs ``concepts`` or ``vlm``."""
    edit: str | None = None
    """JSON file of an edit of the SAE's latents to look at; ``Edit.save`` and ``tasks`` write it.
    With ``concepts`` its latents are changed as it says, one by one and all at once."""
    vlm: str | None = None
    """Vision-language model over the SAE's tower that is asked before and while features are
    held."""
    asked: tuple[int | str, ...] = ()
    """Latents it is asked about, by number or as ``name:WORD``; by default ``features``."""
    prompts: tuple[str, ...] = ("What is in the picture?",)
    """What it is asked."""
    n_asked_images: int = 3
    """Number of images it is asked about, spread over the source."""
    answers: str | None = None
    """JSON of answers of a vision-language model, to show those in place of asking."""
    study: str | None = None
    """``sparsity.json`` of a sparsity study, for L0 and explained variance by layer; by default
    the one beside the SAE, if any."""
    layout: Literal["auto", "umap", "pca", "none"] = "auto"
    """How the map is laid out; ``umap`` needs the extra ``map``."""
    title: str | None = None
    """Heading of the pages; by default it names the hook."""
    open: bool = False
    """Open the index in a browser when it is written."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vlm and self.answers:
            raise ValueError("answers are asked for or read: leave out --vlm or --answers")
        if self.vlm and not (self.asked or self.features):
            raise ValueError("name the latents that vlm is asked about: --asked 12, or --features")
        if self.strengths and not (self.concepts or self.vlm):
            raise ValueError("strengths= has nothing to show: name concepts= or vlm= as well")
        if self.asked and not self.vlm:
            raise ValueError("asked= needs a vision-language model: name one by vlm=")
        if self.n_asked_images < 1:
            raise ValueError(f"n_asked_images={self.n_asked_images}: use a whole number from 1 up")


def run(arguments: Sequence[str]) -> None:
    """Write a report from flags and print where it is."""
    cfg = parse(
        ReportConfig,
        arguments,
        command="report",
        description="Write static HTML pages in which an SAE's features can be browsed.",
    )
    check_replaceable(local_path(cfg.output_path), REPORT)
    known = read_scores(cfg.evaluation, cfg.sae)
    known |= {"training": read_training(cfg.sae), "study": read_study(cfg.study, cfg.sae)}
    spoken = read_spoken(cfg.answers)
    from vision_plugin.report import report
    from vision_plugin.steering import Edit

    sae = cfg.open_sae(cfg.sae)
    names = read_feature_names(cfg.names, cfg.sae, sae)
    known |= {} if names is None else {"names": names}
    images = cfg.open_images()
    written = report(
        sae,
        cfg.open_model(sae, where=cfg.sae),
        images,
        cfg.output_path,
        features=list(cfg.features) or None,
        compare={
            Path(name).name: name if name == "neurons" else cfg.open_sae(name)
            for name in cfg.compare
        },
        concepts=list(cfg.concepts) or None,
        strengths=list(cfg.strengths) if cfg.concepts else (),
        edit=None if cfg.edit is None else Edit.load(cfg.edit, sae=sae, device=cfg.device),
        answers=spoken if cfg.vlm is None else ask(cfg, sae, images),
        layout=cfg.layout,
        title=cfg.title,
        **known,
    )
    console().print(f"Open {cfg.output_path}/index.html in a browser.", soft_wrap=True)
    if cfg.open:
        webbrowser.open(written.as_uri())


def ask(cfg: ReportConfig, sae: Any, images: Any) -> dict[str, Any]:
    """Return what the vision-language model says before and while features are held."""
    from vision_plugin.models import as_rgb, load_vlm
    from vision_plugin.tasks import feature_answers

    n = min(cfg.n_asked_images, len(images))
    numbers = [i * len(images) // n for i in range(n)]
    found = feature_answers(
        load_vlm(str(cfg.vlm), device=cfg.device),
        sae,
        [as_rgb(images[number]) for number in numbers],
        resolve_latents(cfg.asked or cfg.features, sae, cfg.sae),
        prompts=cfg.prompts,
        strengths=cfg.strengths or (STRENGTH,),
        check_model=cfg.check_model,
    )
    return {**found.to_dict(), "images": numbers}
