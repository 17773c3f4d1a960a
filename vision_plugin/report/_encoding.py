"""Latents of every token, a few images at a time, for the heat maps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from PIL import Image
from torch import Tensor

from vision_plugin.models import encode_tokens
from vision_plugin.models.dictionary import Dictionary
from vision_plugin.models.site import Site

CHUNK_ELEMENTS = 2**25
"""Most latents held at once (128 MiB in float32), unless one image alone has more."""


class TokenEncoder:
    """Encode images into latents of the tokens that an SAE reads."""

    def __init__(self, model: Any, sae: Dictionary, *, tokens: str | None) -> None:
        """Find the SAE's hook and tokens in the model.

        Args:
            model: A VisionBridge.
            sae: A ``sae_lens.SAE`` whose metadata names a hook of the model.
            tokens: Kind of token; None takes the kind that the SAE was trained on.

        Raises:
            UnknownHookError: the model has no such hook.
            ValueError: the SAE names no hook or does not fit, or the kind is unknown.
        """
        self.model, self.sae = model, sae
        site = Site.of(model, sae, tokens=tokens)
        self.tokens = site.selection.kind
        self.site = Site(model, site.hook_name, site.hook_name, self.tokens)
        self.layout = model.token_layout()
        self.harvester = self.site.harvester()
        self.has_patches = self.tokens in ("patch", "all") and self.site.patch_rows is not None

    @property
    def patch_columns(self) -> Tensor:
        """Return the positions of the patches among the selected tokens."""
        columns = self.site.patch_rows
        assert columns is not None
        return columns

    def pixels(self, images: list[Image.Image]) -> Tensor:
        """Return images prepared for the model."""
        pixels: Tensor = self.model.preprocess(images)
        return pixels

    def encode(self, pixels: Tensor, numbers: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the latents of a batch, as metrics take them, in parts that fit in memory.

        Args:
            pixels: Images prepared for the model.
            numbers: Their numbers.

        Yields:
            Latents of the tokens, image by image, sparse COO or dense, and the images' numbers.
        """
        source = self.site.read(self.harvester(pixels)).source
        step = max(1, CHUNK_ELEMENTS // (source.shape[1] * int(self.sae.cfg.d_sae)))
        for start in range(0, len(source), step):
            found = encode_tokens(self.sae, source[start : start + step])
            flat = found.flat() if found.is_sparse else found.dense
            yield flat, numbers[start : start + step]
