"""Small training runs that the tests of this package share."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import sae_lens
import torch
from PIL import Image
from sae_lens import TrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer

from tests.activations._stores import D_MODEL, RESID, make_store, tiny_model
from vision_plugin.activations import ActivationStore
from vision_plugin.images import open_images
from vision_plugin.sae import (
    SkipTranscoderTrainingConfig,
    TranscoderTrainingConfig,
    VisionSAERunnerConfig,
    VisionSAETrainingRunner,
)

MLP_IN, MLP_OUT = "blocks.1.ln2.hook_out", "blocks.1.hook_mlp_out"
N_IMAGES, BATCH, STEPS = 12, 32, 24
SHAPE = {"d_in": D_MODEL, "d_sae": 32}

ARCHITECTURES: dict[str, Callable[..., TrainingSAEConfig]] = {
    "standard": lambda **o: sae_lens.StandardTrainingSAEConfig(
        **SHAPE, l1_coefficient=0.1, l1_warm_up_steps=10, **o
    ),
    "gated": lambda **o: sae_lens.GatedTrainingSAEConfig(**SHAPE, l1_warm_up_steps=10, **o),
    "jumprelu": lambda **o: sae_lens.JumpReLUTrainingSAEConfig(
        **SHAPE, l0_coefficient=0.1, l0_warm_up_steps=10, **o
    ),
    "topk": lambda **o: sae_lens.TopKTrainingSAEConfig(**SHAPE, k=4, **o),
    "abstopk": lambda **o: sae_lens.AbsTopKTrainingSAEConfig(**SHAPE, k=4, **o),
    "batchtopk": lambda **o: sae_lens.BatchTopKTrainingSAEConfig(**SHAPE, k=4.0, **o),
    "matryoshka_batchtopk": lambda **o: sae_lens.MatryoshkaBatchTopKTrainingSAEConfig(
        **SHAPE, k=4.0, matryoshka_widths=[8, 16, 32], **o
    ),
    "matching_pursuit": lambda **o: sae_lens.MatchingPursuitTrainingSAEConfig(
        **SHAPE, decoder_init_norm=1.0, max_iterations=4, **o
    ),
    "transcoder": lambda **o: TranscoderTrainingConfig(
        **SHAPE, d_out=D_MODEL, l1_coefficient=0.1, **o
    ),
    "skip_transcoder": lambda **o: SkipTranscoderTrainingConfig(
        **SHAPE, d_out=D_MODEL, l1_coefficient=0.1, **o
    ),
}
"""Every architecture that can be trained."""

SAVED_AS = {name: name for name in ARCHITECTURES} | {
    "batchtopk": "jumprelu",
    "matryoshka_batchtopk": "jumprelu",
}


def images(n: int = N_IMAGES, *, first: int = 0) -> list[Image.Image]:
    """Random images of 32 pixels."""
    rng = np.random.default_rng(first)
    return [Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(n)]


def config(path: Path | None, architecture: str = "topk", **changes: Any) -> VisionSAERunnerConfig:
    """A run of 24 steps of 32 vectors each."""
    is_transcoder = architecture.endswith("transcoder")
    settings: dict[str, Any] = {
        "sae": ARCHITECTURES[architecture](),
        "model_name": "tiny",
        "images": "images",
        "hook_name": MLP_IN if is_transcoder else RESID,
        "hook_name_out": MLP_OUT if is_transcoder else None,
        "training_tokens": STEPS * BATCH,
        "train_batch_size_tokens": BATCH,
        "store_batch_size_images": 4,
        "n_batches_in_buffer": 4,
        "n_batches_for_norm_estimate": 3,
        "dead_feature_window": 5,
        "defaults": "saelens",
        "lr": 3e-3,
        "lr_warm_up_steps": 4,
        "lr_decay_steps": 8,
        "output_path": None if path is None else str(path),
    }
    return VisionSAERunnerConfig(**{**settings, **changes})


def runner(cfg: VisionSAERunnerConfig, **overrides: Any) -> VisionSAETrainingRunner:
    """A runner over random images and the tiny model."""
    settings: dict[str, Any] = {
        "model": tiny_model(),
        "images": open_images(images()),
    }
    return VisionSAETrainingRunner(cfg, **{**settings, **overrides})


def store_of(path: Path, **changes: Any) -> ActivationStore:
    """A store of 12 images' activations at the hook that runs read by default."""
    settings = {"images_per_shard": 4, "batch_size": 4, **changes}
    return make_store(path, N_IMAGES, **settings)


def weights(path: Path) -> str:
    """Hash of the weights that a run saved, and of how often its latents fire."""
    files = ("sae_weights.safetensors", "sparsity.safetensors")
    return hashlib.sha256(b"".join((path / name).read_bytes() for name in files)).hexdigest()


class Killed(BaseException):
    """Ends a run the way no handler expects."""


def stop_at(monkeypatch: Any, step: int, end: Callable[[], None]) -> None:
    """Call ``end`` in the middle of a step of every run from now on."""
    before = SAETrainer.step

    def until(self: Any, batch: torch.Tensor) -> Any:
        output = before(self, batch)
        if self.n_training_steps == step:
            end()
        return output

    monkeypatch.setattr(SAETrainer, "step", until)


def kill() -> None:
    """As :class:`Killed`."""
    raise Killed
