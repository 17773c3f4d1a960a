"""The page of results on a real model: its scores, its words, and a small run of all of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from PIL import Image

from benchmarks._dinov2_page import page
from benchmarks._dinov2_pictures import GAP, SIDE, TEXT, draw, standing_out
from benchmarks._dinov2_score import KINDS, Held, read, scores
from vision_plugin import metrics

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
N, D_IN = 240, 8


@pytest.fixture(scope="module")
def activations() -> torch.Tensor:
    return torch.randn(N, len(KINDS), D_IN, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def sparse_activations(activations: torch.Tensor) -> torch.Tensor:
    """Activations that are 0 on most patches, so that a latent fires on some of the pictures."""
    draws = torch.rand(N, len(KINDS), 1, generator=torch.Generator().manual_seed(2))
    return activations * (draws < 0.1)


@pytest.fixture(scope="module")
def held() -> Held:
    folders = [("a", "a/b", "c")[i % 3] for i in range(N)]
    shown = torch.randn(N, 5, generator=torch.Generator().manual_seed(1))
    one_hot = torch.tensor([[f == g for g in ("a", "a/b", "c")] for f in folders]).float()
    judges = {"emoji CLIP": shown, "folders": one_hot, "the model itself": shown + one_hot[:, :1]}
    return Held(folders, judges)


def dictionary(width: int) -> metrics.ControlDictionary:
    return metrics.random_dictionary(D_IN, width * D_IN, k=3, seed=width)


def plain_score(values: torch.Tensor, folders: list[str]) -> float:
    """Monosemanticity by folders, pair by pair."""
    low, high = float(values.min()), float(values.max())
    w = [(float(v) - low) / (high - low) for v in values]
    pairs = [(i, j) for i in range(len(w)) for j in range(i)]
    alike = sum(w[i] * w[j] for i, j in pairs if folders[i] == folders[j])
    return alike / sum(w[i] * w[j] for i, j in pairs)


def test_the_scores_are_those_of_a_plain_loop(activations: torch.Tensor, held: Held) -> None:
    control = dictionary(2)
    found, _ = scores(read(control, activations), held, None, [4, 2 * D_IN])
    latents = control.encode(activations)
    largest = latents[:, 1:].amax(1)
    plain = [plain_score(largest[:, k], held.folders) for k in range(2 * D_IN)]
    by_folders = found["monosemanticity"]["patches"]["folders"]
    assert by_folders["mean"] == pytest.approx(sum(plain) / len(plain), rel=1e-9)
    assert by_folders["best"] == pytest.approx(max(plain), rel=1e-9)
    same = sum(held.folders[i] == held.folders[j] for i in range(N) for j in range(i))
    assert by_folders["chance"] == pytest.approx(same / (N * (N - 1) / 2), rel=1e-9)
    assert found["l0_by_kind"]["cls"] == pytest.approx(float((latents[:, 0] != 0).sum() / N))
    residual = (activations - control.decode(latents))[:, 1:]
    spread = activations[:, 1:] - activations[:, 1:].flatten(0, 1).mean(0)
    share = 1 - float(residual.square().sum() / spread.square().sum())
    assert found["explained_variance"]["patch"] == pytest.approx(share, abs=0.02)
    assert [group["n_latents"] for group in found["hierarchy"]["groups"]] == [4, 12]


@pytest.fixture(scope="module")
def content(
    activations: torch.Tensor, sparse_activations: torch.Tensor, held: Held
) -> dict[str, Any]:
    """What a run leaves, of two widths and two seeds, by real scores of directions."""
    cells = []
    for width, seed in ((1, 0), (2, 0), (2, 1)):
        _, random = scores(read(dictionary(width + 7), activations), held, None, None)
        for name in ("BatchTopK", "Matryoshka", "random", *(("neurons", "PCA") * (width == 1))):
            groups = [4, width * D_IN] if name == "Matryoshka" else None
            one = read(dictionary(width), activations)
            cell, _ = scores(one, held, None if name == "random" else random, groups)
            cells.append({"layer": 3, "width": width, "seed": seed, "dictionary": name} | cell)
    one_of_64 = metrics.random_dictionary(D_IN, 64, k=1, seed=0)
    rows = standing_out(read(one_of_64, sparse_activations), held)
    found = {
        "settings": {
            "n_pictures": 180, "n_seen": 120, "n_held": N, "every": 1, "training_tokens": 1000,
            "k": 3, "tokens_scored": len(KINDS), "n_folders": 3,
        },
        "cells": cells,
        "maps": {"3": [[1.0, 1, 1, 1], [1, 5, 5, 1], [1, 5, 5, 1], [1, 1, 1, 1]]},
        "seconds": {"extract": {"wall": 1.0, "cpu": 60.0}, "train layer 3": {"wall": 1, "cpu": 60}},
        "features": {"layer": 3, "width": 2, "rows": rows},
        "environment": {"threads": 1, "device": "a processor"},
    }  # fmt: skip
    kept: dict[str, Any] = json.loads(json.dumps(metrics.to_json(found)))
    return kept


def test_the_page_shows_what_the_json_holds(content: dict[str, Any]) -> None:
    text = page(content)
    cell = next(c for c in content["cells"] if c["width"] == 1 and c["dictionary"] == "neurons")
    mean = cell["monosemanticity"]["class token"]["emoji CLIP"]["mean"]
    assert f"| 3 | neurons | {mean:.3f}, best" in text
    assert "| 3 | 1.0 | 1.0 | 5.0 |" in text
    assert "trained on 120 of them and scored on 240 others" in text
    for heading in ("Hierarchy", "Sparse probing", "Sparsity", "Uniqueness", "Another seed"):
        assert f"# {heading}" in text
    assert "nan" not in text


def test_the_words_say_who_wins(content: dict[str, Any]) -> None:
    changed = json.loads(json.dumps(content))
    for cell in changed["cells"]:
        for by_judge in cell["monosemanticity"].values():
            for one in by_judge.values():
                if cell["dictionary"] == "neurons":
                    one["mean"] = 2.0
                if "against_random" in one:
                    one["against_random"]["verdict"] = "below"
    text = page(changed)
    assert "- patches, by folders: above neurons in 0 of 4," in text
    assert "- class token, by emoji CLIP: **below** them in 4." in text


def test_features_are_drawn_red_where_they_fire(
    sparse_activations: torch.Tensor, held: Held, tmp_path: Path
) -> None:
    activations = sparse_activations
    sparse = metrics.random_dictionary(D_IN, 64, k=1, seed=0)
    rows = standing_out(read(sparse, activations), held)
    assert {row["place"] for row in rows} == {"stands out", "middle"}
    blank = {"image": [Image.new("RGB", (20, 20), "white")] * N}
    pictures = datasets.Dataset.from_dict(blank, datasets.Features({"image": datasets.Image()}))
    draw(rows, sparse, activations, pictures, tmp_path / "strips.webp")
    row = rows[0]
    heat = sparse.encode(activations[row["pictures"][0], 1:])[:, row["latent"]]
    strongest = divmod(int(heat.argmax()), 8)
    with Image.open(tmp_path / "strips.webp") as drawn:
        assert drawn.height % len(rows) == 0
        y, x = (int((place + 0.5) * SIDE / 8) for place in strongest)
        red, green, _ = drawn.convert("RGB").getpixel((GAP + x, TEXT + y))
    assert red > 200
    assert green < 170


def test_the_page_that_is_kept_follows_from_the_json_that_is_kept() -> None:
    found = json.loads((RESULTS / "dinov2.json").read_text())
    assert (RESULTS / "dinov2.md").read_text() == page(found), "run it with --page"
    assert (RESULTS / "dinov2-features.webp").stat().st_size < 300_000


@pytest.mark.exhaustive
def test_a_small_run_goes_on_where_it_was(shared: Path, tmp_path: Path) -> None:
    if not (shared / "models" / "dinov2-small").is_dir():
        pytest.skip("needs the dinov2-small checkpoint of the data folder, which is not there")
    sizes = ["--every", "60", "--layers", "11", "--training-tokens", "3000"]
    places = ["--folder", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    for widths in (["1"], ["1", "2"]):
        command = [sys.executable, "-m", "benchmarks.dinov2", *sizes, *places, "--widths", *widths]
        subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    found = json.loads((tmp_path / "out" / "dinov2.json").read_text())
    ran = [(cell["width"], cell["dictionary"]) for cell in found["cells"]]
    assert len(ran) == len(set(ran)) == 5 + 3
    assert (tmp_path / "out" / "dinov2.md").read_text() == page(found)
