"""Lenses: the last layer is the model's own answer, others are read as a plain hook reads."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image

import vision_plugin as vp
from vision_plugin.lens import TextLensSettings, class_lens, language_lens, text_lens

SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip


def classifier(name: str) -> Any:
    torch.manual_seed(0)
    if name == "timm":
        import timm

        module = timm.create_model(
            "vit_tiny_patch16_224", pretrained=False, num_classes=7, img_size=32, patch_size=8,
            embed_dim=32, depth=3, num_heads=4,
        )  # fmt: skip
    elif name == "dinov2":  # its head reads the class token and the mean patch side by side
        sizes = {key: value for key, value in SIZES.items() if key != "intermediate_size"}
        config = transformers.Dinov2Config(**sizes, num_labels=7)
        module = transformers.Dinov2ForImageClassification(config)
    elif name == "clip":  # its head reads the mean patch
        config = transformers.CLIPConfig(
            vision_config=SIZES, num_labels=7, text_config={"bos_token_id": 0, "eos_token_id": 1}
        )
        module = transformers.CLIPForImageClassification(config)
    else:
        module = transformers.ViTForImageClassification(
            transformers.ViTConfig(**SIZES, num_labels=7)
        )
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3)
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    return module.eval(), vp.wrap(module.eval(), image_processor=processor)


@pytest.mark.parametrize("name", ["vit", "clip", "dinov2", "timm"])
def test_the_class_lens_at_the_last_layer_is_the_model(name: str) -> None:
    module, model = classifier(name)
    images = vp.open_images("demo:6")
    pixels = model.preprocess([images[i] for i in range(6)])
    with torch.no_grad():
        logits = module(pixels) if name == "timm" else module(pixel_values=pixels).logits
    labels = logits.argsort(dim=1)[:, -3]  # the model's third choice: rank 2 of 7
    found = class_lens(model, images, labels=labels, batch_size=4, progress=False)
    last = found.layers[-1]
    assert [one.layer for one in found.layers] == [0, 1, 2, 3]
    assert last.agreement.value == 1
    assert last.accuracy.value == 0
    assert last.identifiability.value == pytest.approx(1 - 2 / 6)
    own = class_lens(model, images, progress=False)
    assert own.reference == "model"
    assert own.layers[-1].identifiability.value == 1


def test_tokens_are_read_as_the_norm_and_the_head_read_them() -> None:
    """The reference: plain hooks on the native blocks, and the formula of Vilas et al."""
    module, model = classifier("vit")
    images = vp.open_images("demo:4")
    pixels = model.preprocess([images[i] for i in range(4)])
    kept: dict[int, torch.Tensor] = {}
    blocks = module.vit.layers
    handles = [
        block.register_forward_hook(
            lambda _, __, out, i=i: kept.__setitem__(i, out[0] if isinstance(out, tuple) else out)
        )
        for i, block in enumerate(blocks)
    ]
    with torch.no_grad():
        answers = module(pixel_values=pixels).logits.argmax(1)
    for handle in handles:
        handle.remove()
    found = class_lens(model, images, progress=False)
    for i in range(3):
        with torch.no_grad():
            logits = module.classifier(module.vit.layernorm(kept[i]))
        rates = torch.zeros(4, 17)
        for n in range(4):
            for token in range(17):
                order = logits[n, token].argsort(descending=True).tolist()
                rates[n, token] = 1 - order.index(int(answers[n])) / 6
        layer = found.layers[i + 1]
        assert layer.tokens["cls"].value == pytest.approx(float(rates[:, 0].mean()), abs=1e-6)
        assert layer.tokens["patch"].value == pytest.approx(float(rates[:, 1:].mean()), abs=1e-6)
        assert layer.patches is not None
        torch.testing.assert_close(layer.patches.float(), rates[:, 1:].mean(0))
        # The class token makes this model's answer, so the whole stream is read as its token is.
        assert layer.identifiability.value == pytest.approx(layer.tokens["cls"].value)


def test_no_classes_and_wrong_labels(tmp_path: Path) -> None:
    _, model = classifier("vit")
    images = vp.open_images("demo:3")
    with pytest.raises(ValueError, match="has no classes: load a classifier"):
        class_lens(vp.load_model("demo"), images, progress=False)
    with pytest.raises(ValueError, match="labels= must be from 0 to 6"):
        class_lens(model, images, labels=[0, 1, 7], progress=False)
    with pytest.raises(ValueError, match=r"labels= has shape \[2\]: give one of 3 images"):
        class_lens(model, images, labels=[0, 1], progress=False)
    place = class_lens(model, images, progress=False).save(tmp_path / "lens")
    assert {path.name for path in place.iterdir()} == {
        "results.json", "table.txt", "layers.png", "patches.png",
    }  # fmt: skip


# ---------------------------------------------------------------------- text


COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")


@pytest.fixture(scope="module")
def model() -> Any:
    return vp.load_model("demo")


@pytest.fixture(scope="module")
def lens(model: Any) -> Any:
    cfg = TextLensSettings(labels="column:colour", template="a {} object")
    return text_lens(model, vp.open_images("demo:240"), COLOURS, settings=cfg, progress=False)


def test_the_text_lens_at_the_last_layer_is_the_model(lens: Any) -> None:
    for name in ("raw", "bias", "tuned"):
        last = lens.row(name, 4)
        assert last.cosine.value == pytest.approx(1, abs=1e-6)
        assert last.agreement.value == 1
        assert last.kl.value == pytest.approx(0, abs=1e-9)
        assert last.accuracy.value > 0.95


def test_translators_mend_the_middle_layers_on_images_that_they_have_not_seen(lens: Any) -> None:
    for layer in (1, 2, 3):
        raw, tuned = lens.row("raw", layer), lens.row("tuned", layer)
        assert tuned.cosine.low > raw.cosine.high
        assert tuned.cosine.value > lens.row("bias", layer).cosine.value
    assert lens.row("tuned", 3).accuracy.value > lens.row("raw", 3).accuracy.value


def test_the_raw_lens_is_the_head_on_a_layers_class_token(model: Any) -> None:
    """The reference: a plain hook on the native block, the native norm and projection."""
    images = vp.open_images("demo:120")
    cfg = TextLensSettings(fit_share=0.5)
    found = text_lens(model, images, ["star", "red"], settings=cfg, progress=False)
    order = torch.randperm(120, generator=torch.Generator().manual_seed(0))[60:]
    pixels = model.preprocess([images[i] for i in order.tolist()])
    tower = model.native.vision_model
    kept = {}
    handle = tower.encoder.layers[1].register_forward_hook(
        lambda _, __, out: kept.update(h=out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        end = model.native.get_image_features(pixel_values=pixels)
        end = end if isinstance(end, torch.Tensor) else end.pooler_output
        early = model.native.visual_projection(tower.post_layernorm(kept["h"][:, 0]))
    handle.remove()
    cosine = torch.nn.functional.cosine_similarity(early, end, dim=1).mean()
    assert found.row("raw", 2).cosine.value == pytest.approx(float(cosine), abs=1e-5)


def test_a_translator_is_the_ridge_regression_of_a_plain_solver() -> None:
    from sklearn.linear_model import Ridge

    from vision_plugin.lens._logit_lens_text import _Moments

    generator = torch.Generator().manual_seed(1)
    x = torch.randn(200, 6, generator=generator, dtype=torch.float64)
    y = x @ torch.randn(6, 6, generator=generator, dtype=torch.float64) + 3
    moments = _Moments(6)
    for some in (slice(0, 90), slice(90, 200)):
        moments.add(x[some], y[some])
    spread = float(x.var(0, correction=0).sum()) / 6
    peer = Ridge(alpha=0.3 * spread * 200).fit(x.numpy(), (y - x).numpy())
    expected = x + torch.from_numpy(peer.predict(x.numpy()))
    torch.testing.assert_close(moments.fit(0.3)(x), expected, atol=1e-9, rtol=0)


def test_bad_texts_are_one_sentence(model: Any) -> None:
    images = vp.open_images("demo:60")
    with pytest.raises(ValueError, match="texts= has 1 texts: a lens compares at least two"):
        text_lens(model, images, ["star", " star "], progress=False)
    with pytest.raises(ValueError, match="has no text tower"):
        text_lens(classifier("vit")[1], images, ["star", "red"], progress=False)
    with pytest.raises(ValueError, match="and each needs 20: give more images"):
        text_lens(model, vp.open_images("demo:24"), ["star", "red"], progress=False)


# ---------------------------------------------------------------------- language


@pytest.fixture(scope="module")
def vlm() -> Any:
    return vp.load_vlm("demo")


def test_the_language_lens_at_the_last_layer_is_the_models_logits(vlm: Any) -> None:
    images = [vp.open_images("demo:3")[i] for i in range(3)]
    found = language_lens(vlm, images, "What colour is shown?", top=4, batch_size=2)
    inputs = vlm.prepare(images, "What colour is shown?")
    with torch.no_grad():
        output = vlm.native(**inputs, output_hidden_states=True)
    image_token = vlm.native.config.image_token_id
    rows = (inputs["input_ids"][0] == image_token).nonzero()[:, 0]
    best = torch.softmax(output.logits[:, rows], -1).topk(4)
    torch.testing.assert_close(found.probabilities[:, -1], best.values, atol=1e-6, rtol=1e-5)
    assert bool((found.tokens[:, -1] == best.indices).double().mean() > 0.99)
    assert found.answers == vlm.generate(images, "What colour is shown?", max_new_tokens=1)
    # Other layers: transformers' own hidden states, through its own norm and head.
    inner = vlm.native.model.language_model
    for layer in (0, 1):
        hidden = output.hidden_states[layer][:, rows]
        with torch.no_grad():
            shares = torch.softmax(vlm.native.lm_head(inner.norm(hidden)), -1).topk(4)
        torch.testing.assert_close(
            found.probabilities[:, layer], shares.values, atol=1e-6, rtol=1e-5
        )
    assert found.grid == (8, 8)


def test_pages_are_whole_files_with_everything_escaped(vlm: Any, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (64, 64), "red").save(folder / "<b>&star.png")
    place = language_lens(vlm, str(folder), "What colour is shown?").save(tmp_path / "lens")
    assert {path.name for path in place.iterdir()} == {
        "results.json", "index.html", "image-0.html",
    }  # fmt: skip
    for name in ("index.html", "image-0.html"):
        page = (place / name).read_text()
        assert "<b>" not in page
        assert "&lt;b&gt;&amp;star" in page
        assert "<script" not in page
        assert not re.search(r"(src|href)=\"(?!data:|index\.html|image-)", page)
    content = json.loads((place / "results.json").read_text())
    assert content["schema"] == "vision_plugin.lens/language/1"
    assert len(content["images"][0]["layers"]) == 3
    assert len(content["images"][0]["layers"][0]) == 64


def test_more_images_or_words_than_there_can_be(vlm: Any) -> None:
    image = vp.open_images("demo:1")[0]
    with pytest.raises(ValueError, match="a page per image, of at most 500: 501 are too many"):
        language_lens(vlm, [image] * 501, "What colour is shown?")
    with pytest.raises(ValueError, match="top=56: the vocabulary has 55 words"):
        language_lens(vlm, [image], "What colour is shown?", top=56)
    with pytest.raises(ValueError, match="was wrapped without its processor"):
        language_lens(vp.wrap_vlm(vlm.native), [image], "What colour is shown?")
