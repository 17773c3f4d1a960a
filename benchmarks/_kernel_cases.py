"""What the kernel benchmark runs: dense references, the sparse kernel, and accuracy checks.

Needs torch alone. The dense reference does what SAELens's TopK does with its defaults.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from vision_plugin import kernels


@dataclass(frozen=True)
class Shape:
    """A problem's size: widths, latents kept per row, rows per batch."""

    d_in: int
    d_sae: int
    k: int
    batch: int


SHAPES = {
    "small": Shape(64, 2048, 8, 256),
    "cpu": Shape(768, 16384, 32, 2048),
    "49k": Shape(768, 49152, 32, 4096),
    "65k": Shape(1024, 65536, 64, 8192),
}
NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")
Parameters = dict[str, Tensor]


def parameters(shape: Shape, device: str, seed: int, *, dtype: torch.dtype) -> Parameters:
    """A tied TopK SAE, W_enc stored latent-major as the drop-in classes store it."""
    generator = torch.Generator().manual_seed(seed)
    W_dec = torch.randn(shape.d_sae, shape.d_in, generator=generator, dtype=torch.float64)
    W_dec = (functional.normalize(W_dec, dim=1) * 0.1).to(device, dtype)
    made = {
        "W_enc": W_dec.clone().t(),
        "b_enc": torch.zeros(shape.d_sae, device=device, dtype=dtype),
        "W_dec": W_dec,
        "b_dec": torch.zeros(shape.d_in, device=device, dtype=dtype),
    }
    return {name: tensor.requires_grad_() for name, tensor in made.items()}


def latents(shape: Shape, device: str, seed: int, skew: str) -> tuple[Tensor, Tensor]:
    """Random values and ascending indices ``[batch, k]``; ``skew`` is uniform or zipf.

    They are drawn on the device: the k largest of noise are k latents without repeats, and of the
    logarithm of weights plus Gumbel noise, k latents drawn by these weights.
    """
    generator = torch.Generator(device).manual_seed(seed)
    popularity = torch.zeros(shape.d_sae, device=device)
    if skew == "zipf":
        # Popular latents lie anywhere in the dictionary, not side by side.
        place = torch.randperm(shape.d_sae, generator=generator, device=device)
        popularity[place] = -torch.arange(1, shape.d_sae + 1, device=device).log()
    drawn = []
    for start in range(0, shape.batch, 256):
        rows = min(256, shape.batch - start)
        noise = torch.rand(rows, shape.d_sae, generator=generator, device=device)
        gumbel = -(-noise.clamp(1e-9, 1 - 1e-7).log()).log()
        drawn.append((popularity + gumbel).topk(shape.k, dim=1).indices)
    values = torch.rand(shape.batch, shape.k, generator=generator, device=device)
    return values, torch.cat(drawn).sort(dim=1).values.int()


def dense_forward(p: Parameters, x: Tensor, k: int, *, rescale: bool, coo: bool = False) -> Tensor:
    """The dense reference's squared error; ``coo`` decodes through a COO tensor."""
    pre = (x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]
    norm = p["W_dec"].norm(dim=-1) if rescale else None
    keys = pre if norm is None else pre * norm
    top = keys.topk(k, dim=-1, sorted=False)
    if coo:
        rows = torch.arange(len(x), device=x.device).repeat_interleave(k)
        index = torch.stack([rows, top.indices.flatten()])
        acts = torch.sparse_coo_tensor(
            index, top.values.relu().flatten(), keys.shape, check_invariants=False
        )
        out = torch.sparse.mm(acts, p["W_dec"]) + p["b_dec"]
    else:
        acts = torch.zeros_like(keys).scatter(-1, top.indices, top.values.relu())
        acts = acts if norm is None else acts * (1 / norm)
        out = acts @ p["W_dec"] + p["b_dec"]
    return functional.mse_loss(out, x, reduction="none").sum(dim=-1).mean()


def sparse_forward(p: Parameters, x: Tensor, k: int, *, rescale: bool, backend: str) -> Tensor:
    """The same squared error on the sparse kernel."""
    scale = p["W_dec"].detach().norm(dim=-1) if rescale else None
    values, indices = kernels.topk_encode(
        x, p["W_enc"], p["b_enc"], k, b_in=p["b_dec"], scale=scale, backend=backend
    )
    out = kernels.sparse_decode(values, indices, p["W_dec"], p["b_dec"], backend=backend)
    return functional.mse_loss(out, x, reduction="none").sum(dim=-1).mean()


def backward_of(p: Parameters, loss: Callable[[], Tensor]) -> Callable[[], None]:
    """Forward and backward, gradients thrown away."""

    def work() -> None:
        loss().backward()
        for tensor in p.values():
            tensor.grad = None

    return work


