"""ProjectAway takes positive projections and nothing else; steering is the authors' formula."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import vision_plugin as vp
from vision_plugin.demo.dialogue import ONE_WORD
from vision_plugin.demo.objects import object_questions
from vision_plugin.lens import (
    HallucinationSettings,
    ObjectQuestions,
    edit_language,
    hallucination,
    project_away,
    vti_textual,
    vti_visual,
    word_direction,
)
from vision_plugin.steering import Directions

PROMPT = "Is there a star?"


@pytest.fixture(scope="module")
def vlm() -> Any:
    return vp.load_vlm("demo")


@pytest.fixture(scope="module")
def images() -> list[Any]:
    source = vp.open_images("demo:6")
    return [source[i] for i in range(6)]


def states(vlm: Any, inputs: Any, module: nn.Module) -> torch.Tensor:
    """What a module returns, by a plain hook on the model that runs."""
    kept = {}
    handle = module.register_forward_hook(
        lambda _, __, out: kept.update(h=(out[0] if isinstance(out, tuple) else out).detach())
    )
    with torch.no_grad():
        vlm(inputs)
    handle.remove()
    return kept["h"]


@pytest.mark.parametrize("kind", ["unembedding", "hidden"])
@pytest.mark.parametrize("weight", [1.0, 2.5])
def test_project_away_leaves_no_positive_projection_and_changes_nothing_else(
    vlm: Any, images: list[Any], kind: Any, weight: float
) -> None:
    inputs = vlm.prepare(images, PROMPT)
    image_rows = inputs["input_ids"][0] == vlm.native.config.image_token_id
    hook = "blocks.0.hook_resid_post"
    _, cache = vlm.run_with_cache(inputs, names_filter=hook)
    before = cache[hook]
    t = word_direction(vlm, "star", 1, kind=kind)
    edit = project_away(vlm, "star", 1, weight=weight, kind=kind)
    seen = {}
    with edit_language(vlm, edit, inputs), vlm.hooks([(hook, lambda x, hook: seen.update(h=x))]):
        vlm(inputs)
    after = seen["h"]
    coefficient = before @ t / (t @ t)
    for n in range(len(images)):
        for row in range(before.shape[1]):
            c = float(coefficient[n, row])
            if c > 0 and bool(image_rows[row]):
                expected = before[n, row] - weight * c * t
                torch.testing.assert_close(after[n, row], expected, atol=1e-4, rtol=1e-4)
            else:
                assert bool((after[n, row] == before[n, row]).all())
    touched = (coefficient > 0) & image_rows
    assert bool(touched.any())
    assert bool((~touched[:, image_rows]).any())
    left = (after @ t / (t @ t))[touched]
    assert float((left - (1 - weight) * coefficient[touched]).abs().max()) < 1e-4
    # What is along any direction at right angles stays.
    across = torch.randn(len(t), generator=torch.Generator().manual_seed(0))
    across = across - across @ t / (t @ t) * t
    torch.testing.assert_close(after @ across, before @ across, atol=1e-2, rtol=1e-3)


def test_directions_are_the_unembeddings_row_or_the_words_hidden_state(vlm: Any) -> None:
    token = vlm.processor.tokenizer.convert_tokens_to_ids("star")
    row = vlm.native.lm_head.weight[token]
    torch.testing.assert_close(word_direction(vlm, "star", 2), row.detach())
    start = vlm.processor.tokenizer.bos_token_id
    with torch.no_grad():
        output = vlm.native(input_ids=torch.tensor([[start, token]]), output_hidden_states=True)
    hidden = word_direction(vlm, "star", 1, kind="hidden")
    torch.testing.assert_close(hidden, output.hidden_states[1][0, -1], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="has no token for 'zebra'"):
        word_direction(vlm, "zebra", 1)
    with pytest.raises(ValueError, match="layer=3: the language model's are 0 to 2"):
        word_direction(vlm, "star", 3)


def test_an_edit_stays_while_the_model_writes_and_goes_after(vlm: Any, images: list[Any]) -> None:
    inputs = vlm.prepare(images, PROMPT)
    plain = vlm.generate(inputs, max_new_tokens=4)
    d = torch.randn(128, generator=torch.Generator().manual_seed(3))
    place = Directions("blocks.1.hook_resid_post", d)
    everything = vp.Edit.add(place, {0: 50.0}, tokens="all")
    with edit_language(vlm, everything, inputs):
        steered = vlm.generate(inputs, max_new_tokens=4, return_type="tokens")
    assert vlm.generate(inputs, max_new_tokens=4) == plain
    # The reference: a plain hook on the native block, at every step.
    block = vlm.original_model.get_submodule("model.language_model.layers.1")

    def push(_: Any, __: Any, out: Any) -> Any:
        return (out[0] + 50 * d, *out[1:]) if isinstance(out, tuple) else out + 50 * d

    handle = block.register_forward_hook(push)
    reference = vlm.generate(inputs, max_new_tokens=4, return_type="tokens")
    handle.remove()
    assert torch.equal(steered, reference)
    # At the last layer an edit of the image's tokens cannot reach the answer.
    with edit_language(vlm, vp.Edit.add(place, {0: 50.0}, tokens="patch"), inputs):
        assert vlm.generate(inputs, max_new_tokens=4) == plain


def test_edits_that_do_not_fit_are_one_sentence(vlm: Any, images: list[Any]) -> None:
    inputs = vlm.prepare(images[:2], [PROMPT, ONE_WORD])  # one prompt is padded at its left
    edit = vp.Edit.clamp("blocks.0.hook_resid_post", {1: 1.0}, tokens="patch")
    with (
        pytest.raises(ValueError, match="the image stands at different places"),
        edit_language(vlm, edit, inputs),
    ):
        vlm(inputs)
    inputs = vlm.prepare(images, PROMPT)
    wide = vp.Edit.add(Directions("blocks.0.hook_resid_post", torch.ones(5)), {0: 1.0})
    for wrong, sentence in (
        (edit.with_tokens("cls"), "a language model has no 'cls' token"),
        (vp.Edit.clamp("vision.blocks.0.hook_mlp_out", {1: 1.0}), "is a hook of the tower"),
        (wide, "wide, but blocks"),
    ):
        with pytest.raises(ValueError, match=sentence), edit_language(vlm, wrong, inputs):
            vlm(inputs)


def test_visual_steering_is_the_authors_formula(vlm: Any, images: list[Any]) -> None:
    edit = vti_visual(vlm, images[:3], strength=2.0, n_masks=4, seed=5)
    assert edit.hook_names == tuple(f"blocks.{i}.hook_mlp_out" for i in range(3))
    pixels = vlm.vision.preprocess(images)
    with torch.no_grad():
        x = vlm.vision.run_with_cache(pixels, names_filter="blocks.0.hook_mlp_out")[1]
        x = x["blocks.0.hook_mlp_out"]
        seen = {}
        with vlm.vision.edit(vp.Edit(edit.changes[:1])):
            handle = [("blocks.0.hook_mlp_out", lambda y, hook: seen.update(y=y))]
            vlm.vision.run_with_hooks(pixels, fwd_hooks=handle)
    change = edit.changes[0]
    d = change.basis.vectors[0]
    assert float(d.norm()) == pytest.approx(1, abs=1e-5)
    moved = x + change.amounts[0] * d
    expected = nn.functional.normalize(moved, dim=-1) * x.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(seen["y"][:, 1:], expected[:, 1:], atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(seen["y"][:, 0], x[:, 0])  # the class token
    mean_norm = (
        vlm.vision.harvest(vlm.vision.preprocess(images[:3]), "blocks.0.hook_mlp_out")[
            "blocks.0.hook_mlp_out"
        ][:, 1:]
        .norm(dim=-1)
        .mean()
    )
    assert change.amounts[0] == pytest.approx(0.2 * float(mean_norm), rel=1e-4)


def test_textual_steering_points_from_the_wrong_answer_to_the_right_one(
    vlm: Any, images: list[Any]
) -> None:
    edit = vti_textual(vlm, images[:1], [PROMPT], ["no"], ["yes"], strength=1.0)
    inputs = vlm.prepare(images[:1], PROMPT)
    words = [vlm.processor.tokenizer.convert_tokens_to_ids(word) for word in ("no", "yes")]
    ends = []
    for word in words:
        ids = torch.cat([inputs["input_ids"], torch.tensor([[word]])], 1)
        with torch.no_grad():
            output = vlm.native(
                input_ids=ids, pixel_values=inputs["pixel_values"], output_hidden_states=True
            )
        ends.append(output.hidden_states[1][0, -1])
    expected = nn.functional.normalize(ends[0] - ends[1], dim=0)  # one demonstration: the mean
    torch.testing.assert_close(edit.changes[0].basis.vectors[0], expected, atol=1e-4, rtol=1e-3)


@pytest.fixture(scope="module")
def study(vlm: Any) -> Any:
    settings = HallucinationSettings(
        layers=(1,), weights=(1.0, 4.0), strengths=(5.0,), demonstrations=6, n_masks=3, n_random=1
    )
    return hallucination(vlm, object_questions(70, absent=1, seed=9), settings=settings)


@pytest.mark.slow
def test_the_study_counts_what_the_model_says(vlm: Any, study: Any) -> None:
    _, reported = object_questions(70, absent=1, seed=9).halves(0)
    yes = []
    for image, asked in zip(reported.image.tolist(), reported.asked.tolist(), strict=True):
        question = reported.question.format(reported.objects[asked])
        yes.append(vlm.generate([reported.images[image]], question)[0] == "yes")
    said = torch.tensor(yes)
    row = study.row("none")
    assert row.hallucinated.value == pytest.approx(float(said[~reported.there].double().mean()))
    assert row.recognised.value == pytest.approx(float(said[reported.there].double().mean()))
    assert row.hallucinated.n == int((~reported.there).sum())


@pytest.mark.slow
def test_every_method_stands_beside_its_control_and_what_is_erased_is_written(
    study: Any, tmp_path: Path
) -> None:
    methods = [row.method for row in study.rows]
    for kind in ("unembedding", "hidden", "diff_mean"):
        assert f"project_away:{kind}" in methods
        assert f"random direction:{kind}" in methods
    assert {"vti:visual", "random vti:visual", "vti:textual", "confidence"} <= set(methods)
    for row in study.rows:
        middle = 1 - row.hallucinated.value + row.recognised.value
        assert row.balanced.value == pytest.approx(middle / 2)
        assert row.balanced.low <= row.balanced.value <= row.balanced.high
    place = study.save(tmp_path / "study")
    content = json.loads((place / "results.json").read_text())
    assert content["schema"] == "vision_plugin.lens/hallucination/1"
    edit = vp.Edit.load(place / "edits" / "erase-hidden-star.json")
    assert len(edit) == 1
    assert (place / "edits" / "vti-visual.json").is_file()
    assert study.maps.shape == (35, 9, 64)


def test_maps_find_what_they_are_made_of() -> None:
    from vision_plugin.lens._hallucination_result import localised

    masks = torch.zeros(4, 9, dtype=torch.bool)
    masks[torch.arange(4), torch.arange(4)] = True
    found = localised("perfect", masks.float(), masks)
    assert (found.auroc.value, found.pointing.value) == (1, 1)
    assert found.share.value == pytest.approx(1 / 9)
    assert localised("inverse", 1 - masks.float(), masks).auroc.value == 0
    assert localised("flat", torch.ones(4, 9), masks).auroc.value == 0.5
    with pytest.raises(ValueError, match="no mask covers half of an image token"):
        localised("none", masks.float(), torch.zeros_like(masks))


def test_too_few_questions_and_questions_that_do_not_fit(images: list[Any]) -> None:
    data = object_questions(20, seed=1)
    with pytest.raises(ValueError, match=r"a half has \d+ questions about present and \d+ about"):
        data.halves(0)
    there = torch.tensor([True])
    with pytest.raises(ValueError, match="names an object of 1 that is not there"):
        ObjectQuestions(images, ["star"], torch.tensor([0]), torch.tensor([1]), there)
    with pytest.raises(ValueError, match="names an image of 6 that is not there"):
        ObjectQuestions(images, ["star"], torch.tensor([6]), torch.tensor([0]), there)
    with pytest.raises(ValueError, match="objects= is empty"):
        ObjectQuestions(images, [], torch.tensor([0]), torch.tensor([0]), there)
