"""Hostile command lines: every flag of every command with values that it does not expect."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, get_type_hints

from tests.faults._corpus import _samples as samples
from tests.faults._corpus._case import Rule

HERE = "hostile"
"""Folder of the things that lines name, as seen from where they run."""
HOOK = "blocks.1.hook_resid_post"
MODEL, IMAGES, OUT = f"{HERE}/model", f"{HERE}/images", f"{HERE}/out"
SAE = f"{HERE}/sae"
_ON_IMAGES = ("--images", IMAGES, "--model-name", MODEL)
BASES: dict[str, tuple[str, ...]] = {
    "info": (SAE,),
    "verify": (f"{HERE}/store",),
    "convert": ("--sae", f"{HERE}/foreign", "--output-path", OUT),
    "extract": (*_ON_IMAGES, "--hook-names", HOOK, "--output-path", OUT, "--n-workers", "0"),
    "train": (
        *(*_ON_IMAGES, "--hook-name", HOOK, "--output-path", OUT, "--architecture", "topk"),
        *("--d-sae", "16", "--k", "2", "--training-tokens", "256", "--n-batches-in-buffer", "2"),
        *("--train-batch-size-tokens", "32", "--n-checkpoints", "0"),
    ),
    "sweep": (f"{HERE}/sweep.yaml", "--n-trials", "1"),
    "eval": (
        *(*_ON_IMAGES, "--sae", SAE, "--metrics", "fvu", "sparsity", "--controls", "neurons"),
        *("--output-path", OUT),
    ),
    "sparsity": (*_ON_IMAGES, "--saes", SAE, "--output-path", OUT),
    "decompose": (*_ON_IMAGES, "--output-path", OUT, "--n-images", "2"),
    "steer": (*_ON_IMAGES, "--sae", SAE, "--latents", "1", "--concepts", f"{HERE}/concepts.txt"),
    "name": (
        *("--images", "demo:24", "--model-name", MODEL, "--sae", SAE, "--output-path", OUT),
        *("--vocabulary", f"{HERE}/concepts.txt", "--methods", "dissect", "--top-images", "5"),
    ),
    "bottleneck": (
        *("--images", "demo:200", "--labels", "column:texture", "--model-name", MODEL),
        *("--sae", SAE, "--output-path", OUT, "--epochs", "2"),
    ),
    "concepts": (
        *("--images", "demo:120", "--labels", "column:texture", "--class-name", "plain"),
        *("--model-name", MODEL, "--output-path", OUT, "--n-features", "3", "--design", "2"),
        *("--n-images", "1"),
    ),
    "splice": (
        *("--images", "demo:24", "--model-name", MODEL, "--output-path", OUT),
        *("--vocabulary", f"{HERE}/concepts.txt"),
    ),
    "lens": (
        *("text", "--images", "demo:24", "--model-name", MODEL, "--output-path", OUT),
        *("--texts", f"{HERE}/concepts.txt"),
    ),
    "hallucination": (
        *("--output-path", OUT, "--n-images", "40", "--absent", "1", "--demonstrations", "4"),
        *("--n-masks", "1", "--n-random", "1"),
    ),
    "report": (*_ON_IMAGES, "--sae", SAE, "--output-path", OUT, "--features", "0", "1"),
    "tasks": (
        *("typographic", "--output-path", OUT, "--train-pairs", "30", "--validation-pairs", "30"),
        *("--test-pairs", "30", "--training-images", "32", "--training-tokens", "8192"),
        *("--d-sae", "16", "--k", "2", "--sizes", "2", "--kinds", "shape", "--no-unseen-words"),
    ),
    "demo": (
        *("--output-path", OUT, "--training-images", "32", "--training-tokens", "544"),
        *("--images", "16", "--d-sae", "16", "--k", "2", "--steered-latents", "1"),
    ),
}
"""A line of each command that works."""

SWEEP = "\n".join(
    [
        *("method: random", "metric: {name: validation/fvu, goal: minimize}", "parameters:"),
        *(
            f"  {flag.removeprefix('--').replace('-', '_')}: {{value: {value}}}"
            for flag, value in zip(BASES["train"][::2], BASES["train"][1::2], strict=True)
        ),
        "command: [vision-plugin, train, '${args}']\n",
    ]
)
"""A sweep of one trial, which trains as the line above does."""

DEEP = '{"a":' * 3_000 + "1" + "}" * 3_000
NUMBERS = ("x", "-1", "0", "nan", "", "1e30", "9" * 25, "9" * 5_000, None)
WHOLE = (*NUMBERS, "1.5", "0x10", "1_0")
REAL = (*NUMBERS, "inf", "-inf", "1e400", "-1e-320")
TEXTS = (
    "",
    "nosuch",
    "x" * 5_000,
    "a\nb",
    "\x1b[2J",
    "~nosuch/x",
    DEEP,
    "[]",
    "None",
    None,
    "-1",
    "\udcff",
)
PATHS = (
    *("", None, f"{HERE}/nosuch", f"{HERE}/nosuch/deeper", f"{HERE}/loop", f"{HERE}/pipe"),
    *("/dev/zero", "/dev/null/x", "/proc/self/mem", "~nosuch", "~nosuch/x", "x" * 5_000),
    *(f"{HERE}/file", f"{HERE}/empty", f"{HERE}/list.json", f"{HERE}/deep.json", "a\nb", "\udcff"),
    *(DEEP, "..", "imagefolder:", "demo:0", "demo:x", "hf://x/y", "timm:nosuch", "open_clip:x"),
)
PLACES = (
    *("", None, f"{HERE}/loop", f"{HERE}/loop/x", f"{HERE}/pipe", "/dev/null/x", "/proc/x/y"),
    *(
        "~nosuch/x",
        "x" * 5_000,
        f"{HERE}/file/x",
        f"{HERE}/file",
        "../canary/keep.txt",
        "../canary",
    ),
    *(IMAGES, SAE, "a\nb", "\udcff"),
)
BY_NAME: dict[str, tuple[str | None, ...]] = {
    "device": ("nosuch", "cuda:99", "meta", "mps", "cpu:-1", "cuda:x", "", None),
    "dtype": ("float33", "int8", "complex64", "float8_e4m3fn", "bool", "", "torch.float32", None),
    "tokens": ("random:0", "random:-5", "random:9" * 9, "random:x", "patches", "cls,patch", ""),
    "output_path": PLACES,
    "metric_options": (
        *(
            DEEP,
            "[]",
            "1",
            "null",
            '{"fvu": 1}',
            '{"nosuch": {}}',
            '{"fvu": {"nosuch": 1}}',
            "{'a'",
        ),
        *(
            "9" * 5_000,
            '{"fvu": {"n_features": -1}}',
            '{"monosemanticity": {"definition": [1]}}',
            "",
        ),
    ),
    "methods": ("nosuch", "", "decoder,dissect", "steering", "caption", "labels", None),
    "concept_template": (
        "",
        "no place",
        "{} {}",
        "{x}",
        "{",
        "{0.__class__}",
        "{:>999999999}",
        None,
    ),
    "validation_template": ("", "{} {}", "{x}", "{"),
    "strengths": ("nan", "x", "inf", ""),
    "taxonomy": (*PATHS[:10], "column:", "column:nosuch", "column:label,label", "demo"),
    "labels": ("", "nosuch", "column:", "column:nosuch", "labels"),
    "concepts": (*PATHS[:16], "column:", "column:nosuch", "labels"),
}
BY_NAME |= dict.fromkeys(
    ("hook_name", "hook_names", "hook_name_out"),
    ("blocks.99.hook_resid_post", "blocks.-1.hook_resid_post", "nosuch", "", "*", "blocks.1", None),
)
BY_NAME |= dict.fromkeys(
    (
        *("sae", "saes", "images", "model_name", "evaluation", "masks", "other_saes", "path"),
        *("domain_images", "validation_images", "embedder", "validation_embedder"),
        *("judge", "vlm", "vocabulary"),
    ),
    PATHS,
)
SMALL_ONLY = ("training_tokens", "training_images", "n_images", "images", "d_sae", "n_workers")
"""Flags whose large values are a large job, not a wrong one."""
NOBODY = ("wandb_project", "wandb_entity", "wandb_id", "run_name", "wandb_log_frequency")
"""Flags that only matter to a service that no line here talks to."""


def values_for(name: str, hint: str) -> Sequence[str | None]:
    """Return hostile values of a flag; None leaves its value out."""
    if name in BY_NAME and not (name == "images" and "int" in hint):
        return BY_NAME[name]
    if "bool" in hint:
        return ("maybe",)
    numbers = WHOLE if "int" in hint else REAL if "float" in hint else TEXTS
    large = () if name in SMALL_ONLY or numbers is TEXTS else ("999999",)
    return (*numbers, *large)


def flags_of(command: str) -> dict[str, str]:
    """Return the flags of a command with their types as text."""
    hints: dict[str, Any] = {}
    for cls in _classes(command):
        own = get_type_hints(cls)
        names = [field.name for field in dataclasses.fields(cls) if field.init]
        hints |= {name: own[name] for name in names if name not in hints}
    left_out = {"logger", "explicit", "metadata", "reshape_activations", *NOBODY}
    if command == "train":
        left_out.add("sae")
    return {name: str(hint) for name, hint in hints.items() if name not in left_out}


def _classes(command: str) -> list[type]:
    from importlib import import_module

    if command == "train":
        from sae_lens import LoggingConfig

        from vision_plugin.sae import VisionSAERunnerConfig, training_config_class

        return [VisionSAERunnerConfig, training_config_class("topk"), LoggingConfig]
    if command in ("eval", "sparsity"):
        evaluation = import_module("vision_plugin.evaluation")
        name = {"eval": "EvaluationConfig", "sparsity": "SparsityStudyConfig"}[command]
        return [getattr(evaluation, name)]
    if command in ("name", "decompose"):
        lens = import_module("vision_plugin.lens")
        return [{"name": lens.NamesConfig, "decompose": lens.DecomposeConfig}[command]]
    if command == "lens":
        return [import_module("vision_plugin.cli._lens").TextLensConfig]
    if command == "extract":
        return [import_module("vision_plugin.activations").ExtractionConfig]
    if command == "tasks":
        return [import_module("vision_plugin.cli._tasks_typographic").TypographicConfig]
    if command == "sweep":
        return [import_module("vision_plugin.cli._sweep").SweepFlags]
    if command == "demo":
        return [import_module("vision_plugin.demo.job").DemoConfig]
    module = import_module(f"vision_plugin.cli._{command}")
    return [getattr(module, f"{command.capitalize()}Config")]


def with_flag(line: Sequence[str], name: str, given: str | None) -> list[str]:
    """Return a line with one flag set to a value, or left without one."""
    flag = f"--{name.replace('_', '-')}"
    kept: list[str] = []
    words = iter(line)
    skipping = False
    for word in words:
        if word.startswith("--"):
            skipping = word == flag
        if not skipping:
            kept.append(word)
    return [*kept, flag] if given is None else [*kept, flag, given]


def lines() -> Iterator[tuple[str, str, list[str]]]:
    """Yield command, what is hostile, and the line."""
    for command, base in BASES.items():
        if command in ("info", "verify"):
            for given in PATHS:
                yield command, _short(given), [] if given is None else [given]
        else:
            for name, hint in flags_of(command).items():
                for given in values_for(name, hint):
                    line = with_flag(base, name, given)
                    yield command, f"--{name} {_short(given)}", line
        for what, line in (
            ("no flags", [] if command != "info" else ["a", "b"]),
            ("an unknown flag", [*base, "--nosuch", "1"]),
            ("an unknown flag that is long", [*base, "--" + "x" * 5_000]),
            ("a word too many", [*base, "nosuch"]),
            ("half a flag", [*base, "--"]),
            ("a flag of one dash", [*base, "-x"]),
        ):
            yield command, what, line


def _short(given: str | None) -> str:
    if given is None:
        return "without a value"
    return ascii(given) if len(given) < 40 else f"{given[:12]!a} of {len(given):,} characters"


class Failed(Exception):
    """A command that ended with a traceback, or said that it is at fault."""


def command_line(words: Sequence[str], _: Path) -> None:
    """Run a line in this process; a refusal is raised as what it says.

    Raises:
        Failed: it ends with another error than a refusal.
        ValueError: the line is refused, with the text on stderr.
    """
    from vision_plugin.cli import main

    sys.argv[0] = "vision-plugin"
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()) as said,
    ):
        try:
            code = main(words)
        except SystemExit as error:
            code = error.code
    told = said.getvalue().strip()
    if code in (0, None):
        return
    *_, last = told.splitlines() or [""]
    if "fault of vision-plugin" in told:
        raise Failed(last)
    if code not in (1, 2):  # 1 where it was at work, and says why it could not go on
        raise ValueError(f"exit status {code}: {told}")
    raise ValueError(last if last.startswith("vision-plugin ") else f"several lines: {told}")


@cache
def fixtures() -> dict[str, bytes]:
    """Return the files that lines name: a model, images, an SAE, a store, and odd files."""
    import sae_lens
    import torch
    from sae_lens.saes.sae import SAEMetadata

    from tests._models import TEXTS as CONCEPTS
    from tests._models import save_tiny_clip

    made = {f"images/{name}": content for name, content in samples.photos().items()}
    made |= {f"images/cat/{i}.png": samples.image() for i in range(1, 4)}
    made |= {f"store/{name}": content for name, content in samples.store().items()}
    made |= {f"foreign/{n}": c for n, c in samples.foreign("visaebench-topk").items()}
    made |= {"concepts.txt": "\n".join(CONCEPTS).encode(), "file": b"text", "empty": b""}
    made |= {"list.json": b"[1]", "deep.json": DEEP.encode(), "sweep.yaml": SWEEP.encode()}
    with tempfile.TemporaryDirectory() as folder:
        save_tiny_clip(Path(folder) / "model")
        torch.manual_seed(0)
        metadata = SAEMetadata(model_name=MODEL, hook_name=HOOK, tokens="all")
        sae = sae_lens.TopKSAE(sae_lens.TopKSAEConfig(d_in=32, d_sae=40, k=4, metadata=metadata))
        with torch.no_grad():
            sae.W_enc.copy_(torch.randn(32, 40) / 32**0.5)
            sae.W_dec.copy_(sae.W_enc.T)
        sae.save_model(Path(folder) / "sae")
        return made | samples.files_of(Path(folder))


def put(folder: Path, _: random.Random) -> Path:
    """Write the files that lines name."""
    samples.put(fixtures(), folder)
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "pipe")
    return folder


def rules() -> tuple[Rule, ...]:
    """Return the lines as rules of one input each; a line that is not refused may take a while."""
    return tuple(
        Rule(
            *(f"vision-plugin {command}", what, 1, put, partial(command_line, [command, *line])),
            *((f"vision-plugin {command}: ",), 60.0, True),
        )
        for command, what, line in lines()
    )
