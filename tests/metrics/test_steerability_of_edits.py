"""Steerability of whole edits, against native forwards with plain hooks and against latents."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from jaxtyping import TypeCheckError

import vision_plugin as vp
from tests.metrics._steerability_reference import SCALE, slow_delta, standard_sae, tiny_clip
from vision_plugin.metrics import edit_steerability, steerability

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def world() -> Any:
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randn(5, 3, 8, 8, generator=generator)
    texts = torch.randn(7, 12, generator=generator)
    return vp.wrap(tiny_clip()), tiny_clip(), pixels, torch.nn.functional.normalize(texts, dim=-1)


NAMES = [f"concept {i}" for i in range(7)]


def test_a_clamped_latent_scores_as_the_latent_does(world: Any) -> None:
    model, native, pixels, texts = world
    sae = standard_sae(HOOK, 16)
    edits = {str(k): vp.Edit.clamp(sae, {k: 8.0}, tokens="all") for k in range(6)}
    result = edit_steerability(model, edits, pixels, texts, concepts=NAMES)
    expected = slow_delta(native, sae, pixels, texts, strength=8.0, latents=list(range(6)))
    assert float(expected.abs().max()) > 0.01
    torch.testing.assert_close(result.delta, expected.double(), rtol=0, atol=1e-5)
    of_latents = steerability(model, sae, pixels, texts, strength=8.0, concepts=NAMES)
    for name in ("score", "power", "ratio", "polysemanticity"):
        found, wanted = getattr(result, name), getattr(of_latents, name)
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)
    assert result.top_names == of_latents.top_names
    assert torch.equal(result.steerable, of_latents.steerable)
    assert result.summary()["coverage"] == of_latents.coverage


@torch.no_grad()
def test_an_edit_at_two_layers_equals_plain_hooks(world: Any) -> None:
    model, native, pixels, texts = world
    edit = vp.Edit.add("blocks.0.hook_resid_post", {2: 3.0}) + vp.Edit.scale(
        "blocks.2.hook_resid_pre", {5: -1.0}, tokens="patch"
    )

    def first(module: Any, inputs: Any, output: Any) -> Any:
        output = output.clone()
        output[..., 2] += 3
        return output

    def second(module: Any, inputs: Any) -> Any:
        stream = inputs[0].clone()
        stream[:, 1:, 5] *= -1
        return (stream, *inputs[1:])

    def answers() -> torch.Tensor:
        seen = native.get_image_features(pixel_values=pixels)
        features = getattr(seen, "pooler_output", seen)
        unit = torch.nn.functional.normalize(features.double(), dim=-1)
        return torch.softmax(SCALE * unit @ texts.double().T, dim=-1)

    before = answers()
    layers = native.vision_model.encoder.layers
    handles = [layers[0].register_forward_hook(first), layers[2].register_forward_pre_hook(second)]
    try:
        expected = (answers() - before).mean(0)
    finally:
        for handle in handles:
            handle.remove()
    assert float(expected.abs().max()) > 0.01
    result = edit_steerability(model, edit, pixels, texts, concepts=NAMES, definition="mean")
    torch.testing.assert_close(result.delta[0], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(result.score[0], expected.square().mean(), rtol=0, atol=1e-5)
    assert result.edits == (str(edit),)


def test_an_edit_that_moves_nothing_has_no_concept(world: Any) -> None:
    model, _, pixels, texts = world
    result = edit_steerability(model, vp.Edit(), pixels, texts, concepts=NAMES)
    assert result.top_names == (None,)
    assert bool(result.ratio.isnan().all())
    assert not bool(result.steerable.any())


def test_what_does_not_fit_is_refused_in_a_sentence(world: Any) -> None:
    model, _, pixels, texts = world
    edit = vp.Edit.add("blocks.0.hook_resid_post", {2: 1.0})
    with pytest.raises(ValueError, match="edits= is empty"):
        edit_steerability(model, [], pixels, texts, concepts=NAMES)
    with pytest.raises(ValueError, match="two that read the same"):
        edit_steerability(model, [edit, edit], pixels, texts, concepts=NAMES)
    # Under the tests' import hook the types are checked first.
    with pytest.raises((ValueError, TypeCheckError), match="definition"):
        edit_steerability(model, edit, pixels, texts, concepts=NAMES, definition="most")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="6 names for 7"):
        edit_steerability(model, edit, pixels, texts, concepts=NAMES[1:])
