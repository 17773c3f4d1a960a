"""One pass of pictures through a model and an SAE: what the metrics and the report start from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from rich.progress import track
from torch import Tensor

from vision_plugin.activations import BadImageError
from vision_plugin.models import Harvester, TokenSelection, VisionBridge
from vision_plugin.models._splicing import trained_tokens

Pooling = Literal["max", "mean"]


@dataclass(frozen=True)
class EncodedImages:
    """Image-level latents, neurons and embeddings of a set of pictures."""

    ids: list[str]
    """Ids of the pictures that could be read, in order."""
    indices: list[int]
    """Their places in the source."""
    bad_images: dict[str, str]
    """Ids of those that could not, with the reason."""
    latents: Tensor
    """SAE latents pooled over tokens, sparse CSR [n, d_sae]."""
    neurons: Float[Tensor, "n d_in"]
    """The activation itself pooled over tokens: the baseline."""
    embeddings: dict[str, Float[Tensor, "n d"]]
    """Unit embeddings by the name of the embedder."""
    fidelity: dict[str, float]
    """``explained_variance``, ``cosine`` and ``l0`` over the selected tokens."""
    tokens: str
    """Kind of token that was encoded."""
    pooling: Pooling
    """How tokens became images."""


class Fidelity:
    """Explained variance, cosine and L0 over a stream of activation vectors, in float64."""

    def __init__(self, d_in: int) -> None:
        self.n = 0
        self.residual = self.cosine = self.active = 0.0
        self.sum = torch.zeros(d_in, dtype=torch.float64)
        self.square = 0.0

    def update(self, x: Tensor, reconstruction: Tensor, latents: Tensor) -> None:
        """Add vectors [..., d_in], what became of them, and their latents [..., d_sae]."""
        x, reconstruction = x.flatten(0, -2).double(), reconstruction.flatten(0, -2).double()
        self.n += len(x)
        self.residual += float((x - reconstruction).square().sum())
        self.cosine += float(torch.cosine_similarity(x, reconstruction, dim=-1).sum())
        self.active += float((latents != 0).sum())
        self.sum += x.sum(0).cpu()
        self.square += float(x.square().sum())

    def compute(self) -> dict[str, float]:
        """``explained_variance`` is 1 - residual / total variance over all vectors together."""
        variance = self.square - float(self.sum.square().sum()) / self.n
        return {
            "explained_variance": 1 - self.residual / variance,
            "cosine": self.cosine / self.n,
            "l0": self.active / self.n,
        }


@torch.no_grad()
def encode_images(
    model: VisionBridge,
    sae: Any,
    pictures: Any,
    *,
    tokens: str | None = None,
    pooling: Pooling = "max",
    embedders: dict[str, VisionBridge] | None = None,
    batch_size: int = 64,
    progress: bool = False,
) -> EncodedImages:
    """Encode pictures with an SAE and embed them, in one pass.

    Args:
        model: The model the SAE belongs to.
        sae: A ``sae_lens.SAE``.
        pictures: An image source, or any sequence of PIL pictures with ``ids``.
        tokens: Which tokens to encode; by default those the SAE was trained on.
        pooling: Image-level latents are the ``max`` or ``mean`` over those tokens.
        embedders: Models that embed the pictures, by name.
        batch_size: Pictures per forward pass.
        progress: Show a progress bar.

    Raises:
        ValueError: no picture could be read.
    """
    hook_name = sae.cfg.metadata["hook_name"]
    tokens = tokens or trained_tokens(sae)
    rows = _row_selector(model, tokens)
    harvester, fidelity = Harvester(model, [hook_name]), Fidelity(sae.cfg.d_in)
    embedders = embedders or {}
    bad: dict[str, str] = {}
    indices: list[int] = []
    latents, neurons = [], []
    embeddings: dict[str, list[Tensor]] = {name: [] for name in embedders}
    for batch in _batches(pictures, batch_size, bad, progress):
        indices += batch
        images = list(batch.values())
        x = rows(harvester(model.preprocess(images))[hook_name])
        encoded = sae.encode(x)
        fidelity.update(x, sae.decode(encoded), encoded)
        latents.append(_pool(encoded, pooling).cpu().to_sparse_csr())
        neurons.append(_pool(x, pooling).cpu())
        for name, embedder in embedders.items():
            embedding = embedder.image_features(embedder.preprocess(images))
            embeddings[name].append(embedding.float().cpu())
    if not indices:
        raise ValueError("none of the images could be read")
    return EncodedImages(
        ids=[pictures.ids[i] for i in indices],
        indices=indices,
        bad_images=bad,
        latents=_stack_csr(latents, int(sae.cfg.d_sae)),
        neurons=torch.cat(neurons).float(),
        embeddings={name: torch.cat(parts) for name, parts in embeddings.items()},
        fidelity=fidelity.compute(),
        tokens=tokens,
        pooling=pooling,
    )


def _batches(
    pictures: Any, batch_size: int, bad: dict[str, str], progress: bool
) -> Iterator[dict[int, Any]]:
    starts = range(0, len(pictures), batch_size)
    for start in track(starts, "Encoding images", disable=not progress, transient=True):
        batch = {}
        for index in range(start, min(start + batch_size, len(pictures))):
            try:
                batch[index] = pictures[index]
            except BadImageError as error:
                bad[pictures.ids[index]] = str(error)
        if batch:
            yield batch


def _row_selector(model: VisionBridge, tokens: str) -> Callable[[Tensor], Tensor]:
    selection, layout = TokenSelection.parse(tokens), model.token_layout()

    def select(activation: Tensor) -> Tensor:
        if activation.ndim == 4:
            activation = activation.flatten(-2)
        if activation.ndim == 2 or selection == TokenSelection("all"):
            return activation
        rows = selection.rows(layout, len(activation)).to(activation.device)
        return activation.gather(1, rows[..., None].expand(-1, -1, activation.shape[-1]))

    return select


def _pool(x: Tensor, pooling: Pooling) -> Tensor:
    if x.ndim == 2:
        return x
    return x.amax(dim=1) if pooling == "max" else x.mean(dim=1)


def _stack_csr(parts: list[Tensor], width: int) -> Tensor:
    """Stack CSR matrices on top of each other."""
    offsets = [torch.zeros(1, dtype=torch.int64)]
    for part in parts:
        offsets.append(part.crow_indices()[1:] + offsets[-1][-1])
    return torch.sparse_csr_tensor(
        torch.cat(offsets),
        torch.cat([part.col_indices() for part in parts]),
        torch.cat([part.values() for part in parts]),
        size=(sum(part.shape[0] for part in parts), width),
    )
