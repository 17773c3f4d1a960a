"""``vision-plugin concepts``: a class taken apart into concepts, with what each is worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vision_plugin._inputs import Inputs
from vision_plugin._ours import LENS, check_replaceable
from vision_plugin._paths import local_path
from vision_plugin.cli._console import console
from vision_plugin.cli._flags import parse, pick
from vision_plugin.lens import ClassConceptsSettings, class_concepts


@dataclass(frozen=True, kw_only=True)
class ConceptsConfig(Inputs, ClassConceptsSettings):
    """Labelled images, a class of theirs, and what finds its concepts."""

    class_name: str
    """The class, as its label says it."""
    output_path: str
    """Folder of the results; earlier results of a lens in it are replaced."""
    sae: str | None = None
    """Folder of an SAE whose latents are the concepts; by default a dictionary is fitted."""

    def __post_init__(self) -> None:
        Inputs.__post_init__(self)
        ClassConceptsSettings.__post_init__(self)
        if self.sae is None and self.model_name is None:
            raise ValueError("name the model that a dictionary is fitted to: model_name=")


def run(arguments: Sequence[str]) -> None:
    """Take a class apart from flags, print its concepts, and write the folder."""
    cfg = parse(
        ConceptsConfig,
        arguments,
        command="concepts",
        description="Take a class apart into concepts by NMF, semi-NMF, ICA, k-means or an SAE, "
        "with how much the class's answer depends on each (CRAFT's total Sobol indices), and the "
        "images that show them.",
    )
    check_replaceable(local_path(cfg.output_path), LENS)
    sae = None if cfg.sae is None else cfg.open_sae(cfg.sae)
    model = cfg.open_model(sae, where=cfg.sae or "")
    result = class_concepts(
        model, cfg.open_images(), cfg.class_name, sae=sae,
        settings=pick(ClassConceptsSettings, cfg),
    )  # fmt: skip
    result.save(cfg.output_path)
    out = console()
    out.print(result.table())
    out.print(result.deletion_table())
    out.print(
        f"The answer is read by {result.read_by}; explained variance "
        f"{result.explained_variance:.3f} on the images that importance is measured on."
    )
    out.print(
        f"In {cfg.output_path}: results.json, table.txt, importance.png, deletion.png, images.png",
        soft_wrap=True,
    )
