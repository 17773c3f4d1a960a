"""Read every hostile input and run every hostile command line, and say what became of each.

``python -m benchmarks.hostile`` takes about an hour on one core. It writes ``hostile.json`` and
the table ``hostile.md`` to ``benchmarks/results/``, and exits with 1 if anything was not read or
refused in one sentence, within two seconds and a gigabyte, with everything beside it untouched.
``python -m tests.faults._hostile NAME`` reads one input again, by the name that stands there.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # a bare checkout works, too

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

RESULTS = Path(__file__).resolve().parent / "results"


def main() -> int:
    """Run the corpus."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[""], help="texts: kinds or rules with one")
    parser.add_argument("--files", action="store_true", help="leave the command lines out")
    parser.add_argument("--most", type=int, default=None, help="most inputs for each rule")
    parser.add_argument("--every", type=int, default=1, help="take one input in so many")
    parser.add_argument(
        "--join", action="store_true", help="keep the rows of other kinds that the results have"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    cfg = parser.parse_args()

    from benchmarks._machine import machine
    from tests.faults import _corpus as corpus
    from tests.faults._hostile import MEGABYTES, SECONDS, import_everything, run

    every = corpus.RULES if cfg.files else corpus.every_rule()
    rules = [rule for rule in every if any(text in f"{rule.kind}/{rule.name}" for text in cfg.only)]
    cases = [case for rule in rules for case in rule.cases(cfg.most)][:: cfg.every]
    import_everything()
    setting, began = machine("sae-lens", "transformers", "pyarrow", "pillow", "pyyaml"), time.time()
    with tempfile.TemporaryDirectory(prefix="hostile-") as folder:
        outcomes = run(cases, Path(folder), _tell(len(cases)))
    content = {
        "machine": setting,
        "seconds": round(time.time() - began),
        "limits": {"seconds": SECONDS, "megabytes": MEGABYTES},
        "table": table(outcomes),
        "slowest": _largest(outcomes, "seconds"),
        "largest": _largest(outcomes, "megabytes"),
        "wrong": [asdict(outcome) for outcome in outcomes if not outcome.right],
    }
    file = cfg.output / "hostile.json"
    if cfg.join and file.exists():
        content = joined(json.loads(file.read_text()), content)
    cfg.output.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=1) + "\n")
    (cfg.output / "hostile.md").write_text(markdown(content["table"]))
    sys.stdout.write(markdown(content["table"]))
    return 1 if content["wrong"] else 0


COLUMNS = ("tried", "read", "refused", "unclear", "traceback", "hang", "memory", "canary")


def table(outcomes: Sequence[Any]) -> dict[str, dict[str, int]]:
    """Return how many inputs of each kind ended in each manner."""
    found: dict[str, Counter[str]] = {}
    for outcome in outcomes:
        for kind in (outcome.kind, "all"):
            found.setdefault(kind, Counter()).update(("tried", outcome.manner))
    rows = {kind: {name: counted[name] for name in COLUMNS} for kind, counted in found.items()}
    return {**{kind: row for kind, row in rows.items() if kind != "all"}, "all": rows["all"]}


def joined(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Return the results of two runs; kinds that both have tried come from the later one."""
    rows = {**before["table"], **now["table"]}
    del rows["all"]
    total = {name: sum(row[name] for row in rows.values()) for name in COLUMNS}
    kept = [wrong for wrong in before["wrong"] if wrong["kind"] not in now["table"]]
    most = {
        name: sorted(before[name] + now[name], key=lambda one: -one[field])[:10]
        for name, field in (("slowest", "seconds"), ("largest", "megabytes"))
    }
    return {
        **now,
        **most,
        "seconds": before["seconds"] + now["seconds"],
        "table": {**rows, "all": total},
        "wrong": kept + now["wrong"],
    }


def markdown(rows: dict[str, dict[str, int]]) -> str:
    """Return the table as Markdown."""
    lines = [f"| kind | {' | '.join(COLUMNS)} |", f"|---|{'---:|' * len(COLUMNS)}"]
    for kind, row in rows.items():
        lines.append(f"| {kind} | {' | '.join(f'{row[name]:,}' for name in COLUMNS)} |")
    return "\n".join(lines) + "\n"


def _largest(outcomes: Sequence[Any], field: str) -> list[dict[str, Any]]:
    ranked = sorted(outcomes, key=lambda outcome: -getattr(outcome, field))
    return [{"name": one.name, field: getattr(one, field)} for one in ranked[:10]]


def _tell(total: int) -> Any:
    told = Counter[str]()

    def tell(outcome: Any) -> None:
        told.update((outcome.manner,))
        if not outcome.right:
            sys.stderr.write(f"{outcome}\n")
        if sum(told.values()) % 250 == 0 or sum(told.values()) == total:
            sys.stderr.write(f"{sum(told.values()):,} of {total:,}: {dict(told)}\n")

    return tell


if __name__ == "__main__":
    sys.exit(main())
