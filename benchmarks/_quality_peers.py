"""Train one peer's SAE on given vectors and encode others with it.

    python benchmarks/_quality_peers.py JOB.json

It runs in an environment of its own, with torch and the peer alone: the peers' pins and this
package's do not go together. The job names a safetensors file with ``train`` [n, d_in] and
``scored`` [m, d_in], the trainer and its sizes; the result is a safetensors file with the decoder
directions, the latents of the scored vectors in compressed rows, and their reconstruction.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Encode = Callable[[Tensor], Tensor]
Trained = tuple[Tensor, Encode, Encode, "Encode | None"]
"""Decoder directions, encode, decode, and encode with the threshold at which k latents fire."""


def batches(rows: Tensor, size: int, n: int, seed: int) -> Iterator[Tensor]:
    """So many batches, without a repetition before every vector was taken."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(n):
        while len(order) < size:
            order = torch.cat([order, torch.randperm(len(rows), generator=generator)])
        yield rows[order[:size]]
        order = order[size:]


def dictionary_learning(job: dict[str, Any], rows: Tensor) -> Trained:
    """dictionary_learning's trainers with their defaults; warm-up as short as the run asks for."""
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
    from dictionary_learning.trainers.top_k import TopKTrainer

    steps = -(-job["tokens"] // job["batch"])
    options: dict[str, Any] = {
        **{"steps": steps, "activation_dim": rows.shape[1], "dict_size": job["d_sae"]},
        **{"k": job["k"], "layer": 0, "lm_name": "none", "seed": job["seed"], "device": "cpu"},
        **{"warmup_steps": min(1000, steps // 12), "threshold_start_step": min(1000, steps // 2)},
    }
    if job["kind"] == "matryoshka_batchtopk":
        options["group_fractions"] = [1 / 16, 3 / 16, 7 / 16, 5 / 16]
    trainers = {
        "topk": TopKTrainer,
        "batchtopk": BatchTopKTrainer,
        "matryoshka_batchtopk": MatryoshkaBatchTopKTrainer,
    }
    trainer = trainers[job["kind"]](**options)
    for step, batch in enumerate(batches(rows, job["batch"], steps, job["seed"])):
        trainer.update(step, batch)
    sae = trainer.ae
    W_dec = sae.W_dec if hasattr(sae, "W_dec") else sae.decoder.weight.T
    if job["kind"] == "topk":
        return W_dec, lambda x: sae.encode(x, use_threshold=False), sae.decode, None

    def at_k(x: Tensor) -> Tensor:
        kept, sae.threshold = sae.threshold.clone(), torch.tensor(-1.0)
        before = torch.cat([sae.encode(part, use_threshold=True) for part in x.split(1024)])
        sae.threshold = before.flatten().topk(job["k"] * len(x)).values[-1]
        found = torch.cat([sae.encode(part) for part in x.split(1024)])
        sae.threshold = kept
        return found

    return W_dec, sae.encode, sae.decode, at_k


def overcomplete(job: dict[str, Any], rows: Tensor) -> Trained:
    """overcomplete's SAEs with its own loop, a squared error and Adam at 5e-4, as in its README."""
    from overcomplete.sae import BatchTopKSAE, TopKSAE, train_sae

    torch.manual_seed(job["seed"])
    steps = -(-job["tokens"] // job["batch"])
    n_active = job["k"] * (job["batch"] if job["kind"] == "batchtopk" else 1)
    sae_class = {"topk": TopKSAE, "batchtopk": BatchTopKSAE}[job["kind"]]
    sae = sae_class(rows.shape[1], nb_concepts=job["d_sae"], top_k=n_active, device="cpu")
    loader = list(batches(rows, job["batch"], steps, job["seed"]))
    train_sae(
        sae,
        loader,
        lambda x, x_hat, *_: (x - x_hat).square().mean(),
        torch.optim.Adam(sae.parameters(), lr=5e-4),
        nb_epochs=1,
        monitoring=0,
    )
    sae.eval()
    return sae.get_dictionary(), lambda x: sae.encode(x)[1], sae.decode, None


def sparsify(job: dict[str, Any], rows: Tensor) -> Trained:
    """sparsify's SparseCoder and loss, its sign descent and rate, and the mean as first bias."""
    from sparsify import SparseCoder, SparseCoderConfig
    from sparsify.sign_sgd import SignSGD

    torch.manual_seed(job["seed"])
    steps = -(-job["tokens"] // job["batch"])
    cfg = SparseCoderConfig(num_latents=job["d_sae"], k=job["k"])
    sae = SparseCoder(rows.shape[1], cfg, device="cpu")
    sae.b_dec.data = rows[:8192].mean(0)
    rate = 5e-3 / (job["d_sae"] / 2**14) ** 0.5
    optimizer = SignSGD(sae.parameters(), lr=rate)
    for step, batch in enumerate(batches(rows, job["batch"], steps, job["seed"])):
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - step / steps)
        sae.set_decoder_norm_to_unit_norm()
        sae(batch).fvu.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()

    def encode(x: Tensor) -> Tensor:
        found = sae.encode(x)
        return x.new_zeros(len(x), job["d_sae"]).scatter(1, found.top_indices, found.top_acts)

    return sae.W_dec, encode, lambda z: z @ sae.W_dec + sae.b_dec, None


PEERS = {
    "dictionary_learning": dictionary_learning,
    "overcomplete": overcomplete,
    "sparsify": sparsify,
}


@torch.no_grad()
def encoded(x: Tensor, encode: Encode, decode: Encode, prefix: str = "") -> dict[str, Tensor]:
    """Latents in compressed rows and the reconstruction, a part at a time."""
    values, indices, counts, outputs = [], [], [], []
    for part in x.split(2048):
        latents = encode(part)
        where = latents.nonzero(as_tuple=True)
        values.append(latents[where])
        indices.append(where[1].int())
        counts.append((latents != 0).sum(1))
        outputs.append(decode(latents))
    return {
        f"{prefix}values": torch.cat(values),
        f"{prefix}indices": torch.cat(indices),
        f"{prefix}counts": torch.cat(counts),
        f"{prefix}reconstruction": torch.cat(outputs).contiguous(),
    }


def main(path: str) -> None:
    """Run the job in a file."""
    job = json.loads(Path(path).read_text())
    torch.set_num_threads(job["threads"])
    data = load_file(job["data"])
    begin, cpu = time.perf_counter(), time.process_time()
    W_dec, encode, decode, at_k = PEERS[job["trainer"]](job, data["train"])
    seconds = torch.tensor([time.perf_counter() - begin, time.process_time() - cpu])
    found = {"W_dec": W_dec.detach().clone().contiguous(), "seconds": seconds}
    found |= encoded(data["scored"], encode, decode)
    if at_k is not None:
        with torch.no_grad():
            latents = at_k(data["scored"])
            found["at_k"] = torch.cat([decode(part) for part in latents.split(2048)])
    save_file(found, job["result"])


if __name__ == "__main__":
    main(sys.argv[1])
