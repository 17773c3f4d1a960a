"""Latents of the tokens of some images, sparse wherever the dictionary allows it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vision_plugin.kernels import SparseLatents
from vision_plugin.models.dictionary import Dictionary, encode_and_decode


@dataclass(frozen=True)
class TokenLatents:
    """A dictionary's latents and reconstructions of the tokens of some images.

    Attributes:
        rows: Latents ``[n * tokens, k]``, image by image: compressed rows, or dense where some
            are negative, because a missing entry, a zero, is then not the smallest value.
        reconstruction: Decoded activations ``[n, tokens, d_out]``.

    Examples:
        >>> found = vp.models.encode_tokens(sae, acts)
        >>> found.dense.shape, found.pooled("max").shape
        (torch.Size([8, 65, 256]), torch.Size([8, 256]))
    """

    rows: SparseLatents | Tensor
    reconstruction: Tensor

    @property
    def n_images(self) -> int:
        """Number of images."""
        return int(self.reconstruction.shape[0])

    @property
    def n_tokens(self) -> int:
        """Number of tokens per image."""
        return int(self.reconstruction.shape[1])

    @property
    def n_active(self) -> int:
        """Number of latents that are not zero, over all tokens."""
        values = self.rows.values if isinstance(self.rows, SparseLatents) else self.rows
        return int(torch.count_nonzero(values))

    @cached_property
    def dense(self) -> Float[Tensor, "n tokens k"]:
        """All latents as one dense tensor, zeros included."""
        rows = self.rows.to_dense() if isinstance(self.rows, SparseLatents) else self.rows
        return rows.view(self.n_images, self.n_tokens, rows.shape[1])

    def flat(self, tokens: Int[Tensor, " chosen"] | None = None) -> Tensor:
        """Return latents of some tokens of each image, ``[n * chosen, k]``: sparse COO, or dense.

        Args:
            tokens: Places among the tokens of an image; all by default.
        """
        if not isinstance(self.rows, SparseLatents):
            chosen = self.dense if tokens is None else self.dense[:, tokens.to(self.rows.device)]
            return chosen.flatten(0, 1)
        if tokens is None:
            return self.rows.to_sparse_coo()
        place = torch.full((self.n_tokens,), -1, device=self.rows.values.device)
        place[tokens.to(place.device)] = torch.arange(len(tokens), device=place.device)
        rows = self.rows.rows()
        to = place[rows % self.n_tokens]
        kept = to >= 0
        to = (rows // self.n_tokens * len(tokens) + to)[kept]
        where = torch.stack([to, self.rows.indices.long()[kept]])
        size = (self.n_images * len(tokens), self.rows.d_sae)
        entries = torch.sparse_coo_tensor(
            where, self.rows.values[kept], size, check_invariants=False
        )
        return entries.coalesce()

    def pooled(self, how: str) -> Tensor:
        """Return latents of each image, ``[n, k]``: sparse COO, or dense.

        Args:
            how: Pooling over the tokens, ``"max"`` or ``"mean"``.
        """
        if not isinstance(self.rows, SparseLatents):
            return self.dense.amax(dim=1) if how == "max" else self.dense.mean(dim=1)
        width = self.rows.d_sae
        entry = self.rows.rows() // self.n_tokens * width + self.rows.indices.long()
        found, group = entry.unique(return_inverse=True)
        # Latents are positive here, so the zeros of other tokens are never the maximum.
        start = self.rows.values.new_zeros(len(found))
        if how == "max":
            values = start.scatter_reduce(0, group, self.rows.values, "amax")
        else:
            values = start.index_add(0, group, self.rows.values) / self.n_tokens
        where = torch.stack([found // width, found % width])
        return torch.sparse_coo_tensor(
            where, values, (self.n_images, width), is_coalesced=True, check_invariants=False
        )

    @property
    def is_sparse(self) -> bool:
        """Whether the latents are held in compressed rows."""
        return isinstance(self.rows, SparseLatents)

    def entries(
        self, pooling: str, patches: Int[Tensor, " patches"] | None = None
    ) -> dict[str, Callable[[], Tensor]]:
        """Return functions that make the latents as metrics take them, dense and sparse.

        Args:
            pooling: Pooling of tokens to images, see :meth:`pooled`.
            patches: Places of the patches among the tokens; None leaves out what needs patches.
        """
        makers: dict[str, Callable[[], Tensor]] = {
            "latents": lambda: _with_zeros(self.pooled(pooling)),
            "token_latents": lambda: self.dense,
            "reconstruction": lambda: self.reconstruction,
        }
        if self.is_sparse:
            makers["sparse_latents"] = lambda: self.pooled(pooling)
            makers["sparse_token_latents"] = self.flat
        if patches is not None:
            makers["patch_latents"] = lambda: self.dense[:, patches.to(self.reconstruction.device)]
            if self.is_sparse:
                makers["sparse_patch_latents"] = lambda: self.flat(patches)
        return makers


@torch.no_grad()
def encode_tokens(dictionary: Dictionary, source: Float[Tensor, "n tokens d_in"]) -> TokenLatents:
    """Encode and decode the tokens of some images.

    Args:
        dictionary: A SAELens SAE or transcoder, a control, or any other dictionary.
        source: Activations of the tokens, heads joined.

    Examples:
        >>> found = vp.models.encode_tokens(sae, acts)
        >>> found.n_images, found.n_tokens, found.reconstruction.shape
        (8, 65, torch.Size([8, 65, 128]))
    """
    latents, reconstruction = encode_and_decode(dictionary, source)
    if isinstance(latents, SparseLatents) and bool((latents.values < 0).any()):
        latents = latents.to_dense()
    return TokenLatents(latents, reconstruction)


def _with_zeros(latents: Tensor) -> Tensor:
    return latents.to_dense() if latents.is_sparse else latents
