"""Registers, spills and shared memory of the Triton kernels, compiled without a GPU.

    python -m benchmarks.compiled

Writes ``results/compiled.json`` and ``results/compiled.md``. A minute on a CPU.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # a bare checkout works, too

from benchmarks._machine import machine

RESULTS = Path(__file__).parent / "results"
SCHEMA = 1


def main() -> None:
    """Compile the kernels, and write what each needs."""
    os.environ["TRITON_INTERPRET"] = "0"
    from tests.kernels.triton_cases import compile_ahead

    report = {"schema": SCHEMA, "environment": machine("triton"), "kernels": compile_ahead()}
    (RESULTS / "compiled.json").write_text(json.dumps(report, indent=1) + "\n")
    (RESULTS / "compiled.md").write_text(table(report))
    sys.stdout.write(table(report))


def table(report: dict[str, Any]) -> str:
    """Return the figures as Markdown: a kernel a row, sm_80 and sm_90 side by side."""
    versions = report["environment"]["versions"]
    lines = [
        "# The Triton kernels, compiled ahead of time",
        "",
        f"Triton {versions['triton']}, torch {versions['torch']}; made by "
        "`python -m benchmarks.compiled` without a GPU.",
        "",
        "| kernel | registers (sm_80, sm_90) | spilled bytes | shared bytes |",
        "|---|---|---|---|",
    ]
    kernels = report["kernels"]
    for name in dict.fromkeys(name.rpartition(" ")[0] for name in kernels):
        found = [kernels[f"{name} sm_{arch}"] for arch in (80, 90)]
        cells = [
            ", ".join(str(f[key]) for f in found) for key in ("registers", "spilled", "shared")
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
