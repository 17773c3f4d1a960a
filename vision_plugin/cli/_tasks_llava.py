"""``vision-plugin tasks llava``: steer the small LLaVA of the drawn world through its tower."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from vision_plugin._paths import local_path
from vision_plugin.cli._console import console
from vision_plugin.cli._tasks_training import LEAST, TrainsSAE, given_latents, train_saes


@dataclass(frozen=True, kw_only=True)
class LlavaConfig(TrainsSAE):
    """A vision-language model, an SAE of its tower, and drawn images with questions."""

    model_name: str = "demo"
    """Model, as ``vp.load_vlm`` takes it, that answers the drawn world's questions."""
    sae: str | None = None
    """Folder of the SAE, or any checkpoint that ``vp.load_sae`` reads. By default one is trained on
    the patches that the language model reads."""
    training_tokens: int = 600_000
    """Activations that the SAE is trained on, with repetition."""
    train_images: int = 600
    """Images on which latents, neurons and directions are found."""
    validation_images: int = 150
    """Images on which number and strength are chosen."""
    test_images: int = 150
    """Images that are reported on."""
    latents: tuple[int | str, ...] = ()
    """Latents of ``--sae`` to change for every value in place of those that are found: by number,
    or as ``name:WORD`` for all whose name in ``names.json`` beside the SAE has that word."""
    sizes: tuple[int, ...] = (1, 3, 10, 30)
    """Numbers of latents or neurons per value to try."""
    strengths: tuple[float, ...] = (1.0, 1.25, 1.5, 2.0, 3.0)
    """Strengths to try, as multiples of a latent's natural strength or of a difference of means."""
    alpha: float = 100.0
    """Value of the one latent that is set while the model says in one word what it sees."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_at_most("train_images", "validation_images", "test_images")
        self.check_at_least(LEAST, "validation_images", "test_images")


def compute_llava(cfg: LlavaConfig) -> tuple[Any, Any]:
    """Return the result, and the SAE or where it lies."""
    from vision_plugin.demo import draw
    from vision_plugin.demo.multimodal import multimodal_data
    from vision_plugin.formats import load_sae
    from vision_plugin.models import load_model, load_vlm
    from vision_plugin.tasks import (
        MultimodalSettings,
        check_reads_one_block,
        multimodal,
        one_word,
    )

    out = console()
    settings = MultimodalSettings(sizes=cfg.sizes, strengths=cfg.strengths, seed=cfg.seed)
    vlm = load_vlm(cfg.model_name, device=cfg.device)
    check_reads_one_block(vlm)
    given = [] if cfg.sae is None else [load_sae(cfg.sae, device=cfg.device)]
    latents = given_latents(cfg.latents, given, (cfg.sae or "",))
    settings = replace(settings, latents=latents)
    if given:
        (sae,) = given
    else:
        hook_name = vlm.reach.hook_names[-1]
        out.print(f"Training an SAE at {hook_name} on {cfg.training_images} drawn images")
        drawn = draw(cfg.training_images, seed=31 + cfg.seed).images
        (sae,) = train_saes(
            cfg, vlm.vision, [hook_name], drawn, model_name=cfg.model_name, images="drawn images",
            tokens="patch",
        )  # fmt: skip
    out.print("Drawing images")
    data = multimodal_data(
        train=cfg.train_images,
        validation=cfg.validation_images,
        test=cfg.test_images,
        seed=2000 + 10 * cfg.seed,
    )
    result = multimodal(
        vlm, sae, data, settings=settings, name=cfg.sae or "sae", announce=out.print
    )
    out.print(f"Asking for one word, each latent at {cfg.alpha:g}")
    said = one_word(
        vlm,
        sae,
        data.train.images,
        [data.values["shape"][label] for label in data.train.labels["shape"].tolist()],
        clip=load_model("demo", device=cfg.device),
        asked=data.test.images,
        alpha=cfg.alpha,
        seed=cfg.seed,
    )
    result = replace(result, one_word=said)
    return result, sae if cfg.sae is None else str(local_path(cfg.sae).absolute())
