"""The one definition of a training run: Python object, command line and saved file."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sae_lens import LoggingConfig, TrainingSAEConfig
from sae_lens.config import SAETrainerConfig

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
"""Fields that leave the trained weights as they are."""


_SAELENS_BATCH, _BATCH_RANGE, _LEAST_STEPS = 4096, (256, 4096), 1000


def batch_size_for(training_tokens: int, defaults: str) -> int:
    """Vectors per step where none are set: a power of two that makes at least 1,000 steps.

    More steps at equal vectors reconstruct better, until a step is too small to be worth its
    fixed cost.
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

    Fields have SAELens's names (``LanguageModelSAERunnerConfig``) wherever the meaning is the
    same; a "token" is one vector of the residual stream.
    """

    sae: TrainingSAEConfig
    """The SAE: one of SAELens's training configurations."""
    defaults: Literal["auto", "saelens"] = "auto"
    """What decides the fields that are not set. ``auto``: rules that follow from the data and the
    run, found by experiment; they fill in every field of value ``auto`` here, and the fields of
    ``sae`` that have SAELens's own default. ``saelens``: SAELens's own defaults for all of them."""
    explicit: tuple[str, ...] = ()
    """Names of fields of ``sae`` that stay as they are although they have SAELens's default."""
    model_name: str
    """Hugging Face id, local folder, ``open_clip:...``, ``timm:...`` or ``demo``."""
    images: str
    """Folder, ``imagefolder:...``, Parquet file, data set name, tar shards, or ``demo:N``; or the
    folder of an activation store that ``vision-plugin extract`` wrote for this model, hook and
    kind of token."""
    hook_name: str
    """Where the SAE reads, for example ``blocks.10.hook_resid_post``."""
    hook_name_out: str | None = None
    """Where a transcoder writes, for example ``blocks.10.hook_mlp_out``."""
    tokens: str = "all"
    """``cls``, ``patch``, ``all`` or ``random:n`` (n random tokens of each image)."""
    training_tokens: int = 2_000_000
    """Vectors to train on."""
    output_path: str | None = "output"
    """Folder for the trained SAE; it must not exist, or be empty, unless ``overwrite`` is set."""
    overwrite: bool = False
    """Replace what is in ``output_path``, and begin anew where a killed run left checkpoints."""
    dense: bool = False
    """Compute TopK, BatchTopK and Matryoshka with SAELens's dense arithmetic in place of the sparse
    kernel, which does the same several times faster."""
    n_checkpoints: int = 10
    """Checkpoints on the way, in ``<output_path>.checkpoints``, from which the same command goes on
    after it was killed; the last two are kept, and all removed when the SAE is saved."""

    image_column: str | None = None
    """Column of images, where a data set has several."""
    split: str | None = None
    """Split of a data set."""

    train_batch_size_tokens: int | Auto = AUTO
    """Vectors per training step; ``auto`` makes at least 1,000 steps of the run, with 256 to 4,096
    vectors in each."""
    store_batch_size_images: int = 32
    """Images per forward pass."""
    n_batches_in_buffer: int = 20
    """Training batches that the shuffle buffer holds."""
    n_batches_for_norm_estimate: int = 100
    """Training batches from which an activation scale is estimated, where the SAE wants one."""

    lr: float | Auto = AUTO
    """Learning rate; ``auto`` falls with the square root of the SAE's width."""
    encoder_lr_ratio: float | Auto = AUTO
    """Learning rate of the encoder, as a multiple of ``lr``."""
    lr_end: float | None = None
    """Final learning rate of a cosine schedule; a tenth of ``lr`` by default."""
    lr_scheduler_name: str = "constant"
    """``constant``, ``cosineannealing`` or ``cosineannealingwarmrestarts``."""
    lr_warm_up_steps: int | Auto = AUTO
    """Steps of linear warm-up; ``auto`` is a tenth of the run."""
    lr_decay_steps: int | Auto = AUTO
    """Steps of linear decay at the end; ``auto`` is a fifth of the run."""
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

    b_dec_init_method: str = AUTO
    """Decoder bias to begin with: ``zeros``, or the ``mean`` or ``geometric_median`` of the first
    buffer of activations; ``auto`` is the mean."""
    decoder_init_method: str = AUTO
    """Decoder directions to begin with: ``random``, or centred activations of the first buffer
    (``data``); ``auto`` is random."""
    target_l0: float | Auto | None = AUTO
    """Latents to be active per vector, for the kinds of SAE that have no k: while it trains, the
    weight of the sparsity penalty is raised or lowered until as many are. None leaves the weight
    alone; so does ``auto`` where the weight is set, and otherwise it is the k of other kinds."""
    revive_dead: bool | Auto = AUTO
    """Train the dead latents of a standard or gated SAE or of a transcoder on what the others leave
    over, as SAELens does for TopK SAEs; ``auto`` does."""
    fit_threshold: bool | Auto = AUTO
    """Set the threshold of a BatchTopK or Matryoshka SAE at the end of the run so that k latents
    are active on average on vectors of the stream, in place of a moving average; ``auto`` does."""
    mono_coefficient: float = 0.0
    """Weight of a term that rewards monosemantic latents: 1 less the mean over latents of the
    similarity of the batch's vectors, weighted by how strongly the latent fires on both (MonoLoss,
    2602.12403, whose authors use 3e-4 of a mean squared error)."""

    dead_feature_window: int | Auto = AUTO
    """Steps without firing after which a latent counts as dead, and is trained on what the others
    leave over; ``auto`` is a twentieth of the run."""
    feature_sampling_window: int = 2000
    """Steps over which firing frequencies are counted."""

    n_quality_tokens: int = 20_000
    """Vectors of the stream, behind those that were trained on, on which the finished SAE is
    measured: dead and dense latents, L0, explained variance. Not more than were trained on."""

    validation_images: str | None = None
    """Held-out images to look at while training, as for ``images``; none by default. What is found
    goes into ``validation.jsonl`` beside the SAE, and to wandb where that is on."""
    validation_split: str | None = None
    """Split of the held-out data set."""
    n_validation_images: int = 256
    """The first so many of them."""
    n_validations: int = 10
    """Looks at them, evenly over the run, the last at its end."""
    validation_metrics: tuple[str, ...] = ()
    """Further metrics by their names in ``vp.metrics.available()``."""
    validation_embedder: str | None = None
    """Model whose embeddings say which images are alike; by default the model itself."""
    validation_template: str = "a photo of a {}"
    """Sentence around a label, for the loss recovered in zero-shot classification."""

    logger: LoggingConfig = field(default_factory=_no_wandb)
    """Weights & Biases; off by default."""

    def __post_init__(self) -> None:
        TokenSelection.parse(self.tokens)
        for name in (
            *("training_tokens", "train_batch_size_tokens", "store_batch_size_images", "lr"),
            *("n_validation_images", "n_validations", "n_batches_for_norm_estimate", "target_l0"),
            *("encoder_lr_ratio", "dead_feature_window", "n_quality_tokens", "n_restart_cycles"),
            *("n_batches_in_buffer", "feature_sampling_window"),
        ):
            value = getattr(self, name)
            if value not in (AUTO, None) and not value > 0:
                raise ValueError(f"{name}={value}: it has to be above 0")
        for name in ("n_checkpoints", "lr_warm_up_steps", "lr_decay_steps", "mono_coefficient"):
            value = getattr(self, name)
            if value != AUTO and value < 0:
                raise ValueError(f"{name}={value}: it cannot be below 0")
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
                f"explicit names {unknown[0]!r}, which a {self.sae.architecture()} SAE has not"
            )
        check_latents(self)
        if self.training_tokens < self.batch_size:
            raise ValueError(
                f"training_tokens={self.training_tokens} is less than one batch of "
                f"train_batch_size_tokens={self.batch_size}"
            )

    @classmethod
    def preset(cls, name: str, *, architecture: str, **changes: Any) -> VisionSAERunnerConfig:
        """A sound beginning for a backbone that people use, with every setting decided.

        Args:
            name: Of the backbone, for example ``clip-vit-b-32``; ``vision-plugin info presets``
                lists them, and where their numbers come from.
            architecture: Of the SAE, for example ``matryoshka_batchtopk``.
            **changes: Fields to set otherwise: ``images`` above all.

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
        """``train_batch_size_tokens``, or what it becomes where it is ``auto``."""
        if self.train_batch_size_tokens != AUTO:
            return self.train_batch_size_tokens
        return batch_size_for(self.training_tokens, self.defaults)

    @property
    def total_training_steps(self) -> int:
        """Optimiser steps of the run."""
        return -(-self.training_tokens // self.batch_size)

    @property
    def hook_names(self) -> list[str]:
        """Hooks whose activations a training step takes: one, or a transcoder's two."""
        out = self.hook_name_out
        return [self.hook_name] if out is None else [self.hook_name, out]

    @property
    def checkpoint_path(self) -> Path | None:
        """Folder of the checkpoints; None where nothing is saved."""
        if self.output_path is None:
            return None
        out = Path(self.output_path)
        return out.with_name(f"{out.name}.checkpoints")

    def identity(self) -> dict[str, Any]:
        """The fields that the trained weights follow from, as JSON has them."""
        fields: dict[str, Any] = json.loads(json.dumps(self.to_dict(), default=str))
        return {name: fields[name] for name in sorted(fields) if name not in NOT_OF_THE_RESULT}

    def to_sae_trainer_config(self) -> SAETrainerConfig:
        """What SAELens's trainer takes of this.

        Raises:
            ValueError: a field is still ``auto``: the runner decides it once it knows the data.
        """
        shared = {f.name for f in dataclasses.fields(SAETrainerConfig)}
        mine = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name in shared}
        del mine["n_checkpoints"]  # SAELens's are pickles, and cannot be gone on with bit for bit
        undecided = [name for name, value in mine.items() if value == AUTO]
        if undecided:
            raise ValueError(
                f"{', '.join(undecided)} are still 'auto': VisionSAETrainingRunner(cfg).cfg has "
                "the values that they take"
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
        for name in ("validation_metrics", "explicit"):
            fields[name] = tuple(fields.get(name, ()))
        return cls(**fields)


def number(cfg: VisionSAERunnerConfig, name: str) -> float:
    """A field that can be ``auto``, decided.

    Raises:
        ValueError: it is still ``auto``.
    """
    value = getattr(cfg, name)
    if value == AUTO:
        raise ValueError(
            f"{name} is still 'auto': VisionSAETrainingRunner(cfg).cfg has the value that it takes"
        )
    return float(value)
