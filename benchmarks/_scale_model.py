"""How long an extraction takes on many GPUs, from rates; every rate says where it comes from."""

from __future__ import annotations

import heapq
from dataclasses import asdict, dataclass, replace

import numpy as np

GPUS = (1, 8, 64)


@dataclass(frozen=True)
class Rates:
    """What a machine and a network do in a second. The defaults are assumptions."""

    gpu_images: float = 2000.0
    """Images that a GPU forwards."""
    core_images: float = 150.0
    """JPEG images that a core decodes and resizes."""
    cores_per_gpu: int = 12
    """Cores beside a GPU."""
    gpus_per_node: int = 8
    disk_bytes: float = 5e9
    """Bytes that all machines together write to the shared storage."""
    node_network_bytes: float = 1.2e9
    """Bytes that a machine sends or receives: 10 Gbit."""
    start_seconds: float = 90.0
    """From the command to the first shard: processes, imports, the model, the probe."""
    task_overhead: float = 0.05
    """Share of a task's time that Ray adds."""
    tasks_per_second: float = 200.0
    """Tasks that the one process that gives them out can give out."""
    node_hours_between_failures: float = 2000.0
    """Hours that a machine runs until it dies, on average."""
    dollars_per_gpu_hour: float = 3.0


@dataclass(frozen=True)
class Job:
    """Images, and what is kept of each."""

    name: str
    images: int
    image_bytes: int
    kept_bytes: int
    """Bytes of activations per image: hooks x tokens x width x bytes of a number."""
    images_per_shard: int = 2048


JOBS = (
    Job("ImageNet-1k, one layer, class token", 1_281_167, 110_000, 768 * 2),
    Job("ImageNet-1k, one layer, 50 tokens", 1_281_167, 110_000, 50 * 768 * 2),
    Job("LAION-400M, one layer, class token", 400_000_000, 25_000, 768 * 2),
    Job("LAION-400M, one layer, 50 tokens", 400_000_000, 25_000, 50 * 768 * 2),
)
"""A ViT-B/32's residual stream in 16 bits."""


def limits(job: Job, rates: Rates, n_gpus: int) -> dict[str, float]:
    """Images a second that each part of the machinery lets through."""
    nodes = -(-n_gpus // rates.gpus_per_node)
    network = nodes * rates.node_network_bytes
    return {
        "GPUs": n_gpus * rates.gpu_images * (1 - rates.task_overhead),
        "decoding": n_gpus * rates.cores_per_gpu * rates.core_images * (1 - rates.task_overhead),
        "storage": rates.disk_bytes / job.kept_bytes,
        "network": network / (job.image_bytes + job.kept_bytes),
        "giving out tasks": rates.tasks_per_second * job.images_per_shard,
    }


def simulate(job: Job, rates: Rates, n_gpus: int, *, seed: int = 0) -> dict[str, float | str]:
    """Run the shards of a job through slots that start, work, straggle and die.

    A shard takes the time that the narrowest part allows, times a random factor (lognormal, 5%). A
    machine that dies takes the shards in hand with it, which are done again elsewhere, and it is
    replaced after the time of a start.

    Returns:
        Hours, GPU hours, dollars, terabytes kept, shards done again, and what limits.
    """
    rng = np.random.default_rng(seed)
    allowed = limits(job, rates, n_gpus)
    narrow = min(allowed, key=lambda name: allowed[name])
    seconds = job.images_per_shard * n_gpus / allowed[narrow]
    n_shards = -(-job.images // job.images_per_shard)
    deaths = 1 / (rates.node_hours_between_failures * 3600 * rates.gpus_per_node)
    slots = [(rates.start_seconds, slot) for slot in range(n_gpus)]
    heapq.heapify(slots)
    again, last, left = 0, 0.0, n_shards
    factors = rng.lognormal(0.0, 0.05, 65536)
    dies = rng.random(65536) < seconds * deaths * rates.gpus_per_node
    number = 0
    while left:
        at, slot = heapq.heappop(slots)
        takes = seconds * factors[number % len(factors)]
        if dies[(number * 31) % len(dies)]:
            again += 1
            heapq.heappush(slots, (at + takes / 2 + rates.start_seconds, slot))
        else:
            left -= 1
            last = max(last, at + takes)
            heapq.heappush(slots, (at + takes, slot))
        number += 1
    hours = last / 3600
    return {
        "job": job.name,
        "gpus": n_gpus,
        "hours": hours,
        "gpu_hours": hours * n_gpus,
        "dollars": hours * n_gpus * rates.dollars_per_gpu_hour,
        "terabytes": job.images * job.kept_bytes / 1e12,
        "images_per_second": job.images / last,
        "shards": n_shards,
        "shards_again": again,
        "limited_by": narrow,
    }


def lanes_seconds(parameters: int, n_gpus: int, rates: Rates) -> float:
    """Seconds that a training step of lanes spends on sending gradients in 32 bits.

    In each of the log2(n) rounds of the tree a process sends all gradients to one other. Within a
    machine they go over its own links, which are not counted.
    """
    nodes = -(-n_gpus // rates.gpus_per_node)
    rounds = max(0, (nodes - 1).bit_length())
    return rounds * rates.gpus_per_node * 4 * parameters / rates.node_network_bytes


def assumptions(rates: Rates, measured: dict[str, str]) -> list[str]:
    """Every rate as a line that says whether it was measured."""
    return [
        f"{name} = {value:g} ({measured.get(name, 'assumed')})"
        for name, value in asdict(rates).items()
    ]


def table(rates: Rates, measured: dict[str, str]) -> str:
    """The jobs on 1, 8 and 64 GPUs, below the assumptions."""
    lines = ["Assumptions:", "", *(f"- {line}" for line in assumptions(rates, measured)), ""]
    lines += [
        "| job | GPUs | hours | GPU hours | dollars | TB | images/s | limited by |",
        "|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for job in JOBS:
        for n_gpus in GPUS:
            r = simulate(job, rates, n_gpus)
            lines.append(
                f"| {r['job']} | {n_gpus} | {r['hours']:.2f} | {r['gpu_hours']:.1f} "
                f"| {r['dollars']:.0f} | {r['terabytes']:.2f} | {r['images_per_second']:,.0f} "
                f"| {r['limited_by']} |"
            )
    sent = {n: lanes_seconds(2 * 768 * 24_576, n, rates) for n in GPUS}
    lines += [
        "",
        "One SAE of 768 x 24,576 in lanes: a step sends its gradients for "
        + ", ".join(f"{seconds:.2f} s on {n} GPUs" for n, seconds in sent.items())
        + " between machines.",
    ]
    return "\n".join(lines)


def with_measured(rates: Rates, **found: float) -> Rates:
    """Replace assumptions by what was measured."""
    return replace(rates, **found)
