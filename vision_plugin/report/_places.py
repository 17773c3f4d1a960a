"""Where in the image each latent fires, and at which kind of token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vision_plugin.report._statistics import positive

MOSTLY = 0.8
"""Share of a latent's activation at one kind of token, from which it belongs to that kind."""
NAMES = {"cls": "class token", "patch": "patches", "register": "registers"}
MIXED = "mixed"


@dataclass(frozen=True)
class Places:
    """Sums over all images of every latent's values, token by token."""

    kinds: tuple[str, ...]
    """Kind of each token."""
    fired: Int[Tensor, "d_sae tokens"]
    """Number of images on which the latent fires at the token."""
    total: Float[Tensor, "d_sae tokens"]
    """Sum of its values there."""
    n_images: int

    @property
    def frequency(self) -> Float[Tensor, " d_sae"]:
        """Return the share of tokens on which each latent fires, in float64."""
        n_tokens = max(1, self.n_images * len(self.kinds))
        return self.fired.sum(1).double() / n_tokens

    @property
    def kinds_there(self) -> list[str]:
        """Return the kinds of token, in the order of the sequence."""
        return list(dict.fromkeys(self.kinds))

    def of_kind(self, kind: str) -> Int[Tensor, " chosen"]:
        """Return the places of the tokens of a kind."""
        return torch.tensor([place for place, each in enumerate(self.kinds) if each == kind])

    @cached_property
    def shares(self) -> Float[Tensor, "d_sae kinds"]:
        """The share of each latent's activation at each kind of token; 0 where dead."""
        sums = torch.stack([self.total[:, self.of_kind(k)].sum(1) for k in self.kinds_there], 1)
        return sums / sums.sum(1, keepdim=True).clamp(min=1e-30)

    def main_kind(self) -> list[str]:
        """Return the kind of token that each latent belongs to, an empty text where dead."""
        shares = self.shares
        largest, place = shares.max(1)
        named = [NAMES.get(kind, kind) for kind in self.kinds_there]
        return [
            "" if share == 0 else named[kind] if share >= MOSTLY else MIXED
            for share, kind in zip(largest.tolist(), place.tolist(), strict=True)
        ]


class TokenPlaces:
    """Collect :class:`Places` from token-level latents; the loop feeds it like a metric."""

    sparse_latents = True
    latents_per = "token"

    def __init__(self, d_sae: int, kinds: Sequence[str]) -> None:
        self.kinds = tuple(kinds)
        self._fired = torch.zeros(d_sae * len(self.kinds), dtype=torch.int32)
        self._total = torch.zeros(d_sae * len(self.kinds))
        self._n_rows = 0

    def update(self, latents: Tensor) -> None:
        """Add latents, ``[..., d_sae]`` dense or ``[tokens, d_sae]`` sparse COO, image by image."""
        rows, features, values = positive(latents if latents.is_sparse else latents.flatten(0, -2))
        n_tokens = len(self.kinds)
        entry = features * n_tokens + rows % n_tokens
        self._fired.index_add_(0, entry, torch.ones_like(entry, dtype=torch.int32))
        self._total.index_add_(0, entry, values)
        self._n_rows += latents.shape[:-1].numel()

    def state(self) -> dict[str, Tensor]:
        """Return all that was counted so far, by name."""
        counted = {"place_fired": self._fired, "place_total": self._total}
        return {**counted, "n_rows": torch.tensor(self._n_rows)}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from a state."""
        self._fired, self._total = state["place_fired"], state["place_total"]
        self._n_rows = int(state["n_rows"])

    def compute(self) -> Places:
        """Return the sums over all images."""
        n_tokens = len(self.kinds)
        fired, total = self._fired.view(-1, n_tokens), self._total.view(-1, n_tokens)
        return Places(self.kinds, fired, total, self._n_rows // n_tokens)
