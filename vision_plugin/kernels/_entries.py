"""Checks of the indices and offsets that a caller gives."""

from __future__ import annotations

import torch
from torch import Tensor


def check_entries(indices: Tensor, offsets: Tensor | None, weights: Tensor, n_rows: int) -> None:
    """Raise where indices are no rows of a matrix of ``n_rows``, or offsets no places of indices.

    On a GPU the check runs after this call and fails there, as torch's own indexing does: to wait
    for it would hold up every step. Rows of equal length are checked there by the backend itself.

    Raises:
        IndexError: a row is out of range.
        ValueError: the tensors do not belong together.
    """
    nnz = indices.numel()
    if weights.numel() != nnz:
        raise ValueError(f"{nnz} indices need as many values, got {weights.numel()}")
    if offsets is None:
        if nnz and indices.device.type != "cuda":
            lowest, highest = indices.aminmax()
            _raise_out_of_range(int(lowest), int(highest), n_rows)
        return
    if offsets.numel() == 0:
        raise ValueError("offsets are empty: a batch of no rows has one of them, 0")
    are_places = (offsets[0] == 0) & (offsets[-1] == nnz) & (offsets.diff() >= 0).all()
    lowest, highest = indices.aminmax() if nnz else (offsets[0], offsets[0] - 1)
    are_rows = (lowest >= 0) & (highest < n_rows)
    if indices.device.type == "cuda":
        torch._assert_async(are_places & are_rows, f"latents outside 0 to {n_rows - 1}")
        return
    _raise_out_of_range(int(lowest), int(highest), n_rows)
    if not bool(are_places):
        raise ValueError(f"offsets must rise from 0 to {nnz}, the number of values")


def _raise_out_of_range(lowest: int, highest: int, n_rows: int) -> None:
    if lowest < 0 or highest >= n_rows:
        raise IndexError(
            f"latent {lowest if lowest < 0 else highest} is out of range: W_dec has {n_rows} rows, "
            f"for latents 0 to {n_rows - 1}"
        )
