"""The same commands in two checkouts of this project, in turn: their time and memory as ratios.

    python -m benchmarks.trees --before ../vision_plugin-before            # twenty minutes
    python -m benchmarks.trees --before ../vision_plugin-before --images 100 --repetitions 1

Both checkouts need their ``.venv`` (``make setup``). Each has a process of its own that imports its
tree once and then runs the commands it is given, so that starting is not part of the time. Every
repetition runs a command in one tree and then in the other, and who goes first alternates. Results
are compared with each other: numbers that differ are counted. The data set and the model lie in
``../shared``. Writes ``benchmarks/results/trees.json``.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parents[1]))  # a bare checkout works, too

from benchmarks._machine import machine

logger = logging.getLogger("benchmarks.trees")

MANY = 20
"""With more files than this that differ, only their number is said."""

RESULTS = Path(__file__).parent / "results" / "trees.json"
SHARED = Path(__file__).parents[2] / "shared"

WORKER = """
import json, os, resource, sys, time
out = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
import vision_plugin.cli as cli
peak = lambda: next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM"))
for line in sys.stdin:
    argv = json.loads(line)
    open("/proc/self/clear_refs", "w").write("5")
    begin, cpu = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    status = cli.main(argv)
    end = resource.getrusage(resource.RUSAGE_SELF)
    spent = end.ru_utime + end.ru_stime - cpu.ru_utime - cpu.ru_stime
    answer = {"status": status, "seconds": time.perf_counter() - begin, "cpu_seconds": spent}
    out.write(json.dumps({**answer, "peak_mb": peak() / 1024}) + "\\n")
    out.flush()
"""
"""What a tree's process runs. It clears the record of its peak memory before each command."""


class Tree:
    """A checkout, with a process that runs its commands."""

    def __init__(self, root: Path, folder: Path, images: Path) -> None:
        self.root = root
        self.images = images
        self.folder = folder
        folder.mkdir(parents=True)
        self.process = subprocess.Popen(
            [str(root / ".venv/bin/python"), "-c", WORKER],
            cwd=root,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(folder / "log").open("w"),
            text=True,
        )

    def run(self, line: str) -> dict[str, Any]:
        """Run a command; ``{out}`` in it is this tree's folder.

        Raises:
            RuntimeError: the command fails.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        argv = [
            word.format(out=self.folder, shared=SHARED, images=self.images) for word in line.split()
        ]
        if argv[0] == "train" and (self.root / "vision_plugin/sae/_defaults.py").is_file():
            argv += ["--defaults", "saelens"]
        self.process.stdin.write(json.dumps(argv) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer or json.loads(answer)["status"]:
            log = (self.folder / "log").read_text()
            raise RuntimeError(f"{self.root}: {line!r} failed: {log[-800:]}")
        return dict(json.loads(answer))


def commands(tokens: int = 0) -> dict[str, str]:
    """The commands to time, by what they measure, in the order in which they need each other."""
    at = "--model-name {shared}/models/emoji-clip --images {images}"
    scored = "--sae {out}/sae --images {images}"
    return {
        "extraction": f"extract {at} --hook-names blocks.4.hook_resid_post "
        "--n-workers 0 --output-path {out}/store",
        "training": f"train {at} --hook-name blocks.4.hook_resid_post --architecture batchtopk "
        f"--d-sae 768 --k 16 --training-tokens {tokens} --output-path {{out}}/sae --overwrite",
        "evaluation": f"eval {scored} --metrics fvu sparsity monosemanticity uniqueness "
        "--output-path {out}/evaluation.json",
        "steerability": f"eval {scored} --metrics steerability --controls neurons "
        "--concepts column:group --steering-images 8 --output-path {out}/steerability.json",
        "report": f"report {scored} --output-path {{out}}/report",
    }


def compare(
    trees: dict[str, Tree], timed: Sequence[str], repetitions: int, tokens: int
) -> dict[str, Any]:
    """Time commands in both trees by turns; those that are not timed run once."""
    rows: dict[str, Any] = {}
    for what, line in commands(tokens).items():
        if what not in timed:
            if what == "training":  # the others need its SAE
                for tree in trees.values():
                    tree.run(line)
            continue
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in trees}
        for repetition in range(-1, repetitions):  # the first warms up and is not counted
            order = list(trees) if repetition % 2 else list(reversed(trees))
            for name in order:
                if what == "extraction":
                    shutil.rmtree(trees[name].folder / "store", ignore_errors=True)
                took = trees[name].run(line)
                if repetition >= 0:
                    runs[name].append(took)
        rows[what] = {**_row(runs), **difference(*(tree.folder for tree in trees.values()))}
        logger.info("%s: %s", what, rows[what])
    return rows


def _row(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians per tree, and the median of the paired ratios, after over before."""
    measures = ("seconds", "cpu_seconds", "peak_mb")
    medians = {
        name: {m: round(statistics.median(run[m] for run in of), 2) for m in measures}
        for name, of in runs.items()
    }
    pairs = list(zip(runs["before"], runs["after"], strict=True))
    ratios = {
        m: round(statistics.median(after[m] / before[m] for before, after in pairs), 3)
        for m in measures
    }
    return {**medians, "after_over_before": ratios, "repetitions": len(pairs)}


