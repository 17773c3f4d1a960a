"""What every task's command shares: its folder, and the SAEs that it trains where none is named."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vision_plugin._device import check_device
from vision_plugin.cli._name import resolve_latents

LEAST = 30
"""Fewest images of which a task gives an interval."""
MAX_IMAGES = 50_000
"""Largest number of images of which a task holds the pixels."""

MAX_KEPT_BYTES = 4 * 2**30
"""Most activations that are kept on disk while SAEs are trained on them."""


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
        for name in ("d_sae", "k"):  # before images are drawn for it
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: it has to be above 0")

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


def train_saes(
    cfg: TrainsSAE,
    model: Any,
    hook_names: Sequence[str],
    pictures: Sequence[Any],
    *,
    model_name: str,
    images: str,
    tokens: str = "all",
) -> list[Any]:
    """Return an SAE at each hook, all trained on one pass over pictures.

    Where training repeats the pictures, the model runs on each of them once and its activations
    are kept on disk, unless they are many.

    Args:
        cfg: Configuration of the task.
        model: The model.
        hook_names: Hooks of the SAEs.
        pictures: The images.
        model_name: Name of the model, for records.
        images: What the images are, for records.
        tokens: Kind of token.
    """
    from sae_lens import BatchTopKTrainingSAEConfig

    from vision_plugin.activations import ExtractionConfig, extract
    from vision_plugin.formats import load_sae
    from vision_plugin.images import open_images
    from vision_plugin.sae import VisionSAERunnerConfig, train_many

    source: Any = open_images(list(pictures))
    vectors = len(pictures) * len(model.token_layout().indices(tokens))
    n_bytes = vectors * int(model.cfg.d_model) * 4 * len(hook_names)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "saes"
        if vectors < cfg.training_tokens and n_bytes <= MAX_KEPT_BYTES:
            store = ExtractionConfig(
                model_name=model_name, images=images, hook_names=tuple(hook_names),
                output_path=str(Path(folder) / "store"), tokens=tokens, batch_size=64,
                n_workers=0, device=cfg.device,
            )  # fmt: skip
            source = extract(store, model=model, images=source)
        configs = {
            hook_name: VisionSAERunnerConfig(
                model_name=model_name,
                images=images,
                hook_name=hook_name,
                tokens=tokens,
                sae=BatchTopKTrainingSAEConfig(d_in=0, d_sae=cfg.d_sae, k=cfg.k),
                training_tokens=cfg.training_tokens,
                seed=cfg.seed,
                device=cfg.device,
                output_path=str(place),
            )
            for hook_name in hook_names
        }
        train_many(configs, output_path=str(place), model=model, images=source)
        return [load_sae(str(place / name), device=cfg.device) for name in hook_names]


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
