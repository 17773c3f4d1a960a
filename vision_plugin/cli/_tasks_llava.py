"""``vision-plugin tasks llava``: steer the small LLaVA of the drawn world through its tower."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vision_plugin._device import check_device
from vision_plugin._ours import TASK, check_replaceable
from vision_plugin._paths import local_path
from vision_plugin.cli._console import console
from vision_plugin.cli._flags import parse


@dataclass(frozen=True, kw_only=True)
class LlavaConfig:
    """A vision-language model, an SAE of its tower, and drawn images with questions."""

    output_path: str
    """Folder of the results; earlier results of a task in it are replaced."""
    model_name: str = "demo"
    """Model, as ``vp.load_vlm`` takes it, that answers the drawn world's questions."""
    sae: str | None = None
    """Folder of the SAE, or any checkpoint that ``vp.load_sae`` reads. By default one is trained on
    the patches that the language model reads."""
    train_images: int = 600
    """Images on which latents, neurons and directions are found."""
    validation_images: int = 150
    """Images on which number and strength are chosen."""
    test_images: int = 150
    """Images that are reported on."""
    sizes: tuple[int, ...] = (1, 3, 10)
    """Numbers of latents or neurons per value to try."""
    strengths: tuple[float, ...] = (1.0, 2.0, 4.0)
    """Strengths to try, as multiples of a latent's natural strength or of a difference of means."""
    d_sae: int = 1024
    """Latents of the SAE that is trained."""
    k: int = 16
    """Mean number of active latents per token of the SAE that is trained."""
    training_images: int = 4000
    """Images that the SAE is trained on."""
    training_tokens: int = 1_200_000
    """Activations that the SAE is trained on, with repetition."""
    device: str = "cpu"
    """Device that the model and the SAE run on."""
    seed: int = 0
    """Seed of the images, the SAE and the targets."""

    def __post_init__(self) -> None:
        check_device(self.device)
        for name in ("train_images", "validation_images", "test_images"):
            if getattr(self, name) < 40:
                flag = f"--{name.replace('_', '-')} {getattr(self, name)}"
                raise ValueError(f"{flag} is too few for an interval: at least 40")


def run_llava(arguments: Sequence[str]) -> None:
    """Run the task from flags, print its table and write its folder."""
    cfg = parse(
        LlavaConfig,
        arguments,
        command="tasks llava",
        description="Put values into the answers of a vision-language model, or take them out, by "
        "latents of an SAE in its tower, and by every baseline beside it, on drawn images.",
    )
    check_replaceable(local_path(cfg.output_path), TASK)
    result, sae = compute(cfg)
    result.save(cfg.output_path, sae=sae if cfg.sae is None else None)
    out = console()
    out.print(result.table())
    for dialogue in result.dialogues:
        out.print(str(dialogue), soft_wrap=True)
    out.print(f"In {cfg.output_path}: results.json, table.txt", soft_wrap=True)


def compute(cfg: LlavaConfig) -> tuple[Any, Any]:
    """Return the result, and the SAE."""
    from vision_plugin.demo.multimodal import multimodal_data
    from vision_plugin.formats import load_sae
    from vision_plugin.models import load_vlm
    from vision_plugin.tasks import MultimodalSettings, multimodal

    out = console()
    settings = MultimodalSettings(sizes=cfg.sizes, strengths=cfg.strengths, seed=cfg.seed)
    vlm = load_vlm(cfg.model_name, device=cfg.device)
    if cfg.sae is None:
        hook_name = vlm.reach.hook_names[-1]
        out.print(f"Training an SAE at {hook_name} on {cfg.training_images} drawn images")
        sae = train_sae(cfg, vlm, hook_name)
    else:
        sae = load_sae(cfg.sae, device=cfg.device)
    out.print("Drawing images")
    data = multimodal_data(
        train=cfg.train_images,
        validation=cfg.validation_images,
        test=cfg.test_images,
        seed=2000 + 10 * cfg.seed,
    )
    return multimodal(
        vlm, sae, data, settings=settings, name=cfg.sae or "sae", announce=out.print
    ), sae


def train_sae(cfg: LlavaConfig, vlm: Any, hook_name: str) -> Any:
    """Return an SAE of the patches that the language model reads, trained on drawn images."""
    from sae_lens import BatchTopKTrainingSAEConfig

    from vision_plugin.demo import draw
    from vision_plugin.formats import load_sae
    from vision_plugin.images import open_images
    from vision_plugin.sae import VisionSAERunnerConfig, VisionSAETrainingRunner

    with tempfile.TemporaryDirectory() as folder:
        place = str(Path(folder) / "sae")
        training = VisionSAERunnerConfig(
            model_name=cfg.model_name,
            images="drawn images",
            hook_name=hook_name,
            tokens="patch",
            sae=BatchTopKTrainingSAEConfig(d_in=0, d_sae=cfg.d_sae, k=cfg.k),
            training_tokens=cfg.training_tokens,
            seed=cfg.seed,
            device=cfg.device,
            output_path=place,
        )
        drawn = open_images(list(draw(cfg.training_images, seed=31 + cfg.seed).images))
        VisionSAETrainingRunner(training, model=vlm.vision, images=drawn).run()
        return load_sae(place, device=cfg.device)
