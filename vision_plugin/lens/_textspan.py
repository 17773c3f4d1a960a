"""TEXTSPAN: the few texts whose directions span most of what a head writes.

Gandelsman, Efros and Steinhardt, Interpreting CLIP's image representation via text-based
decomposition (ICLR 2024, arXiv 2310.05916), Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vision_plugin._rich import Table

_SPENT = 1e-10
"""Share of a text's squared length below which nothing of its own is left."""
_FLAT = 1e-12
"""Share of the variance below which nothing is left to explain."""


@dataclass(frozen=True, eq=False)
class TextSpan:
    """Texts in the order in which they were chosen, and the variance that they explain together.

    Attributes:
        texts: The texts.
        chosen: Their places in the list that they come from.
        explained: Share of the outputs' variance in the span of the first texts, one by one.
        basis: Orthonormal directions, one for each text: what it adds to the texts before it.
        mean: Mean of the outputs.

    Examples:
        >>> outputs = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
        >>> span = vp.lens.textspan(outputs, torch.eye(2), ["x", "y"])
        >>> span.project(outputs).shape
        torch.Size([4, 2])
    """

    texts: tuple[str, ...]
    chosen: Int[Tensor, " m"]
    explained: Float[Tensor, " m"]
    basis: Float[Tensor, "m d"]
    mean: Float[Tensor, " d"]

    def project(self, outputs: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        """Return outputs with everything replaced by its mean that the texts do not span."""
        basis = self.basis.to(outputs)
        mean = self.mean.to(outputs)
        return mean + (outputs - mean) @ basis.T @ basis

    def table(self) -> Table:
        """Return the texts with the variance explained up to each, for ``rich`` to print."""
        table = Table()
        table.add_column("text")
        table.add_column("variance explained", justify="right")
        for text, share in zip(self.texts, self.explained.tolist(), strict=True):
            table.add_row(text, f"{share:.3f}")
        return table

    def to_dict(self) -> dict[str, Any]:
        """Return texts and shares ready for JSON."""
        return {"texts": list(self.texts), "explained": self.explained.tolist()}


def textspan(
    outputs: Float[Tensor, "n d"],
    texts: Float[Tensor, "v d_text"],
    names: Sequence[str],
    *,
    n_texts: int = 10,
    rank: int | None = None,
) -> TextSpan:
    """Choose texts that span the outputs of a head.

    Each step takes the text along which the outputs, less what is spanned, vary most, and takes its
    direction out of outputs and texts. Texts are projected onto the outputs' own subspace first
    and not brought to one length, so that a text far from what the head can write loses.

    Args:
        outputs: Outputs of a head for images.
        texts: Text embeddings.
        names: The texts.
        n_texts: Most texts to choose; fewer where they explain everything.
        rank: Dimensions of the outputs' subspace, from the largest singular value down (the
            paper: that of the head, 80 in its code); None takes all that are not zero.

    Raises:
        ValueError: there are no outputs or texts, or the widths differ.

    Examples:
        >>> outputs = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
        >>> span = vp.lens.textspan(outputs, torch.eye(2), ["x", "y"])
        >>> span.texts, [round(share, 3) for share in span.explained.tolist()]
        (('x', 'y'), [0.8, 1.0])
    """
    if len(names) != len(texts):
        raise ValueError(f"names= holds {len(names)} texts and texts= {len(texts)} embeddings")
    if not len(texts) or not len(outputs):
        raise ValueError("TEXTSPAN needs at least one output and one text")
    if outputs.shape[1] != texts.shape[1]:
        raise ValueError(
            f"outputs= have {outputs.shape[1]} numbers and texts= {texts.shape[1]}: take both from "
            "the same model"
        )
    if n_texts < 1:
        raise ValueError(f"n_texts={n_texts} must be at least 1")
    values, words = outputs.double(), texts.double()
    _, singular, rows = torch.linalg.svd(values, full_matrices=False)
    kept = int((singular > 1e-6 * singular[0]).sum())
    rows = rows[: kept if rank is None else min(rank, kept)]
    mean = values.mean(0)
    values = (values - mean) @ rows.T  # in the coordinates of the subspace
    words = words @ rows.T
    lengths = words.square().sum(1)
    covariance = values.T @ values / len(values)
    total = float(covariance.trace())
    chosen: list[int] = []
    basis: list[Tensor] = []
    explained: list[float] = []
    for _ in range(min(n_texts, len(words))):
        left = words.square().sum(1)
        variance = ((words @ covariance) * words).sum(1)
        variance[left <= _SPENT * lengths.clamp(min=1e-300)] = -1.0
        best = int(variance.argmax())
        if total == 0.0 or variance[best] <= _FLAT * total * float(left[best]):
            break
        direction = words[best] / left[best].sqrt()
        chosen.append(best)
        basis.append(direction)
        along = covariance @ direction
        covariance = covariance - torch.outer(along, direction) - torch.outer(direction, along)
        covariance = covariance + (direction @ along) * torch.outer(direction, direction)
        words = words - torch.outer(words @ direction, direction)
        explained.append(1.0 - float(covariance.trace()) / total)
    width = values.shape[1]
    directions = torch.stack(basis) if basis else values.new_zeros(0, width)
    return TextSpan(
        tuple(str(names[place]) for place in chosen),
        torch.tensor(chosen, dtype=torch.long),
        torch.tensor(explained, dtype=torch.float64),
        directions @ rows,
        mean,
    )
