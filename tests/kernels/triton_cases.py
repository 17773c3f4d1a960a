"""Cases for the Triton backend, run as a script in a process of its own.

``interpret``: the kernels in Triton's interpreter against the reference backend; ``short``: some.
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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
    for kind in ("random", "ties", "zeros", "negative"):
        cases[f"batch topk, {kind}"] = _attempt(_batch_topk, kind)
    cases["batch topk in chunks"] = _attempt(_batch_topk_in_chunks)
    cases["levels"] = _attempt(_levels)
    for kind in ("random", "ties", "zeros", "negative"):
        cases[f"tiled product, {kind}"] = _attempt(_tiled_product, kind, torch.float32)
    cases["tiled product, bfloat16"] = _attempt(_tiled_product, "ties", torch.bfloat16)
    cases["tiled product, NaN"] = _attempt(_tiled_product, "nan", torch.float32)
    cases["nothing waits"] = _attempt(_nothing_waits)
    for d_sae in (40, 2111):
        cases[f"strided vectors, {d_sae} latents"] = _attempt(_strided, d_sae)
        cases[f"NaN, {d_sae} latents"] = _attempt(_not_a_number, d_sae)
    cases["latents out of range"] = _attempt(_out_of_range)
    return cases


def short() -> dict[str, str]:
    """A few of the cases, in seconds."""
    return {
        "few latents": _attempt(_compare, "ties", 2, 3, 24, 3),
        "batch topk": _attempt(_batch_topk_in_chunks),
        "tiled product": _attempt(_tiled_product, "ties", torch.float32),
    }


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
    found = triton.gather_sum(source, indices, offsets, weights, None, False)
    exact = (source.double(), indices, offsets, weights.double(), None, False)
    expected = reference.gather_sum(*exact)
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


def _batch_topk(kind: str) -> None:
    """Fewer positive entries than wanted, all wanted, and most of them."""
    for k, padded in ((0.4, True), (3.5, False), (3.5, True), (20.0, True)):
        results = []
        for backend in ("triton", "torch"):
            t = _leaves(kind, 5, 4, 70)
            scale = t["W_dec"].detach().norm(dim=1) + 0.5
            latents = kernels.batch_topk_encode(
                t["x"], t["W_enc"], t["b_enc"], k, scale=scale, padded=padded, backend=backend
            )
            assert not padded or latents.values.numel() == int(k * 5)
            results.append([latents.to_dense().detach()])
            if k == 3.5:
                out = kernels.matryoshka_decode(
                    latents, t["W_dec"], None, [9, 30, 70], backend=backend
                )
                leaves = [t["W_enc"], t["W_dec"]]
                results[-1] += [out, *torch.autograd.grad(out.pow(2).sum(), leaves)]
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * _size(expected))


def _batch_topk_in_chunks() -> None:
    from vision_plugin.kernels import _torch_backend

    t = _leaves("ties", 7, 4, 60)
    whole = kernels.batch_topk_encode(t["x"], t["W_enc"], t["b_enc"], 3, backend="torch")
    before = _torch_backend._CPU_ELEMENTS
    _torch_backend._CPU_ELEMENTS = 130
    try:
        for padded in (False, True):
            parts = kernels.batch_topk_encode(
                t["x"], t["W_enc"], t["b_enc"], 3, padded=padded, backend="triton"
            )
            assert torch.equal(parts.to_dense(), whole.to_dense())
    finally:
        _torch_backend._CPU_ELEMENTS = before


def _levels() -> None:
    """Each level against a float64 product with its prefix of the dictionary."""
    t = _leaves("random", 4, 5, 50)
    latents = kernels.batch_topk_encode(t["x"], t["W_enc"], t["b_enc"], 6, backend="torch")
    widths = [1, 7, 20, 50]
    found = kernels.matryoshka_decode(latents, t["W_dec"], t["b_dec"], widths, backend="triton")
    dense = latents.to_dense().double()
    for width, level in zip(widths, found, strict=True):
        expected = dense[:, :width] @ t["W_dec"][:width].double() + t["b_dec"].double()
        torch.testing.assert_close(level.double(), expected, rtol=1e-5, atol=1e-5)


def _tiled_product(kind: str, dtype: torch.dtype) -> None:
    """The product that keeps nothing but maxima chooses what the dense one does.

    The ties are sums of whole numbers, which no order of adding changes.
    """
    t = {
        name: tensor.detach()
        for name, tensor in _leaves("ties" if kind == "nan" else kind, 5, 7, 300).items()
    }
    if kind == "nan":
        t["b_enc"][[3, 299]] = torch.nan
    arguments = (t["x"].to(dtype), t["W_enc"].to(dtype), t["b_enc"], 4)
    scale = t["W_dec"].norm(dim=1).round() + 1
    total = (*arguments[:3], 3.5)
    results = []
    for fused in ("0", "1"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("VISION_PLUGIN_FUSED_ENCODER", fused)
            values, indices = kernels.topk_encode(*arguments, scale=scale, backend="triton")
            latents = kernels.batch_topk_encode(*total, scale=scale, backend="triton")
        results.append((indices, values, latents.to_dense()))
    _, expected = kernels.topk_encode(*(v.double() for v in arguments[:3]), 4, scale=scale.double())
    assert torch.equal(results[1][0], expected), "not the index sets of float64"
    assert torch.equal(results[0][0], results[1][0]), "index sets differ"
    for found, wanted in zip(results[1][1:], results[0][1:], strict=True):
        torch.testing.assert_close(found, wanted, equal_nan=True)


def _nothing_waits() -> None:
    """No primitive asks the host for a number: the kernels could be captured in a CUDA graph."""
    from tests._waiting import NoWaiting
    from vision_plugin.kernels._triton_backend import BACKEND

    t = {name: tensor.detach() for name, tensor in _leaves("random", 5, 4, 300).items()}
    encoder = (t["x"], t["W_enc"], t["b_enc"], t["W_dec"].norm(dim=1))
    for fused in ("0", "1"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("VISION_PLUGIN_FUSED_ENCODER", fused)
            with NoWaiting():
                values, indices = BACKEND.encode_topk(*encoder, 4, True, None)
                some, columns, offsets = BACKEND.encode_batch_topk(*encoder, 17, True, None)
                BACKEND.gather_sum(t["W_dec"], indices, None, values, t["b_dec"], True)
                BACKEND.gather_sum(t["W_dec"], columns, offsets, some, t["b_dec"], True)
                BACKEND.level_sums(t["W_dec"], columns, offsets[:5], some, t["b_dec"], 2)
                BACKEND.pair_dot(t["x"], t["W_dec"], indices, None)
                BACKEND.pair_dot(t["x"], t["W_dec"], columns, offsets)
                for entries, places in ((indices, None), (columns, offsets)):
                    _, order, starts = BACKEND.transpose(entries, places, 300)
                    BACKEND.segment_sum(values.flatten()[order.clamp(max=16)], starts)


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


def _signature(pointers: dict[str, str], *numbers: str) -> dict[str, str]:
    """Types of a kernel's arguments: pointers by name, then int32 numbers."""
    return {name: f"*{kind}" for name, kind in pointers.items()} | dict.fromkeys(numbers, "i32")


