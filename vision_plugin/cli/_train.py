"""``vision-plugin train``: the training configuration as flat flags."""

from __future__ import annotations

import ast
import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_origin, get_type_hints

from vision_plugin.cli._console import console
from vision_plugin.cli._engine import EngineFlags, opened
from vision_plugin.cli._flags import flat_class, parse, pick

DEFAULT_ARCHITECTURE = "batchtopk"
_NOT_FLAGS = ("metadata", "reshape_activations")


@dataclass(frozen=True)
class TeamFlags(EngineFlags):
    """Processes that train the SAE together."""

    workers: int = 1
    """Processes that train the SAE together, on this machine or on a Ray cluster. Under
    ``torchrun`` its own processes do so."""
    share: Literal["auto", "lanes", "latents"] = "auto"
    """What each worker has: ``lanes``, a part of every batch, with the same bits on any number of
    workers; or ``latents``, a part of the SAE, which need not fit one device. ``auto`` takes lanes
    where there are several workers."""
    n_lanes: int = 8
    """Parts that ``lanes`` cuts a batch into, a power of two; it decides the last bits."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.workers < 1:
            raise ValueError(f"workers={self.workers}: use a whole number from 1 up")

    @property
    def launched(self) -> bool:
        """Whether something such as ``torchrun`` started this process as one of several."""
        return int(os.environ.get("WORLD_SIZE", "1")) > 1

    @property
    def shared(self) -> bool:
        """Whether the run is one of workers, if only of one."""
        return self.workers > 1 or self.launched or self.share != "auto" or self.engine != "local"


def run(arguments: Sequence[str]) -> int:
    """Train an SAE from flags, and print what was decided, what came out and where it is."""
    cfg, team = read_line(arguments)
    if team.engine != "local":
        with opened(team) as engine:
            said = engine.train(cfg, n_workers=team.workers, split=_split(team))
        console().print(f"{said}\nSaved to {cfg.output_path} in SAELens's format.".strip())
    elif team.workers > 1 and not team.launched:
        from vision_plugin.scale import launch

        _split(team)  # a split that is none is refused here, before processes start
        return launch(["train", *arguments], team.workers)
    else:
        train_line(cfg, team)
    return 0


def train_line(cfg: Any, team: TeamFlags) -> Any:
    """Train in this process, with others where these are; return the runner."""
    if not team.shared:
        from vision_plugin.sae import VisionSAETrainingRunner

        return _train(VisionSAETrainingRunner(cfg))
    from vision_plugin.scale import shared_runner

    with shared_runner(cfg, _split(team)) as runner:
        return _train(runner)


def _split(team: TeamFlags) -> Any:
    from vision_plugin.scale import Split

    return Split("lanes" if team.share == "auto" else team.share, team.n_lanes)


def _train(runner: Any) -> Any:
    from vision_plugin.sae import architecture_of

    out = console()
    decided = runner.decided()
    if decided:
        out.print(
            f"Decided from the data and the run: {decided}.\nEach of them is a flag; --defaults "
            "saelens takes SAELens's own.",
        )
    sae, cfg = runner.run(), runner.cfg
    metadata = sae.cfg.metadata
    assert runner.quality is not None
    lines = [
        f"Trained a {architecture_of(cfg.sae)} SAE with {sae.cfg.d_sae} latents at {cfg.hook_name} "
        f"of {metadata.model_name}:",
        f"{runner.quality.sentence()}.",
        runner.quality.advice(cfg),
        f"Saved to {cfg.output_path} in SAELens's format.",
    ]
    out.print("\n".join(line for line in lines if line))
    return runner


def read_config(arguments: Sequence[str]) -> Any:
    """Return the training configuration that a command line describes."""
    return read_line(arguments)[0]


def read_line(arguments: Sequence[str]) -> tuple[Any, TeamFlags]:
    """Return the training configuration that a command line describes, and who trains."""
    from sae_lens import LoggingConfig

    from vision_plugin.sae import (
        AUTO,
        DECIDED_IN_SAE,
        SAE_FIELDS,
        VisionSAERunnerConfig,
        architectures,
        training_config_class,
    )

    architecture, rest = take_flag(arguments, "--architecture", DEFAULT_ARCHITECTURE)
    preset, rest = take_flag(rest, "--preset", "")
    sae_class = training_config_class(architecture)
    flags_class = flat_class(
        "TrainFlags",
        [
            (VisionSAERunnerConfig, ("sae", "logger", "explicit")),
            (sae_class, (*_NOT_FLAGS, "dtype", "device")),
            (LoggingConfig, ()),
            (TeamFlags, ()),
        ],
        defaults=_defaults(preset, architecture),
        docs=SAE_FIELDS,
        undecided=DECIDED_IN_SAE,
    )
    flags: Any = parse(
        flags_class,
        as_flags(rest, flags_class),
        command="train",
        description=f"Train a {architecture} SAE. --architecture chooses another: "
        f"{', '.join(architectures())}; the flags of the SAE itself follow from it. --preset NAME "
        "sets the flags that suit a backbone: vision-plugin info presets lists them. Run the same "
        "line again to continue a killed run from its last checkpoint.",
    )
    own: dict[str, Any] = {"dtype": "float32", "device": flags.device}
    if flags.target_l0 == AUTO and "target_l0" in {f.name for f in dataclasses.fields(sae_class)}:
        own["target_l0"] = None  # of JumpReLU's quadratic penalty, which shares the flag
    sae = pick(sae_class, flags, **own)
    output_path = None if flags.output_path is None else os.path.expandvars(flags.output_path)
    cfg = pick(
        VisionSAERunnerConfig,
        flags,
        output_path=output_path,
        sae=sae,
        explicit=_explicit(rest, preset, architecture, sae),
        logger=pick(LoggingConfig, flags),
    )
    return cfg, pick(TeamFlags, flags)


def _explicit(
    arguments: Sequence[str], preset_name: str, architecture: str, sae: Any
) -> tuple[str, ...]:
    """Return the fields of the SAE that the line or the preset sets, whatever their values."""
    from vision_plugin.sae import preset

    said = {
        argument.partition("=")[0].removeprefix("--").removeprefix("no-").replace("-", "_")
        for argument in arguments
        if argument.startswith("--")
    }
    if preset_name:
        said |= set(preset(preset_name, architecture=architecture).sae)
    return tuple(sorted(said & {field.name for field in dataclasses.fields(sae)}))


def _defaults(preset_name: str, architecture: str) -> dict[str, Any]:
    """Values of the flags that are not given; a preset's, where one is named."""
    from vision_plugin.sae import D_IN_OF_MODEL, D_SAE_AUTO, preset

    values: dict[str, Any] = {"d_in": D_IN_OF_MODEL, "d_sae": D_SAE_AUTO, "log_to_wandb": False}
    if not preset_name:
        return values
    found = preset(preset_name, architecture=architecture)
    output_path = f"runs/{found.name}-{found.architecture}"
    return {**values, "output_path": output_path, **found.sae, **found.run}


