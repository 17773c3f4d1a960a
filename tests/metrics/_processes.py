"""What each of two processes does that talk over gloo."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as distributed
from torch import Tensor

from vision_plugin import metrics

N, K, D = 30, 6, 4


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    latents = torch.rand(N, K, generator=generator, dtype=torch.float64)
    latents[:, :3] *= torch.rand(N, 3, generator=generator) < 0.4
    latents[:, 3] += 1000
    latents[:15, 3] -= 200  # The processes see different minima.
    return latents, torch.randn(N, D, generator=generator)


def scores(rank: int, world: int) -> dict[str, Tensor]:
    """Feed this process's share of the images and return what every process must agree on."""
    latents, embeddings = data()
    share = slice(rank * N // world, (rank + 1) * N // world)
    found: dict[str, Tensor] = {}
    for images in ("all", "top16"):
        metric = metrics.Monosemanticity(n_features=K, d_embed=D, images=images)
        metric.update(latents[share], embeddings[share])
        found[f"monosemanticity {images}"] = metric.compute().score
        found[f"monosemanticity {images} again"] = metric.compute().z
        starved = metrics.Monosemanticity(n_features=K, d_embed=D, images=images)
        if rank == world - 1:
            starved.update(latents, embeddings)
        found[f"one process without data {images}"] = starved.compute().score
    labels = torch.arange(N)[share] % 2
    top = metrics.TopImages(n_features=K, n_top=3)
    top.update(latents[share])
    found["top images"] = top.compute().images
    sparsity = metrics.Sparsity(n_features=K)
    sparsity.update(latents[share].to_sparse_csr())
    found["firing counts"] = sparsity.compute().n_active
    fidelity = metrics.FVU(d_in=D)
    fidelity.update(embeddings[share], 0.9 * embeddings[share])
    found["explained variance"] = torch.tensor(fidelity.compute().explained_variance)
    probing = metrics.SparseProbing(n_features=K, k_values=(1, 3))
    if rank == world - 1:
        probing.update(latents, torch.arange(N) % 2)
    found["probe accuracy"] = torch.tensor(list(probing.compute().accuracy.values()))
    preservation = metrics.DownstreamPreservation(d_in=D)
    preservation.update(embeddings[share], embeddings[share].roll(1, 1), labels)
    found["preservation"] = torch.tensor(preservation.compute().preservation)
    return found


def main(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = distributed.FileStore(str(folder / "store"), world)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
    torch.save(scores(rank, world), folder / f"{rank}.pt")
    distributed.destroy_process_group()