def _encoder_variants() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], int]]:
    """Each kernel of the encoder: name, function, types, constants, warps."""
    from vision_plugin.kernels import _triton_encoder_kernels as t

    vectors = {"bias": "fp32", "scale": "fp32"}
    tile = {"HAS_SCALE": True, "TILE": 32}
    pre = {"pre": "fp32", **vectors}
    yield "tile_maxima", t.tile_maxima, _signature(pre | {"maxima": "i32"}, "n", "n_tiles"), {
        **tile, "TILES": 32}, 4  # fmt: skip
    for width, warps in ((2048, 4), (4096, 8), (8192, 8)):
        types = _signature({"maxima": "i32", "chosen_tiles": "i32"}, "n_tiles", "k")
        yield f"choose_tiles {width}", t.choose_tiles, types, {"N_TILES": width}, warps
    for lanes, tiles, packed, warps in (
        (1024, True, False, 4), (1024, True, True, 4), (2048, True, False, 4),
        (2048, True, True, 4), (8192, True, False, 8), (8192, False, False, 8),
    ):  # fmt: skip
        types = _signature(
            pre | {"tiles": "i32", "values": "fp32", "indices": "i32"}, "n", "n_chosen", "k"
        )
        constants = {**tile, "CANDIDATES": lanes, "USE_TILES": tiles, "PACKED": packed}
        yield f"choose_entries {lanes} {tiles} {packed}", t.choose_entries, types, constants, warps
    for kind in ("bf16", "fp16"):
        operands = {"x": kind, "W": kind, **vectors}
        strides = ("stride_x", "stride_k", "stride_n")
        common = {**tile, "BLOCK_K": 64, "UPCAST": False, "stride_k": 1}
        types = _signature(operands | {"maxima": "i32"}, "batch", "n", "n_tiles", "d", *strides)
        constants = common | {"BLOCK_M": 128, "BLOCK_N": 128, "GROUP": 8}
        yield f"product_maxima {kind}", t.product_maxima, types, constants, 8
        pointers = {
            "order": "i32", "slot_rows": "i32", "starts": "i32", "jobs": "i32", "found": "fp32"
        }  # fmt: skip
        types = _signature(operands | pointers, "n", "n_tiles", "d", *strides)
        constants = common | {"BLOCK_M": 64, "DEPTH": 12}
        yield f"tile_products {kind}", t.tile_products, types, constants, 4
    pointers = {"slot_rows": "i32", "slot_tiles": "i32", "found": "fp32"}
    yield "copy_tiles", t.copy_tiles, _signature(pre | pointers, "n", "n_slots"), {
        **tile, "SLOTS": 32}, 4  # fmt: skip
    for kind in ("i32", "fp32"):
        state = {"keys": kind, "state": "i32"}
        block = {"ARE_KEYS": kind == "i32", "BLOCK": 4096}
        types = _signature(state | {"counts": "i32"}, "size")
        yield f"count_digits {kind}", t.count_digits, types, {**block, "SHIFT": 16}, 8
        counts = state | {"above": "i32", "equal": "i32"}
        yield f"count_chosen {kind}", t.count_chosen, _signature(counts, "size"), block, 8
        types = _signature(counts | {"chosen": "i64"}, "size")
        yield f"list_chosen {kind}", t.list_chosen, types, block, 8
    types = _signature({"state": "i32", "counts": "i32"})
    yield "choose_digit", t.choose_digit, types, {"SHIFT": 0, "POSITIVE": True}, 4
    pointers = {
        "found": "fp32", "chosen": "i64", "slot_rows": "i32", "slot_tiles": "i32",
        "values": "fp32", "rows": "i32", "columns": "i32",
    }  # fmt: skip
    yield "list_entries", t.list_entries, _signature(pointers, "size"), {
        "TILE": 32, "BLOCK": 1024}, 4  # fmt: skip


