"""Preprocessing of images and texts, as the checkpoint defines it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from vision_plugin.models._rgb import as_rgb


@runtime_checkable
class ImageProcessor(Protocol):
    """Turns images into pixels."""

    def __call__(self, images: Sequence[Image.Image]) -> Float[Tensor, "n c h w"]:
        """Return pixels [n, channels, height, width] in float32."""
        ...

    def fingerprint(self) -> str:
        """Return a hash that changes when the pixels of an image would change."""
        ...


@runtime_checkable
class TextProcessor(Protocol):
    """Turns texts into keyword arguments of the text tower."""

    def __call__(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Return token ids and, where the tower needs them, further tensors."""
        ...


class HuggingFaceImages:
    """A transformers image processor that puts transparent images on white first."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, images: Sequence[Image.Image]) -> Float[Tensor, "n c h w"]:
        """Resize, crop and normalise as the checkpoint's configuration says."""
        batch = self.processor(images=[as_rgb(p) for p in images], return_tensors="pt")
        pixels: Tensor = batch["pixel_values"]
        return pixels

    def fingerprint(self) -> str:
        """Return a hash of the processor's settings."""
        settings = {k: v for k, v in self.processor.to_dict().items() if _plain(v)}
        return hash_settings(settings)


class TorchvisionImages:
    """A torchvision-style transform of one image, as timm and open_clip provide."""

    def __init__(self, transform: Any) -> None:
        self.transform = transform

    def __call__(self, images: Sequence[Image.Image]) -> Float[Tensor, "n c h w"]:
        """Transform each image and stack the results."""
        return torch.stack([self.transform(as_rgb(image)) for image in images])

    def fingerprint(self) -> str:
        """Return a hash of the transform's description."""
        return hash_settings({"transform": repr(self.transform)})


class HuggingFaceTexts:
    """A transformers tokenizer with the padding and truncation that the text tower needs."""

    def __init__(
        self, tokenizer: Any, max_length: int, *, padding: bool | str = True, mask: bool = True
    ) -> None:
        """Keep the tokenizer and its arguments.

        Args:
            tokenizer: A transformers tokenizer.
            max_length: Length of the longest text that the tower can take, in tokens.
            padding: The tokenizer's argument; SigLIP was trained on texts of one length.
            mask: Whether to return the attention mask; SigLIP was trained without one.
        """
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.padding = padding
        self.names = ("input_ids", "attention_mask") if mask else ("input_ids",)

    def __call__(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Return ``input_ids`` and, where the tower takes one, ``attention_mask``, [n, length]."""
        batch = self.tokenizer(
            list(texts),
            padding=self.padding,
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        )
        return {name: batch[name] for name in self.names if name in batch}


class PlainTexts:
    """A tokenizer that is a plain function of texts, as in open_clip."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Return the tokenizer's dictionary, or its token ids as ``text``, [n, length]."""
        tokens = self.tokenizer(list(texts))
        return dict(tokens) if isinstance(tokens, Mapping) else {"text": tokens}


def hash_settings(settings: dict[str, Any]) -> str:
    """Return sixteen hexadecimal digits of the SHA-256 of the settings as sorted JSON."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(value: Any) -> bool:
    return isinstance(value, (str, int, float, bool, list, tuple, dict, type(None)))
