"""Non-negative sparse codes over a dictionary of words: two solvers of one problem.

Both minimise, for each target ``z`` and unit rows ``C``,

    ``||C.T w - z||^2 + l1 * sum(w)``  over ``w >= 0``,

which is the Lasso that SpLiCE's code runs (scikit-learn's ``alpha`` is ``l1 / (2 d)``); the paper
writes the factor as ``2 lambda``, so its lambda is half of ``l1``.
"""

from __future__ import annotations

import warnings
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vision_plugin._extras import require_sklearn

Solver = Literal["fista", "sklearn"]
SOLVERS: tuple[Solver, ...] = ("fista", "sklearn")
PIVOT_EVERY, MOST_PIVOTS = 400, 200
"""Gradient steps between two tries of exact solves, and most solves of a try."""
CHUNK = 2**24
"""Largest number of weights that are solved for at once."""


def sparse_codes(
    targets: Float[Tensor, "n d"],
    words: Float[Tensor, "v d_words"],
    l1: float,
    *,
    solver: Solver = "fista",
    tolerance: float = 1e-6,
    max_steps: int = 5000,
) -> Float[Tensor, "n v"]:
    """Return non-negative sparse weights of words for each target, in float64.

    Args:
        targets: What is to be composed.
        words: Rows to compose it from.
        l1: Factor of the sum of the weights.
        solver: ``"fista"``, batched, in torch (Beck and Teboulle 2009, restarted where it swings,
            and finished by exact solves on the words in use where words are alike and it is slow);
            or ``"sklearn"``, one target after the other.
        tolerance: Largest violation of the optimality conditions at which the batched solver stops.
        max_steps: Most steps; targets that have not settled by then are warned of.

    Raises:
        ValueError: shapes do not fit, a number is not finite, or ``l1`` is not above 0.

    Examples:
        >>> codes = vp.lens.sparse_codes(torch.eye(2), torch.eye(2), 0.2)
        >>> codes.round(decimals=3).tolist()
        [[0.9, 0.0], [0.0, 0.9]]
    """
    if targets.ndim != 2 or words.ndim != 2 or targets.shape[1] != words.shape[1]:
        raise ValueError(
            f"targets {list(targets.shape)} and words {list(words.shape)} need the same width"
        )
    if not l1 > 0:
        raise ValueError(f"l1={l1} must be above 0: without a penalty no weight becomes 0")
    if not bool(targets.isfinite().all() and words.isfinite().all()):
        raise ValueError("targets or words hold NaN or infinity: leave those rows out")
    if solver not in SOLVERS:
        raise ValueError(f"solver={solver!r}: use {' or '.join(SOLVERS)}")
    targets, words = targets.double(), words.double()
    if solver == "sklearn":
        return _by_sklearn(targets, words, l1)
    step = max(1, CHUNK // max(1, len(words)))
    largest = _largest_eigenvalue(words)
    parts = [_by_fista(some, words, l1, largest, tolerance, max_steps) for some in
             targets.split(step)]  # fmt: skip
    return torch.cat(parts) if parts else targets.new_zeros(0, len(words))


def violation(
    weights: Float[Tensor, "n v"],
    targets: Float[Tensor, "n d"],
    words: Float[Tensor, "v d"],
    l1: float,
) -> Float[Tensor, " n"]:
    """Return how far weights are from the optimality (KKT) conditions, per target.

    At the optimum the gradient ``2 C (C.T w - z) + l1`` is 0 where a weight is above 0, and 0 or
    more where it is 0.
    """
    words, targets, weights = words.double(), targets.double(), weights.double()
    gradient = 2 * (weights @ words - targets) @ words.T + l1
    wrong = torch.where(weights > 0, gradient.abs(), (-gradient).clamp(min=0))
    return wrong.amax(1)


def _by_fista(
    targets: Tensor, words: Tensor, l1: float, largest: float, tolerance: float, max_steps: int
) -> Tensor:
    n, width = len(targets), 1 / (2 * largest)
    weights = targets.new_zeros(n, len(words))
    # A word whose gradient at 0 is not negative enough may still enter later, so all take part.
    momentum, t = weights.clone(), targets.new_ones(n, 1)
    left = torch.arange(n)
    done = targets.new_zeros(n, len(words))
    for step in range(max_steps):
        gradient = 2 * (momentum @ words - targets) @ words.T + l1
        new = (momentum - width * gradient).clamp(min=0)
        moved = new - weights
        # Restart a target's momentum where it points against the step (O'Donoghue, Candes 2015).
        swings = ((momentum - new) * moved).sum(1, keepdim=True) > 0
        t = torch.where(swings, torch.ones_like(t), t)
        t_next = (1 + (1 + 4 * t * t).sqrt()) / 2
        momentum = torch.where(swings, new, new + (t - 1) / t_next * moved)
        weights, t = new, t_next
        if step % 20 == 19:
            if step % PIVOT_EVERY == PIVOT_EVERY - 1:
                weights = _pivoted(weights, targets, words, l1, tolerance)
            settled = violation(weights, targets, words, l1) <= tolerance
            if bool(settled.any()):
                done[left[settled]] = weights[settled]
                keep = ~settled
                left, targets = left[keep], targets[keep]
                weights, momentum, t = weights[keep], momentum[keep], t[keep]
            if len(left) == 0:
                return done
    done[left] = weights
    worst = float(violation(weights, targets, words, l1).max())
    warnings.warn(
        f"{len(left)} of {n} codes have not settled after {max_steps} steps (optimality violated "
        f"by up to {worst:.1e}): raise max_steps=",
        stacklevel=3,
    )
    return done


def _pivoted(
    weights: Tensor, targets: Tensor, words: Tensor, l1: float, tolerance: float
) -> Tensor:
    """Return optimal weights where exact solves on words in use find them, the others unchanged.

    The words in use are those that gradient steps have left. A word whose solved weight is
    negative leaves, else the word whose gradient violates the conditions most comes in, until
    nothing is violated (active set; Lawson and Hanson 1974, without their line search, so that it
    may go round in circles: then the target is left to gradient steps).
    """
    used = weights > 0
    found = weights.clone()
    left = torch.nonzero(used.sum(1) <= words.shape[1]).flatten()
    for _ in range(MOST_PIVOTS):
        if len(left) == 0:
            break
        solved = _solved(used[left], targets[left], words, l1)
        negative = solved < 0
        gradient = 2 * (solved @ words - targets[left]) @ words.T + l1
        gradient[used[left]] = 0
        worst, entering = gradient.min(1)
        good = ~negative.any(1) & (worst >= -tolerance)
        found[left[good]] = solved[good]
        used[left] &= ~negative
        enters = ~negative.any(1) & ~good & (used[left].sum(1) < words.shape[1])
        used[left[enters], entering[enters]] = True
        left = left[negative.any(1) | enters]
    better = violation(found, targets, words, l1) < violation(weights, targets, words, l1)
    return torch.where(better[:, None], found, weights)


def _solved(used: Tensor, targets: Tensor, words: Tensor, l1: float) -> Tensor:
    """Return the weights of the words in use at which their gradients are 0; others are 0."""
    most = max(1, int(used.sum(1).max()))
    active, places = used.to(targets.dtype).topk(most, dim=1)
    rows = words[places] * active[..., None]
    # A word that is not in use has a row of its own, with a weight of 0; alike ones get a ridge.
    gram = rows @ rows.mT + torch.diag_embed(1 - active + 1e-12)
    right = (rows @ targets[..., None]).squeeze(-1) - l1 / 2 * active
    values = torch.linalg.solve(gram, right)
    return torch.zeros_like(used, dtype=targets.dtype).scatter(1, places, values)


def _largest_eigenvalue(words: Tensor) -> float:
    """Return the largest eigenvalue of ``words.T @ words``: the gradient's Lipschitz constant."""
    gram = words.T @ words if words.shape[1] <= words.shape[0] else words @ words.T
    return max(float(torch.linalg.eigvalsh(gram)[-1]), 1e-12)


def _by_sklearn(targets: Tensor, words: Tensor, l1: float) -> Tensor:
    require_sklearn("codes with solver='sklearn'")
    from sklearn.linear_model import Lasso

    lasso = Lasso(
        alpha=l1 / (2 * words.shape[1]),
        fit_intercept=False,
        positive=True,
        tol=1e-9,
        max_iter=20_000,
    )
    matrix = np.asfortranarray(words.T.cpu().numpy())
    found = [lasso.fit(matrix, target.cpu().numpy()).coef_.copy() for target in targets]
    if not found:
        return targets.new_zeros(0, len(words))
    return torch.from_numpy(np.stack(found)).to(targets)
