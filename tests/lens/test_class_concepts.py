"""A class taken apart into concepts: indices, deletion, pictures, the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sae_lens import TopKSAE, TopKSAEConfig
from sklearn.metrics import r2_score

import vision_plugin as vp
from tests.lens._tower import tower_of
from vision_plugin.cli import main
from vision_plugin.lens import ClassConceptsSettings, class_concepts, fit_dictionary
from vision_plugin.models.site import Site

HOOK = "blocks.2.hook_resid_post"
SMALL = ClassConceptsSettings(
    labels="column:shape", n_features=6, n_images=4, design=16, template="a {}", top=3
)


@pytest.fixture(scope="module")
def model() -> vp.VisionBridge:
    return vp.load_model("demo")


def test_taking_concepts_out_is_a_plain_hook(model: vp.VisionBridge) -> None:
    found = class_concepts(model, "demo:160", "square", settings=SMALL, progress=False)
    assert found.read_by == "zero-shot"
    assert found.n_fitted >= 5
    images = vp.open_images("demo:160")
    shapes = images.column("shape")
    assert {str(shapes[at]) for row in found.strongest for at in row} == {"square"}

    # All concepts out: what decodes is the dictionary's offset, put there by a plain hook.
    site = Site.of(model, found.dictionary)
    held = sorted({i for i, name in enumerate(shapes) if str(name) == "square"} - _fitted())
    pixels = model.preprocess([images[i] for i in held])

    def emptied(activation: torch.Tensor, hook: object) -> torch.Tensor:
        del hook
        changed = activation.clone()
        changed[:, 1:] = found.dictionary.decode(torch.zeros(1, 6)).to(changed)
        return changed

    def rebuilt(activation: torch.Tensor, hook: object) -> torch.Tensor:
        del hook
        changed = activation.clone()
        changed[:, 1:] = found.dictionary(changed[:, 1:])
        return changed

    classes = sorted({str(name) for name in shapes})
    texts = model.encode_text([f"a {name}" for name in classes])

    def answers(hook_function: object) -> torch.Tensor:
        with torch.no_grad(), model.hooks(fwd_hooks=[(site.hook_name_out, hook_function)]):
            logits = model.zero_shot_logits(model.encode_image(pixels), texts)
        return logits[:, classes.index("square")].double()

    def without(latent: int) -> object:
        def hook_function(activation: torch.Tensor, hook: object) -> torch.Tensor:
            del hook
            changed = activation.clone()
            codes = found.dictionary.encode(changed[:, 1:])
            codes[..., latent] = 0
            changed[:, 1:] = found.dictionary.decode(codes)
            return changed

        return hook_function

    whole = answers(rebuilt)
    for place, latent in enumerate(found.importance.latents[:2]):
        alone = float((answers(without(latent)) - whole).mean())
        assert found.alone[place] == pytest.approx(alone, abs=1e-3)
    first = found.importance.ranked()[0]
    assert found.deletion.important_first[1] == pytest.approx(
        float((answers(without(first)) - whole).abs().mean()), rel=1e-3
    )
    moved = float((answers(emptied) - whole).abs().mean())
    for curve in (found.deletion.important_first, found.deletion.random):
        assert curve[0] == 0
        assert curve[-1] == pytest.approx(moved, rel=1e-3)


def _fitted() -> set[int]:
    from vision_plugin.lens import _class_concepts

    shapes = [str(name) for name in vp.open_images("demo:160").column("shape")]
    return set(_class_concepts._split(shapes, "square", SMALL)[0])


def test_explained_variance_is_that_of_scikit_learn(model: vp.VisionBridge) -> None:
    torch.manual_seed(0)
    given = fit_dictionary(torch.randn(400, 128), 24, "kmeans").at(HOOK, tokens="patch")
    found = class_concepts(model, "demo:160", "square", sae=given, settings=SMALL, progress=False)
    assert found.n_fitted == 0
    images = vp.open_images("demo:160")
    shapes = [str(name) for name in images.column("shape")]
    held = sorted({i for i, n in enumerate(shapes) if n == "square"} - _fitted())
    _, cache = model.run_with_cache(model.preprocess([images[i] for i in held]))
    rows = cache[HOOK][:, 1:].flatten(0, 1)
    expected = r2_score(rows, given(rows), multioutput="variance_weighted")
    assert found.explained_variance == pytest.approx(expected, rel=1e-4)


def test_a_model_without_text_is_read_by_a_probe(model: vp.VisionBridge) -> None:
    tower = tower_of(model)
    sae = TopKSAE(TopKSAEConfig(d_in=128, d_sae=8, k=2))
    sae.cfg.metadata.hook_name, sae.cfg.metadata.tokens = HOOK, "cls"
    settings = replace(SMALL, n_images=1, design=2)
    found = class_concepts(tower, "demo:60", "square", sae=sae, settings=settings, progress=False)
    assert found.read_by == "a linear probe"
    assert found.hook_name == HOOK


def test_the_command_writes_a_folder_and_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["concepts", "--model-name", "demo", "--images", "demo:120", "--labels",
            "column:texture", "--n-features", "3", "--design", "2", "--n-images", "2",
            "--output-path", str(tmp_path / "out")]  # fmt: skip
    assert main([*line, "--class-name", "plain"]) == 0
    assert "total Sobol index" in capsys.readouterr().out
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert content["schema"] == "vision_plugin.lens/class_concepts/1"
    assert len(content["deletion"]["random"]) == len(content["importance"]["latents"]) + 1
    for name in ("importance", "deletion", "images"):
        assert (tmp_path / "out" / f"{name}.png").stat().st_size > 2000
    for more, sentence in (
        (["--class-name", "frog"], "no image is of class 'frog'"),
        (["--class-name", "plain", "--design", "12"], "--design 12 must be a power of 2"),
        (["--class-name", "plain", "--method", "pca"], "is no dictionary"),
        (["--class-name", "plain", "--n-features", "0"], "--n-features 0 must be at least 1"),
        (["--class-name", "plain", "--images", "demo:12"], "takes 10"),
    ):
        assert main([*line, *more]) == 2
        assert sentence in capsys.readouterr().err


def test_a_class_alone_has_no_answer(model: vp.VisionBridge, tmp_path: Path) -> None:
    (tmp_path / "photo").mkdir()
    for number, image in enumerate(vp.open_images("demo:12")):
        image.save(tmp_path / "photo" / f"{number}.png")
    with pytest.raises(ValueError, match="every image is of class 'photo'"):
        class_concepts(
            model, str(tmp_path), "photo", settings=replace(SMALL, labels=None), progress=False
        )
