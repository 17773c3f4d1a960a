"""The training steps of sparsify and dictionary_learning, where they are installed.

pip install eai-sparsify==1.3.3 dictionary-learning==0.1.0
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

from benchmarks._kernel_cases import Shape

Step = Callable[[], object]


def steps(shape: Shape, device: str, x: Tensor) -> tuple[dict[str, Step], dict[str, str]]:
    """Return the steps of the peers that are here, and why the others are not."""
    found: dict[str, Step] = {}
    missing: dict[str, str] = {}
    for name, make in (("sparsify", _sparsify), ("dictionary_learning", _dictionary_learning)):
        if find_spec(name) is None:
            missing[name] = "not installed"
            continue
        try:
            found[name] = make(shape, device, x)
            found[name]()
        except Exception as error:  # another project's package: whatever fails there is a fact
            found.pop(name, None)
            missing[name] = f"{type(error).__name__}: {error}"
    return found, missing


def _autocast(device: str) -> torch.autocast:
    return torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda")


def _sparsify(shape: Shape, device: str, x: Tensor) -> Step:
    """A step of its SAE: forward, backward, clipping, fused Adam, unit decoder rows."""
    from sparsify import SparseCoder, SparseCoderConfig

    torch.manual_seed(0)
    sae = SparseCoder(shape.d_in, SparseCoderConfig(num_latents=shape.d_sae, k=shape.k), device)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-5, fused=device == "cuda")

    def step() -> None:
        with _autocast(device):
            loss = sae(x).fvu
        loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _dictionary_learning(shape: Shape, device: str, x: Tensor) -> Step:
    """A step of its own trainer of TopK SAEs."""
    from dictionary_learning.trainers.top_k import TopKTrainer

    trainer = TopKTrainer(
        steps=10**6, activation_dim=shape.d_in, dict_size=shape.d_sae, k=shape.k, layer=0,
        lm_name="none", lr=1e-5, seed=0, device=device,
    )  # fmt: skip

    def step() -> None:
        with _autocast(device):
            trainer.update(1, x)

    return step
