"""The logit lens of a vision-language model: words at every layer and image position.

*Towards interpreting visual information processing in vision-language models* (Neo et al. 2024,
arXiv 2410.07149): the language model's final norm and unembedding read the image's tokens.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from PIL.Image import Image
from torch import Tensor

from vision_plugin._version import __version__
from vision_plugin.images import open_images, read_batches
from vision_plugin.lens._language_reading import LanguageReading
from vision_plugin.lens._result_folder import save_result
from vision_plugin.models import as_rgb

MAX_IMAGES = 500
"""Most images of one lens: each has a page."""
_SHOWN_SIDE = 384


@dataclass(frozen=True, eq=False)
class LanguageLens:
    """Words that a language model would say at its image's tokens.

    Attributes:
        model: Name of the model.
        prompt: What was asked.
        ids: Ids of the images.
        grid: Rows and columns of the image's tokens.
        tokens: The likeliest tokens, ``[images, layers, positions, top]``; layer 0 is what enters
            the first block, the last one what the model's own logits are made of.
        probabilities: Their probabilities.
        words: Texts of tokens by their ids.
        answers: The likeliest next word after the prompt.
        pictures: The images as they are shown on the pages.

    Examples:
        >>> found = vp.lens.language_lens(vlm, world.images[:2], "What colour is shown?", top=2)
        >>> found.tokens.shape, len(found.answers)
        (torch.Size([2, 3, 64, 2]), 2)
    """

    model: str
    prompt: str
    ids: Sequence[str]
    grid: tuple[int, int]
    tokens: Int[Tensor, "images layers positions top"]
    probabilities: Float[Tensor, "images layers positions top"]
    words: dict[int, str]
    answers: Sequence[str]
    pictures: Sequence[Image]

    def top(self, image: int, layer: int) -> list[list[tuple[str, float]]]:
        """Return the likeliest words at each position, with their probabilities.

        Raises:
            ValueError: there is no such image or layer.
        """
        n_images, n_layers = self.tokens.shape[:2]
        if not 0 <= image < n_images or not -n_layers <= layer < n_layers:
            raise ValueError(
                f"image {image}, layer {layer}: there are {n_images} images and {n_layers} layers"
            )
        found = zip(self.tokens[image, layer].tolist(), self.probabilities[image, layer].tolist(),
                    strict=True)  # fmt: skip
        return [
            [(self.words[token], share) for token, share in zip(*position, strict=True)]
            for position in found
        ]

    def page(self, image: int) -> str:
        """Return an image's page: HTML in one file, without scripts and without any network."""
        layers = [
            {"number": layer, "positions": self._positions(image, layer)}
            for layer in range(self.tokens.shape[1])
        ]
        text: str = (
            _environment()
            .get_template("language_lens.html")
            .render(
                title=self.ids[image],
                model=self.model,
                prompt=self.prompt,
                answer=self.answers[image],
                picture=_data_uri(self.pictures[image]),
                layers=layers,
                rows=self.grid[0],
                columns=self.grid[1],
                made_by=f"Made by vision_plugin {__version__}",
            )
        )
        return text

    def _positions(self, image: int, layer: int) -> list[dict[str, Any]]:
        found = []
        for words in self.top(image, layer):
            listed = ", ".join(f"{word} {share:.2f}" for word, share in words)
            word, share = words[0]
            found.append({"word": word, "share": f"{share:.2f}", "listed": listed})
        return found

    def index(self) -> str:
        """Return the page that lists the images."""
        rows = [
            {"page": f"image-{place}.html", "id": name, "answer": self.answers[place],
             "picture": _data_uri(self.pictures[place], side=64)}
            for place, name in enumerate(self.ids)
        ]  # fmt: skip
        text: str = (
            _environment()
            .get_template("language_index.html")
            .render(
                model=self.model,
                prompt=self.prompt,
                rows=rows,
                made_by=f"Made by vision_plugin {__version__}",
            )
        )
        return text

    def to_dict(self) -> dict[str, Any]:
        """Return the result ready for JSON."""
        return {
            "schema": "vision_plugin.lens/language/1",
            "model": self.model,
            "prompt": self.prompt,
            "grid": list(self.grid),
            "n_layers": int(self.tokens.shape[1]),
            "images": [
                {"image": name, "answer": self.answers[place],
                 "layers": [
                     [[[word, round(share, 6)] for word, share in words]
                      for words in self.top(place, layer)]
                     for layer in range(self.tokens.shape[1])
                 ]}
                for place, name in enumerate(self.ids)
            ],
        }  # fmt: skip

    def save(self, folder: str | Path) -> Path:
        """Write results.json, index.html and a page per image; an earlier lens is replaced.

        Raises:
            FileExistsError: something else has the name.
        """
        pages = {f"image-{place}": self.page(place) for place in range(len(self.ids))}
        return save_result(folder, self.to_dict(), pages={"index": self.index(), **pages})


