"""Latents of every token, a few images at a time, for the heat maps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from vision_plugin.models.dictionary import Dictionary, bare
from vision_plugin.models.site import Site

CHUNK_ELEMENTS = 2**25
"""Most latents held at once (128 MiB in float32), unless one image alone has more."""


@dataclass(frozen=True)
class TokenLatents:
    """Latents of the selected tokens of some images of a batch."""

    start: int
    """Row of the first image in the batch."""
    values: Float[Tensor, "b tokens d_sae"]


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
        self.has_patches = self.tokens in ("patch", "all")

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

    def encode(self, pixels: Tensor) -> Iterator[TokenLatents]:
        """Yield the latents of a batch, in parts that fit in memory."""
        found = self.harvester(pixels)
        self.has_patches &= found[self.site.hook_name].ndim > 2
        activation = self.site.read(found).source
        activation = activation.to(_weights_of(self.sae, activation))
        per_image = activation.shape[1] * int(self.sae.cfg.d_sae)
        step = max(1, CHUNK_ELEMENTS // per_image)
        for start in range(0, len(activation), step):
            with torch.no_grad(), bare(self.sae):
                values = self.sae.encode(activation[start : start + step])
            yield TokenLatents(start, values.to_dense() if values.is_sparse else values)


def _weights_of(dictionary: Dictionary, otherwise: Tensor) -> Tensor:
    """Return a tensor of the dictionary's type and on its device."""
    W_dec = getattr(dictionary, "W_dec", None)
    return W_dec if isinstance(W_dec, Tensor) else otherwise
