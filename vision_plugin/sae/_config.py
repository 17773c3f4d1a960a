"""The one definition of a training run: Python object, command line and saved file."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sae_lens import LoggingConfig, TrainingSAEConfig
from sae_lens.config import SAETrainerConfig

from vision_plugin.models import TokenSelection

D_IN_OF_MODEL = 0
"""``sae.d_in`` of this value is replaced by the width of the model at the hook."""


def _no_wandb() -> LoggingConfig:
    return LoggingConfig(log_to_wandb=False)


@dataclass(frozen=True, kw_only=True)
class VisionSAERunnerConfig:
    """How to train an SAE on a vision transformer.

    Fields have SAELens's names (``LanguageModelSAERunnerConfig``) wherever the meaning is the
    same; a "token" is one vector of the residual stream.
    """

    sae: TrainingSAEConfig
    """The SAE: one of SAELens's training configurations."""
    model_name: str
    """Hugging Face id, local folder, ``open_clip:...``, ``timm:...`` or ``demo``."""
    images: str
    """Folder, ``imagefolder:...``, Parquet file, data set name, tar shards, or ``demo:N``."""
    hook_name: str
    """Where the SAE reads, for example ``blocks.10.hook_resid_post``."""
    hook_name_out: str | None = None
    """Where a transcoder writes, for example ``blocks.10.hook_mlp_out``."""
    tokens: str = "all"
    """``cls``, ``patch``, ``all`` or ``random:n`` (n random tokens of each picture)."""
    training_tokens: int = 2_000_000
    """Vectors to train on."""
    output_path: str | None = "output"
    """Folder for the trained SAE; it must not exist, or be empty, unless ``overwrite`` is set."""
    overwrite: bool = False
    """Replace what is in ``output_path``."""

    image_column: str | None = None
    """Column of pictures, where a data set has several."""
    split: str | None = None
    """Split of a data set."""

    train_batch_size_tokens: int = 4096
    """Vectors per training step."""
    store_batch_size_images: int = 32
    """Pictures per forward pass."""
    n_batches_in_buffer: int = 20
    """Training batches that the shuffle buffer holds."""
    n_batches_for_norm_estimate: int = 100
    """Training batches from which an activation scale is estimated, where the SAE wants one."""

    lr: float = 3e-4
    """Learning rate."""
    lr_end: float | None = None
    """Final learning rate of a cosine schedule; a tenth of ``lr`` by default."""
    lr_scheduler_name: str = "constant"
    """``constant``, ``cosineannealing`` or ``cosineannealingwarmrestarts``."""
    lr_warm_up_steps: int = 0
    """Steps of linear warm-up."""
    lr_decay_steps: int = 0
    """Steps of linear decay at the end."""
    n_restart_cycles: int = 1
    """Cycles of a cosine schedule with warm restarts."""
    adam_beta1: float = 0.9
    """Adam's decay of the mean."""
    adam_beta2: float = 0.999
    """Adam's decay of the variance."""

    device: str = "cpu"
    """Where the SAE and the model live."""
    dtype: str = "float32"
    """Type of the model's weights and of the activations."""
    autocast: bool = False
    """Train in bfloat16 where PyTorch deems it safe."""
    seed: int = 42
    """Seed of everything random."""

    dead_feature_window: int = 1000
    """Steps without firing after which a latent counts as dead."""
    feature_sampling_window: int = 2000
    """Steps over which firing frequencies are counted."""

    logger: LoggingConfig = field(default_factory=_no_wandb)
    """Weights & Biases; off by default."""

    def __post_init__(self) -> None:
        TokenSelection.parse(self.tokens)
        for name in (
            "training_tokens",
            "train_batch_size_tokens",
            "store_batch_size_images",
            "lr",
        ):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: it has to be above 0")
        if self.training_tokens < self.train_batch_size_tokens:
            raise ValueError(
                f"training_tokens={self.training_tokens} is less than one batch of "
                f"train_batch_size_tokens={self.train_batch_size_tokens}"
            )

    @property
    def total_training_steps(self) -> int:
        """Optimiser steps of the run."""
        return -(-self.training_tokens // self.train_batch_size_tokens)

    def to_sae_trainer_config(self) -> SAETrainerConfig:
        """What SAELens's trainer takes of this."""
        shared = {f.name for f in dataclasses.fields(SAETrainerConfig)}
        mine = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name in shared}
        mine["lr_end"] = self.lr / 10 if self.lr_end is None else self.lr_end
        return SAETrainerConfig(
            total_training_samples=self.training_tokens,
            train_batch_size_samples=self.train_batch_size_tokens,
            **mine,
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields, the SAE's and the logger's nested."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        fields["sae"] = self.sae.to_dict()
        fields["logger"] = dataclasses.asdict(self.logger)
        return fields

    def save(self, path: Path) -> None:
        """Write the run's definition as JSON."""
        path.write_text(json.dumps(self.to_dict(), indent=2, sort_keys=True, default=str))

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> VisionSAERunnerConfig:
        """Read what :meth:`to_dict` gave.

        Raises:
            ValueError: a field is unknown.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(fields) - known)
        if unknown:
            raise ValueError(f"unknown fields in a training configuration: {', '.join(unknown)}")
        fields = dict(fields)
        fields["sae"] = TrainingSAEConfig.from_dict(dict(fields["sae"]))
        fields["logger"] = LoggingConfig(**fields["logger"])
        return cls(**fields)
