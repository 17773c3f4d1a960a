"""Run the matrix of vision transformers and write the table of supported models.

    python -m benchmarks.families              # every family, every name of timm and open_clip
    python -m benchmarks.families --sample     # the sample that the ordinary test run takes

Writes ``benchmarks/results/families.json`` and ``families.md``. Weights are random and the towers
small; what is checked is that the bridge is exact, whatever the weights.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # a bare checkout works, too

import vision_plugin as vp
from benchmarks import _family_checks as checks
from benchmarks._family_cases import (
    Case,
    llava_cases,
    open_clip_case,
    open_clip_names,
    timm_case,
    timm_names,
    transformers_cases,
)
from vision_plugin.models import UnsupportedModelError

logger = logging.getLogger("benchmarks.families")

RESULTS = Path(__file__).parent / "results"
TIMM_SAMPLE = (
    "vit_base_patch16_224",
    "vit_base_patch16_siglip_224",
    "vit_giant_patch14_reg4_dinov2",
    "vit_base_patch32_clip_224",
    "deit_base_distilled_patch16_224",
    "eva_giant_patch14_224",
    "eva02_base_patch14_224",
    "eva02_base_patch16_clip_224",
    "vit_base_patch16_dinov3",
    "vit_pe_core_base_patch16_224",
    "vit_small_patch16_rope_mixed_224",
    "vit_base_patch16_rpn_224",
    "vit_small_patch16_18x2_224",
    "test_vit",
)
OPEN_CLIP_SAMPLE = (
    "ViT-B-32",
    "ViT-B-32-quickgelu",
    "coca_ViT-B-32",
    "EVA02-B-16",
    "ViT-B-16-SigLIP",
    "PE-Core-B-16",
    "RN50",
    "convnext_base",
)


@dataclass(frozen=True)
class Row:
    """What came out for one model."""

    library: str
    name: str
    supported: bool
    reason: str = ""
    tokens: str = ""
    output: float = 0.0
    """Bridge against native module, nothing hooked; relative to the largest value if above 1."""
    hooked: float = 0.0
    """The same with every hook read."""
    outliers: float = 0.0
    """The same, nothing hooked, with weight matrices scaled by 10."""
    residual: float = 0.0
    """Residual stream against the sum of its parts."""
    stretch: float = 0.0
    """Stopped at each layer and started there again, against the whole pass."""
    pattern: float = 0.0
    """Sums of the attention patterns' rows against 1."""
    harvest: float = 0.0
    """Harvest path against the bridge's cache."""


def run(case: Case) -> Row:
    """Check one model.

    Raises:
        AssertionError: it is supported and a check failed.
    """
    try:
        model = vp.wrap(case.build(), name=case.name)
    except UnsupportedModelError as error:
        reason = str(error).removeprefix(f"{case.name}: ").split(". Supported:")[0]
        return Row(case.library, case.name, False, reason.split(". CONTRIBUTING")[0])
    dims = model.adapter.tower_dimensions
    pixels = torch.randn(2, dims.n_channels, *(case.image or dims.image_size))
    layout = model.token_layout(case.image)
    row = Row(
        library=case.library,
        name=case.name,
        supported=True,
        tokens=f"{layout.n_cls} + {layout.n_registers} + {layout.grid[0]} x {layout.grid[1]}",
        output=checks.output_error(model, case.native, pixels),
        hooked=checks.hooked_error(model, case.native, pixels),
        outliers=checks.outlier_error(model, case.native, pixels),
        residual=checks.residual_error(model, pixels),
        stretch=checks.stretch_error(model, pixels),
        pattern=checks.pattern_error(model, pixels),
        harvest=checks.harvest_error(model, pixels),
    )
    _judge(row, case.tolerance)
    return row


