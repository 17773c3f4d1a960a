"""``vision-plugin hallucination``: objects that a vision-language model sees and are not there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vision_plugin._device import check_device
from vision_plugin._ours import LENS, check_replaceable
from vision_plugin._paths import local_path
from vision_plugin.cli._console import console
from vision_plugin.cli._flags import parse, pick
from vision_plugin.lens import HallucinationSettings, hallucination


@dataclass(frozen=True, kw_only=True)
class HallucinationConfig(HallucinationSettings):
    """A vision-language model, drawn images with questions, and what is tried."""

    model_name: str = "demo"
    """Model, as ``vp.load_vlm`` takes it, that answers the drawn world's questions."""
    output_path: str
    """Folder of the results; earlier results of a lens in it are replaced."""
    n_images: int = 400
    """Number of drawn images; settings are chosen on one half and figures are of the other."""
    absent: int = 2
    """Objects to ask about that are not in an image, for each image."""
    coloured: bool = False
    """Ask for shapes of a colour; absent ones have the shape or the colour of the image."""
    device: str = "cpu"
    """Device that the model runs on."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_device(self.device)


def run(arguments: Sequence[str]) -> None:
    """Run the study from flags, print its tables and write its folder."""
    cfg = parse(
        HallucinationConfig,
        arguments,
        command="hallucination",
        description="Ask a vision-language model for objects that are and are not in drawn images: "
        "confidence in its internal vocabulary, where that lies, erasure of directions "
        "(ProjectAway) and latent-space steering (VTI), beside random directions.",
    )
    check_replaceable(local_path(cfg.output_path), LENS)
    from vision_plugin.demo.objects import object_questions
    from vision_plugin.models import load_vlm

    out = console()
    vlm = load_vlm(cfg.model_name, device=cfg.device)
    data = object_questions(
        cfg.n_images, absent=cfg.absent, coloured=cfg.coloured, seed=3000 + cfg.seed
    )
    settings = pick(HallucinationSettings, cfg)
    result = hallucination(vlm, data, settings=settings, announce=out.print)
    result.save(cfg.output_path)
    out.print(result.table())
    out.print(result.seen_table())
    out.print(f"In {cfg.output_path}: results.json, table.txt, methods.png, edits/", soft_wrap=True)
