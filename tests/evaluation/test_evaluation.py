"""An evaluation: any metric by name, the SAE beside its controls, several embedders at once."""

from __future__ import annotations

import gc
import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vision_plugin as vp
from tests.metrics._steerability_reference import standard_sae
from vision_plugin import metrics
from vision_plugin.cli._eval import notes, scores_table
from vision_plugin.evaluation import EvaluationConfig, Facts, evaluate_config, randomized_model
from vision_plugin.images import open_images

HOOK = "blocks.1.hook_resid_post"
CONCEPTS = ["a red circle", "a blue square", "a green star"]
N = 48


@pytest.fixture(scope="module")
def world(tiny_clip: str, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    sae = standard_sae(HOOK, 32, d_sae=40)
    with torch.no_grad():
        sae.b_enc.sub_(4.0)  # few latents fire
    other = standard_sae(HOOK, 32, d_sae=40, seed=1)
    other_path = tmp_path_factory.mktemp("other") / "sae"
    other.save_model(str(other_path))
    return SimpleNamespace(
        clip=tiny_clip,
        model=vp.load_model(tiny_clip),
        sae=sae,
        other=str(other_path),
        images=open_images(f"demo:{N}@3"),
    )


def score(world: SimpleNamespace, path: Any, **changes: Any) -> Any:
    cfg = EvaluationConfig(
        sae="sae", images=f"demo:{N}@3", output_path=str(path / "scores.json"), **changes
    )
    return evaluate_config(
        cfg, model=world.model, sae=world.sae, images=world.images, concepts=CONCEPTS
    )


@pytest.fixture(scope="module")
def everything(world: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Every registered metric in one run, beside the neurons."""
    path = tmp_path_factory.mktemp("everything")
    result = score(
        world,
        path,
        metrics=("all",),
        controls=("neurons",),
        embedder=("model", world.clip),
        taxonomy="demo",
        masks="demo",
        domain_images=("demo:24@9",),
        other_saes=(world.other,),
        steering_images=2,
        batch_size=20,
        metric_options=json.dumps(
            {
                "localization": {"min_images": 2, "min_active_patches": 2},
                "sparse_probing": {"k_values": [1, 5]},
                "downstream_preservation": {"max_iter": 50},
            }
        ),
    )
    return SimpleNamespace(result=result, written=json.loads((path / "scores.json").read_text()))


def test_every_registered_metric_runs_by_name(everything: SimpleNamespace) -> None:
    result = everything.result
    names = {name.partition("@")[0] for name in result.results}
    ours = {n for n, i in metrics.available().items() if i.package.startswith("vision-plugin ")}
    assert names == ours
    for name, by_dictionary in result.results.items():
        assert list(by_dictionary) == ["sae", "neurons"], (name, result.left_out)
    assert result.left_out == {}


def test_every_control_stands_beside_the_sae_in_one_table(
    world: SimpleNamespace, tmp_path: Any
) -> None:
    chosen = ("fvu", "sparsity", "monosemanticity", "steerability")
    result = score(world, tmp_path, metrics=chosen, steering_images=3)
    for by_dictionary in result.results.values():
        assert list(by_dictionary) == ["sae", "neurons", "pca", "random", "random_model"]
    fidelity, sparsity = result.results["fvu"], result.results["sparsity"]
    assert fidelity["neurons"].explained_variance == pytest.approx(1)
    assert fidelity["pca"].explained_variance == pytest.approx(1, abs=1e-4)
    assert fidelity["random"].explained_variance < 1
    assert sparsity["random"].l0 == pytest.approx(round(sparsity["sae"].l0), abs=0.3)
    assert sparsity["neurons"].l0 > 30
    scores = [result.results["monosemanticity"][key].score for key in ("neurons", "random_model")]
    assert not torch.allclose(*scores, equal_nan=True)
    table = scores_table(result)
    headings = [" ".join(str(column.header).split()) for column in table.columns]
    assert headings[1:] == ["SAE", "neurons", "PCA", "random directions", "random model's neurons"]
    assert all(len(list(column.cells)) == table.row_count for column in table.columns)


def test_results_are_those_of_the_metrics_on_the_same_latents(
    everything: SimpleNamespace, world: SimpleNamespace
) -> None:
    result = everything.result
    pixels = world.model.preprocess([world.images[i] for i in range(N)])
    with torch.no_grad():
        x = world.model.run_with_cache(pixels)[1][HOOK]
        embeddings = world.model.encode_image(pixels)
        latents = world.sae.encode(x)
        reconstruction = world.sae.decode(latents)
        texts = world.model.encode_text(sorted(set(world.images.labels)))
        scale = world.model.logit_scale
        spliced = world.model.run_with_saes(pixels, saes=[world.sae])
    expected = metrics.monosemanticity(latents.amax(1), embeddings).score
    found = result.monosemanticity["sae"].score
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, equal_nan=True)
    neurons = metrics.monosemanticity(x.amax(1), embeddings).score
    found = result.monosemanticity["neurons"].score
    torch.testing.assert_close(found, neurons, rtol=1e-4, atol=1e-4, equal_nan=True)
    fvu = metrics.FVU(d_in=32)
    fvu.update(x, reconstruction)
    assert result.results["fvu"]["sae"].fvu == pytest.approx(fvu.compute().fvu, rel=1e-4)
    dissected = metrics.Dissection(n_features=40, n_concepts=17, grid_size=(4, 4))
    dissected.update(latents[:, 1:], everything_masks(world))
    found = result.results["dissection"]["sae"].iou
    torch.testing.assert_close(found, dissected.compute().iou, equal_nan=True)
    logits = scale * torch.nn.functional.normalize(spliced, dim=-1) @ texts.T
    labels = torch.tensor([sorted(set(world.images.labels)).index(v) for v in world.images.labels])
    loss = torch.nn.functional.cross_entropy(logits, labels)
    assert result.results["loss_recovered"]["sae"].spliced == pytest.approx(float(loss), rel=1e-4)
    neurons = result.results["loss_recovered"]["neurons"]
    assert neurons.spliced == pytest.approx(neurons.clean, abs=1e-5)
    assert neurons.ablated != pytest.approx(neurons.clean, abs=1e-3)


def everything_masks(world: SimpleNamespace) -> torch.Tensor:
    """Shapes, then colours, where the drawn objects are, made smaller by hand."""
    from vision_plugin.demo import FACTORS, draw

    drawn = draw(N, seed=3)
    colours_from = len(FACTORS["shape"])
    masks = torch.zeros(N, 17, 32, 32, dtype=torch.bool)
    for row, scene in enumerate(drawn.scenes):
        image = Image.fromarray(drawn.masks[row].astype(np.uint8) * 255).convert("RGB")
        pixels = world.model.preprocess([image])[0]
        inside = pixels.sum(0) > 0.5 * (pixels.sum(0).max() + pixels.sum(0).min())
        for first, factor in ((0, "shape"), (colours_from, "colour")):
            masks[row, first + list(FACTORS[factor]).index(scene.value(factor))] = inside
    return masks


def test_several_embedders_give_one_result_each_and_the_model_itself_is_marked(
    everything: SimpleNamespace, world: SimpleNamespace
) -> None:
    result = everything.result
    assert result.embedders == {"model": True, world.clip: False}
    own, outside = (result.results[f"monosemanticity@{n}"]["sae"] for n in result.embedders)
    torch.testing.assert_close(own.score, outside.score, equal_nan=True)  # the same weights
    assert everything.written["embedders"] == {"model": "model", world.clip: "external"}
    rows = list(scores_table(result).columns[0].cells)
    assert "monosemanticity, mean (the model itself)" in rows
    assert f"monosemanticity, mean ({world.clip})" in rows


def test_json_holds_scores_per_latent_and_all_else_apart(everything: SimpleNamespace) -> None:
    written = everything.written
    assert all(len(by["sae"]["score"]) == 40 for by in written["per_latent"].values())
    assert {"fvu", "dissection", "hierarchy", "stability"} <= set(written["details"])
    summary = written["summary"]
    assert summary["hierarchy/sae"]["n_features"] == 40
    assert summary["stability/sae"]["n_directions"] == 40
    assert summary["cross_domain/sae"]["composite_demo:24@9"] > 0


def test_what_the_inputs_do_not_allow_is_left_out_by_default_and_an_error_by_name(
    world: SimpleNamespace, tmp_path: Any
) -> None:
    result = score(world, tmp_path, controls=(), steering_images=0)
    assert list(result.results) == ["fvu", "sparsity", "monosemanticity", "uniqueness"]
    assert list(result.left_out) == ["steerability"]
    assert any("--concepts" in line for line in notes(result))
    assert any("the model's own embeddings" in line for line in notes(result))
    for name, hint in {
        "dissection": "masks=",
        "hierarchy": "taxonomy=",
        "stability": "other_saes=",
    }.items():
        with pytest.raises(ValueError, match=f"metrics={name} needs .*{hint}"):
            score(world, tmp_path, metrics=(name,), controls=())
    with pytest.raises(ValueError, match="did you mean 'uniqueness'"):
        score(world, tmp_path, metrics=("uniquenes",), controls=())
    with pytest.raises(ValueError, match="has no option 'seeds'"):
        score(
            world, tmp_path, metrics=("fvu",), metric_options='{"fvu": {"seeds": 1}}', controls=()
        )
    with pytest.raises(ValueError, match="is not JSON"):
        EvaluationConfig(sae="a", images="b", metric_options="{")


def test_masks_from_a_folder_follow_the_models_own_crop(
    world: SimpleNamespace, tmp_path: Any
) -> None:
    wide = [Image.new("RGB", (64, 32), colour) for colour in ("red", "blue")]
    folder = tmp_path / "masks"
    folder.mkdir()
    (folder / "names.txt").write_text("left\nright\n")
    numbers = np.zeros((32, 64), dtype=np.uint8)
    numbers[:, :32], numbers[:, 32:] = 1, 2
    for name in ("0", "1"):
        Image.fromarray(numbers).save(folder / f"{name}.png")
    masks = Facts(open_images(wide), masks=str(folder)).masks
    assert masks is not None
    found = masks.batch(world.model, [0, 1])
    assert found.shape == (2, 2, 32, 32)
    assert bool(found[:, 0, :, :15].all())
    assert bool(found[:, 1, :, 17:].all())
    assert not bool(found[:, 0, :, 17:].any())
    (folder / "0.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no .*0\.png"):
        masks.batch(world.model, [0])


def test_a_model_with_random_weights_keeps_the_size_of_its_activations(
    world: SimpleNamespace,
) -> None:
    pixels = world.model.preprocess([world.images[i] for i in range(4)])
    drawn = randomized_model(world.model, seed=1)
    assert drawn.logit_scale == world.model.logit_scale
    with torch.no_grad():
        before, after = (m.run_with_cache(pixels)[1][HOOK] for m in (world.model, drawn))
        again = randomized_model(world.model, seed=1).encode_image(pixels)
        torch.testing.assert_close(again, drawn.encode_image(pixels))
    assert float(torch.cosine_similarity(before, after, dim=-1).abs().mean()) < 0.7
    assert 0.2 < float(after.norm() / before.norm()) < 5


def test_intervals_and_curves_are_there_when_asked_for(
    world: SimpleNamespace, tmp_path: Any
) -> None:
    result = score(
        world,
        tmp_path,
        metrics=("monosemanticity", "steerability"),
        controls=("neurons",),
        confidence=0.9,
        steering_images=2,
        strengths=(0.0, 20.0),
    )
    for key, latents in (("sae", result.encoded.latents), ("neurons", result.encoded.neurons)):
        found = result.monosemanticity[key]
        expected = metrics.monosemanticity(
            latents, result.encoded.embeddings["model"], confidence=0.9
        )
        torch.testing.assert_close(found.low, expected.low, equal_nan=True)
        assert bool((found.low <= found.high)[~found.low.isnan()].all())
    curve = result.results["steerability_curve"]["sae"]
    assert curve.strengths == (0.0, 20.0)
    assert curve.score.shape == (2, 40)
    written = json.loads((tmp_path / "scores.json").read_text())
    assert "share_steerable_at_20" in written["summary"]["steerability_curve/sae"]
    assert "steerability_curve" in written["details"]
    with pytest.raises(ValueError, match="needs monosemanticity_definition='all'"):
        score(world, tmp_path, confidence=0.9, monosemanticity_definition="top16")


def test_a_metric_that_fails_is_a_row_with_its_reason_and_costs_no_other(
    world: SimpleNamespace, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def update(self: Any, latents: torch.Tensor) -> None:
        raise KeyError("a fault of another package")

    monkeypatch.setattr(metrics.Sparsity, "update", update)
    result = score(world, tmp_path, metrics=("fvu", "sparsity"), controls=("neurons",))
    assert list(result.results) == ["fvu"]
    assert set(result.left_out) == {"sparsity/sae", "sparsity/neurons"}
    assert "a fault of another package" in result.left_out["sparsity/sae"]
    written = json.loads((tmp_path / "scores.json").read_text())
    assert "a fault of another package" in written["left_out"]["sparsity/sae"]


def test_objects_in_hand_are_evaluated_without_a_file(world: SimpleNamespace) -> None:
    result = vp.evaluate(
        world.sae, world.model, world.images, metrics=["fvu"], controls=[], progress=False
    )
    assert result.path is None
    assert list(result.results) == ["fvu"]


@pytest.mark.slow
def test_batches_are_let_go_without_the_garbage_collector(
    world: SimpleNamespace, tmp_path: Any
) -> None:
    gc.collect()
    gc.disable()  # a batch that is part of a cycle stays until the collector runs
    try:
        score(world, tmp_path, metrics=("sparsity", "fvu", "monosemanticity"), batch_size=8)
        found = [o for o in gc.get_objects() if isinstance(o, torch.Tensor) and o.ndim == 4]
    finally:
        gc.enable()
    assert [tuple(tensor.shape) for tensor in found if tensor.shape[0] == 8] == []
