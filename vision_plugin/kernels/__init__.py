"""Sparse kernels for SAEs whose latents are mostly zero. They need torch alone.

    values, indices = topk_encode(x, W_enc, b_enc, k)
    xhat = sparse_decode(values, indices, W_dec, b_dec)

BatchTopK, JumpReLU and Matryoshka have a variable-length form, `SparseLatents`. All functions are
differentiable (in reverse mode), deterministic (two runs give the same bits) and made of
``torch.library`` operators. `available` lists the backends, `use_backend` picks one by name.
"""

from __future__ import annotations

from ._backends import (
    Backend,
    BackendStatus,
    BackendUnavailableError,
    available,
    choose,
    use_backend,
)
from ._csr import SparseLatents
from ._functions import (
    batch_topk_encode,
    csr_decode,
    matryoshka_decode,
    sparse_decode,
    threshold_encode,
    topk_encode,
)

__all__ = [
    "Backend",
    "BackendStatus",
    "BackendUnavailableError",
    "SparseLatents",
    "available",
    "batch_topk_encode",
    "choose",
    "csr_decode",
    "matryoshka_decode",
    "sparse_decode",
    "threshold_encode",
    "topk_encode",
    "use_backend",
]