@torch.no_grad()
def language_lens(
    vlm: Any,
    images: Any,
    prompt: str,
    *,
    top: int = 5,
    batch_size: int = 32,
) -> LanguageLens:
    """Read the vocabulary off every layer and image position of a vision-language model.

    At the last layer the lens equals the model's own logits at those positions.

    Args:
        vlm: A VisionLanguageBridge.
        images: Whatever ``vp.open_images`` takes, at most 500.
        prompt: What to ask about each image.
        top: Words to keep per layer and position.
        batch_size: Images per pass.

    Raises:
        ValueError: there are too many images, none could be read, or the model was wrapped without
            its processor.

    Examples:
        >>> found = vp.lens.language_lens(vlm, world.images[:2], "What colour is shown?", top=2)
        >>> found.grid, len(found.top(0, 1))
        ((8, 8), 64)
    """
    source = open_images(images)
    if len(source) > MAX_IMAGES:
        raise ValueError(
            f"a lens makes a page per image, of at most {MAX_IMAGES}: {len(source)} are too many"
        )
    reading = LanguageReading(vlm)
    vocabulary = len(reading.tokenizer)
    if not 1 <= top <= vocabulary:
        raise ValueError(f"top={top}: the vocabulary has {vocabulary} words")
    bad: dict[str, str] = {}
    found: dict[int, Image] = {}
    for batch in read_batches(source, batch_size, bad):
        found |= batch
    if not found:
        raise ValueError("none of the images could be read: mend images=")
    tokens, shares, answers = [], [], []
    for cache, rows, logits in reading.read(list(found.values()), prompt, batch_size=batch_size):
        layers = [reading.logits(reading.at_images(cache[hook], rows)) for hook in reading.hooks]
        best = torch.softmax(torch.stack(layers, dim=1).float(), dim=-1).topk(top, dim=-1)
        tokens.append(best.indices.cpu())
        shares.append(best.values.cpu())
        answers += logits[:, -1].argmax(-1).tolist()
    kept = torch.cat(tokens)
    every = {*torch.unique(kept).tolist(), *answers}
    words = {token: reading.spelled(token) for token in every}
    return LanguageLens(
        model=str(vlm.cfg.model_name),
        prompt=prompt,
        ids=[source.ids[place] for place in found],
        grid=reading.grid(int(kept.shape[2])),
        tokens=kept,
        probabilities=torch.cat(shares),
        words=words,
        answers=[words[token] for token in answers],
        pictures=[as_rgb(image) for image in found.values()],
    )


def _environment() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        autoescape=True,
        loader=PackageLoader("vision_plugin.lens", "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _data_uri(image: Image, side: int = _SHOWN_SIDE) -> str:
    """Return an image as a PNG inside the page, with its longer side at most ``side`` pixels."""
    shown = image.copy()
    if max(shown.size) > side:
        shown.thumbnail((side, side))
    buffer = io.BytesIO()
    shown.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
