"""Maps of texts over patches, and scores against masks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, jaccard_score
from torch import Tensor

import vision_plugin as vp
from tests._clip import model as model  # the fixtures
from tests._clip import pixels as pixels
from tests.models.test_decompose import bridged
from vision_plugin.lens import (
    attention_maps,
    contrastive_maps,
    segmentation_scores,
    similarity_maps,
    text_maps,
)
from vision_plugin.models import VisionBridge

TEXTS = ["a red circle", "a blue square"]


def test_a_map_is_the_text_s_product_with_what_each_patch_gives(
    model: VisionBridge, pixels: Tensor
) -> None:
    found = model.decompose(pixels)
    texts = model.encode_text(TEXTS)
    whole = text_maps(model, pixels, TEXTS)
    assert whole.shape == (3, 2, 4, 4)
    expected = torch.einsum("bnd,cd->bcn", found.by_token()[:, 1:], texts)
    torch.testing.assert_close(whole.flatten(2), expected, atol=1e-5, rtol=1e-4)
    one = text_maps(model, pixels, texts, head=(2, 1))
    expected = torch.einsum("bnd,cd->bcn", found.attention[:, 2, 1, 1:], texts)
    torch.testing.assert_close(one.flatten(2), expected, atol=1e-5, rtol=1e-4)
    last = text_maps(model, pixels, texts, layers=[1, 2])
    expected = torch.einsum("bhnd,cd->bcn", found.attention[:, 1:, :, 1:].sum(1), texts)
    torch.testing.assert_close(last.flatten(2), expected, atol=1e-5, rtol=1e-4)
    apart = contrastive_maps(model, pixels, *TEXTS)
    torch.testing.assert_close(apart, whole[:, 0] - whole[:, 1], atol=1e-5, rtol=1e-4)


def test_a_pool_s_map_is_of_its_key_tokens() -> None:
    siglip, pixels = bridged("transformers: SiglipModel")
    texts = torch.randn(3, siglip.decompose(pixels).embed.shape[1])
    maps = text_maps(siglip, pixels, texts)
    expected = siglip.decompose(pixels).by_token() @ texts.T
    torch.testing.assert_close(maps.flatten(2), expected.transpose(1, 2), atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="pools its tokens"):
        text_maps(siglip, pixels, texts, layers=[0])
    with pytest.raises(ValueError, match="through an attention pool"):
        similarity_maps(siglip, pixels, texts)
    with pytest.raises(ValueError, match="no class token"):
        attention_maps(siglip, pixels)


def test_baselines_are_what_they_say(model: VisionBridge, pixels: Tensor) -> None:
    _, cache = model.run_with_cache(pixels)
    seen = attention_maps(model, pixels).flatten(1)
    pattern = cache["blocks.2.attn.hook_pattern"][:, :, 0, 1:].mean(1)
    torch.testing.assert_close(seen, pattern, atol=1e-6, rtol=1e-5)
    tower = model.native.vision_model
    patches = tower.post_layernorm(cache["resid_post", 2][:, 1:]) @ (
        model.native.visual_projection.weight.T
    )
    texts = model.encode_text(TEXTS)
    expected = torch.nn.functional.cosine_similarity(patches[:, None], texts[None, :, None], dim=-1)
    found = similarity_maps(model, pixels, TEXTS).flatten(2)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_scores_are_scikit_learn_s_over_all_pixels() -> None:
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(5, 4, 4, generator=generator)
    masks = torch.rand(5, 16, 16, generator=generator) > 0.6
    found = segmentation_scores(maps, masks)
    large = torch.nn.functional.interpolate(
        maps[:, None].double(), size=(16, 16), mode="bilinear", align_corners=False
    )[:, 0].numpy()
    guess = large > large.mean((1, 2), keepdims=True)
    truth = masks.numpy()
    assert found.pixel_accuracy == pytest.approx((guess == truth).mean())
    ious = jaccard_score(truth.ravel(), guess.ravel(), average="macro")
    assert found.miou == pytest.approx(ious)
    each = [
        average_precision_score(t.ravel(), s.ravel()) for t, s in zip(truth, large, strict=True)
    ]
    assert found.mean_ap == pytest.approx(np.mean(each))
    perfect = segmentation_scores(masks.float(), masks, threshold=0.5)
    assert (perfect.pixel_accuracy, perfect.miou, perfect.mean_ap) == (1.0, 1.0, 1.0)


def test_the_demo_model_s_maps_find_drawn_objects_better_than_a_blank_map() -> None:
    model = vp.load_model("demo")
    world = vp.demo.draw(24, seed=11)
    pixels = model.preprocess(list(world.images))
    masks = torch.tensor(np.stack(list(world.masks)))
    texts = model.encode_text([f"a {s.colour} {s.shape}" for s in world.scenes])
    others = model.encode_text([f"a {c} {s}" for c in vp.demo.COLOURS for s in vp.demo.SHAPES])
    maps = torch.cat(
        [
            text_maps(model, pixels[i : i + 1], texts[i : i + 1], against=others)[:, 0]
            for i in range(24)
        ]
    )
    found = segmentation_scores(maps, masks)
    share = float(masks.float().mean())
    assert found.mean_ap > 2 * share
    assert found.miou > (1 - share) / 2  # what calling everything background scores


def test_what_cannot_be_mapped_is_refused(model: VisionBridge, pixels: Tensor) -> None:
    with pytest.raises(ValueError, match=r"no head 0\.4: its layers are 0 to 2 and the heads"):
        text_maps(model, pixels, TEXTS, head=(0, 4))
    with pytest.raises(ValueError, match=r"no head 3\.0"):
        text_maps(model, pixels, TEXTS, layers=[3])
    with pytest.raises(ValueError, match="exclude each other"):
        text_maps(model, pixels, TEXTS, layers=[1], head=(0, 0))
    with pytest.raises(ValueError, match="texts= holds no text"):
        text_maps(model, pixels, [])
    with pytest.raises(ValueError, match="empty text at place 1"):
        text_maps(model, pixels, ["a star", " "])
    with pytest.raises(ValueError, match="against= is one text"):
        text_maps(model, pixels, TEXTS, against="a star")
    with pytest.raises(ValueError, match="no text tower"):
        tower, images = bridged("transformers: CLIPVisionModel")
        text_maps(tower, images, TEXTS)
    with pytest.raises(ValueError, match="2 maps and 3 masks"):
        segmentation_scores(torch.ones(2, 4, 4), torch.ones(3, 8, 8) > 0)
    with pytest.raises(ValueError, match="NaN or infinity"):
        segmentation_scores(torch.full((1, 4, 4), torch.nan), torch.ones(1, 8, 8) > 0)
