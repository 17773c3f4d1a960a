"""``vision-plugin tasks``: the experiments that repair and steer models, with their baselines."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

from vision_plugin._ours import TASK, check_replaceable
from vision_plugin._paths import local_path
from vision_plugin.cli._console import console
from vision_plugin.cli._flags import parse
from vision_plugin.cli._tasks_groups import GroupConfig, compute_groups
from vision_plugin.cli._tasks_llava import LlavaConfig, compute_llava
from vision_plugin.cli._tasks_ravel import RavelConfig, compute_ravel
from vision_plugin.cli._tasks_training import TrainsSAE
from vision_plugin.cli._tasks_typographic import TypographicConfig, compute_typographic


@dataclass(frozen=True)
class Task:
    """One experiment on the command line."""

    summary: str
    description: str
    config: type[TrainsSAE]
    compute: Callable[[Any], tuple[Any, Any]]
    """Returns the result, and its SAE or where that lies."""
    writes: str = "results.json, edit.json, edits/, table.txt, figures"


TASKS: Mapping[str, Task] = MappingProxyType(
    {
        "typographic": Task(
            "printed words that fool a model, and what mends that",
            "Repair a model that printed words fool: suppress latents, and every baseline beside "
            "it, on drawn images or on yours.",
            TypographicConfig,
            compute_typographic,
        ),
        "background": Task(
            "a probe that goes by the background, as in Waterbirds, and what mends that",
            "Repair a probe that goes by the background in its worst group: suppress latents, and "
            "every baseline beside it.",
            GroupConfig,
            partial(compute_groups, task="background"),
        ),
        "attribute": Task(
            "a probe that goes by another attribute, as in CelebA, and what mends that",
            "Repair a probe of one attribute that goes by another in its worst group: suppress "
            "latents, and every baseline beside it.",
            GroupConfig,
            partial(compute_groups, task="attribute"),
        ),
        "ravel": Task(
            "how well latents stand for one attribute each: swapped, and the others left",
            "Swap one attribute of an image for another image's by latents, and by every "
            "alternative: cause and isolate, as RAVEL scores them.",
            RavelConfig,
            compute_ravel,
        ),
        "llava": Task(
            "what a vision-language model says, steered through its tower",
            "Put values into the answers of a vision-language model, or take them out, by latents "
            "of an SAE in its tower, and by every baseline beside it, on drawn images.",
            LlavaConfig,
            compute_llava,
            "results.json, edit.json, edits/, table.txt with dialogues",
        ),
    }
)


def run(arguments: Sequence[str]) -> None:
    """Run a task from flags, print its table and write its folder."""
    if arguments and arguments[0] in ("-h", "--help"):
        sys.stdout.write(usage())
        raise SystemExit(0)
    if not arguments:
        raise ValueError(f"name a task: {', '.join(TASKS)}")
    if arguments[0] not in TASKS:
        raise ValueError(f"there is no task {arguments[0]!r}: use {', '.join(TASKS)}")
    task = TASKS[arguments[0]]
    command = f"tasks {arguments[0]}"
    cfg = parse(task.config, arguments[1:], command=command, description=task.description)
    check_replaceable(local_path(cfg.output_path), TASK)
    result, sae = task.compute(cfg)
    result.save(cfg.output_path, sae=sae)
    out = console()
    out.print(result.table())
    if getattr(result, "one_word", None) is not None:
        out.print(result.one_word.table())
    for dialogue in getattr(result, "dialogues", ()):
        out.print(str(dialogue), soft_wrap=True)
    kept = "" if isinstance(sae, (str, Mapping)) else ", sae/"
    out.print(f"In {cfg.output_path}: {task.writes}{kept}", soft_wrap=True)


def usage() -> str:
    """Return the list of tasks."""
    listed = "\n".join(f"  {name:11}  {task.summary}" for name, task in TASKS.items())
    return (
        f"usage: vision-plugin tasks TASK [FLAGS]\n\n{listed}\n\n"
        "vision-plugin tasks TASK --help lists the options of a task.\n"
    )
