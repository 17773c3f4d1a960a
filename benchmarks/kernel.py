"""The sparse kernel against SAELens's dense arithmetic: speed, memory, accuracy.

    python benchmarks/kernel.py                     # this machine: its GPU, or else its CPU
    python benchmarks/kernel.py --shape small --repetitions 3 --out -

Prints a table and writes JSON. Torch alone is enough for the kernel's own part; with sae_lens
installed its classes and its trainer are measured in the same interleaved rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # a bare checkout works, too

from benchmarks import _kernel_cases as cases
from benchmarks import _kernel_peers as peers
from benchmarks._kernel_timing import Timing, interleaved
from benchmarks._machine import machine
from vision_plugin import kernels

RESULTS = Path(__file__).parent / "results"
SCHEMA = 1


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the table, write the JSON."""
    options = _parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    report = measure(options)
    sys.stdout.write(table(report) + "\n")
    if options.out != "-":
        path = Path(options.out or RESULTS / f"kernel-{options.device}-{options.shape}.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n")


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, choices=("cpu", "cuda"))
    parser.add_argument("--shape", choices=tuple(cases.SHAPES), help="cpu, or 49k on a GPU")
    parser.add_argument("--repetitions", type=int, help="rounds per stage (7, or 30 on a GPU)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="torch threads on the CPU")
    parser.add_argument("--out", help="JSON file, '-' for none")
    options = parser.parse_args(arguments)
    options.shape = options.shape or ("49k" if options.device == "cuda" else "cpu")
    options.repetitions = options.repetitions or (30 if options.device == "cuda" else 7)
    return options


def measure(options: argparse.Namespace) -> dict[str, object]:
    """Everything the report holds; one stage after the other, variants interleaved."""
    shape, device = cases.SHAPES[options.shape], options.device
    backend = kernels.choose(device)
    ceiling = _ceilings(shape, device, options.repetitions)
    stages = {
        name: _stage(variants, work, options, ceiling)
        for name, variants, work in _stages(shape, options, backend)
    }
    return {
        "schema": SCHEMA,
        "environment": {
            **machine("triton", "sae-lens", device=device),
            "backend": backend,
            "dtype": "float32 parameters",
            "tf32": torch.backends.cuda.matmul.allow_tf32,
        },
        "shape": asdict(shape),
        "seed": options.seed,
        "repetitions": options.repetitions,
        "ceiling": ceiling,
        "stages": stages,
        "ratios": _ratios(stages),
        "over_floor": _over_floor(stages),
        "host_us_per_call": _on_one_thread(host_times, device, options.repetitions),
        "accuracy": cases.accuracy(shape, device, options.seed, backend),
        "drift": cases.drift(device, options.seed, backend),
        "not_measured": [] if device == "cuda" else ["every GPU figure: no CUDA device"],
    }


def _ceilings(shape: cases.Shape, device: str, repetitions: int) -> dict[str, float]:
    """What this machine reaches: the encoder's product, and reading and writing memory."""
    x = torch.randn(shape.batch, shape.d_in, device=device)
    W = torch.randn(shape.d_sae, shape.d_in, device=device).t()
    big = torch.randn(shape.d_sae, shape.d_in, device=device)
    other = torch.empty_like(big)
    work: dict[str, Callable[[], object]] = {
        "gemm_float32": lambda: x @ W,
        "copy": lambda: other.copy_(big),
    }
    if device == "cuda":
        x16, W16 = x.bfloat16(), W.bfloat16()
        work["gemm_bfloat16"] = lambda: x16 @ W16
    times = interleaved(work, repetitions=repetitions, device=device)
    operations = 2 * shape.batch * shape.d_in * shape.d_sae
    result = {"copy_GBps": 2 * big.numel() * 4 / times["copy"].median_ms / 1e6}
    for name in ("gemm_float32", "gemm_bfloat16"):
        if name in times:
            result[f"{name}_ms"] = times[name].median_ms
            result[f"{name}_TFLOPs"] = operations / times[name].median_ms / 1e9
    return result


Variants = dict[str, Callable[[], object]]


def _stages(
    shape: cases.Shape, options: argparse.Namespace, backend: str
) -> Iterator[tuple[str, Variants, tuple[str, float]]]:
    """Each stage: its name, its variants, and the work that an ideal kernel would do."""
    device, seed = options.device, options.seed
    host = find_spec("sae_lens") is not None
    nnz = shape.batch * shape.k
    decode_bytes = 4.0 * shape.d_in * (nnz + shape.batch)
    for skew in ("uniform", "zipf"):
        p = cases.parameters(shape, device, seed, dtype=torch.float32)
        values, indices = cases.latents(shape, device, seed, skew)
        variants: Variants = dict(cases.decoders(p, shape, values, indices, backend))
        if host:
            from benchmarks import _kernel_host as host_cases

            variants |= host_cases.decoders(shape, device, values, indices)
        yield f"decode, {skew}", variants, ("bytes", decode_bytes)
    encode = 2.0 * shape.batch * shape.d_in * shape.d_sae
    yield "forward+backward", _step_variants(shape, device, seed, backend), ("operations", encode)
    yield "training step", _own_steps(shape, device, seed, backend), ("operations", encode)
    if host:
        from benchmarks import _kernel_host as host_cases

        for dead in (0.0, 0.2):
            label = f"{dead:.0%} dead"
            yield (
                f"SAELens forward+backward, {label}",
                host_cases.steps(shape, device, dead),
                ("operations", encode),
            )
            yield (
                f"SAELens trainer step, {label}",
                host_cases.trainer_steps(shape, device, dead, autocast=device == "cuda"),
                ("operations", encode),
            )


def _batch(shape: cases.Shape, device: str, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape.batch, shape.d_in, generator=generator).to(device)


def _step_variants(shape: cases.Shape, device: str, seed: int, backend: str) -> Variants:
    x = _batch(shape, device, seed)
    p = cases.parameters(shape, device, seed, dtype=torch.float32)
    k = shape.k
    dense = cases.backward_of(p, lambda: cases.dense_forward(p, x, k, rescale=True))
    plain = cases.backward_of(p, lambda: cases.dense_forward(p, x, k, rescale=False))
    coo = cases.backward_of(p, lambda: cases.dense_forward(p, x, k, rescale=False, coo=True))
    sparse = cases.backward_of(
        p, lambda: cases.sparse_forward(p, x, k, rescale=True, backend=backend)
    )
    variants: Variants = {
        "dense": dense,
        "dense, no rescale": plain,
        "COO, no rescale": coo,
        "sparse kernel": sparse,
    }
    if device == "cuda":
        variants |= {
            "dense, TF32": _tf32(dense),
            "dense, bf16": _bf16(dense),
            "dense, bf16, no rescale": _bf16(plain),
            "sparse kernel, TF32": _tf32(sparse),
            "sparse kernel, bf16": _bf16(sparse),
        }
    return variants


FLOOR = "floor: encoder product and Adam"


def _own_steps(shape: cases.Shape, device: str, seed: int, backend: str) -> Variants:
    """Whole steps with fused Adam, and the floor: the encoder's product and Adam alone.

    On a GPU the product is in bfloat16, and so are the steps. The peers take part where they are
    installed.
    """
    x = _batch(shape, device, seed)
    p = cases.parameters(shape, device, seed, dtype=torch.float32)
    half = _bf16 if device == "cuda" else lambda work: work
    dense = cases.training_step(
        p, lambda: cases.dense_forward(p, x, shape.k, rescale=True), fused=True
    )
    sparse = cases.training_step(
        p, lambda: cases.sparse_forward(p, x, shape.k, rescale=True, backend=backend), fused=True
    )
    # Latent-major weights go to Adam as their contiguous transposes, as in the steps.
    leaves = [tensor.t() if name == "W_enc" else tensor for name, tensor in p.items()]
    leaves = [torch.zeros_like(leaf).requires_grad_() for leaf in leaves]
    for leaf in leaves:
        leaf.grad = torch.ones_like(leaf)
    optimizer = torch.optim.Adam(leaves, lr=1e-5, fused=True)
    kind = torch.bfloat16 if device == "cuda" else torch.float32
    x_kind, W_kind = x.to(kind), p["W_enc"].detach().to(kind)

    def floor() -> None:
        torch.mm(x_kind, W_kind)
        optimizer.step()

    found, missing = peers.steps(shape, device, x)
    for name, reason in missing.items():
        sys.stderr.write(f"{name} takes no part: {reason}\n")
    return {
        FLOOR: floor,
        "dense": half(dense),
        "sparse kernel": half(sparse),
        **found,
    }


def _over_floor(stages: dict[str, dict[str, dict[str, object]]]) -> dict[str, float]:
    """Return how many times the floor each whole step takes."""
    floor = float(str(stages["training step"][FLOOR]["median_ms"]))
    return {
        f"{stage}: {name}": float(str(row["median_ms"])) / floor
        for stage, rows in stages.items()
        if "step" in stage
        for name, row in rows.items()
        if name != FLOOR
    }


def _on_one_thread(measure: Callable[..., dict[str, float]], *arguments: Any) -> dict[str, float]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return measure(*arguments)
    finally:
        torch.set_num_threads(threads)


def host_times(device: str, repetitions: int) -> dict[str, float]:
    """Return the microseconds of CPU time of a call without gradients, on next to no work.

    On a GPU nothing waits between the calls, so this is the time to launch one. On a CPU one thread
    does all of it: a second one would count its waiting.
    """
    shape = cases.Shape(16, 64, 2, 4)
    p = {n: t.detach() for n, t in cases.parameters(shape, device, 0, dtype=torch.float32).items()}
    values, indices = cases.latents(shape, device, 0, "uniform")
    latents = kernels.SparseLatents.from_topk(values, indices, d_sae=shape.d_sae, trusted=True)
    x = torch.zeros(shape.batch, shape.d_in, device=device)
    calls: Variants = {
        "sparse_decode": lambda: kernels.sparse_decode(values, indices, p["W_dec"], p["b_dec"]),
        "csr_decode": lambda: kernels.csr_decode(latents, p["W_dec"], p["b_dec"]),
        "topk_encode": lambda: kernels.topk_encode(x, p["W_enc"], p["b_enc"], shape.k),
        "embedding_bag and bias": lambda: (
            torch.nn.functional.embedding_bag(
                indices, p["W_dec"], per_sample_weights=values, mode="sum"
            )
            + p["b_dec"]
        ),
    }
    n = 100
    times: dict[str, list[float]] = {name: [] for name in calls}
    with torch.no_grad():
        for _ in range(repetitions + 1):
            for name, call in calls.items():
                start = time.process_time()
                for _ in range(n):
                    call()
                times[name].append(1e6 * (time.process_time() - start) / n)
                if device == "cuda":
                    torch.cuda.synchronize()
    return {name: statistics.median(us[1:]) for name, us in times.items()}


def _bf16(work: Callable[[], object]) -> Callable[[], object]:
    def run() -> None:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            work()

    return run


def _tf32(work: Callable[[], object]) -> Callable[[], object]:
    def run() -> None:
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            work()
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before

    return run


def _stage(
    variants: Variants,
    work: tuple[str, float],
    options: argparse.Namespace,
    ceiling: dict[str, float],
) -> dict[str, dict[str, object]]:
    times = interleaved(variants, repetitions=options.repetitions, device=options.device)
    batch = cases.SHAPES[options.shape].batch
    return {name: _row(timing, work, batch, ceiling) for name, timing in times.items()}


def _row(
    timing: Timing, work: tuple[str, float], batch: int, ceiling: dict[str, float]
) -> dict[str, object]:
    """A variant's figures. Rates count what an ideal kernel must do, for every variant alike."""
    kind, amount = work
    row: dict[str, object] = dict(asdict(timing))
    row["tokens_per_s"] = batch / timing.median_ms * 1e3
    if kind == "bytes":
        rate = amount / timing.median_ms / 1e6
        row |= {"GBps": rate, "share_of_ceiling": rate / ceiling["copy_GBps"]}
    else:
        best = max(value for name, value in ceiling.items() if name.endswith("TFLOPs"))
        rate = amount / timing.median_ms / 1e9
        row |= {"TFLOPs": rate, "share_of_ceiling": rate / best}
    return row


def _ratios(stages: dict[str, dict[str, dict[str, object]]]) -> dict[str, float]:
    """How many times quicker ours is than the dense variant of the same rounds."""
    ratios = {}
    for stage, rows in stages.items():
        for dense in ("SAELens dense", "dense", "dense, bf16"):
            for ours in ("drop-in class", "sparse kernel", "sparse kernel, bf16"):
                if dense in rows and ours in rows and ("bf16" in dense) == ("bf16" in ours):
                    times = [float(str(rows[name]["median_ms"])) for name in (dense, ours)]
                    ratios[f"{stage}: {dense} / {ours}"] = times[0] / times[1]
    return ratios


def table(report: dict[str, object]) -> str:
    """The report as text."""
    lines = [json.dumps({name: report[name] for name in ("environment", "shape", "ceiling")})]
    stages = report["stages"]
    assert isinstance(stages, dict)
    for stage, rows in stages.items():
        lines.append(
            f"\n{stage:<44}{'median ms':>10}{'min':>10}{'spread':>8}{'MiB':>8}"
            f"{'tokens/s':>12}{'rate':>16}{'ceiling':>9}"
        )
        for name, row in rows.items():
            rate = f"{row['GBps']:.1f} GB/s" if "GBps" in row else f"{row['TFLOPs']:.3f} TFLOP/s"
            lines.append(
                f"  {name:<42}{row['median_ms']:>10.2f}{row['min_ms']:>10.2f}"
                f"{row['spread']:>8.0%}{row['peak_mib']:>8.0f}"
                f"{row['tokens_per_s']:>12.0f}{rate:>16}{row['share_of_ceiling']:>9.0%}"
            )
    lines.append("")
    ratios = report["ratios"]
    assert isinstance(ratios, dict)
    lines += [f"{name}: {ratio:.1f}x" for name, ratio in ratios.items()]
    over, host = report["over_floor"], report["host_us_per_call"]
    assert isinstance(over, dict)
    assert isinstance(host, dict)
    lines += ["", *(f"{name}: {ratio:.2f} times the floor" for name, ratio in over.items())]
    lines += ["", *(f"{name}: {us:.0f} us of the host a call" for name, us in host.items())]
    lines += [json.dumps({name: report[name]}) for name in ("accuracy", "drift", "not_measured")]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
