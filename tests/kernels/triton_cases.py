"""Cases for the Triton backend, run as a script in a process of its own.

``interpret``: the kernels in Triton's interpreter against the reference backend.
``compile``: the kernels compiled for GPUs that need not be here; registers and spills.
``eager``: the compiled forms of the variable-length functions.

A process of its own, because Triton decides at import whether it interprets, and because the test
session's annotation hook rewrites functions whose source Triton has to read. Prints one JSON
object: what each case found.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from vision_plugin import kernels


def interpret() -> dict[str, str]:
    """Run every kernel in the interpreter; the message of each case that fails, else ``ok``."""
    cases = {}
    for kind in ("random", "ties", "zeros", "negative", "skewed"):
        cases[f"{kind}, few latents"] = _attempt(_compare, kind, 3, 5, 40, 4)
        # More tiles than one block of the tile kernel, and a width that they do not divide.
        cases[f"{kind}, many tiles"] = _attempt(_compare_selection, kind, 2, 3, 2111, 4)
    cases["k is d_sae"] = _attempt(_compare, "ties", 2, 3, 17, 17)
    cases["k is one"] = _attempt(_compare, "ties", 3, 5, 40, 1)
    cases["empty"] = _attempt(_compare, "random", 0, 3, 20, 2)
    cases["long segments"] = _attempt(_long_segments)
    cases["bfloat16 weights"] = _attempt(_half_precision)
    cases["same bits"] = _attempt(_same_bits)
    cases["batch topk"] = _attempt(_batch_topk)
    for d_sae in (40, 2111):
        cases[f"strided vectors, {d_sae} latents"] = _attempt(_strided, d_sae)
        cases[f"NaN, {d_sae} latents"] = _attempt(_not_a_number, d_sae)
    cases["latents out of range"] = _attempt(_out_of_range)
    return cases


def _attempt(case, *arguments) -> str:
    try:
        case(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "ok"


def _leaves(kind: str, batch: int, d_in: int, d_sae: int):
    from tests.kernels.reference import inputs

    tensors = inputs(batch, d_in, d_sae, kind=kind)
    return {name: tensor.float().requires_grad_() for name, tensor in tensors.items()}


def _run(backend: str, kind: str, batch: int, d_in: int, d_sae: int, k: int):
    leaves = _leaves(kind, batch, d_in, d_sae)
    scale = leaves["W_dec"].detach().norm(dim=1) + 0.5
    values, indices = kernels.topk_encode(
        leaves["x"], leaves["W_enc"], leaves["b_enc"], k,
        b_in=leaves["b_in"], scale=scale, backend=backend,
    )  # fmt: skip
    out = kernels.sparse_decode(values, indices, leaves["W_dec"], leaves["b_dec"], backend=backend)
    out.pow(2).sum().backward()
    return indices, values, out, *(leaf.grad for leaf in leaves.values())


def _compare(kind: str, batch: int, d_in: int, d_sae: int, k: int) -> None:
    ours = _run("triton", kind, batch, d_in, d_sae, k)
    reference = _run("torch", kind, batch, d_in, d_sae, k)
    assert torch.equal(ours[0], reference[0]), "index sets differ"
    for found, expected in zip(ours[1:], reference[1:], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * _size(expected))


def _compare_selection(kind: str, batch: int, d_in: int, d_sae: int, k: int) -> None:
    t = _leaves(kind, batch, d_in, d_sae)
    scale = t["W_dec"].detach().norm(dim=1) + 0.5
    ours, reference = (
        kernels.topk_encode(t["x"], t["W_enc"], t["b_enc"], k, scale=scale, backend=backend)
        for backend in ("triton", "torch")
    )
    assert torch.equal(ours[1], reference[1]), "index sets differ"
    torch.testing.assert_close(ours[0], reference[0], rtol=1e-5, atol=1e-5)


def _size(tensor: torch.Tensor) -> float:
    return max(1.0, float(tensor.abs().max())) if tensor.numel() else 1.0


def _long_segments() -> None:
    """Segments of 0, 256, 257, 1 and 700 entries: at, just over and far over the split."""
    from vision_plugin.kernels._torch_backend import BACKEND as reference
    from vision_plugin.kernels._triton_backend import BACKEND as triton

    torch.manual_seed(0)
    offsets = torch.tensor([0, 256, 513, 513, 514, 1214, 1214], dtype=torch.int32)
    indices = torch.randint(0, 40, (1214,), dtype=torch.int32)
    weights, source = torch.randn(1214), torch.randn(40, 300)
    found = triton.gather_sum(source, indices, offsets, weights)
    expected = reference.gather_sum(source.double(), indices, offsets, weights.double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)
    segments = torch.randn(6, 300)
    dots = triton.pair_dot(segments, source, indices, offsets)
    torch.testing.assert_close(dots, reference.pair_dot(segments, source, indices, offsets))


def _half_precision() -> None:
    values = torch.ones(1, 600)
    indices = torch.arange(600, dtype=torch.int32)[None]
    weight = torch.ones(600, 3, dtype=torch.bfloat16)
    out = kernels.sparse_decode(values, indices, weight, backend="triton")
    assert out.tolist() == [[600.0] * 3], f"not accumulated in float32: {out.tolist()}"


def _same_bits() -> None:
    first, second = (_run("triton", "skewed", 3, 4, 90, 3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def _batch_topk() -> None:
    results = []
    for backend in ("triton", "torch"):
        t = _leaves("random", 5, 4, 60)
        latents = kernels.batch_topk_encode(t["x"], t["W_enc"], t["b_enc"], 3.5, backend=backend)
        out = kernels.matryoshka_decode(latents, t["W_dec"], None, [9, 30, 60], backend=backend)
        results.append((out, *torch.autograd.grad(out.pow(2).sum(), [t["W_enc"], t["W_dec"]])))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def _spread(vector: torch.Tensor) -> torch.Tensor:
    """The same vector with every other number in memory one of another vector."""
    return torch.stack([vector, torch.full_like(vector, 7)], dim=1)[:, 0]


def _strided(d_sae: int) -> None:
    t = {name: tensor.detach() for name, tensor in _leaves("random", 5, 4, d_sae).items()}
    scale = t["W_dec"].norm(dim=1) + 0.5
    plain = kernels.topk_encode(t["x"], t["W_enc"], t["b_enc"], 3, scale=scale, backend="torch")
    spread = kernels.topk_encode(
        t["x"], t["W_enc"], _spread(t["b_enc"]), 3, scale=_spread(scale), backend="triton"
    )
    assert torch.equal(spread[1], plain[1]), "index sets differ"
    torch.testing.assert_close(spread[0], plain[0])
    latents = kernels.batch_topk_encode(t["x"], t["W_enc"], t["b_enc"], 3, backend="torch")
    expected = latents.to_dense() @ t["W_dec"]
    values = _spread(latents.values).requires_grad_()
    apart = kernels.SparseLatents(
        values, _spread(latents.indices), _spread(latents.offsets), latents.d_sae
    )
    decoded = kernels.csr_decode(apart, t["W_dec"], backend="triton")
    torch.testing.assert_close(decoded, expected)
    decoded.sum().backward()
    torch.testing.assert_close(values.grad, t["W_dec"].sum(1)[latents.indices.long()])


def _not_a_number(d_sae: int) -> None:
    """NaN of either sign is selected before every number, and its neighbours stay in order."""
    t = {name: tensor.detach() for name, tensor in _leaves("ties", 4, 4, d_sae).items()}
    b_enc = t["b_enc"].clone()
    b_enc[[5, d_sae - 1]] = torch.nan
    b_enc[5] = -b_enc[5]
    pre = t["x"] @ t["W_enc"] + b_enc
    order = pre.nan_to_num(nan=torch.inf).sort(dim=1, descending=True, stable=True).indices
    expected = order[:, :4].sort(dim=1).values
    for backend in ("triton", "torch"):
        values, indices = kernels.topk_encode(t["x"], t["W_enc"], b_enc, 4, backend=backend)
        assert torch.equal(indices.long(), expected), f"{backend}: index sets differ"
        assert torch.equal(values, pre.gather(1, expected).relu()) or torch.equal(
            values.isnan(), pre.gather(1, expected).isnan()
        )


def _out_of_range() -> None:
    weight = torch.randn(9, 3)
    for wrong in (9, 10**6, -1):
        indices = torch.tensor([[0, wrong]])
        with pytest.raises(IndexError, match=f"latent {wrong} is out of range"):
            kernels.sparse_decode(torch.ones(1, 2), indices, weight, backend="triton")


def compile_ahead() -> dict[str, dict[str, int]]:
    """Registers and spilled bytes of each kernel on sm_80 and sm_90."""
    import triton
    from triton.backends import nvidia
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from vision_plugin.kernels import _triton_kernels as t

    tools = Path(nvidia.__file__).parent / "bin"
    select = {"pre": "*fp32", "bias": "*fp32", "scale": "*fp32"}
    rows = {"source": "*{}", "indices": "*i32", "offsets": "*i32", "weights": "*fp32",
            "first_part": "*i32", "partial": "*fp32"}  # fmt: skip
    scaled = {"HAS_SCALE": True, "TILE": 32}
    variants = [
        ("tile_maxima", t.tile_maxima, select | {"maxima": "*i32", "n": "i32", "n_tiles": "i32"},
         scaled | {"TILES": 32}, 4),
        *((f"choose_tiles {width}", t.choose_tiles,
           {"maxima": "*i32", "chosen_tiles": "*i32", "n_tiles": "i32", "k": "i32"},
           {"N_TILES": width}, warps) for width, warps in ((2048, 4), (4096, 8), (8192, 8))),
        *((f"choose_entries {lanes} {tiles}", t.choose_entries,
           select | {"tiles": "*i32", "values": "*fp32", "indices": "*i32", "n": "i32",
                     "n_chosen": "i32", "k": "i32"},
           scaled | {"CANDIDATES": lanes, "USE_TILES": tiles}, warps)
          for lanes, tiles, warps in ((1024, True, 4), (2048, True, 4), (8192, True, 8),
                                      (8192, False, 8))),
        *((f"long_segments {kind}", t.long_segments,
           rows | {"source": f"*{kind}", "n_segments": "i32", "d": "i32", "stride": "i32"},
           {"SPLIT": 256, "BLOCK_D": 256, "DEPTH": 18}, 4) for kind in ("fp32", "bf16")),
        *((f"short_segments {kind}", t.short_segments,
           rows | {"source": f"*{kind}", "out": "*fp32", "d": "i32", "stride": "i32"},
           {"SPLIT": 256, "BLOCK_D": 256, "ANY_LONG": True}, 2) for kind in ("fp32", "bf16")),
        ("pair_dots", t.pair_dots,
         {"segments": "*fp32", "source": "*fp32", "indices": "*i32", "rows": "*i32", "out": "*fp32",
          "nnz": "i32", "d": "i32", "segment_stride": "i32", "source_stride": "i32"},
         {"PAIRS": 16, "BLOCK_D": 128}, 4),
    ]  # fmt: skip
    report = {}
    for (name, function, signature, constants, warps), arch in itertools.product(
        variants, (80, 90)
    ):
        source = ASTSource(
            fn=function,
            signature=signature | dict.fromkeys(constants, "constexpr"),
            constexprs=constants,
        )
        compiled = triton.compile(
            source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps}
        )
        report[f"{name} sm_{arch}"] = _resources(tools, compiled.asm["cubin"])
    return report


def _resources(tools: Path, cubin: bytes) -> dict[str, int]:
    """Registers, and bytes of stack and local memory: what a spill would need."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        done = subprocess.run(
            [tools / "cuobjdump", "--dump-resource-usage", path],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    found = {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", done.stdout)}
    return {"registers": found["REG"], "spilled": found["STACK"] + found["LOCAL"]}


def eager() -> dict[str, str]:
    """The variable-length functions under ``torch.compile``."""
    return {"batch topk": _attempt(_compiled_batch_topk)}


def _compiled_batch_topk() -> None:
    def loss(x, W_enc, b_enc, b_in, W_dec, b_dec):
        latents = kernels.batch_topk_encode(x, W_enc, b_enc, 3.0, b_in=b_in)
        return (kernels.matryoshka_decode(latents, W_dec, b_dec, [9, 60]) - x).pow(2).sum()

    eager_leaves, compiled_leaves = (_leaves("random", 5, 4, 60) for _ in range(2))
    loss(*eager_leaves.values()).backward()
    torch.compile(loss, backend="aot_eager")(*compiled_leaves.values()).backward()
    for name, leaf in eager_leaves.items():
        torch.testing.assert_close(compiled_leaves[name].grad, leaf.grad)


if __name__ == "__main__":
    modes = {"interpret": interpret, "compile": compile_ahead, "eager": eager}
    sys.stdout.write(json.dumps(modes[sys.argv[1]]()))
