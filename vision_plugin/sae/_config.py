"""Configuration of a training run; the command line and the saved file follow from it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sae_lens import LoggingConfig, TrainingSAEConfig
from sae_lens.config import SAETrainerConfig

from vision_plugin._device import check_device
from vision_plugin._inputs import check_template
from vision_plugin._paths import local_path
from vision_plugin.models import TokenSelection
from vision_plugin.sae._auto import AUTO, Auto
from vision_plugin.sae._defaults import check_latents, resolve

DEFAULTS = ("auto", "saelens")
DTYPES = ("float32", "bfloat16", "float16", "float64")
SCHEDULERS = ("constant", "cosineannealing", "cosineannealingwarmrestarts")
B_DEC_INIT_METHODS = (AUTO, "zeros", "mean", "geometric_median")
DECODER_INIT_METHODS = (AUTO, "random", "data")
NOT_OF_THE_RESULT = (
    *("output_path", "overwrite", "n_checkpoints", "logger", "device", "n_quality_tokens"),
    *("validation_images", "validation_split", "n_validation_images", "n_validations"),
    *("validation_metrics", "validation_embedder", "validation_template"),
)
"""Fields that do not change the trained weights."""

_LARGEST = 2**53
"""Up to here numbers of steps stay whole where schedules make floats of them."""
_LARGEST_BUFFER = 100_000_000
"""Vectors; a larger buffer would not be full for days."""
_SAELENS_BATCH, _BATCH_RANGE, _LEAST_STEPS = 4096, (256, 4096), 1000


def batch_size_for(training_tokens: int, defaults: str) -> int:
    """Return the vectors per step for a run that does not set them.

    By ``auto`` it is a power of two from 256 to 4,096 that gives the run at least 1,000 steps. For
    the same number of vectors, more steps reconstruct better, until the fixed cost of a step
    outweighs the gain.

    Args:
        training_tokens: Vectors that the run trains on.
        defaults: ``"auto"`` or ``"saelens"``.
    """
    if defaults == "saelens":
        return _SAELENS_BATCH
    least, most = _BATCH_RANGE
    wanted = max(1, training_tokens // _LEAST_STEPS)
    size = min(most, max(least, 1 << (wanted.bit_length() - 1)))
    return min(size, training_tokens)


def _no_wandb() -> LoggingConfig:
    return LoggingConfig(log_to_wandb=False)


@dataclass(frozen=True, kw_only=True)
class VisionSAERunnerConfig:
    """How to train an SAE on a vision transformer.

    A field that means the same as in SAELens's ``LanguageModelSAERunnerConfig`` has the same name.
    A "token" is the activation vector of one token of one image.

    Examples:
        >>> cfg = vp.VisionSAERunnerConfig(
        ...     model_name="demo",
        ...     images="demo:40",
        ...     hook_name="blocks.2.hook_resid_post",
        ...     sae=TopKTrainingSAEConfig(d_in=128, d_sae=256, k=8),
        ...     training_tokens=2048,
        ...     tokens="patch",
        ... )
        >>> cfg.tokens, cfg.total_training_steps
        ('patch', 8)
    """

    sae: TrainingSAEConfig
    """Architecture and sizes of the SAE, as one of SAELens's training configurations."""
    defaults: Literal["auto", "saelens"] = "auto"
    """How to fill in the fields that are not set. ``auto`` uses rules, chosen by experiment, that
    depend on the data and the length of the run; they set every field whose value is ``auto``, and
    every field of ``sae`` that has SAELens's default. ``saelens`` uses SAELens's defaults."""
    explicit: tuple[str, ...] = ()
    """Names of fields of ``sae`` that keep SAELens's default."""
    model_name: str
    """Model: Hugging Face id or folder, ``open_clip:...``, ``timm:...`` or ``demo``."""
    images: str
    """Images: folder, ``imagefolder:...``, Parquet, dataset name, tars or ``demo:N``; or the folder
    of a store that ``vision-plugin extract`` wrote for this model, hook and kind of token."""
    hook_name: str
    """Hook whose activations the SAE reads, for example ``blocks.10.hook_resid_post``."""
    hook_name_out: str | None = None
    """Hook whose activations a transcoder predicts, for example ``blocks.10.hook_mlp_out``; other
    SAEs have none."""
    tokens: str = "all"
    """Tokens to train on: ``cls``, ``patch``, ``register``, ``all`` or ``random:n`` (n random
    tokens of each image)."""
    training_tokens: int = 2_000_000
    """Number of activation vectors to train on."""
    output_path: str | None = "output"
    """Folder of the trained SAE. It may not exist or be empty, unless ``overwrite`` is set. In
    Python, None saves nothing."""
    overwrite: bool = False
    """Replace an SAE of this package in ``output_path``, and ignore checkpoints that a killed run
    left. What anybody else wrote is never replaced."""
    dense: bool = False
    """Train TopK, BatchTopK and Matryoshka SAEs with SAELens's dense arithmetic. The default is the
    sparse kernel, which computes the same several times faster."""
    n_checkpoints: int = 10
    """Number of checkpoints, spread evenly over the run, in ``<output_path>.checkpoints``. After a
    kill, the same command continues from the last one. The run keeps the newest two, and removes
    them once it has saved the SAE."""

    image_column: str | None = None
    """Column that holds the images, needed where several do; for WebDataset tars the suffix."""
    split: str | None = None
    """Split of a data set, or of files and folders named for splits; by default the only one."""

    train_batch_size_tokens: int | Auto = AUTO
    """Vectors per training step; ``auto`` is a power of two from 256 to 4,096 that gives the run at
    least 1,000 steps."""
    store_batch_size_images: int = 32
    """Images per forward pass."""
    n_batches_in_buffer: int = 20
    """Size of the shuffle buffer, in training batches."""
    n_batches_for_norm_estimate: int = 100
    """Number of training batches that the scale of the activations is estimated from, for SAEs that
    scale them. Above 100 a run reads no more batches for it than it trains on."""

    lr: float | Auto = AUTO
    """Learning rate; ``auto`` is ``6e-4 * sqrt(16384 / d_sae)``, and at most 4e-3."""
    encoder_lr_ratio: float | Auto = AUTO
    """Learning rate of the encoder, as a multiple of ``lr``; ``auto`` is 0.3, because a slower
    encoder leaves more latents alive."""
    lr_end: float | None = None
    """Final learning rate of a cosine schedule; by default a tenth of ``lr``."""
    lr_scheduler_name: str = "constant"
    """Schedule of the learning rate: ``constant``, ``cosineannealing`` or
    ``cosineannealingwarmrestarts``."""
    lr_warm_up_steps: int | Auto = AUTO
    """Steps of linear warm-up at the start; ``auto`` is a tenth of the run."""
    lr_decay_steps: int | Auto = AUTO
    """Steps of linear decay at the end; ``auto`` is a fifth of the run."""
    n_restart_cycles: int = 1
    """Number of cycles of a cosine schedule with warm restarts."""
    adam_beta1: float = 0.9
    """Decay rate of Adam's mean of the gradient."""
    adam_beta2: float = 0.999
    """Decay rate of Adam's mean of the squared gradient."""

    device: str = "cpu"
    """Device of the model and the SAE, for example ``cuda``."""
    dtype: str = "float32"
    """Type of the model's weights and of the activations: ``float32``, ``bfloat16``, ``float16``
    or ``float64``."""
    autocast: bool = False
    """Train with PyTorch's autocast, which computes in bfloat16 where that is safe."""
    seed: int = 42
    """Seed of the first weights, the order of the images and the random tokens."""

    b_dec_init_method: str = AUTO
    """Initial decoder bias: ``zeros``, or the ``mean`` or ``geometric_median`` of the activations
    in the first buffer; ``auto`` is the mean."""
    decoder_init_method: str = AUTO
    """Initial decoder directions: ``random``, or ``data`` for centred activations of the first
    buffer; ``auto`` is ``data`` for matching pursuit and ``random`` for the others."""
    target_l0: float | Auto | None = AUTO
    """Mean number of active latents per vector that an SAE without a k should reach. Training
    raises or lowers the weight of the sparsity penalty to get there. ``auto`` is the square root of
    the width of the activations, or None if you set the penalty's weight. In Python, None leaves
    the weight alone."""
    revive_dead: bool | Auto = AUTO
    """Train the dead latents of a standard, gated or JumpReLU SAE or a transcoder to reconstruct
    the error of the others, as SAELens does for TopK SAEs; ``auto`` does."""
    fit_threshold: bool | Auto = AUTO
    """At the end of the run, set the threshold of a BatchTopK or Matryoshka SAE so that k latents
    are active on average; ``auto`` does. If False, the SAE keeps the moving average of training."""
    mono_coefficient: float = 0.0
    """Weight of a loss that rewards latents which fire on similar vectors of a batch (MonoLoss,
    arXiv 2602.12403), relative to the mean squared error. Its authors use 3e-4; 0 turns it off."""

    archetypal_points: int = 0
    """Keep the decoder's directions near the convex hull of so many data points (RA-SAE, arXiv
    2502.12892): the centres of k-means clusters of the first buffer. More points fit better; 0
    leaves the decoder free."""
    archetypal_relaxation: float = 0.1
    """How far a direction may be from that hull, as a share of the points' mean norm."""

    dead_feature_window: int | Auto = AUTO
    """Steps without firing after which a latent counts as dead, and trains to reconstruct the error
    of the others; ``auto`` is a twentieth of the run."""
    feature_sampling_window: int = 2000
    """Steps over which training counts how often each latent fires."""

    n_quality_tokens: int = 20_000
    """Number of vectors, next in the stream after the training vectors, to measure the finished SAE
    on: dead and dense latents, L0, explained variance; at most ``training_tokens``."""

    validation_images: str | None = None
    """Held-out images that score the SAE while it trains, given like ``images``; none by default.
    The scores go to ``validation.jsonl`` in the SAE's folder, and to wandb if that is on."""
    validation_split: str | None = None
    """Split of the held-out images, like ``split``; by default the only one."""
    n_validation_images: int = 256
    """Number of held-out images to use, from the front."""
    n_validations: int = 10
    """How often to score on the held-out images, spread evenly over the run; the last time is at
    its end."""
    validation_metrics: tuple[str, ...] = ()
    """Names of further metrics to compute, from ``vp.metrics.available()``."""
    validation_embedder: str | None = None
    """Model whose image embeddings measure how similar two images are; by default the model that
    the SAE trains on."""
    validation_template: str = "a photo of a {}"
    """Sentence that a class name is put into for zero-shot classification; ``{}`` is the name."""

    logger: LoggingConfig = field(default_factory=_no_wandb)
    """Settings of Weights & Biases; off by default."""

    def __post_init__(self) -> None:
        if not isinstance(self.images, str):
            raise ValueError(
                f"images= is a {type(self.images).__name__}: a configuration names images by a "
                "text; give images in hand to the runner or vp.train(cfg, images=...)"
            )
        TokenSelection.parse(self.tokens)
        check_device(self.device)
        for name, value in [*vars(self).items(), *vars(self.sae).items()]:
            if isinstance(value, (int, float)) and not abs(value) < _LARGEST:
                raise ValueError(f"{name}={value}: use a finite number below 2^53")
        for name in (
            *("training_tokens", "train_batch_size_tokens", "store_batch_size_images", "lr"),
            *("n_validation_images", "n_validations", "n_batches_for_norm_estimate", "target_l0"),
            *("encoder_lr_ratio", "dead_feature_window", "n_quality_tokens", "n_restart_cycles"),
            *("n_batches_in_buffer", "feature_sampling_window"),
        ):
            value = getattr(self, name)
            if value not in (AUTO, None) and not value > 0:
                raise ValueError(f"{name}={value}: use a number above 0")
        for name in (
            *("n_checkpoints", "lr_warm_up_steps", "lr_decay_steps", "mono_coefficient"),
            *("archetypal_points", "archetypal_relaxation"),
        ):
            value = getattr(self, name)
            if value != AUTO and value < 0:
                raise ValueError(f"{name}={value}: use 0 or a larger number")
        check_template(self.validation_template, argument="validation_template")
        choices = {
            "defaults": DEFAULTS,
            "dtype": DTYPES,
            "lr_scheduler_name": SCHEDULERS,
            "b_dec_init_method": B_DEC_INIT_METHODS,
            "decoder_init_method": DECODER_INIT_METHODS,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: use {', '.join(allowed)}")
        unknown = sorted(set(self.explicit) - {f.name for f in dataclasses.fields(self.sae)})
        if unknown:
            raise ValueError(
                f"explicit names {unknown[0]!r}, but {self.sae.architecture()} has no such field"
            )
        check_latents(self)
        if self.n_batches_in_buffer > (most := _LARGEST_BUFFER // self.batch_size):
            raise ValueError(
                f"n_batches_in_buffer={self.n_batches_in_buffer}: use at most {most:,} batches of "
                f"{self.batch_size:,} vectors"
            )
        if self.training_tokens < self.batch_size:
            raise ValueError(
                f"training_tokens={self.training_tokens} is less than one batch of "
                f"train_batch_size_tokens={self.batch_size}"
            )

    @classmethod
    def preset(cls, name: str, *, architecture: str, **changes: Any) -> VisionSAERunnerConfig:
        """Return a configuration for a well-known backbone, with a value for every setting.

        Args:
            name: Name of the backbone, for example ``clip-vit-b-32``; ``vision-plugin info
                presets`` lists the names and the sources of the numbers.
            architecture: Architecture of the SAE, for example ``matryoshka_batchtopk``.
            **changes: Fields to set to other values. Presets name no images, so set ``images``,
                or give the runner opened images.

        Raises:
            ValueError: there is no such preset, or no such field.
        """
        from vision_plugin.sae._architectures import training_config_class
        from vision_plugin.sae._presets import preset

        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(changes) - known)
        if unknown:
            raise ValueError(f"a training run has no field {unknown[0]!r}")
        found = preset(name, architecture=architecture)
        sae = training_config_class(found.architecture)(**found.sae)
        output_path = f"runs/{found.name}-{found.architecture}"
        settings = {
            **{"images": "", "output_path": output_path, "sae": sae},
            **{"explicit": tuple(sorted(found.sae)), **found.run},
        }
        return resolve(cls(**{**settings, **changes}))

    @property
    def batch_size(self) -> int:
        """Vectors per training step: ``train_batch_size_tokens``, or what ``auto`` makes of it."""
        if self.train_batch_size_tokens != AUTO:
            return self.train_batch_size_tokens
        return batch_size_for(self.training_tokens, self.defaults)

    @property
    def total_training_steps(self) -> int:
        """Number of optimiser steps of the run."""
        return -(-self.training_tokens // self.batch_size)

    @property
    def hook_names(self) -> list[str]:
        """Hooks whose activations a training step takes: one, or two for a transcoder."""
        out = self.hook_name_out
        return [self.hook_name] if out is None else [self.hook_name, out]

    @property
    def checkpoint_path(self) -> Path | None:
        """Folder of the checkpoints; None if the run saves nothing."""
        return None if self.output_path is None else checkpoints_of(local_path(self.output_path))

    def identity(self) -> dict[str, Any]:
        """Return the fields that decide the trained weights, as JSON values."""
        fields: dict[str, Any] = json.loads(json.dumps(self.to_dict(), default=str))
        return {name: fields[name] for name in sorted(fields) if name not in NOT_OF_THE_RESULT}

    def to_sae_trainer_config(self) -> SAETrainerConfig:
        """Return the configuration of SAELens's trainer.

        Raises:
            ValueError: a field is still ``auto``; the runner fills it in once it knows the data.
        """
        shared = {f.name for f in dataclasses.fields(SAETrainerConfig)}
        mine = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name in shared}
        del mine["n_checkpoints"]  # SAELens's are pickles, and do not resume bit for bit
        undecided = [name for name, value in mine.items() if value == AUTO]
        if undecided:
            raise ValueError(
                f"the run has not filled in {', '.join(undecided)} yet: use "
                "VisionSAETrainingRunner(cfg).cfg, which has values for all fields"
            )
        if self.lr_end is None:
            mine["lr_end"] = mine["lr"] / 10
        return SAETrainerConfig(
            total_training_samples=self.training_tokens,
            train_batch_size_samples=self.batch_size,
            **mine,
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields, the SAE's and the logger's nested."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        fields["sae"] = self.sae.to_dict()
        fields["logger"] = dataclasses.asdict(self.logger)
        return fields

    def save(self, path: Path) -> None:
        """Write the configuration as JSON."""
        path.write_text(json.dumps(self.to_dict(), indent=2, sort_keys=True, default=str))

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> VisionSAERunnerConfig:
        """Return the configuration that :meth:`to_dict` turned into a dictionary.

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
        for name in ("validation_metrics", "explicit"):
            fields[name] = tuple(fields.get(name, ()))
        return cls(**fields)


def checkpoints_of(output_path: Path) -> Path:
    """Return the folder of the checkpoints of a run that saves to ``output_path``."""
    return output_path.with_name(f"{output_path.name}.checkpoints")


def number(cfg: VisionSAERunnerConfig, name: str) -> float:
    """Return the number in a field that can be ``auto``.

    Raises:
        ValueError: the field is still ``auto``.
    """
    value = getattr(cfg, name)
    if value == AUTO:
        raise ValueError(
            f"the run has not filled in {name} yet: use VisionSAETrainingRunner(cfg).cfg, which "
            "has values for all fields"
        )
    return float(value)
