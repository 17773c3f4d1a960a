"""The repair tasks at full size: the table as printed, its settings, and a check on fresh images.

    python -m benchmarks.tasks typographic          # the drawn world
    python -m benchmarks.tasks emoji                # words printed on emoji, of a CLIP beside us
    python -m benchmarks.tasks background           # a probe that goes by the background
    python -m benchmarks.tasks attribute            # a probe that goes by another attribute
    python -m benchmarks.tasks ravel                # one attribute swapped, the others left
    python -m benchmarks.tasks llava                # what a small LLaVA says
    python -m benchmarks.tasks typographic --small  # a minute, to see that it works; writes no file

Each is one command of ``vision-plugin tasks``, which the result names. The check loads
``edit.json`` into the model again and asks it about images that were drawn anew, by whole passes:
the figures have to agree with those of the table within the intervals of both.
"""

from __future__ import annotations

import argparse
import json
import logging
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import torch
from sklearn.linear_model import LogisticRegression

sys.path.insert(0, str(Path(__file__).parents[1]))  # a bare checkout works, too

import vision_plugin as vp
from benchmarks._fresh import FRESH_SEED, compared
from benchmarks._llava_fresh import aims, check_llava
from benchmarks._machine import machine
from vision_plugin.cli import main as vision_plugin
from vision_plugin.demo import zero_shot_prompts
from vision_plugin.demo.attacks import attack
from vision_plugin.demo.attributes import factor_split
from vision_plugin.demo.groups import CONFOUNDS, group_split

logger = logging.getLogger("benchmarks.tasks")

RESULTS = Path(__file__).parent / "results"
SHARED = Path(__file__).parents[2] / "shared"
FRESH = 1000


@dataclass(frozen=True)
class Task:
    """A command, and a check of its edit on images that it has not seen."""

    arguments: Sequence[str]
    small: Sequence[str]
    check: Callable[[Path, dict[str, Any], int], list[dict[str, Any]]] | None = None
    n_fresh: int = FRESH
    """Number of those images."""
    images: Callable[[Path], Path] | None = None
    """Writes the images into a folder, where the command has to be given some."""


def short_names(folder: Path) -> Path:
    """Write the emoji whose name is one word of at most ten letters, which fits on an image."""
    table = parquet.read_table(SHARED / "data" / "noto.parquet")
    names = table["name"].to_pylist()
    chosen = [row for row, name in enumerate(names) if name.isalpha() and len(name) <= 10]
    path = folder / "noto-short-names.parquet"
    parquet.write_table(table.take(chosen), path)
    return path


@torch.no_grad()
def check_typographic(folder: Path, result: dict[str, Any], n: int) -> list[dict[str, Any]]:
    """Return the figures of each kind's edit on fresh drawn images beside those on test."""
    model = vp.load_model("demo")
    found = []
    for row in result["rows"]:
        if (row["method"], row["split"]) != ("sae", "test"):
            continue
        kind = row["kind"]
        fresh = attack(model, kind, n, seed=FRESH_SEED)
        texts = model.encode_text(list(zero_shot_prompts(kind)[0]))
        edit = vp.Edit.load(folder / "edits" / f"{kind}-sae.json")
        with model.edit(edit):
            answers, clean = (
                torch.cat([model.encode_image(part) @ texts.T for part in pixels.split(100)])
                for pixels in (fresh.attacked, fresh.clean)
            )
        values = {
            "fooled": answers.argmax(1) == fresh.printed,
            "accuracy": answers.argmax(1) == fresh.labels,
            "clean_accuracy": clean.argmax(1) == fresh.labels,
        }
        found += [
            {"kind": kind, "figure": name, **compared(row[name], value, n)}
            for name, value in values.items()
        ]
    return found


