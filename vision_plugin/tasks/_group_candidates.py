"""Edits that take a nuisance away, as each method proposes them from biased images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vision_plugin.models.dictionary import Dictionary
from vision_plugin.models.site import Site
from vision_plugin.steering import EditPass
from vision_plugin.tasks._candidates import (
    Candidate,
    erasure,
    layer_of,
    listed,
    projection,
    suppressed,
)
from vision_plugin.tasks._erase import leace, probe_direction
from vision_plugin.tasks._find import GRADIENT_RULES
from vision_plugin.tasks._group_data import GROUPS, GroupSplit
from vision_plugin.tasks._group_evidence import gather_groups
from vision_plugin.tasks._probe import Probe, group_weights

RANKS = (2, 5, 20)


def group_latent_candidates(
    method: str,
    model: Any,
    sae: Dictionary,
    train: GroupSplit,
    images: EditPass,
    probe: Probe,
    *,
    rules: Sequence[str],
    sizes: Sequence[int],
    tokens: Sequence[str],
    batch_size: int,
    given: Sequence[int] = (),
) -> Iterator[Candidate]:
    """Propose latents by every rule and size, set to their mean over the groups.

    Latents that are given are proposed in place of those.
    """
    for kind in tokens:
        site = Site.of(model, sae, tokens=kind)
        evidence = gather_groups(
            site, sae, train, images, probe, with_gradients=not GRADIENT_RULES.isdisjoint(rules),
            batch_size=batch_size,
        )  # fmt: skip
        if given:
            found = listed(given, kind, evidence.active, evidence.neutral)
            edit, layer = suppressed(sae, found), layer_of(site)
            yield Candidate(method, edit, len(found), layer, f"given, {kind}", found, fixed=True)
        for rule in () if given else rules:
            every = evidence.found(rule)
            for size in sizes:
                found = every.best(size)
                if len(found) == size:
                    yield Candidate(
                        method, suppressed(sae, found), size, layer_of(site), f"{rule}, {kind}",
                        found, fixed=True,
                    )  # fmt: skip


def group_direction_candidates(
    model: Any, images: EditPass, train: GroupSplit, *, tokens: Sequence[str]
) -> Iterator[Candidate]:
    """Propose DiffMean, difference subspaces, LEACE and the nuisance's probe behind each block.

    Args:
        model: A VisionBridge.
        images: The training images, run once.
        train: The training images.
        tokens: Kinds of token.
    """
    for layer in range(int(model.cfg.n_layers)):
        for kind in tokens:
            rows = model.token_layout().indices(kind)
            stream = images.stream(layer + 1)[:, rows].cpu().double()
            yield from _directions(layer, kind, stream, train)


def _directions(
    layer: int, tokens: str, stream: Float[Tensor, "n tokens d"], train: GroupSplit
) -> Iterator[Candidate]:
    groups, n_tokens = train.groups, stream.shape[1]
    means = torch.stack([stream[groups == group].mean(0) for group in range(len(GROUPS))])
    moved = torch.stack([means[1] - means[0], means[3] - means[2]])
    centre = means.mean((0, 1)).float()
    projected = partial(projection, layer=layer, centre=centre, tokens=tokens)
    yield projected("diff_mean", moved.mean((0, 1))[None], tokens)
    basis = torch.linalg.svd(moved.flatten(0, 1), full_matrices=False).Vh
    for rank in sorted({min(rank, len(basis)) for rank in RANKS}):
        yield projected("difference_subspace", basis[:rank], f"rank {rank}, {tokens}")
    flat = stream.flatten(0, 1)
    nuisance = train.nuisance.repeat_interleave(n_tokens)
    alike = group_weights(groups).repeat_interleave(n_tokens)
    for weights, how in ((None, tokens), (alike, f"groups weighted, {tokens}")):
        yield erasure(leace(flat, nuisance, weights), how, layer=layer, tokens=tokens)
        direction = probe_direction(flat, nuisance > 0, weights)
        yield projected("probe", direction[None], how)
