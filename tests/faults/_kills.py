"""Commands that are killed at random moments, and run again until they are done."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

from tests._processes import ended, in_child
from tests.faults._corpus import _lines as lines
from tests.faults._corpus import _samples as samples

OUT = "out"
READ = ("model/", "images/", "sae/", "foreign/", "concepts.txt")
TIMES = ("seconds", "created", "date")
"""Fields of JSON files that say when, or how long, and so differ from run to run."""


@dataclass(frozen=True)
class Job:
    """A command, run in a folder that holds what it reads."""

    line: tuple[str, ...]
    earlier: tuple[str, ...] | None = None
    """The same command with other settings, whose result lies there before; None for nothing."""
    grows: bool = False
    """Whether the output is written piece by piece, and gone on with."""

    @property
    def command(self) -> str:
        """Name of the command."""
        return self.line[0]


_MODEL = ("--model-name", "model", "--images", "images")
_EVAL = ("eval", *_MODEL, "--sae", "sae", "--metrics", "fvu", "sparsity", "monosemanticity")
_REPORT = ("report", *_MODEL, "--sae", "sae", "--output-path", OUT, "--features", "0", "1", "2")
_TRAIN = (
    *("train", *_MODEL, "--hook-name", lines.HOOK, "--architecture", "topk", "--d-sae", "16"),
    *("--k", "2", "--training-tokens", "2048", "--train-batch-size-tokens", "32"),
    *("--n-batches-in-buffer", "4", "--n-checkpoints", "6", "--output-path", OUT),
)
JOBS = (
    Job(
        (
            *("extract", *_MODEL, "--hook-names", lines.HOOK, "--images-per-shard", "2"),
            *("--batch-size", "2", "--n-workers", "0", "--output-path", OUT),
        ),
        grows=True,
    ),
    Job(_TRAIN, grows=True),
    Job((*_EVAL, "--output-path", f"{OUT}/scores.json")),
    Job(
        (*_EVAL, "--output-path", f"{OUT}/scores.json"),
        earlier=(*_EVAL, "--output-path", f"{OUT}/scores.json", "--seed", "7"),
    ),
    Job(_REPORT),
    Job(_REPORT, earlier=(*_REPORT, "--title", "an earlier one")),
    Job(("convert", "--sae", "foreign", "--output-path", OUT)),
    Job(("decompose", *_MODEL, "--n-images", "4", "--output-path", OUT)),
    Job(("sparsity", *_MODEL, "--saes", "sae", "--output-path", OUT)),
    Job(
        (
            *("steer", *_MODEL, "--sae", "sae", "--latents", "1", "--concepts", "concepts.txt"),
            *("--output-path", f"{OUT}/steered.json"),
        )
    ),
    Job(
        (
            *("demo", "--output-path", OUT, "--training-images", "32", "--training-tokens", "1088"),
            *("--images", "24", "--d-sae", "16", "--k", "2", "--steered-latents", "1"),
        ),
        grows=True,
    ),
)


@dataclass
class Figures:
    """What came of killing one job."""

    command: str
    replaces: bool
    kills: int = 0
    runs: int = 0
    """Runs to the end, each compared with the straight one byte by byte."""
    seconds: float = 0.0
    """Time of the straight run."""
    littered: int = 0
    """Runs to the end that left hidden files of killed ones behind."""
    faults: list[str] = field(default_factory=list)


def kill_often(job: Job, root: Path, kills: int, seed: int, *, in_a_row: int = 5) -> Figures:
    """Kill a job at random moments; after some kills let it finish, and compare.

    Args:
        job: The command.
        root: An empty folder.
        kills: How many processes to kill.
        seed: Seed of the moments.
        in_a_row: Most kills before the job may finish.
    """
    figures = Figures(job.command, replaces=job.earlier is not None)
    moments = random.Random(f"{job.line} {job.earlier} {seed}")
    folder = _prepared(job, root / "job")
    before = content(folder / OUT)
    began = time.monotonic()
    _finish(job.line, folder)
    figures.seconds = time.monotonic() - began
    right, inputs = content(folder / OUT), _beside(folder)
    shutil.rmtree(folder)
    while figures.kills < kills and not figures.faults:
        _prepared(job, folder)
        for _ in range(min(in_a_row, kills - figures.kills)):
            child = in_child(lambda: _run(job.line, folder))
            time.sleep(moments.uniform(0, figures.seconds))
            os.kill(child, signal.SIGKILL)
            status = ended(child)
            killed = status == -signal.SIGKILL
            figures.kills += killed
            found = content(folder / OUT)
            if not killed and status and found != right:
                told = (folder.parent / "told.txt").read_text()
                figures.faults.append(f"run again, it ended with {status}: {told[-800:]}")
            if not job.grows and found not in (before, right):
                figures.faults.append(f"a kill left neither the old nor the new: {sorted(found)}")
            if not killed:
                break
        else:
            _finish(job.line, folder, may_exist=content(folder / OUT) == right)
        figures.runs += 1
        if content(folder / OUT) != right:
            figures.faults.append(f"another result: {_difference(content(folder / OUT), right)}")
        if _beside(folder) != inputs:
            figures.faults.append(f"changed beside it: {_difference(_beside(folder), inputs)}")
        figures.littered += any(path.name.startswith(".") for path in folder.rglob("*"))
        shutil.rmtree(folder)
    return figures


def _prepared(job: Job, folder: Path) -> Path:
    """A folder with what the job reads, and perhaps an earlier result."""
    folder.mkdir(parents=True)
    names = [name for name in lines.fixtures() if name.startswith(READ)]
    samples.put({name: lines.fixtures()[name] for name in names}, folder)
    if job.earlier is not None:
        kept = folder.parent / f"earlier-{job.command}"
        if not kept.exists():
            _finish(job.earlier, folder)
            shutil.copytree(folder / OUT, kept)
        elif not (folder / OUT).exists():
            shutil.copytree(kept, folder / OUT)
    return folder


def _finish(line: tuple[str, ...], folder: Path, *, may_exist: bool = False) -> None:
    status = ended(in_child(lambda: _run(line, folder)))
    # A result that was complete when its process was killed may be refused as already there.
    if status and not may_exist:
        told = (folder.parent / "told.txt").read_text()
        raise RuntimeError(f"{' '.join(line)} ended with {status}: {told[-500:]}")


def _run(line: tuple[str, ...], folder: Path) -> None:
    from vision_plugin.cli import main

    os.chdir(folder)
    told = os.open(folder.parent / "told.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(told, 1)
    os.dup2(told, 2)
    status = main(line)
    if status:
        raise SystemExit(status)


def content(folder: Path) -> dict[str, str]:
    """Return a hash of every file that is to be seen below a folder, without times."""
    return {
        path.relative_to(folder).as_posix(): _digest(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(p.startswith(".") for p in path.relative_to(folder).parts)
    }


def _digest(path: Path) -> str:
    data = path.read_bytes()
    if path.suffix == ".json":
        tree = json.loads(data)
        if isinstance(tree, dict) and any(name in tree for name in TIMES):
            kept = {name: inner for name, inner in tree.items() if name not in TIMES}
            data = json.dumps(kept).encode()
    return hashlib.sha256(data).hexdigest()


def _beside(folder: Path) -> dict[str, str]:
    """Return a hash of every file beside the output."""
    return {name: one for name, one in content(folder).items() if not name.startswith(OUT)}


def _difference(found: dict[str, str], right: dict[str, str]) -> str:
    missing, extra = sorted(right.keys() - found.keys()), sorted(found.keys() - right.keys())
    other = sorted(name for name in found.keys() & right.keys() if found[name] != right[name])
    return f"missing {missing[:5]}, too many {extra[:5]}, different {other[:5]}"