def difference(before: Path, after: Path) -> dict[str, Any]:
    """Files that stand in one folder alone, and those in both whose bytes differ."""
    files = [
        {str(p.relative_to(root)): p for p in root.rglob("*") if p.is_file() and p.name != "log"}
        for root in (before, after)
    ]
    shared = sorted(files[0].keys() & files[1].keys())
    unlike = [name for name in shared if files[0][name].read_bytes() != files[1][name].read_bytes()]
    return {
        "files": len(shared),
        "only_before": _summary(files[0].keys() - files[1].keys()),
        "only_after": _summary(files[1].keys() - files[0].keys()),
        "bytes_differ": {name: _numbers(files[0][name], files[1][name]) for name in unlike}
        if len(unlike) < MANY
        else _summary(unlike),
    }


def _summary(names: Iterable[str]) -> dict[str, int]:
    """How many files of each folder and suffix there are."""
    return dict(Counter(f"{Path(name).parent}/*{Path(name).suffix}" for name in sorted(names)))


def _numbers(before: Path, after: Path) -> str:
    """How two files differ: for JSON, how many of their numbers and by how much at most."""
    if before.suffix != ".json":
        return "bytes"
    old, new = (dict(_leaves(json.loads(path.read_text()))) for path in (before, after))
    pairs = [(old[key], new[key]) for key in old.keys() & new.keys()]
    pairs = [(a, b) for a, b in pairs if isinstance(a, float) and isinstance(b, float)]
    gaps = [abs(a - b) for a, b in pairs if a != b]
    new_keys, old_keys = len(new.keys() - old.keys()), len(old.keys() - new.keys())
    return (
        f"{len(gaps)} of {len(pairs)} numbers differ, by {max(gaps, default=0.0):.3g} at most; "
        f"{old_keys} entries gone, {new_keys} new"
    )


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, entry in items:
        if isinstance(entry, dict | list):
            yield from _leaves(entry, f"{path}/{key}")
        else:
            yield f"{path}/{key}", entry


def main() -> None:
    """Time the commands, and write the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--before", type=Path, required=True, help="the other checkout")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=100_000, help="vectors to train on")
    parser.add_argument("--images", type=int, default=600, help="images of the data set")
    parser.add_argument("--parts", nargs="*", default=list(commands()))
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with tempfile.TemporaryDirectory() as folder:
        roots = {"before": arguments.before.resolve(), "after": Path(__file__).parents[1]}
        images = Path(folder) / "images.parquet"
        table = pq.read_table(SHARED / "data/noto.parquet")
        pq.write_table(table.slice(0, arguments.images), images)
        trees = {name: Tree(root, Path(folder) / name, images) for name, root in roots.items()}
        rows = compare(trees, arguments.parts, arguments.repetitions, arguments.tokens)
    kept = json.loads(RESULTS.read_text())["rows"] if RESULTS.is_file() else {}
    size = {"images": arguments.images, "tokens": arguments.tokens}
    for row in rows.values():
        row |= size
    found = {"environment": machine("sae-lens", "transformer-lens"), "rows": kept | rows}

    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
