"""SAELens's side of the kernel benchmark: its decoder, its step, its trainer, and ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from sae_lens import LoggingConfig, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainStepInput
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from benchmarks._kernel_cases import Shape
from vision_plugin.sae import SteppedTrainer
from vision_plugin.sae._sparse_training import SparseTopKTrainingSAE, SparseTopKTrainingSAEConfig


def _make(sparse: bool, shape: Shape, device: str, **changes: Any) -> TopKTrainingSAE:
    torch.manual_seed(0)
    sae_class, config = (
        (SparseTopKTrainingSAE, SparseTopKTrainingSAEConfig)
        if sparse
        else (TopKTrainingSAE, TopKTrainingSAEConfig)
    )
    sizes = {"d_in": shape.d_in, "d_sae": shape.d_sae, "k": shape.k, "device": device}
    return sae_class(config(**sizes, **changes))


def decoders(shape: Shape, device: str, values: Tensor, indices: Tensor) -> dict[str, Any]:
    """SAELens's own decoder on dense latents, with its defaults."""
    sae = _make(False, shape, device)
    acts = torch.zeros(shape.batch, shape.d_sae, device=device).scatter(1, indices.long(), values)

    def decode() -> Tensor:
        with torch.no_grad():
            return sae.decode(acts)

    return {"SAELens dense": decode}


def steps(shape: Shape, device: str, dead_fraction: float) -> dict[str, Callable[[], object]]:
    """Forward and backward of SAELens's training pass: dense, COO, and the drop-in class."""
    x = torch.randn(shape.batch, shape.d_in, generator=torch.Generator().manual_seed(0)).to(device)
    dead = _dead(shape, device, dead_fraction)
    saes = {
        "SAELens dense": _make(False, shape, device),
        "SAELens dense, no rescale": _make(
            False, shape, device, rescale_acts_by_decoder_norm=False
        ),
        "SAELens COO, no rescale": _make(
            False, shape, device, rescale_acts_by_decoder_norm=False, use_sparse_activations=True
        ),
        "drop-in class": _make(True, shape, device),
    }

    def work(sae: TopKTrainingSAE) -> Callable[[], None]:
        step = TrainStepInput(
            sae_in=x, coefficients={}, dead_neuron_mask=dead, n_training_steps=0,
            is_logging_step=False,
        )  # fmt: skip

        def run() -> None:
            sae.training_forward_pass(step).loss.backward()
            sae.zero_grad()

        return run

    return {name: work(sae) for name, sae in saes.items()}


def trainer_steps(
    shape: Shape, device: str, dead_fraction: float, *, autocast: bool
) -> dict[str, Callable[[], object]]:
    """One step of the stock ``SAETrainer`` on both classes, and of the trainer of ``vp.train``."""
    x = torch.randn(shape.batch, shape.d_in, generator=torch.Generator().manual_seed(0)).to(device)

    def batches() -> Iterator[Tensor]:
        while True:
            yield x

    def work(make: Any, sparse: bool) -> Callable[[], object]:
        config = SAETrainerConfig(
            n_checkpoints=0, checkpoint_path=None, save_final_checkpoint=False,
            total_training_samples=10**9, device=device, autocast=autocast, lr=1e-5, lr_end=1e-5,
            lr_scheduler_name="constant", lr_warm_up_steps=0, adam_beta1=0.9, adam_beta2=0.999,
            lr_decay_steps=0, n_restart_cycles=1, train_batch_size_samples=shape.batch,
            dead_feature_window=10**6, feature_sampling_window=1000,
            logger=LoggingConfig(log_to_wandb=False),
        )  # fmt: skip
        trainer = make(config, _make(sparse, shape, device), batches())
        dead = _dead(shape, device, dead_fraction)

        def run() -> object:
            # Keep the same latents dead, whatever fires: the trainer counts passes.
            if dead is not None:
                trainer.n_forward_passes_since_fired.masked_fill_(dead, 2e6)
            return trainer.step(x)

        if make is SteppedTrainer:
            for _ in range(5):  # a graph is captured after a few steps
                run()
        return run

    return {
        "SAELens dense": work(SAETrainer, sparse=False),
        "drop-in class": work(SAETrainer, sparse=True),
        "vp.train": work(SteppedTrainer, sparse=True),
    }


def _dead(shape: Shape, device: str, fraction: float) -> Tensor | None:
    if not fraction:
        return None
    order = torch.randperm(shape.d_sae, generator=torch.Generator().manual_seed(0))
    dead = torch.zeros(shape.d_sae, dtype=torch.bool)
    dead[order[: int(fraction * shape.d_sae)]] = True
    return dead.to(device)