def _decoder_variants() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], int]]:
    """Each kernel of the decoder and of the gradients."""
    from vision_plugin.kernels import _triton_kernels as t

    for kind in ("fp32", "bf16"):
        entries = {"source": kind, "indices": "i32"}
        segments = entries | {"offsets": "i32", "weights": "fp32"}
        parts = segments | {"first_part": "i32", "partial": "fp32"}
        yield (
            f"long_segments {kind}",
            t.long_segments,
            _signature(parts, "n_segments", "d", "stride"),
            {"SPLIT": 256, "BLOCK_D": 256, "DEPTH": 18},
            4,
        )
        yield (
            f"short_segments {kind}",
            t.short_segments,
            _signature(parts | {"out": "fp32"}, "d", "stride"),
            {"SPLIT": 256, "BLOCK_D": 256, "ANY_LONG": True},
            2,
        )
        rows = entries | {"weights": "fp32", "bias": "fp32", "out": "fp32"}
        for check in (False, True):
            yield (
                f"row_sums {kind} {check}",
                t.row_sums,
                _signature(rows, "n_rows", "k", "d", "stride"),
                {"BLOCK_D": 256, "HAS_BIAS": True, "CHECK": check},
                2,
            )
        yield (
            f"level_sums {kind}",
            t.level_sums,
            _signature(
                segments | {"bias": "fp32", "out": "fp32"}, "n_rows", "n_levels", "d", "stride"
            ),
            {"BLOCK_D": 256, "HAS_BIAS": True},
            2,
        )
    pointers = {
        "segments": "fp32", "source": "fp32", "indices": "i32", "rows": "i32", "out": "fp32"
    }  # fmt: skip
    numbers = ("nnz", "k", "d", "segment_stride", "source_stride")
    for uniform in (False, True):
        yield f"pair_dots {uniform}", t.pair_dots, _signature(pointers, *numbers), {
            "PAIRS": 16, "BLOCK_D": 128, "UNIFORM": uniform}, 4  # fmt: skip


def compile_ahead() -> dict[str, dict[str, int]]:
    """Registers and spilled bytes of each kernel on sm_80 and sm_90."""
    import triton
    from triton.backends import nvidia
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    tools = Path(nvidia.__file__).parent / "bin"
    variants = (*_encoder_variants(), *_decoder_variants())
    report = {}
    for (name, function, signature, constants, warps), arch in itertools.product(
        variants, (80, 90)
    ):
        source = ASTSource(
            fn=function,
            signature=signature | dict.fromkeys(constants, "constexpr"),
            constexprs=constants,
            attrs=_divisible(function, signature, constants),
        )
        compiled = triton.compile(
            source,
            target=GPUTarget("cuda", arch, 32),
            options={"num_warps": warps, "num_stages": 3, "debug": bool(constants.get("CHECK"))},
        )
        resources = _resources(tools, compiled.asm["cubin"])
        report[f"{name} sm_{arch}"] = resources | {"shared": compiled.metadata.shared}
    return report


def _divisible(
    function: Any, signature: dict[str, str], constants: dict[str, Any]
) -> dict[tuple[int], list[list[object]]]:
    """What a launch finds out by itself: pointers and widths are multiples of 16."""
    wide = {name for name in signature if name.startswith("stride") or name.endswith("_stride")}
    return {
        (function.arg_names.index(name),): [["tt.divisibility", 16]]
        for name, kind in signature.items()
        if name not in constants and (kind.startswith("*") or name in wide | {"n", "d"})
    }


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
    modes = {"interpret": interpret, "short": short, "compile": compile_ahead, "eager": eager}
    sys.stdout.write(json.dumps(modes[sys.argv[1]]()))