def take_flag(arguments: Sequence[str], name: str, default: str) -> tuple[str, list[str]]:
    """Return the value of ``--name X`` or ``--name=X``, and the command line without it.

    Raises:
        ValueError: the flag has no value.
    """
    rest, found = [], default
    remaining = iter(arguments)
    for argument in remaining:
        flag, separator, value = argument.partition("=")
        if flag != name:
            rest.append(argument)
            continue
        found = value if separator else next(remaining, "")
        if not found:
            raise ValueError(f"{name} needs a value")
    return found, rest


def as_flags(arguments: Sequence[str], cls: type) -> list[str]:
    """Return a sweep's ``${args}`` in the form that the command reads.

    ``--dense=True`` becomes ``--dense``, ``--dense=False`` becomes ``--no-dense``, and
    ``--matryoshka_widths=[8, 16]`` becomes ``--matryoshka_widths 8 16``. Everything else stays.
    """
    hints = get_type_hints(cls)
    read: list[str] = []
    for argument in arguments:
        flag, _, value = argument.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        hint = hints.get(name)
        if hint is bool and value.lower() in ("true", "false"):
            read.append(f"--{name}" if value.lower() == "true" else f"--no-{name}")
        elif get_origin(hint) in (list, tuple) and value.startswith(("[", "(")):
            read += [flag, *_items(flag, value)]
        else:
            read.append(argument)
    return read


def _items(flag: str, value: str) -> list[str]:
    """Return the items of a list as Python writes it.

    Raises:
        ValueError: it is no such list.
    """
    try:
        return [str(item) for item in ast.literal_eval(value)]
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise ValueError(f"{flag}={value[:60]} is no list: write [8, 16], or {flag} 8 16") from None
