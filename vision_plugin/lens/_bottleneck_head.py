"""Linear heads: the sparse one of a concept bottleneck, and the probes beside it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vision_plugin._extras import require_sklearn
from vision_plugin.lens._bottleneck_data import Codes

PROBE_STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0)
"""Inverse strengths of the probes' regularisation, from which validation chooses."""


@dataclass(frozen=True, eq=False)
class SparseHead:
    """A linear layer without bias on latents.

    Attributes:
        weight: Row of each class, ``[classes, d_sae]``.
        l1: Factor of the mean of the absolute weights in the loss.
        learning_rate: Adam's.
    """

    weight: Float[Tensor, "classes d_sae"]
    l1: float
    learning_rate: float

    def logits(
        self, codes: Codes, rows: Int[Tensor, " m"], without: Sequence[int] = ()
    ) -> Float[Tensor, "m classes"]:
        """Return the logits of some images, without some latents."""
        weight = self.weight
        if len(without):
            weight = weight.clone()
            weight[:, list(without)] = 0
        return torch.cat([codes.dense(some) @ weight.T for some in rows.split(4096)])


def fit_head(
    codes: Codes,
    labels: Int[Tensor, " n"],
    rows: Int[Tensor, " m"],
    *,
    l1: float,
    learning_rate: float,
    epochs: int,
    batch_size: int,
    seed: int,
) -> SparseHead:
    """Fit the head of Discover-then-Name (Rao et al. 2024, arXiv 2407.14499).

    The loss is the cross-entropy plus ``l1`` times the mean of the absolute weights, minimised by
    Adam. The weights begin at 0, so a latent that never fires keeps none.

    Args:
        codes: Latents of all images.
        labels: Class of each image.
        rows: Images to fit on.
        l1: Factor of the penalty.
        learning_rate: Adam's.
        epochs: Passes over the images.
        batch_size: Images per step.
        seed: Seed of the order of the images.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = torch.zeros(int(labels.max()) + 1, codes.width, requires_grad=True)
    adam = torch.optim.Adam([weight], lr=learning_rate)
    held = codes.dense(rows) if len(rows) * codes.width <= 2**26 else None
    for _ in range(epochs):
        for some in torch.randperm(len(rows), generator=generator).split(batch_size):
            z = codes.dense(rows[some]) if held is None else held[some]
            loss = nn.functional.cross_entropy(z @ weight.T, labels[rows[some]])
            loss = loss + l1 * weight.abs().mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
    return SparseHead(weight.detach(), l1, learning_rate)


def probe_answers(
    features: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    parts: dict[str, Int[Tensor, " m"]],
) -> Int[Tensor, " t"]:
    """Return a linear probe's answers on test, its regularisation chosen on validation.

    The probe is scikit-learn's logistic regression on features that are standardised by the
    training images.

    Raises:
        ImportError: scikit-learn is missing.
    """
    require_sklearn("probes beside a bottleneck")
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    train = features[parts["train"]].double()
    spread = train.std(0).clamp(min=1e-12)
    whole = ((features.double() - train.mean(0)) / spread).numpy()
    best: tuple[float, Tensor] | None = None
    for strength in PROBE_STRENGTHS:
        probe = LogisticRegression(C=strength, max_iter=300)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            probe.fit(whole[parts["train"].numpy()], labels[parts["train"]].numpy())
        seen = torch.from_numpy(probe.predict(whole[parts["validation"].numpy()]))
        right = float((seen == labels[parts["validation"]]).double().mean())
        if best is None or right > best[0]:
            best = right, torch.from_numpy(probe.predict(whole[parts["test"].numpy()]))
    assert best is not None
    return best[1]


def concepts_needed(
    contributions: Float[Tensor, "n d_sae"], shares: Sequence[float]
) -> Int[Tensor, "n shares"]:
    """Return how many latents, largest first, make up shares of the positive contributions.

    An image without a positive contribution needs none.
    """
    positive = contributions.clamp(min=0).double().sort(dim=1, descending=True).values
    total = positive.sum(1, keepdim=True)
    reached = positive.cumsum(1)
    goals = total * torch.tensor(list(shares), dtype=torch.float64)
    # The sum of all may fall short of the total by a rounding error.
    needed = (reached[:, :, None] < goals[:, None, :] * (1 - 1e-12)).sum(1) + 1
    most = (positive > 0).sum(1, keepdim=True)
    return torch.minimum(needed, most)
