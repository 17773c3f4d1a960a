"""What people give a model by mistake is named, with what to give in its place."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from PIL import Image
from sae_lens import StandardSAE, StandardSAEConfig

import vision_plugin as vp
from benchmarks._family_cases import small_timm, transformers_cases
from vision_plugin.models import VisionBridge

FAMILIES = ("CLIPModel", "SiglipVisionModel", "Siglip2VisionModel", "Dinov2Model", "ViTMAEModel")
CASES = {case.name: case for case in transformers_cases()}


@pytest.fixture(scope="module")
def clip(tiny_clip: str) -> VisionBridge:
    return vp.load_model(tiny_clip)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], r"images= is empty: give at least one PIL image"),
        (np.zeros((8, 8, 3), np.uint8), r"number 0 is a ndarray of shape \[8, 3\].*fromarray"),
        ([np.zeros((8, 8, 3), np.uint8)], r"number 0 is a ndarray of shape \[8, 8, 3\].*fromarray"),
        ([Image.new("RGB", (8, 8)), "photo.png"], r"number 1 is a str.*Image\.open"),
        ([torch.zeros(3, 8, 8)], r"number 0 is a Tensor of shape \[3, 8, 8\]"),
        ([None], r"number 0 is a NoneType"),
    ],
)
def test_what_is_no_image_is_named(clip, given: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        clip.preprocess(given)


def test_one_image_and_any_iterable_of_them_are_fine(clip) -> None:
    image = Image.new("RGB", (40, 32), "red")
    expected = clip.preprocess([image])
    assert torch.equal(clip.preprocess(image), expected)
    assert torch.equal(clip.preprocess(iter([image])), expected)
    assert torch.equal(clip.preprocess((image,)), expected)


@pytest.mark.parametrize("name", [*FAMILIES, "timm", "open_clip"])
def test_an_image_without_a_batch_is_refused_with_what_to_write(name: str) -> None:
    if name == "timm":
        module: torch.nn.Module = small_timm("test_vit").eval()
    elif name == "open_clip":
        from benchmarks._family_cases import small_open_clip

        module = small_open_clip("ViT-B-32").eval()
    else:
        module = CASES[name].build()
    model = vp.wrap(module)
    height, width = model.adapter.tower_dimensions.image_size
    pixels = torch.randn(2, 3, height, width)
    message = rf"takes a batch of images .* got \[3, {height}, {width}\].*give pixels\[:1\]"
    for read in (
        lambda: model(pixels[0]),
        lambda: model.run_with_cache(pixels[0]),
        lambda: model.image_features(pixels[0]),
        lambda: model.harvest(pixels[0], "blocks.0.hook_resid_post"),
    ):
        with pytest.raises(ValueError, match=message):
            read()
    with torch.no_grad():
        assert model(pixels[:1]).shape[0] == 1


def test_no_text_is_named(clip) -> None:
    with pytest.raises(ValueError, match="texts= is empty"):
        clip.encode_text([])


# ---------------------------------------------------------------------- weights of an SAE


def damaged(value: float, name: str = "W_dec", n: int = 3) -> StandardSAE:
    torch.manual_seed(0)
    sae = StandardSAE(StandardSAEConfig(d_in=32, d_sae=48))
    sae.cfg.metadata.hook_name = "blocks.1.hook_resid_post"
    with torch.no_grad():
        getattr(sae, name).view(-1)[:n] = value
    return sae


KINDS = [
    (
        float("nan"),
        "W_dec",
        r"W_dec of this StandardSAE holds 3 values of 1536 that are NaN or inf",
    ),
    (
        float("inf"),
        "W_enc",
        r"W_enc of this StandardSAE holds 3 values of 1536 that are NaN or inf",
    ),
    (float("nan"), "b_enc", r"b_enc of this StandardSAE holds 3 values of 48 that are NaN or inf"),
    (1e38, "W_enc", r"W_enc of this StandardSAE holds 3 values of 1536 beyond 1\.8e\+19"),
    (-1e38, "b_dec", r"b_dec of this StandardSAE holds 3 values of 32 beyond 1\.8e\+19"),
]


@pytest.mark.parametrize(("value", "name", "message"), KINDS)
def test_an_sae_that_cannot_give_numbers_is_refused_at_its_first_use(
    clip, value: float, name: str, message: str, tmp_path
) -> None:
    sae, images = damaged(value, name), [Image.new("RGB", (32, 32), "red")] * 4
    pixels = clip.preprocess(images)
    texts = clip.encode_text(["a red circle", "a blue square"])
    for use in (
        lambda: clip.add_sae(sae),
        lambda: clip.run_with_saes(pixels, saes=[sae]),
        lambda: clip.steer(sae, {0: 5.0}).__enter__(),
        lambda: vp.metrics.Steerability(clip, sae, texts),
        lambda: vp.metrics.steerability(clip, sae, pixels, texts),
        lambda: vp.evaluate(sae, clip, images, metrics=["fvu"]),
        lambda: vp.report(sae, clip, images, output_path=tmp_path / "report"),
        lambda: vp.report(sae, None, images, output_path=tmp_path / "r", latents=torch.ones(4, 48)),
    ):
        with pytest.raises(ValueError, match=message):
            use()
    assert clip.acts_to_saes == {}
    assert list(tmp_path.iterdir()) == []


def test_weights_that_change_are_looked_at_again(clip) -> None:
    sae = damaged(1.0)
    with clip.saes([sae]), torch.no_grad():
        sae.W_dec[0, 0] = float("nan")
    with pytest.raises(ValueError, match="W_dec of this StandardSAE holds 1 values"):
        clip.add_sae(sae)


def test_large_weights_that_float32_holds_are_fine(clip) -> None:
    with clip.saes([damaged(1e18)]):
        pass
    with clip.saes([damaged(-1e6, "b_enc")]):  # how a latent is switched off
        pass


# ---------------------------------------------------------------------- templates


@pytest.mark.parametrize("template", ["a photo", "", "{name}", "{} and {}", "{1}", "{", "{0!z}}"])
def test_a_template_without_one_place_for_the_name_is_refused(template: str, tmp_path) -> None:
    from sae_lens import TopKTrainingSAEConfig

    from vision_plugin.cli._steer import SteerConfig
    from vision_plugin.evaluation import EvaluationConfig

    message = re.escape(f"template={template!r} must have one {{}}")
    sae = TopKTrainingSAEConfig(d_in=32, d_sae=48, k=4)
    for make in (
        lambda: EvaluationConfig(sae="s", images="demo:4", concept_template=template),
        lambda: SteerConfig(
            sae="s", images="demo:4", latents=(1,), concepts="labels", concept_template=template
        ),
        lambda: vp.VisionSAERunnerConfig(
            model_name="demo", images="demo:4", sae=sae, hook_name="h", training_tokens=9999,
            validation_template=template,
        ),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            make()


@pytest.mark.parametrize("template", ["{}", "a {0}", "{{a}} {}", "{:>9}"])
def test_a_template_with_one_place_is_taken(template: str) -> None:
    from vision_plugin.evaluation import EvaluationConfig

    EvaluationConfig(sae="s", images="demo:4", concept_template=template)


def test_concepts_with_one_sentence_are_refused(clip) -> None:
    """Whoever embeds the sentences by hand falls into the same hole."""
    sae, same = damaged(1.0), clip.encode_text(["a photo"] * 3)
    pixels = clip.preprocess([Image.new("RGB", (32, 32), "red")])
    from vision_plugin.steering import steering_effect

    for use in (
        lambda: vp.metrics.steerability(clip, sae, pixels, same),
        lambda: vp.metrics.steerability_curve(clip, sae, pixels, same),
        lambda: vp.metrics.Steerability(clip, sae, same),
        lambda: steering_effect(clip, sae, pixels, same, {0: 1.0}, concepts=["a", "b", "c"]),
    ):
        with pytest.raises(ValueError, match="all 3 concepts have the same text embedding"):
            use()
