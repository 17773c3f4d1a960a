"""Processes that train one SAE together: what they exchange, in an order that never changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


def check_lanes(n_lanes: int) -> None:
    """Raise ValueError if a batch is not cut into so many lanes: their tree is a binary one."""
    if n_lanes < 1 or n_lanes & (n_lanes - 1):
        raise ValueError(f"n_lanes={n_lanes}: use a power of two, such as 4 or 8")


class Lanes:
    """The processes of torch's default group, or this one alone, and the lanes of each.

    The global batch is cut into a fixed number of lanes, and whatever is summed over the batch is
    summed along one binary tree over the lanes. A process computes consecutive lanes, which are a
    whole branch of that tree, so that the bits do not depend on the number of processes.

    Args:
        n_lanes: Parts of a batch, a power of two. Runs with other numbers of lanes differ in their
            last bits.

    Raises:
        ValueError: the number of lanes is no power of two.
    """

    def __init__(self, n_lanes: int) -> None:
        check_lanes(n_lanes)
        self.n_lanes = n_lanes
        together = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if together else 0
        self.size = dist.get_world_size() if together else 1
        self.n_active = min(n_lanes, 1 << (self.size.bit_length() - 1))
        """Processes that compute: the largest power of two; any others receive the result."""
        per_process = n_lanes // self.n_active
        first = self.rank * per_process
        self.own = range(first, first + per_process) if self.active else range(0)
        """Lanes of this process."""

    @property
    def leads(self) -> bool:
        """Whether this is the first process."""
        return self.rank == 0

    @property
    def active(self) -> bool:
        """Whether this process computes lanes."""
        return self.rank < self.n_active

    def identity(self) -> dict[str, Any]:
        """Return what decides the bits of the result."""
        return {"n_lanes": self.n_lanes}

    def agree(self, step: int | None) -> int | None:
        """Return the first process's step, to all processes."""
        told = torch.tensor([-1 if step is None else step])
        if self.size > 1:
            told = self._moved(told)
            dist.broadcast(told, 0)
        return None if int(told) < 0 else int(told)

    def add_up(self, tensor: Tensor) -> Tensor:
        """Return the sum over the processes, of whole numbers or of one number and zeros."""
        if self.size == 1:
            return tensor
        moved = self._moved(tensor)
        dist.all_reduce(moved)
        return moved.to(tensor.device)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Return the tensors of all processes, which have one shape, in the order of these."""
        if self.size == 1:
            return [tensor]
        moved = self._moved(tensor)
        parts = [torch.empty_like(moved) for _ in range(self.size)]
        dist.all_gather(parts, moved)
        return [part.to(tensor.device) for part in parts]

    def add_branches(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the processes, added along the tree.

        In each round a process adds the sum of its own branch and of the neighbouring one. Two
        numbers have one sum in either order, so that all processes hold the same bits.
        """
        if self.size == 1:
            return
        for dtype in sorted({tensor.dtype for tensor in tensors}, key=str):
            alike = [tensor for tensor in tensors if tensor.dtype == dtype]
            flat = self._moved(torch.cat([tensor.reshape(-1) for tensor in alike]))
            self._add_branches(flat)
            parts = flat.split([tensor.numel() for tensor in alike])
            for tensor, part in zip(alike, parts, strict=True):
                tensor.copy_(part.view(tensor.shape))

    def _add_branches(self, flat: Tensor) -> None:
        theirs, reach = torch.empty_like(flat), 1
        while reach < self.n_active and self.active:
            other = self.rank ^ reach
            both = [dist.P2POp(dist.isend, flat, other), dist.P2POp(dist.irecv, theirs, other)]
            for work in dist.batch_isend_irecv(both):
                work.wait()
            flat.add_(theirs)
            reach *= 2
        if self.n_active < self.size:
            dist.broadcast(flat, 0)

    def _moved(self, tensor: Tensor) -> Tensor:
        """Return a copy where the processes exchange tensors: gloo does so on the CPU."""
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        return tensor.detach().to(device, copy=True).contiguous()
