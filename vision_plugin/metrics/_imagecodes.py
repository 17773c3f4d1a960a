"""Image-level latents, kept as sparse rows for the metrics that fit probes.

Only the non-zeros are kept, so that 50,000 images of 65,536 latents fit in memory (64 non-zeros an
image are 40 MB).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from vision_plugin.metrics._latents import LatentColumns, read_latents
from vision_plugin.metrics._streaming import StreamingMetric

__all__ = ["pool_latents"]

Array = npt.NDArray[Any]
Pooling = Literal["cls", "max", "mean"]

COLUMNS_AT_ONCE = 2**26
"""Elements of the largest dense block of latents (float32: 256 MiB)."""


def pool_latents(
    latents: Float[Tensor, "n tokens k"], how: Pooling, *, cls_at: int = 0
) -> Float[Tensor, "n k"]:
    """Reduce token-level latents to image-level ones; report ``how`` beside the result.

    Args:
        latents: ``[n, tokens, k]``.
        how: ``"cls"`` for the CLS token's latents, ``"max"`` or ``"mean"`` over tokens.
        cls_at: index of the CLS token.

    Raises:
        ValueError: there is no such way to pool.

    Examples:
        >>> tokens = torch.tensor([[[0.0], [4.0], [2.0]]])  # 1 image, 3 tokens, 1 latent
        >>> [vp.metrics.pool_latents(tokens, how).item() for how in ("cls", "max", "mean")]
        [0.0, 4.0, 2.0]
    """
    if how == "cls":
        return latents[:, cls_at]
    if how == "max":
        return latents.amax(1)
    if how == "mean":
        return latents.mean(1)
    raise ValueError(f"how={how!r} is not 'cls', 'max' or 'mean'")


class ImageCodes(StreamingMetric):
    """Base of metrics over image-level latents and class labels.

    Args:
        n_features: number of latents.
    """

    sparse_latents = True

    def __init__(self, *, n_features: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if n_features < 1:
            raise ValueError(f"n_features={n_features} must be at least 1")
        self.n_features = n_features
        whole = torch.zeros(0, dtype=torch.int64)
        for name in ("row_lengths", "features", "labels"):
            self.add_rows_state(name, whole)
        self.add_rows_state("values", torch.zeros(0, dtype=torch.float32))

    def add_images(self, latents: Tensor, labels: Tensor | Sequence[int]) -> None:
        """Keep image-level latents ``[n, n_features]`` and their integer labels ``[n]``.

        Raises:
            ValueError: numbers disagree, a label is negative, or a latent is NaN or infinite.
        """
        labels = torch.as_tensor(labels)
        if labels.shape != latents.shape[:1]:
            raise ValueError(
                f"latents are for {latents.shape[0]} images and labels have shape "
                f"{tuple(labels.shape)}; pass one integer per image"
            )
        if labels.is_floating_point() or (labels.numel() and int(labels.min()) < 0):
            raise ValueError("labels must be integers from 0 up")
        read = read_latents(latents.detach().to(self.device), n_features=self.n_features)
        if isinstance(read, LatentColumns):
            order = torch.sort(read.rows, stable=True).indices
            rows, features, values = read.rows[order], read.features[order], read.values[order]
        else:
            rows, features = read.nonzero(as_tuple=True)
            values = read[rows, features]
        self.add_rows("row_lengths", torch.bincount(rows, minlength=latents.shape[0]))
        self.add_rows("features", features)
        self.add_rows("values", values.float())
        self.add_rows("labels", labels.to(self.device, torch.int64))

    def codes(self) -> Any:
        """Return all images as a scipy CSR matrix ``[n, n_features]``, float32."""
        from scipy.sparse import csr_array

        lengths = self.rows("row_lengths").cpu().numpy()
        indptr = np.concatenate([[0], lengths.cumsum()])
        data, indices = self.rows("values").cpu().numpy(), self.rows("features").cpu().numpy()
        return csr_array((data, indices, indptr), shape=(len(lengths), self.n_features))

    def label_array(self) -> Array:
        """Return the labels of all images."""
        found: Array = self.rows("labels").cpu().numpy()
        return found


def column_blocks(codes: Any, columns: Array) -> list[Array]:
    """Split column numbers so that each dense block stays small, but is never a single column.

    numpy sums a lone column pairwise and several columns row by row; without lone columns every
    split gives the same bits.
    """
    step = max(2, COLUMNS_AT_ONCE // max(1, codes.shape[0]))
    blocks = [columns[start : start + step] for start in range(0, len(columns), step)]
    if len(blocks) > 1 and len(blocks[-1]) == 1:
        blocks[-2:] = [np.concatenate(blocks[-2:])]
    return blocks


def active_columns(codes: Any) -> Array:
    """Return the numbers of the latents that are not zero throughout, at least two of them."""
    counts = np.bincount(codes.indices[codes.data != 0], minlength=codes.shape[1])
    active = np.flatnonzero(counts)
    if len(active) == 1 and codes.shape[1] > 1:
        active = np.union1d(active, [0 if active[0] else 1])
    return active


def class_f_scores(codes: Any, labels: Array) -> Array:
    """Return each latent's F statistic between classes, ``-inf`` for one without variance."""
    from sklearn.feature_selection import f_classif

    scores = np.full(codes.shape[1], -np.inf)
    by_column = codes.tocsc()
    for block in column_blocks(codes, active_columns(codes)):
        dense = np.ascontiguousarray(by_column[:, block].toarray())
        with np.errstate(divide="ignore", invalid="ignore"):
            found, _ = f_classif(dense, labels)
        scores[block] = np.nan_to_num(found, nan=-np.inf)
    return scores


def probe_columns(codes: Any, columns: Array) -> Array:
    """Return a few latents of all images as a dense float32 matrix."""
    dense: Array = codes[:, columns].toarray()
    return dense
