"""What every task's command shares: its folder, and the SAEs that it trains where none is named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vision_plugin._device import check_device
from vision_plugin.cli._name import resolve_latents

LEAST = 30
"""Fewest images of which a task gives an interval."""
MAX_IMAGES = 50_000
"""Largest number of images of which a task holds the pixels."""


@dataclass(frozen=True, kw_only=True)
class TrainsSAE:
    """Where results go, and how an SAE is trained."""

    output_path: str
    """Folder of the results; earlier results of a task in it are replaced."""
    d_sae: int = 1024
    """Latents of each SAE that is trained."""
    k: int = 16
    """Mean number of active latents per token of each SAE that is trained."""
    training_images: int = 4000
    """Images that an SAE is trained on."""
    training_tokens: int = 1_200_000
    """Activations that an SAE is trained on, with repetition."""
    device: str = "cpu"
    """Device that the model and the SAEs run on."""
    seed: int = 0
    """Seed of the images, the SAEs and whatever is random."""

    def __post_init__(self) -> None:
        check_device(self.device)
        self.check_at_most("training_images")

    def check_at_most(self, *names: str) -> None:
        """Raise ValueError where more images are asked for than a task holds in memory."""
        for name in names:
            given = getattr(self, name)
            if given is not None and given > MAX_IMAGES:
                flag = f"--{name.replace('_', '-')} {given}"
                raise ValueError(f"{flag} is too many to hold in memory: at most {MAX_IMAGES:,}")

    def check_at_least(self, least: int, *names: str) -> None:
        """Raise ValueError where too few images are asked for, of which there is an interval."""
        for name in names:
            given = getattr(self, name)
            if given < least:
                flag = f"--{name.replace('_', '-')} {given}"
                raise ValueError(f"{flag} is too few for an interval: at least {least}")


def training(
    cfg: TrainsSAE, hook_name: str, *, model_name: str, images: str, tokens: str, place: str
) -> Any:
    """Return the configuration of an SAE's training.

    Args:
        cfg: Configuration of the task.
        hook_name: Hook of the SAE.
        model_name: Name of the model.
        images: What the images are, for records.
        tokens: Kind of token.
        place: Folder of the SAE.
    """
    from sae_lens import BatchTopKTrainingSAEConfig

    from vision_plugin.sae import VisionSAERunnerConfig

    return VisionSAERunnerConfig(
        model_name=model_name,
        images=images,
        hook_name=hook_name,
        tokens=tokens,
        sae=BatchTopKTrainingSAEConfig(d_in=0, d_sae=cfg.d_sae, k=cfg.k),
        training_tokens=cfg.training_tokens,
        seed=cfg.seed,
        device=cfg.device,
        output_path=place,
    )


def given_latents(
    latents: Sequence[int | str], saes: Sequence[Any], places: Sequence[str]
) -> tuple[int, ...]:
    """Return latents of the SAE that is named, which are given by number or by name.

    Raises:
        ValueError: latents are given and not one SAE, or no feature has such a name.
    """
    if not latents:
        return ()
    if len(saes) != 1:
        raise ValueError("latents= are of one SAE: name it with sae=")
    return resolve_latents(latents, saes[0], places[0])
