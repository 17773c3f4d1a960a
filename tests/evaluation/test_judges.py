"""Who judges which images are alike, and whether an SAE is above random directions to them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import vision_plugin as vp
from tests.metrics._steerability_reference import standard_sae
from vision_plugin import metrics
from vision_plugin.cli import main
from vision_plugin.evaluation import Evaluation, EvaluationConfig, evaluate_config
from vision_plugin.images import open_images

HOOK = "blocks.3.hook_resid_post"
N = 160


@pytest.fixture(scope="module")
def world() -> SimpleNamespace:
    images, model = open_images(f"demo:{N}@3"), vp.load_model("demo")
    pixels = model.preprocess([images[i] for i in range(N)])
    with torch.no_grad():
        x = model.run_with_cache(pixels)[1][HOOK]
        d_in = x.shape[-1]
        sae = standard_sae(HOOK, d_in, d_sae=96)
        sae.b_dec.copy_(x.flatten(0, 1).mean(0))
        sae.b_enc.fill_(-float((x - sae.b_dec).norm(dim=-1).mean()))  # about 14 latents fire
        latents = sae.encode(x)
        k = round(float((latents != 0).sum(-1).float().mean()))
        drawn = metrics.random_dictionary(d_in, 96, k=k, seed=0).encode(x)
        return SimpleNamespace(
            images=images,
            model=model,
            sae=sae,
            embeddings=model.image_features(pixels),
            latents=latents.amax(1),
            drawn=drawn.amax(1),
        )


def score(world: SimpleNamespace, path: Path, **changes: Any) -> Evaluation:
    usual: dict[str, Any] = {"metrics": ("monosemanticity",), "controls": ("random",)}
    cfg = EvaluationConfig(
        sae="sae", images=f"demo:{N}@3", output_path=str(path / "scores.json"), **usual | changes
    )
    return evaluate_config(cfg, model=world.model, sae=world.sae, images=world.images)


def expected(world: SimpleNamespace, embeddings: torch.Tensor) -> metrics.EqualFiringResult:
    both = (metrics.monosemanticity(x, embeddings) for x in (world.latents, world.drawn))
    return metrics.compare_at_equal_firing(*both)


def test_an_evaluation_compares_with_random_directions_at_equal_firing(
    world: SimpleNamespace, tmp_path: Path
) -> None:
    result = score(world, tmp_path)
    found, by_hand = result.equal_firing["model"], expected(world, world.embeddings)
    assert found.n_latents == by_hand.n_latents > 20
    for name in ("difference", "low", "high"):
        assert getattr(found, name) == pytest.approx(getattr(by_hand, name), abs=1e-4)
    written = json.loads((tmp_path / "scores.json").read_text())["equal_firing"]["model"]
    assert written["difference"] == found.difference
    assert written["verdict"] == found.verdict
    assert [each["n_latents"] for each in written["bins"]] == [e.n_latents for e in found.bins]


@pytest.mark.slow
def test_without_random_directions_there_is_no_comparison(
    world: SimpleNamespace, tmp_path: Path
) -> None:
    assert score(world, tmp_path, controls=("neurons",)).equal_firing == {}


def test_classes_judge_as_the_share_of_pairs_of_one_class(
    world: SimpleNamespace, tmp_path: Path
) -> None:
    result = score(world, tmp_path, embedder=("model", "labels"))
    assert list(result.equal_firing) == ["model", "labels"]
    assert result.embedders == {"model": True, "labels": False}
    found = result.results["monosemanticity@labels"]["sae"]
    labels = world.images.labels
    alive = torch.where(~found.score.isnan())[0][:4].tolist()
    for latent in alive:
        weights = world.latents[:, latent].double()
        weights = ((weights - weights.min()) / (weights.max() - weights.min())).tolist()
        pairs = [(i, j) for i in range(N) for j in range(i)]
        total = sum(weights[i] * weights[j] for i, j in pairs)
        alike = sum(weights[i] * weights[j] for i, j in pairs if labels[i] == labels[j])
        assert float(found.score[latent]) == pytest.approx(alike / total, abs=1e-4)


@pytest.mark.slow
def test_centred_embeddings_lose_their_mean_and_nothing_else_changes(
    world: SimpleNamespace, tmp_path: Path
) -> None:
    plain = score(world, tmp_path)
    centred = score(world, tmp_path, centre_embeddings=True)
    by_hand = F.normalize(world.embeddings - world.embeddings.mean(0), dim=1)
    torch.testing.assert_close(centred.encoded.embeddings["model"], by_hand, rtol=1e-3, atol=1e-3)
    assert plain.monosemanticity["sae"].mean_similarity > 0.1
    assert abs(centred.monosemanticity["sae"].mean_similarity) < 0.05
    found = centred.equal_firing["model"]
    assert found.difference == pytest.approx(expected(world, by_hand).difference, abs=1e-3)
    torch.testing.assert_close(
        plain.encoded.embeddings["model"], world.embeddings, rtol=1e-4, atol=1e-4
    )


def test_classes_that_are_not_there_are_named_before_anything_is_scored(
    world: SimpleNamespace, tmp_path: Path
) -> None:
    nameless = open_images([Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")])
    cfg = EvaluationConfig(
        sae="sae", images="two", embedder=("labels",), output_path=str(tmp_path / "scores.json")
    )
    with pytest.raises(ValueError, match=r"embedder='labels': these images have no labels"):
        evaluate_config(cfg, model=world.model, sae=world.sae, images=nameless)
    assert not (tmp_path / "scores.json").exists()


@pytest.mark.slow
def test_the_command_says_whether_the_sae_is_above_random_directions(
    world: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world.sae.cfg.metadata.model_name = "demo"
    world.sae.cfg.metadata.dataset_path = f"demo:{N}@3"
    world.sae.save_model(str(tmp_path / "sae"))
    arguments = (
        f"eval --sae {tmp_path / 'sae'} --images demo:{N}@3 --metrics monosemanticity "
        "--controls random --embedder model labels"
    )
    assert main(arguments.split()) == 0
    said = " ".join(capsys.readouterr().out.split())
    written = json.loads((tmp_path / "sae" / "evaluation.json").read_text())
    verdicts = {
        "above": "score above random directions that fire as often",
        "below": "score below random directions that fire as often",
        "not told apart": "cannot be told apart from random directions that fire as often",
    }
    for embedder, judge in {"model": "the model itself", "labels": "the images' classes"}.items():
        found = written["equal_firing"][embedder]
        sentence = (
            f"Judged by {judge}, the SAE's latents {verdicts[found['verdict']]}: "
            f"{found['difference']:+.4f} (95% interval {found['low']:+.4f} to {found['high']:+.4f})"
        )
        assert sentence in said
        assert f"Monosemanticity at equal firing, judged by {judge}" in said
    assert "own embeddings favour random directions" in said
    assert written["seen_in_training"] is True
    assert "trained on these images" in said


@pytest.mark.slow
def test_images_without_a_class_are_no_centre(world: SimpleNamespace, tmp_path: Path) -> None:
    """Of 600 images every second one is looked at for the centre, and has no class."""
    some = [world.images[0], world.images[1]]
    features = datasets.Features(image=datasets.Image(), label=datasets.Value("string"))
    held = datasets.Dataset.from_dict(
        {"image": some * 300, "label": ["", "a", "", "b"] * 150}, features=features
    )
    cfg = EvaluationConfig(
        sae="sae",
        images="held",
        metrics=("monosemanticity",),
        controls=(),
        embedder=("labels",),
        centre_embeddings=True,
        output_path=str(tmp_path / "scores.json"),
    )
    with pytest.raises(ValueError, match="'labels' are centred on could be read, or has a class"):
        evaluate_config(cfg, model=world.model, sae=world.sae, images=open_images(held))
