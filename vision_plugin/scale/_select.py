"""The k largest values of a batch that is spread over processes, selected exactly."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vision_plugin.scale._team import Lanes

_BITS = 8
_WHOLE = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Whole numbers as long as a floating-point number: of those from zero up the order is the same."""


@torch.no_grad()
def select(
    team: Lanes, lanes: Sequence[Float[Tensor, "rows d_sae"]], k: int
) -> list[Bool[Tensor, "rows d_sae"]]:
    """Return which values of this process's lanes are among the k largest of the whole batch.

    A radix select: the processes add up counts of the leading eight bits, then of the next eight
    among what has these, and so on to the last bit. Of equal values the first are taken, in the
    order of lanes, rows and latents.

    Args:
        team: The processes.
        lanes: Values of each lane of this process, none below zero.
        k: How many values to keep; zeros are never kept.
    """
    if k < 1:
        return [torch.zeros_like(lane, dtype=torch.bool) for lane in lanes]
    size = lanes[0].element_size() if lanes else 4
    size = int(team.add_up(torch.tensor(size if team.leads else 0)))
    left = torch.cat([lane.detach().reshape(-1).view(_WHOLE[size]) for lane in lanes] or [_none()])
    left = left[left > 0]
    prefix, wanted, n_equal = 0, k, 0
    for shift in range(8 * size - _BITS, -1, -_BITS):
        digits = (left >> shift) & (2**_BITS - 1)
        counts = team.add_up(torch.bincount(digits.long(), minlength=2**_BITS)).cpu()
        if shift == 8 * size - _BITS and int(counts.sum()) <= k:
            return [lane > 0 for lane in lanes]
        from_top = counts.flip(0).cumsum(0)
        place = int((from_top >= wanted).nonzero()[0])
        digit = 2**_BITS - 1 - place
        n_equal = int(counts[digit])
        wanted -= int(from_top[place]) - n_equal
        prefix |= digit << shift
        left = left[digits == digit]
    cut = torch.tensor(prefix, dtype=_WHOLE[size])
    return _above(team, lanes, cut.view(lanes[0].dtype) if lanes else cut, wanted, n_equal)


def _none() -> Tensor:
    return torch.zeros(0, dtype=torch.int32)


def _above(
    team: Lanes, lanes: Sequence[Tensor], cut: Tensor, wanted: int, n_equal: int
) -> list[Tensor]:
    """Return the values above a cut, and the first ``wanted`` of those that equal it."""
    if wanted == n_equal:
        return [lane >= cut.to(lane.device) for lane in lanes]
    equal = [lane == cut.to(lane.device) for lane in lanes]
    counts = torch.zeros(team.n_lanes, dtype=torch.int64)
    for number, found in zip(team.own, equal, strict=True):
        counts[number] = int(found.sum())
    counts = team.add_up(counts)
    before = counts.cumsum(0) - counts
    kept = []
    for number, lane, found in zip(team.own, lanes, equal, strict=True):
        place = found.reshape(-1).cumsum(0).view(found.shape)
        kept.append(
            (lane > cut.to(lane.device)) | (found & (place <= wanted - int(before[number])))
        )
    return kept
