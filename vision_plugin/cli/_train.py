"""``vision-plugin train``: the training configuration as flat flags."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console

from vision_plugin.cli._flags import flat_class, parse, pick

DEFAULT_ARCHITECTURE = "batchtopk"
_NOT_FLAGS = ("metadata", "reshape_activations")


def run(arguments: Sequence[str]) -> None:
    """Train an SAE from flags and say where it is."""
    from vision_plugin.sae import VisionSAETrainingRunner

    cfg = read_config(arguments)
    runner = VisionSAETrainingRunner(cfg)
    sae = runner.run()
    metadata = sae.cfg.metadata
    Console().print(
        f"Trained a {cfg.sae.architecture()} SAE with {sae.cfg.d_sae} latents at {cfg.hook_name} "
        f"of {cfg.model_name}: {metadata.l0:.1f} latents active per token, "
        f"{metadata.num_dead_features} dead.\nSaved to {cfg.output_path} in SAELens's format.",
        highlight=False,
    )


def read_config(arguments: Sequence[str]) -> Any:
    """The training configuration that a command line stands for."""
    from sae_lens import LoggingConfig

    from vision_plugin.sae import VisionSAERunnerConfig
    from vision_plugin.sae._config import D_IN_OF_MODEL

    architecture, rest = split_architecture(arguments)
    sae_class = training_config_class(architecture)
    flags_class = flat_class(
        "TrainFlags",
        [
            (VisionSAERunnerConfig, ("sae", "logger")),
            (sae_class, (*_NOT_FLAGS, "dtype", "device")),
            (LoggingConfig, ()),
        ],
        defaults={"d_in": D_IN_OF_MODEL, "log_to_wandb": False},
    )
    flags: Any = parse(
        flags_class,
        rest,
        command="train",
        description=f"Train a {architecture} SAE. --architecture chooses another: "
        f"{', '.join(architectures())}; the flags of the SAE itself follow from it.",
    )
    return pick(
        VisionSAERunnerConfig,
        flags,
        sae=pick(sae_class, flags, dtype="float32", device=flags.device),
        logger=pick(LoggingConfig, flags),
    )


def split_architecture(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """Take ``--architecture X`` out of a command line.

    Raises:
        ValueError: the flag stands at the end, without a value.
    """
    rest, architecture = [], DEFAULT_ARCHITECTURE
    remaining = iter(arguments)
    for argument in remaining:
        flag, separator, value = argument.partition("=")
        if flag != "--architecture":
            rest.append(argument)
            continue
        architecture = value if separator else next(remaining, "")
        if not architecture:
            raise ValueError(f"--architecture needs a value: {', '.join(architectures())}")
    return architecture, rest


def architectures() -> list[str]:
    """Every architecture that SAELens can train, those that plugins register included."""
    from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

    return sorted(SAE_TRAINING_CLASS_REGISTRY)


def training_config_class(architecture: str) -> Any:
    """SAELens's training configuration of an architecture.

    Raises:
        ValueError: SAELens does not know it.
    """
    from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

    if architecture not in SAE_TRAINING_CLASS_REGISTRY:
        raise ValueError(
            f"unknown architecture {architecture!r}: choose from {', '.join(architectures())}"
        )
    return SAE_TRAINING_CLASS_REGISTRY[architecture][1]
