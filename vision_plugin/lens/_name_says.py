"""Names that a model says: what steering raises, and what top images are said to share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from vision_plugin._progress import Progress
from vision_plugin.lens._vocabulary import MAX_LENGTH, clean_name
from vision_plugin.metrics import steerability
from vision_plugin.models import load_vlm
from vision_plugin.models.dictionary import Dictionary
from vision_plugin.steering import Edit

WHAT_IS_SHOWN = "What is shown in this image? Use exactly one word!"
WHAT_IS_SHARED = "What do all of these pictures have in common? Use one to three words!"
TOP_IMAGES = 9
_TILE = 112
_EMPTY = (128, 128, 128)
_NEW_TOKENS = 16

Captioner = Callable[[list[Image.Image]], str]
"""Says in a few words what images share."""


def steered_names(
    model: Any,
    sae: Dictionary,
    pixels: Tensor,
    texts: Tensor,
    words: Sequence[str],
    *,
    latents: Sequence[int],
    strength: float,
    tokens: str,
    batch_size: int,
    progress: bool,
) -> tuple[dict[int, str], dict[int, float]]:
    """Return the word whose probability each latent raises most when it is set to a value.

    Returns:
        Names, and the mean gain in probability, by latent; none for a latent that moves nothing.
    """
    total = len(pixels) * len(latents)
    with Progress(total, "steering", shown=progress, of="passes") as shown:
        found = steerability(
            model, sae, pixels, texts, latents=list(latents), strength=strength, tokens=tokens,
            concepts=list(words), keep_delta=False, batch_size=batch_size, watch=shown.advance,
        )  # fmt: skip
    top = dict(zip(latents, found.top_names, strict=True))
    power = dict(zip(latents, found.power.tolist(), strict=True))
    return {k: name for k, name in top.items() if name is not None}, power


def said_of_nothing(
    vlm: Any,
    sae: Dictionary,
    *,
    latents: Sequence[int],
    strength: float,
    tokens: str | None,
    prompt: str = WHAT_IS_SHOWN,
    check_model: bool = True,
    progress: bool,
) -> dict[int, str]:
    """Return what a vision-language model says it sees in an empty picture with a latent added.

    Args:
        vlm: A VisionLanguageBridge.
        sae: A dictionary in its tower.
        latents: Latents to add, one after the other.
        strength: How much of a latent's direction is added.
        tokens: Kind of token that it is added to.
        prompt: What is asked.
        check_model: Refuse an SAE that was trained on another model.
        progress: Whether to show progress.
    """
    height, width = vlm.vision.adapter.tower_dimensions.image_size
    empty = Image.new("RGB", (width, height), _EMPTY)
    found = {}
    with Progress(len(latents), "asking", shown=progress, of="latents") as shown:
        for latent in latents:
            edit = Edit.add(sae, {latent: strength}, tokens=tokens)
            with vlm.edit(edit, check_model=check_model):
                (said,) = vlm.generate([empty], prompt, max_new_tokens=_NEW_TOKENS)
            found[latent] = said_name(said)
            shown.advance(1)
    return found


def open_captioner(captioner: Any, *, prompt: str = WHAT_IS_SHARED, device: str) -> Captioner:
    """Return a function that says what images share.

    Args:
        captioner: Such a function; a VisionLanguageBridge; or a local Hugging Face
            image-text-to-text model, as ``vp.load_vlm`` takes it.
        prompt: What a model is asked about the images, which it is shown side by side in one.
        device: Device that a model is loaded on.

    Raises:
        ValueError: the model cannot be loaded, or the captioner is nothing that can be asked.
    """
    if isinstance(captioner, (str, Path)):
        captioner = load_vlm(str(captioner), device=device)
    if hasattr(captioner, "generate") and hasattr(captioner, "vision"):
        vlm = captioner

        def ask(images: list[Image.Image]) -> str:
            (said,) = vlm.generate([side_by_side(images)], prompt, max_new_tokens=_NEW_TOKENS)
            return str(said)

        return ask
    if not callable(captioner):
        raise ValueError(
            f"captioner= is a {type(captioner).__name__}: give a function of a list of images, or "
            "the folder of an image-text-to-text model"
        )
    ready: Captioner = captioner
    return ready


def side_by_side(images: Sequence[Image.Image]) -> Image.Image:
    """Return images as tiles of one square picture."""
    side = math.ceil(math.sqrt(len(images)))
    sheet = Image.new("RGB", (side * _TILE, side * _TILE), (255, 255, 255))
    for place, image in enumerate(images):
        row, column = divmod(place, side)
        tile = image.convert("RGB").resize((_TILE, _TILE))
        sheet.paste(tile, (column * _TILE, row * _TILE))
    return sheet


def said_name(said: str) -> str:
    """Return an answer as a name: one line, without quotes and a full stop, cut where it is long.

    An answer that says nothing becomes an empty name.
    """
    return clean_name(said)[:MAX_LENGTH].strip(" .\"'")
