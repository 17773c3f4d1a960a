"""Rotations that are learned by gradient: distributed alignment search.

Geiger et al. 2023 (arXiv 2303.02536): an orthogonal map is trained so that swapping its first
coordinates swaps one factor. Huang et al. 2024 (arXiv 2402.17700) add that the other factors stay
(MDAS). Here each factor and size has a map of its own, of which only the rows that are swapped are
kept.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vision_plugin.models.site import Site
from vision_plugin.tasks._swap_pairs import SwapJudge


def learn_rotation(
    pairs: SwapJudge,
    site: Site,
    factor: str,
    size: int,
    *,
    isolates: bool,
    steps: int = 100,
    batch_size: int = 64,
    lr: float = 0.02,
    seed: int = 0,
) -> Float[Tensor, "size d"]:
    """Return orthonormal directions whose swap swaps a factor, trained on pairs.

    Args:
        pairs: Training pairs.
        site: Hook and tokens of the swap.
        factor: Factor to swap.
        size: Number of directions.
        isolates: Whether the other factors are trained to stay (MDAS), too.
        steps: Steps of Adam.
        batch_size: Pairs of a step.
        lr: Learning rate.
        seed: Seed of the first rotation and of the batches.
    """
    own, theirs = (run.activations(site.hook_name_out) for run in (pairs.run, pairs.sources))
    width = own.flatten(2).shape[-1] if own.ndim > 2 else own.shape[-1]
    generator = torch.Generator().manual_seed(seed)
    start = torch.linalg.qr(torch.randn(width, size, generator=generator)).Q.T
    rotation = nn.Linear(width, size, bias=False, device=own.device)
    nn.utils.parametrizations.orthogonal(rotation)
    rotation.weight = start.to(own)
    candidates = pairs.differs(factor).nonzero().flatten()
    mask = site.mask(own[:1])
    parameters = list(rotation.parameters())
    step = torch.optim.Adam(parameters, lr=lr)
    for _ in range(steps):
        order = torch.randperm(len(candidates), generator=generator)[:batch_size]
        rows = candidates[order]
        base, source = own[rows], theirs[rows]
        weight = rotation.weight
        flat = (source - base).flatten(2) if base.ndim > 2 else source - base
        change = ((flat @ weight.T) @ weight).view_as(base)
        edited = base + (change if mask is None else change * mask)
        embedded = pairs.run.rerun(site, edited, rows)
        loss = _loss(pairs, embedded, factor, rows, isolates=isolates)
        # Not loss.backward(), which would leave gradients on the model.
        for parameter, gradient in zip(
            parameters, torch.autograd.grad(loss, parameters), strict=True
        ):
            parameter.grad = gradient
        step.step()
    return rotation.weight.detach().float().cpu()


def _loss(
    pairs: SwapJudge, embedded: Tensor, factor: str, rows: Tensor, *, isolates: bool
) -> Tensor:
    def cross_entropy(of: str, wanted: Tensor) -> Tensor:
        logits = pairs.readers.logits(embedded, of).float()
        return nn.functional.cross_entropy(logits, wanted[rows].to(logits.device))

    loss = cross_entropy(factor, pairs.source[factor])
    others = [other for other in pairs.factors if other != factor]
    if isolates:
        kept = [cross_entropy(other, pairs.base[other]) for other in others]
        loss = loss + torch.stack(kept).mean()
    return loss