def training_step(p: Parameters, loss: Callable[[], Tensor], *, fused: bool) -> Callable[[], None]:
    """Forward, backward, gradient clipping and Adam, as a lean training loop has them."""
    # Latent-major W_enc goes to Adam as its contiguous transpose: CPU's fused Adam copies others.
    leaves = [tensor.t() if name == "W_enc" else tensor for name, tensor in p.items()]
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    optimizer = torch.optim.Adam(leaves, lr=1e-5, fused=fused)

    def work() -> None:
        loss().backward()
        for leaf, (name, tensor) in zip(leaves, p.items(), strict=True):
            leaf.grad = tensor.grad.t() if name == "W_enc" else tensor.grad  # type: ignore[union-attr]
            tensor.grad = None
        torch.nn.utils.clip_grad_norm_(leaves, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return work


def decoders(
    p: Parameters, shape: Shape, values: Tensor, indices: Tensor, backend: str
) -> dict[str, Callable[[], object]]:
    """The decoders that are compared, from latents that each has in its own form."""
    weights = {name: tensor.detach() for name, tensor in p.items()}
    acts = torch.zeros(shape.batch, shape.d_sae, device=values.device, dtype=values.dtype)
    acts.scatter_(1, indices.long(), values)
    coo = kernels.SparseLatents.from_topk(values, indices, d_sae=shape.d_sae).to_sparse_coo()
    norm = weights["W_dec"].norm(dim=-1)

    def bag() -> Tensor:
        out = functional.embedding_bag(
            indices, weights["W_dec"], per_sample_weights=values, mode="sum"
        )
        return out + weights["b_dec"]

    return {
        "dense, rescale": lambda: (
            (acts * (1 / weights["W_dec"].norm(dim=-1))) @ weights["W_dec"] + weights["b_dec"]
        ),
        "dense": lambda: acts @ weights["W_dec"] + weights["b_dec"],
        "COO": lambda: torch.sparse.mm(coo, weights["W_dec"]) + weights["b_dec"],
        "embedding_bag": bag,
        "sparse kernel": lambda: kernels.sparse_decode(
            values, indices, weights["W_dec"], weights["b_dec"], backend=backend
        ),
        "sparse kernel, rescale": lambda: kernels.sparse_decode(
            values * (1 / norm)[indices.long()],
            indices,
            weights["W_dec"],
            weights["b_dec"],
            backend=backend,
        ),
    }


def accuracy(shape: Shape, device: str, seed: int, backend: str) -> dict[str, object]:
    """Gradient errors against float64, equal index sets, equal bits of two runs, drift."""
    rows = min(shape.batch, 256)
    x64 = torch.randn(rows, shape.d_in, generator=torch.Generator().manual_seed(seed)).double()
    exact = parameters(shape, "cpu", seed, dtype=torch.float64)
    _assign(exact, torch.randn(shape.d_in, generator=torch.Generator().manual_seed(1)).double())
    dense_forward(exact, x64, shape.k, rescale=True).backward()
    x = x64.to(device, torch.float32)
    found: dict[str, dict[str, Tensor]] = {}
    for run in ("dense", "sparse", "again"):
        p = parameters(shape, device, seed, dtype=torch.float32)
        _assign(p, exact["b_dec"])
        if run == "dense":
            dense_forward(p, x, shape.k, rescale=True).backward()
        else:
            sparse_forward(p, x, shape.k, rescale=True, backend=backend).backward()
        found[run] = {name: p[name].grad.cpu() for name in NAMES}  # type: ignore[union-attr]
    p = parameters(shape, device, seed, dtype=torch.float32)
    pre = x @ p["W_enc"].detach() + p["b_enc"].detach()
    _, ours = kernels.topk_encode(
        x, p["W_enc"].detach(), p["b_enc"].detach(), shape.k, backend=backend
    )
    sets = pre.topk(shape.k, dim=1).indices.sort(dim=1).values
    return {
        "rows": rows,
        "gradient_error": {
            run: {name: _relative(found[run][name], exact[name].grad) for name in NAMES}
            for run in ("dense", "sparse")
        },
        "rows_with_equal_index_sets": float((ours.long() == sets).all(dim=1).float().mean()),
        "two_runs_same_bits": all(
            torch.equal(found["sparse"][name], found["again"][name]) for name in NAMES
        ),
    }


def drift(device: str, seed: int, backend: str, *, steps: int = 20) -> dict[str, float]:
    """Largest parameter difference from the dense reference after some Adam steps (small shape)."""
    shape = SHAPES["small"]
    runs = []
    for sparse in (False, True):
        p = parameters(shape, device, seed, dtype=torch.float32)
        generator = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.Adam(p.values(), lr=3e-4)
        for _ in range(steps):
            x = torch.randn(shape.batch, shape.d_in, generator=generator).to(device)
            if sparse:
                loss = sparse_forward(p, x, shape.k, rescale=True, backend=backend)
            else:
                loss = dense_forward(p, x, shape.k, rescale=True)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        runs.append(p)
    return {"steps": float(steps)} | {
        name: float((runs[0][name] - runs[1][name]).detach().abs().max()) for name in NAMES
    }


def _assign(p: Parameters, b_dec: Tensor) -> None:
    with torch.no_grad():
        p["b_dec"].copy_(b_dec)


def _relative(found: Tensor, expected: Tensor | None) -> float:
    assert expected is not None
    return float((found.double() - expected).norm() / expected.norm())
