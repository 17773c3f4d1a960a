"""The reference backend: torch operators alone, on any device, and the fast path on CPUs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ._select import above_threshold, largest_positive, topk_rows

# At most this many elements of dense pre-activations exist at a time (128 MiB in float32, and
# 256 MiB on a GPU).
_CPU_ELEMENTS = 1 << 25
_GPU_ELEMENTS = 1 << 26
_HALF = (torch.float16, torch.bfloat16)


class TorchBackend:
    """The primitives of `Backend` in torch operators."""

    name = "torch"

    def unusable(self, device_type: str) -> str | None:
        """Return None: torch operators run on every device."""
        return None

    def encode_topk(
        self,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        scale: Tensor | None,
        k: int,
        relu: bool,
        dtype: torch.dtype | None,
    ) -> tuple[Tensor, Tensor]:
        """Return the top k of each row; see `Backend`."""
        parts = []
        for rows in row_chunks(x, W_enc.shape[1]):
            keys, indices = self._select_rows(rows, W_enc, b_enc, scale, k, dtype)
            parts.append((finish(keys, indices, scale, relu), indices))
        if len(parts) == 1:
            return parts[0]
        values, columns = zip(*parts, strict=True)
        return torch.cat(values), torch.cat(columns)

    def _select_rows(
        self,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        scale: Tensor | None,
        k: int,
        dtype: torch.dtype | None,
    ) -> tuple[Tensor, Tensor]:
        return topk_rows(selection_keys(x, W_enc, b_enc, scale, dtype), k)

    def encode_batch_topk(
        self,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        scale: Tensor | None,
        total: int,
        padded: bool,
        dtype: torch.dtype | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the largest positive entries of the batch; see `Backend`."""
        d_sae = W_enc.shape[1]
        parts, start = [], 0
        for rows in row_chunks(x, d_sae):
            keys, positions = largest_positive(
                selection_keys(rows, W_enc, b_enc, scale, dtype), total
            )
            parts.append((keys, positions + start * d_sae))
            start += rows.shape[0]
        keys = torch.cat([part[0] for part in parts])
        positions = torch.cat([part[1] for part in parts])
        if len(parts) > 1:  # each chunk gave its own largest: choose among them
            keys, chosen = largest_positive(keys[None], total)
            positions = positions[chosen]
        if padded and x.shape[0]:
            missing = total - keys.numel()
            keys = functional.pad(keys, (0, missing))
            positions = functional.pad(positions, (0, missing), value=x.shape[0] * d_sae - 1)
        indices, offsets = compress(positions, x.shape[0], d_sae)
        return finish(keys, indices, scale, relu=True), indices, offsets

    def encode_threshold(
        self, x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, dtype: torch.dtype | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the entries above their latent's threshold; see `Backend`."""
        d_sae = W_enc.shape[1]
        values, positions, start = [], [], 0
        for rows in row_chunks(x, d_sae):
            keys = selection_keys(rows, W_enc, b_enc, None, dtype)
            kept, where = above_threshold(keys, threshold)
            values.append(kept)
            positions.append(where + start * d_sae)
            start += rows.shape[0]
        return torch.cat(values), *compress(torch.cat(positions), x.shape[0], d_sae)

    def gather_sum(
        self,
        source: Tensor,
        indices: Tensor,
        offsets: Tensor | None,
        weights: Tensor,
        bias: Tensor | None,
        check: bool,
    ) -> Tensor:
        """Return weighted sums of gathered rows; see `Backend`."""
        dtype = torch.promote_types(source.dtype, weights.dtype)
        work = torch.float32 if dtype in _HALF else dtype
        n_segments = indices.shape[0] if offsets is None else offsets.numel() - 1
        if check and offsets is None and indices.device.type == "cuda":
            _assert_rows(indices, source.shape[0])
        if n_segments == 0 or indices.numel() == 0:
            sums = source.new_zeros(n_segments, source.shape[1], dtype=work)
        else:
            sums = functional.embedding_bag(
                indices,
                _cast(source, work).contiguous(),
                offsets,
                mode="sum",
                per_sample_weights=_cast(weights, work),
                include_last_offset=offsets is not None,
            )
        return _cast(sums if bias is None else sums.add_(bias), dtype)

    def level_sums(
        self,
        source: Tensor,
        indices: Tensor,
        offsets: Tensor,
        weights: Tensor,
        bias: Tensor | None,
        n_levels: int,
    ) -> Tensor:
        """Return the running sums over the segments of each row; see `Backend`."""
        bands = self.gather_sum(source, indices, offsets, weights, None, False)
        levels = bands.new_empty(n_levels, bands.shape[0] // n_levels, bands.shape[1])
        total: Tensor | None = bias
        for band, level in zip(bands.unflatten(0, (-1, n_levels)).unbind(1), levels, strict=True):
            total = level.copy_(band) if total is None else torch.add(total, band, out=level)
        return levels

    def pair_dot(
        self, segments: Tensor, source: Tensor, indices: Tensor, offsets: Tensor | None
    ) -> Tensor:
        """Return dot products of each segment's row with the rows it gathers; see `Backend`."""
        dtype = torch.promote_types(segments.dtype, source.dtype)
        work = torch.float32 if dtype in _HALF else dtype
        if indices.numel() == 0:
            return source.new_empty(indices.shape, dtype=dtype)
        starts = _row_starts(indices) if offsets is None else offsets[:-1]
        # The gradient of a weighted embedding bag for its weights is this very product, and torch
        # computes it without gathering the rows.
        dots: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            segments.to(work).contiguous(),
            source.to(work).contiguous(),
            indices.reshape(-1),
            starts,
            _row_of_each(indices, offsets),
            0,
        )
        return dots.to(dtype).view(indices.shape)

    def segment_sum(self, values: Tensor, offsets: Tensor) -> Tensor:
        """Return sums over segments; see `Backend`."""
        work = values.float() if values.dtype in _HALF else values
        if offsets.numel() == 1 or values.numel() == 0:
            return values.new_zeros(offsets.numel() - 1)
        sums = torch.segment_reduce(work, "sum", offsets=offsets.long(), initial=0)
        return sums.to(values.dtype)

    def transpose(
        self, indices: Tensor, offsets: Tensor | None, n_columns: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return compressed columns from one stable sort; see `Backend`."""
        columns, order = indices.reshape(-1).sort(stable=True)
        edges = torch.arange(n_columns + 1, dtype=torch.int32, device=indices.device)
        starts = torch.searchsorted(columns, edges, out_int32=True)
        place = order.int()
        if offsets is None:
            rows = place // max(1, indices.shape[1])
        else:
            rows = _row_of_each(indices, offsets).index_select(0, order)
        return rows, place, starts


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor in a dtype; torch's ``to`` takes microseconds where it has it already."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _row_of_each(indices: Tensor, offsets: Tensor | None) -> Tensor:
    """Return the row of each entry, ``[nnz]``, int32."""
    n_rows = indices.shape[0] if offsets is None else offsets.numel() - 1
    row = torch.arange(n_rows, dtype=torch.int32, device=indices.device)
    if offsets is None:
        return row.repeat_interleave(indices.shape[1])
    return row.repeat_interleave(offsets.diff(), output_size=indices.numel())


def _row_starts(indices: Tensor) -> Tensor:
    n_rows, k = indices.shape
    return torch.arange(0, n_rows * k, k, dtype=indices.dtype, device=indices.device)


def _assert_rows(indices: Tensor, n_rows: int) -> None:
    """Check on the device, without waiting for it, that indices are rows of a matrix."""
    inside = ((indices >= 0) & (indices < n_rows)).all()
    torch._assert_async(inside, f"latents outside 0 to {n_rows - 1}")


def row_chunks(x: Tensor, d_sae: int) -> tuple[Tensor, ...]:
    """Split the batch so that the dense pre-activations of a part stay within a fixed size."""
    elements = _CPU_ELEMENTS if x.device.type == "cpu" else _GPU_ELEMENTS
    return torch.split(x, max(1, elements // d_sae)) if x.shape[0] else (x,)


def pre_activations(x: Tensor, W_enc: Tensor, b_enc: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return ``x @ W_enc + b_enc``, ``[batch, d_sae]``, with the product in ``dtype`` if given."""
    if dtype is None or dtype == x.dtype:
        return torch.addmm(b_enc.to(x.dtype), x, W_enc.to(x.dtype))
    return x.to(dtype) @ W_enc.to(dtype) + b_enc


def selection_keys(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, scale: Tensor | None, dtype: torch.dtype | None
) -> Tensor:
    """Return the keys of the selection: ``(x @ W_enc + b_enc) * scale``, contiguous."""
    keys = pre_activations(x, W_enc, b_enc, dtype)
    return keys.contiguous() if scale is None else keys.mul_(scale)


def finish(keys: Tensor, indices: Tensor, scale: Tensor | None, relu: bool) -> Tensor:
    """Return the activations of selected keys: rectified, and without the scale."""
    values = keys.relu() if relu else keys
    if scale is None:
        return values
    # Multiply by the inverse, as SAELens's decoders do, to get exactly the same bits.
    return values * (1 / scale)[indices.long()].to(values.dtype)


def compress(positions: Tensor, batch: int, d_sae: int) -> tuple[Tensor, Tensor]:
    """Return ascending flat positions as int32 columns ``[nnz]`` and offsets ``[batch + 1]``."""
    rows = positions // d_sae
    edges = torch.arange(batch + 1, device=positions.device)
    offsets = torch.searchsorted(rows, edges, out_int32=True)
    return (positions - rows * d_sae).int(), offsets


BACKEND = TorchBackend()
