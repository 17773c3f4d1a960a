"""Latents of every token, a few pictures at a time: what ranking and heat maps are made of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from vision_plugin.models import Harvester, TokenSelection
from vision_plugin.models._fit import check_fit
from vision_plugin.models._splicing import heads_joined, silent_hooks, trained_tokens

CHUNK_ELEMENTS = 2**25
"""Most latents held at once (128 MiB in float32), unless one picture alone has more."""


@dataclass(frozen=True)
class TokenLatents:
    """Latents of the selected tokens of some pictures of a batch."""

    start: int
    """Row of the first picture in the batch."""
    values: Float[Tensor, "b tokens d_sae"]


class TokenEncoder:
    """Pictures to latents of the tokens an SAE reads."""

    def __init__(self, model: Any, sae: Any, *, tokens: str | None) -> None:
        """Find the SAE's hook and tokens in the model.

        Args:
            model: A VisionBridge.
            sae: A ``sae_lens.SAE`` whose metadata names a hook of the model.
            tokens: Kind of token; None takes those the SAE was trained on.

        Raises:
            UnknownHookError: the model has no such hook.
            ValueError: the SAE names no hook or does not fit, or the kind is unknown.
        """
        hook_name = sae.cfg.metadata.get("hook_name")
        if not hook_name:
            raise ValueError(
                "this SAE does not say where it belongs: set sae.cfg.metadata.hook_name, for "
                "example 'blocks.10.hook_resid_post'"
            )
        model.check_hook_names([hook_name])
        check_fit(model, sae)
        self.model, self.sae, self.hook_name = model, sae, str(hook_name)
        self.tokens = TokenSelection.parse(tokens or trained_tokens(sae)).kind
        self.layout = model.token_layout()
        self.selected = self.layout.indices(self.tokens)
        self.harvester = Harvester(model, [self.hook_name])
        self.has_patches = self.tokens in ("patch", "all")

    @property
    def patch_columns(self) -> Tensor:
        """Where the patches stand among the selected tokens."""
        columns: Tensor = self.layout.mask("patch")[self.selected].nonzero()[:, 0]
        return columns

    def pixels(self, pictures: list[Image.Image]) -> Tensor:
        """Pictures as the model wants them."""
        pixels: Tensor = self.model.preprocess(pictures)
        return pixels

    def encode(self, pixels: Tensor) -> Iterator[TokenLatents]:
        """Latents of a batch, in parts that fit in memory."""
        activation = self._select(self.harvester(pixels)[self.hook_name])
        activation = activation.to(device=self.sae.device, dtype=self.sae.dtype)
        per_picture = activation.shape[1] * int(self.sae.cfg.d_sae)
        step = max(1, CHUNK_ELEMENTS // per_picture)
        for start in range(0, len(activation), step):
            with torch.no_grad(), silent_hooks(self.sae), heads_joined(self.sae):
                values = self.sae.encode(activation[start : start + step])
            yield TokenLatents(start, values.to_dense() if values.is_sparse else values)

    def _select(self, activation: Tensor) -> Tensor:
        """The selected tokens, [batch, tokens, d_in]."""
        if activation.ndim == 4 and activation.shape[-1] != self.sae.cfg.d_in:
            activation = activation.flatten(-2)
        if activation.ndim == 2:
            self.has_patches = False
            return activation[:, None]
        if activation.shape[1] != self.layout.n_tokens:
            raise ValueError(
                f"{self.hook_name} gives {activation.shape[1]} tokens, but "
                f"{self.model.cfg.model_name} has {self.layout.n_tokens}: a report needs a hook "
                "with one vector per token"
            )
        return activation[:, self.selected.to(activation.device)]
