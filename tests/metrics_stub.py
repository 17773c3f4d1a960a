"""Writes ``vision_plugin/metrics/__init__.pyi`` from the ``__all__`` of each module there."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "vision_plugin" / "metrics"
STUB = FOLDER / "__init__.pyi"


def exports() -> str:
    """Return the stub's text: a line for each public name."""
    lines = []
    for path in sorted(FOLDER.glob("_[!_]*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            named = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
            for name in sorted(ast.literal_eval(node.value)) if named else ():
                lines.append(f"from .{path.stem} import {name} as {name}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    STUB.write_text(exports(), encoding="utf-8")
    sys.stdout.write(f"wrote {STUB}\n")
