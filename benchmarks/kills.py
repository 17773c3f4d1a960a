"""Kill commands a thousand times at random moments, and run them again.

``python -m benchmarks.kills`` writes ``kills.json`` to ``benchmarks/results/``, and exits with 1 if
anything was lost: an earlier result, an input, or a byte of what the command makes when it is run
again after it was killed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # a bare checkout works, too

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

RESULTS = Path(__file__).resolve().parent / "results"


def main() -> int:
    """Kill every job its share of times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=1_000, help="kills in all")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument("--only", default="", help="name of the one command to kill")
    parser.add_argument(
        "--join", action="store_true", help="keep what the results have of other commands"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    cfg = parser.parse_args()

    from benchmarks._machine import machine
    from tests.faults._hostile import import_everything
    from tests.faults._kills import JOBS, kill_often

    jobs = [job for job in JOBS if cfg.only in job.command]
    import_everything()
    setting, began, rows = machine("sae-lens", "transformers"), time.time(), []
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        for number, job in enumerate(jobs):
            share = cfg.kills // len(jobs) + (number < cfg.kills % len(jobs))
            figures = kill_often(job, Path(folder) / str(number), share, cfg.seed)
            rows.append(asdict(figures))
            sys.stderr.write(f"{rows[-1]}\n")
    file, seconds = cfg.output / "kills.json", round(time.time() - began)
    if cfg.join and file.exists():
        before, again = json.loads(file.read_text()), {row["command"] for row in rows}
        rows = [row for row in before["commands"] if row["command"] not in again] + rows
        seconds += before["seconds"]
    content = {
        "machine": setting,
        "seconds": seconds,
        "kills": sum(row["kills"] for row in rows),
        "runs_compared": sum(row["runs"] for row in rows),
        "faults": sum(len(row["faults"]) for row in rows),
        "commands": rows,
    }
    cfg.output.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=1) + "\n")
    return 1 if content["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