@torch.no_grad()
def check_groups(folder: Path, result: dict[str, Any], n: int) -> list[dict[str, Any]]:
    """Return the figures of the edit on fresh drawn images beside those on test."""
    model, task = vp.load_model("demo"), result["task"]
    usual, unusual = list(result["settings"]["images"]["train"].values())[:2]
    # As the command draws them.
    train = group_split(model, CONFOUNDS[task], (usual, unusual, unusual, usual), seed=2000)
    fresh = group_split(model, CONFOUNDS[task], (n // 4,) * 4, seed=FRESH_SEED)
    probe = LogisticRegression(max_iter=1000).fit(embedded(model, train.pixels), train.labels)
    with model.edit(vp.Edit.load(folder / "edit.json")):
        after = embedded(model, fresh.pixels)
    right = torch.from_numpy(probe.predict(after)) == fresh.labels
    (row,) = (row for row in result["rows"] if row["method"] == "sae")
    each = [right[fresh.groups == group] for group in range(4)]
    worst = min(each, key=lambda group: group.double().mean().item())
    return [
        {"kind": row["kind"], "figure": name, **compared(row[name], values, len(values))}
        for name, values in (("worst_group", worst), ("accuracy", right))
    ]


@torch.no_grad()
def check_ravel(folder: Path, result: dict[str, Any], n: int) -> list[dict[str, Any]]:
    """Return cause and isolate of each swap of latents on fresh drawn images, beside those on test.

    Whole passes under hooks, by a loop of its own over every pair of neighbours.
    """
    model = vp.load_model("demo")
    factors = list(result["settings"]["factors"])
    fresh = factor_split(model, tuple(factors), n, seed=FRESH_SEED)
    texts = {name: model.encode_text(list(zero_shot_prompts(name)[0])) for name in factors}

    def read(embeddings: torch.Tensor) -> dict[str, torch.Tensor]:
        return {name: (embeddings @ texts[name].T).argmax(1) for name in factors}

    before = read(torch.from_numpy(embedded(model, fresh.pixels)))
    known = torch.stack([before[f] == fresh.values[f] for f in factors]).all(0).nonzero().flatten()
    base, source = known, known.roll(1)
    found = []
    for row in result["rows"]:
        if row["method"] != "sae" or row["kind"] not in factors:
            continue
        edit = vp.Edit.load(folder / "edits" / f"{row['kind']}-sae.json")
        parts = []
        for own, other in zip(base.split(100), source.split(100), strict=True):
            with model.edit(edit, source=fresh.pixels[other]):
                parts.append(model.encode_image(fresh.pixels[own]))
        after = read(torch.cat(parts))
        of = {name: (values[base], values[source]) for name, values in fresh.values.items()}
        swapped = of[row["kind"]][0] != of[row["kind"]][1]
        cause = (after[row["kind"]] == of[row["kind"]][1])[swapped]
        stays, differs = (
            torch.stack([kind(name) for name in factors if name != row["kind"]])
            for kind in (
                lambda name, after=after, of=of: after[name] == of[name][0],
                lambda name, of=of: of[name][0] != of[name][1],
            )
        )
        counts = (differs & swapped).sum(0)
        isolate = ((stays & differs).sum(0) / counts.clamp(min=1))[counts > 0]
        found += [
            {"kind": row["kind"], "figure": name, **compared(row[name], values, len(values))}
            for name, values in (("cause", cause), ("isolate", isolate))
        ]
    return found


def embedded(model: Any, pixels: torch.Tensor) -> Any:
    """Return unit embeddings, by whole passes."""
    return torch.cat([model.encode_image(part) for part in pixels.split(100)]).numpy()


def gains(found: dict[str, Any]) -> list[str]:
    """Return how far the SAE's worst group is above that of each other method, paired."""
    prefix = "worst_group_over_"
    over = {
        name.removeprefix(prefix): figure
        for row in found["rows"]
        if row["method"] == "sae"
        for name, figure in row.items()
        if name.startswith(prefix)
    }
    if not over:
        return []
    return [
        "",
        "How far the worst group of `sae` is above that of the others on the same images:",
        "",
        "| over | difference |",
        "|---|---|",
        *(f"| {name} | {f['value']:.3f} [{f['low']:.3f}, {f['high']:.3f}] |"
          for name, f in over.items()),
    ]  # fmt: skip


SMALL = (
    *("--train-pairs", "40", "--validation-pairs", "30", "--test-pairs", "30", "--sizes", "5"),
    *("--training-images", "60", "--training-tokens", "8192", "--d-sae", "64", "--k", "4"),
)
SMALL_GROUPS = (
    *("--usual", "40", "--unusual", "4", "--validation", "8", "--test", "30", "--sizes", "5"),
    *("--training-images", "60", "--training-tokens", "8192", "--d-sae", "64", "--k", "4"),
)
SMALL_LLAVA = (
    *("--train-images", "120", "--validation-images", "60", "--test-images", "60", "--sizes", "2"),
    *("--training-images", "200", "--training-tokens", "65536", "--d-sae", "256", "--k", "8"),
)
SMALL_RAVEL = (
    *("--train", "60", "--validation", "40", "--test", "40", "--sizes", "5", "--ranks", "4"),
    *("--training-images", "300", "--training-tokens", "8192", "--d-sae", "64", "--k", "4"),
    *("--steps", "10"),
)
TASKS = {
    "ravel": Task(("ravel", "--model-name", "demo"), SMALL_RAVEL, check_ravel),
    # Its methods and defaults were settled on images of other seeds.
    "llava": Task(("llava", "--model-name", "demo", "--seed", "7"), SMALL_LLAVA, check_llava, 300),
    "background": Task(("background", "--model-name", "demo"), SMALL_GROUPS, check_groups),
    "attribute": Task(("attribute", "--model-name", "demo"), SMALL_GROUPS, check_groups),
    "typographic": Task(("typographic", "--model-name", "demo"), SMALL, check_typographic),
    "emoji": Task(
        (
            *("typographic", "--model-name", str(SHARED / "models" / "emoji-clip")),
            *("--label-column", "name", "--template", "a picture of {}"),
            *("--hook-name", "blocks.2.hook_resid_post"),
        ),
        SMALL,
        images=short_names,
    ),
}


def placeless(text: str) -> str:
    """Return a text without the path of the checkout."""
    return text.replace(str(SHARED), "../shared")


def run(name: str, task: Task, *, small: bool) -> tuple[dict[str, Any], str]:
    """Run a task's command; return what it wrote, with its cost and the check, and the table."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / name
        line = ["tasks", *task.arguments, *(task.small if small else ())]
        if task.images is not None:
            line += ["--images", str(task.images(Path(place)))]
        around = machine("transformers", "sae-lens")
        wall, cpu = time.perf_counter(), time.process_time()
        code = vision_plugin([*line, "--output-path", str(folder)])
        cost = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
        if code:
            raise SystemExit(code)
        result = json.loads(placeless((folder / "results.json").read_text()))
        table = placeless((folder / "table.txt").read_text())
        n_fresh = 60 if small else task.n_fresh
        checked = [] if task.check is None else task.check(folder, result, n_fresh)
    shown = ["vision-plugin", *line, "--output-path", "O"]
    command = placeless(shlex.join(shown).replace(place, "."))
    return {
        "command": command,
        "machine": around,
        "cost": cost,
        **result,
        "n_fresh": n_fresh,
        "fresh": checked,
    }, table


def markdown(found: dict[str, Any], table: str) -> str:
    """Return the result as a page."""
    cost, around = found["cost"], found["machine"]
    lines = [
        f"# `{found['command']}`",
        "",
        f"{cost['seconds']:.0f} s ({cost['cpu_seconds']:.0f} s of CPU) on {around['device']}, "
        f"{around['threads']} threads, load {around['load_average_before']:.1f} before.",
        "",
        "```",
        table.rstrip(),
        "```",
    ]
    lines += [*gains(found), *aims(found)]
    if found["fresh"]:
        lines += [
            "",
            f"The chosen edits, loaded from their files, on {found['n_fresh']:,} new images:",
            "",
            "| kind | figure | test | fresh | agree |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| {row['kind']} | {row['figure'].replace('_', ' ')} | {row['test']['value']:.3f} "
            f"[{row['test']['low']:.3f}, {row['test']['high']:.3f}] | {row['fresh']:.3f} | "
            f"{'yes' if row['agrees'] else 'no'} |"
            for row in found["fresh"]
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run one task and write its page and JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("task", choices=sorted(TASKS))
    parser.add_argument("--small", action="store_true", help="a minute, to see that it works")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logger.setLevel(logging.INFO)
    torch.set_num_threads(arguments.threads)
    found, table = run(arguments.task, TASKS[arguments.task], small=arguments.small)
    page = markdown(found, table)
    logger.info("%s", page)
    if not arguments.small:
        place = RESULTS / f"tasks-{arguments.task}"
        place.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
        place.with_suffix(".md").write_text(page)


if __name__ == "__main__":
    main()
