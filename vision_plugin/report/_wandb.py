"""A report in Weights & Biases: its features as a table and its pages as an artifact."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

TABLE, KIND = "report/features", "vision_plugin-report"
_MOST_ROWS = 10_000
_PREFIX = re.compile(r'^"use strict";\nconst [A-Z]+ = ')


def log_report(folder: Path, title: str) -> None:
    """Log a report to the run that is on in this process; do nothing where none is.

    Args:
        folder: Folder of a finished report.
        title: Name of the artifact; characters that names cannot have become hyphens.
    """
    wandb: Any = sys.modules.get("wandb")
    if wandb is None or wandb.run is None:
        return
    text = (folder / "data.js").read_text(encoding="ascii")
    data = json.loads(_PREFIX.sub("", text).rstrip().removesuffix(";"))
    columns = ["latent", "name", *(column["title"] for column in data["columns"])]
    names = data["names"] or [""] * len(data["ids"])
    rows = [
        [latent, names[row], *(values[row] for values in data["values"])]
        for row, latent in enumerate(data["ids"][:_MOST_ROWS])
    ]
    wandb.run.log({TABLE: wandb.Table(columns=columns, data=rows)})
    name = re.sub(r"[^\w.-]+", "-", title)[:100].strip("-") or "report"
    artifact = wandb.Artifact(name, type=KIND)
    artifact.add_dir(str(folder))
    wandb.run.log_artifact(artifact)