def _judge(row: Row, tolerance: float) -> None:
    limits = {
        "output": tolerance,
        "hooked": tolerance,
        "outliers": tolerance,
        "residual": 1e-6,
        "stretch": tolerance,
        "pattern": 1e-5,
        "harvest": tolerance,
    }
    for name, limit in limits.items():
        value = getattr(row, name)
        assert value <= limit, f"{row.library} {row.name}: {name} is off by {value}, limit {limit}"


def sample() -> list[Case]:
    """Every family once."""
    return [
        *transformers_cases(),
        *llava_cases(),
        *(timm_case(name) for name in TIMM_SAMPLE),
        *(open_clip_case(name) for name in OPEN_CLIP_SAMPLE),
    ]


def everything() -> list[Case]:
    """Every family of transformers, every name that timm and open_clip list."""
    return [
        *transformers_cases(),
        *llava_cases(),
        *(timm_case(name) for name in timm_names()),
        *(open_clip_case(name) for name in open_clip_names()),
    ]


def write(rows: list[Row], folder: Path) -> None:
    """Write the JSON and the table made from it."""
    folder.mkdir(parents=True, exist_ok=True)
    data: dict[str, Any] = {
        "versions": {
            name: version(name)
            for name in ("torch", "transformers", "timm", "open_clip_torch", "transformer-lens")
        },
        "device": "cpu",
        "dtype": "float32",
        "rows": [asdict(row) for row in rows],
    }
    (folder / "families.json").write_text(json.dumps(data, indent=1) + "\n")
    (folder / "families.md").write_text(table(rows, data["versions"]))


def table(rows: list[Row], versions: dict[str, str]) -> str:
    """The Markdown: a summary by library, the transformers families, the refusals, the names."""
    by_library: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_library[row.library].append(row)
    lines = [
        "Largest differences in float32 on the CPU, random weights; relative to the largest value "
        "where that is above 1. "
        + ", ".join(f"{name} {number}" for name, number in versions.items())
        + ".",
        "",
        "| library | supported | output | every hook read | weights x 10 | residual parts |"
        " stop, start | harvest |",
        "|---|---|---|---|---|---|---|---|",
    ]
    columns = ("output", "hooked", "outliers", "residual", "stretch", "harvest")
    for library, found in by_library.items():
        good = [row for row in found if row.supported]
        worst = [max((getattr(row, c) for row in good), default=0.0) for c in columns]
        figures = " | ".join(_figure(value) for value in worst)
        lines.append(f"| {library} | {len(good)} of {len(found)} | {figures} |")
    lines += ["", "| transformers class | tokens (cls + registers + grid) |", "|---|---|"]
    lines += [f"| {row.name} | {row.tokens} |" for row in by_library["transformers"]]
    lines += ["", "| refused | why |", "|---|---|"]
    reasons: dict[tuple[str, str], list[str]] = defaultdict(list)
    for row in rows:
        if not row.supported:
            reasons[row.library, row.reason].append(row.name)
    lines += [
        f"| {library}: {', '.join(names)} | {reason} |"
        for (library, reason), names in reasons.items()
    ]
    for library in ("timm", "open_clip"):
        names = [f"`{row.name}`" for row in by_library[library] if row.supported]
        lines += ["", f"<details><summary>{library}: {len(names)} names</summary>", ""]
        lines += [", ".join(names), "", "</details>"]
    return "\n".join(lines) + "\n"


def _figure(value: float) -> str:
    return "0" if value == 0 else f"{value:.0e}"


def main() -> int:
    """Run from the command line; 1 if a check failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", action="store_true", help="every family once")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    rows, failures = [], 0
    cases = sample() if arguments.sample else everything()
    for number, case in enumerate(cases, start=1):
        try:
            row = run(case)
        except Exception:
            logger.exception("%s FAILED", case.label)
            failures += 1
            continue
        rows.append(row)
        state = f"output {row.output:.0e}" if row.supported else f"refused: {row.reason}"
        logger.info("%d/%d %s: %s", number, len(cases), case.label, state)
    write(rows, arguments.out)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
