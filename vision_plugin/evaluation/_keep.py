"""Latents, neurons and embeddings of each image, which an evaluation keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class EncodedImages:
    """Image-level latents, neurons and embeddings of a set of images.

    Examples:
        >>> found = vp.evaluate(sae, model, "demo:8", metrics=["fvu"], controls=())
        >>> found.encoded.latents.shape, found.encoded.neurons.shape
        (torch.Size([8, 256]), torch.Size([8, 128]))
    """

    ids: list[str]
    """Ids of the images that could be read, in order."""
    indices: list[int]
    """Places of these images in the source."""
    bad_images: dict[str, str]
    """Reasons by id of the images that could not be read."""
    latents: Tensor
    """SAE latents pooled over tokens, sparse CSR [n, d_sae]."""
    neurons: Float[Tensor, "n d_in"]
    """Activations pooled over tokens: the baseline."""
    embeddings: dict[str, Float[Tensor, "n d"]]
    """Unit embeddings by the name of the embedder, in the order given."""
    fidelity: dict[str, float]
    """``explained_variance``, ``cosine`` and ``l0`` over the selected tokens."""
    tokens: str
    """Kind of token that was encoded."""
    pooling: Literal["max", "mean"]
    """How tokens are pooled into one row per image."""

    @property
    def first_embeddings(self) -> Float[Tensor, "n d"]:
        """Return the embeddings of the first embedder."""
        return next(iter(self.embeddings.values()))


def pool(activations: Tensor, pooling: str) -> Tensor:
    """Return image-level activations ``[n, d]`` of ``[n, tokens, d]``."""
    return activations.amax(dim=1) if pooling == "max" else activations.mean(dim=1)


class Keeper:
    """Keep the SAE's latents, the neurons and the embeddings of each image.

    Examples:
        >>> keeper = vp.evaluation.Keeper()
        >>> keeper.add(list(range(8)), latents, acts[:, 0], {"model": embeddings})
        >>> keeper.finish(vp.open_images("demo:8"), {}, "all", "max").latents.shape
        torch.Size([8, 256])
    """

    def __init__(self) -> None:
        self.indices: list[int] = []
        self.neurons: list[Tensor] = []
        self.embeddings: dict[str, list[Tensor]] = {}
        self.lengths: list[Tensor] = []
        self.columns: list[Tensor] = []
        self.values: list[Tensor] = []
        self.width = 0

    def add(
        self,
        indices: list[int],
        latents: Tensor,
        neurons: Tensor | None,
        embeddings: Mapping[str, Tensor],
    ) -> None:
        """Keep a batch of images.

        Args:
            indices: Places of the images in the source.
            latents: Pooled latents ``[n, d_sae]``, dense or sparse.
            neurons: Pooled activations ``[n, d_in]``; None where nobody wants them.
            embeddings: Unit embeddings ``[n, d]`` by the name of the embedder.
        """
        latents = latents.detach().cpu()
        self.width = latents.shape[1]
        entries = (latents if latents.is_sparse else latents.to_sparse()).coalesce()
        rows, columns = entries.indices()
        self.indices += indices
        self.lengths.append(torch.bincount(rows, minlength=len(indices)))
        self.columns.append(columns)
        self.values.append(entries.values())
        if neurons is not None:
            self.neurons.append(neurons.detach().float().cpu())
        for name, embedded in embeddings.items():
            self.embeddings.setdefault(name, []).append(embedded)

    def extend(self, later: Keeper) -> None:
        """Append what another keeper kept of later images."""
        self.width = later.width or self.width
        for name in ("indices", "lengths", "columns", "values", "neurons"):
            getattr(self, name).extend(getattr(later, name))
        for name, embedded in later.embeddings.items():
            self.embeddings.setdefault(name, []).extend(embedded)

    def finish(self, images: Any, bad: dict[str, str], tokens: str, pooling: str) -> EncodedImages:
        """Return what was kept.

        Args:
            images: The image source.
            bad: Reasons by id of the images that could not be read.
            tokens: Kind of token that was encoded.
            pooling: How tokens were pooled, ``"max"`` or ``"mean"``.
        """
        ends = torch.cat([torch.zeros(1, dtype=torch.int64), torch.cat(self.lengths).cumsum(0)])
        latents = torch.sparse_csr_tensor(
            ends,
            torch.cat(self.columns),
            torch.cat(self.values),
            (len(ends) - 1, self.width),
            check_invariants=False,
        )
        return EncodedImages(
            ids=[images.ids[index] for index in self.indices],
            indices=self.indices,
            bad_images=bad,
            latents=latents,
            neurons=torch.cat(self.neurons) if self.neurons else torch.empty(len(ends) - 1, 0),
            embeddings={name: torch.cat(parts) for name, parts in self.embeddings.items()},
            fidelity={},
            tokens=tokens,
            pooling="max" if pooling == "max" else "mean",
        )
