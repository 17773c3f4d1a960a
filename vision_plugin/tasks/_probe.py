"""A linear probe on image embeddings."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vision_plugin._extras import require_sklearn


@dataclass(frozen=True, eq=False)
class Probe:
    """Multinomial logistic regression.

    Attributes:
        weight: Row of each class.
        bias: Number of each class.
    """

    weight: Float[Tensor, "c d"]
    bias: Float[Tensor, " c"]

    @classmethod
    def fit(
        cls,
        embeddings: Float[Tensor, "n d"],
        labels: Int[Tensor, " n"],
        weights: Float[Tensor, " n"] | None = None,
    ) -> Probe:
        """Fit scikit-learn's logistic regression (C = 1).

        Args:
            embeddings: Unit embeddings.
            labels: Classes, 0 and up.
            weights: How much each image counts; None counts them alike.

        Raises:
            ImportError: scikit-learn is missing.
        """
        require_sklearn("probes on image embeddings")
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression

        probe = LogisticRegression(max_iter=1000)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            probe.fit(
                embeddings.double().numpy(),
                labels.numpy(),
                sample_weight=None if weights is None else weights.double().numpy(),
            )
        rows, numbers = torch.from_numpy(probe.coef_), torch.from_numpy(probe.intercept_)
        if len(rows) == 1:  # two classes: the first has the logit 0
            rows = torch.cat([torch.zeros_like(rows), rows])
            numbers = torch.cat([torch.zeros_like(numbers), numbers])
        n_classes = int(labels.max()) + 1
        weight = torch.zeros(n_classes, rows.shape[1], dtype=rows.dtype)
        bias = torch.full((n_classes,), -torch.inf, dtype=rows.dtype)  # never seen, never answered
        weight[probe.classes_], bias[probe.classes_] = rows, numbers
        return cls(weight, bias)

    def logits(self, embeddings: Float[Tensor, "n d"]) -> Float[Tensor, "n c"]:
        """Return the logit of each class."""
        rows = self.weight.to(embeddings)
        return embeddings @ rows.T + self.bias.to(embeddings)

    def answers(self, embeddings: Float[Tensor, "n d"]) -> Int[Tensor, " n"]:
        """Return the class of each image."""
        return self.logits(embeddings.double()).argmax(1)


def group_weights(groups: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Return weights with which every group counts the same."""
    sizes = torch.bincount(groups)
    return len(groups) / (int((sizes > 0).sum()) * sizes[groups].double())
