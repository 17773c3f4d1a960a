"""What the steering of the small LLaVA is checked by: its edits on new images, and its aims."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import vision_plugin as vp
from benchmarks._fresh import FRESH_SEED, compared
from vision_plugin.demo import FACTORS
from vision_plugin.demo.dialogue import QUESTIONS
from vision_plugin.demo.multimodal import asked

AIMS: Mapping[tuple[str, str], tuple[float, float]] = {
    ("insertion", "colour"): (0.9, 0.9),
    ("suppression", "colour"): (0.95, 0.9),
    ("suppression", "background"): (0.95, 0.9),
}
"""Shares of answers that change as they should, and that stay, by goal and factor."""
DONE = {"insertion": "inserted", "suppression": "suppressed"}


def winners(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the row of each goal and factor whose edits were saved: validation chose it."""
    found = []
    for row in rows:
        goal, _, choice = row["how"].partition(", ")
        if choice != "winner" or row["method"] != "sae_without_error":
            continue
        found += [
            {**one, "goal": goal}
            for one in rows
            if one["how"] == f"{goal}, best" and one["kind"] == row["kind"]
            and one["edit"] == row["edit"] and row["edit"].startswith(f"{one['method']},")
        ]  # fmt: skip
    return found


def aims(result: dict[str, Any]) -> list[str]:
    """Return lines that say which aims were reached on test, by what validation chose."""
    if result["task"] != "llava":
        return []
    lines = [
        "",
        "By latents, as an edit that validation chose, on test; the aims stand behind `of`:",
        "",
        "| aim | edit | changed | preserved | reached |",
        "|---|---|---|---|---|",
    ]
    for row in winners(result["rows"]):
        wanted = AIMS.get((row["goal"], row["kind"]))
        if wanted is None:
            continue
        figures = [row[DONE[row["goal"]]], row["preserved"]]
        cells = [
            f"{f['value']:.3f} [{f['low']:.3f}, {f['high']:.3f}] of {aim:.2f}"
            for f, aim in zip(figures, wanted, strict=True)
        ]
        reached = all(f["value"] >= aim for f, aim in zip(figures, wanted, strict=True))
        lines.append(
            f"| {row['goal']} of a {row['kind']} | {row['edit']} | {cells[0]} | {cells[1]} | "
            f"{'yes' if reached else 'no'} |"
        )
    return [
        *lines,
        "",
        "`replace` and `diff_mean_replace` take away the value that is there, which they know from "
        "the model's own answer; the other methods know the new value alone.",
    ]


@torch.no_grad()
def check_llava(folder: Path, result: dict[str, Any], n: int) -> list[dict[str, Any]]:
    """Return what each value's edit does to the answers about fresh images, by ``generate``."""
    vlm, sae = vp.load_vlm("demo"), vp.load_sae(folder / "sae")
    fresh = asked(n, seed=FRESH_SEED)
    images, random = list(fresh.images), torch.Generator().manual_seed(0)
    plain = {name: vlm.generate(images, text, do_sample=False) for name, text in QUESTIONS.items()}
    truth = {
        name: [FACTORS[name][label] for label in fresh.labels[name].tolist()] for name in QUESTIONS
    }
    found = []
    for test in winners(result["rows"]):
        goal, kind = test["goal"], test["kind"]
        steps = torch.randint(1, len(FACTORS[kind]), (n,), generator=random)
        steps = steps if goal == "insertion" else torch.zeros_like(steps)
        goals = (fresh.labels[kind] + steps) % len(FACTORS[kind])
        done, kept = torch.zeros(n), torch.zeros(n)
        # The edit for an image is found by what the model says about it, not by its label.
        names = [
            f"{plain[kind][i]}-to-{FACTORS[kind][goals[i]]}"
            if test["method"] == "replace" else FACTORS[kind][goals[i]]
            for i in range(n)
        ]  # fmt: skip
        for name in sorted(set(names)):
            path = folder / "edits" / f"{goal}-{kind}-{name}.json"
            rows = [i for i in range(n) if names[i] == name and plain[kind][i] == truth[kind][i]]
            if not rows:
                continue
            with vlm.edit(vp.Edit.load(path, sae=sae)):
                after = {
                    factor: vlm.generate([images[i] for i in rows], text, do_sample=False)
                    for factor, text in QUESTIONS.items()
                }
            for place, i in enumerate(rows):
                value = FACTORS[kind][goals[i]]
                done[i] = float((after[kind][place] == value) == (goal == "insertion"))
                kept[i] = sum(
                    after[factor][place] == plain[factor][i] == truth[factor][i]
                    for factor in QUESTIONS if factor != kind
                ) / (len(QUESTIONS) - 1)  # fmt: skip
        right = torch.tensor([a == b for a, b in zip(plain[kind], truth[kind], strict=True)])
        for figure, values in ((DONE[goal], done[right]), ("preserved", kept[right])):
            checked = compared(test[figure], values, len(values))
            found.append({"kind": kind, "figure": f"{goal}: {figure}", **checked})
    return found
