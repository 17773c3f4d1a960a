"""What a recipe does to latents, against the Edit that is saved for it and against plain hooks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vision_plugin as vp
from benchmarks.demo_checkpoint._llava import LlavaTraining, build_model, build_processor
from tests._clip import make_sae
from vision_plugin.demo import FACTORS, checkpoint_path, draw
from vision_plugin.demo.dialogue import QUESTIONS
from vision_plugin.demo.multimodal import multimodal_data
from vision_plugin.metrics import ControlDictionary
from vision_plugin.steering import LatentEditor
from vision_plugin.tasks import MultimodalData, feature_answers, one_word
from vision_plugin.tasks._answers import AnswerPass
from vision_plugin.tasks._multimodal_change import Changes, edits_of
from vision_plugin.tasks._multimodal_settings import EDITS, Goal, Recipe
from vision_plugin.tasks._reading import Knowledge, PatchReading, learn

READ = "blocks.2.hook_resid_post"
GREEDY = {"do_sample": False}


@pytest.fixture(scope="module")
def vlm() -> vp.VisionLanguageBridge:
    processor = build_processor(checkpoint_path())
    module = build_model(LlavaTraining(width=64), checkpoint_path(), processor)
    return vp.wrap_vlm(module.eval(), processor, name="untrained")


@pytest.fixture(scope="module")
def sae() -> Any:
    made = make_sae(READ, 128)
    made.cfg.metadata.tokens = "patch"
    return made


@pytest.fixture(scope="module")
def data() -> MultimodalData:
    return multimodal_data(train=80, validation=40, test=40)


@pytest.fixture(scope="module")
def learned(vlm, sae, data) -> tuple[AnswerPass, PatchReading, Knowledge]:
    asked = AnswerPass(vlm, data.train.images, data.questions)
    reading = PatchReading(asked.stream, 1, sae, LatentEditor(sae))
    labels = dict(data.train.labels)
    return asked, reading, learn(reading, labels, data.locator, set(data.beside), most=4)


@torch.no_grad()
@pytest.mark.parametrize("factor", ["colour", "background"])
@pytest.mark.parametrize("method", EDITS)
def test_the_edit_of_a_recipe_does_what_was_measured(
    vlm, sae, data, learned, method: str, factor: str, tmp_path
) -> None:
    _, reading, knowledge = learned
    insertions = ("clamp", "add", "replace")
    goal: Goal = "insertion" if method in insertions else "suppression"
    recipe = Recipe(method, 2, 3.0)
    rows = torch.arange(6)
    seen = {factor: torch.full((80,), 2)}
    changes = Changes(data, reading, knowledge, torch.Generator(), seen)
    stream = changes.stream(goal, factor, recipe, torch.full((80,), 1), rows)
    path = tmp_path / "edit.json"
    made = edits_of(sae, data, knowledge, factor, recipe, 1)
    names = FACTORS[factor]
    made[f"{names[2]}-to-{names[1]}" if method == "replace" else names[1]].save(path)
    name = f"vision.{READ}"
    with vlm.edit(vp.Edit.load(path, sae=sae)):
        images = list(data.train.images[:6])
        _, cache = vlm.run_with_cache(images, "Who?", names_filter=name)
    torch.testing.assert_close(cache[name], stream, rtol=1e-3, atol=1e-2)
    changed = (stream - reading.stream[rows]).abs().amax(-1) > 1e-3
    assert changed.any()
    assert not changed[:, 0].any()
    everywhere = changes.stream(
        goal, factor, Recipe(method, 2, 3.0, "all"), torch.full((80,), 1), rows
    )
    here = changes.here[rows] != (factor in data.beside)
    assert torch.equal(stream[:, 1:][here], everywhere[:, 1:][here])
    assert torch.equal(stream[:, 1:][~here], reading.stream[rows][:, 1:][~here])


def test_latents_that_push_an_answer_follow_its_gradient(vlm, learned) -> None:
    asked, reading, _ = learned
    words, rows = FACTORS["colour"], torch.arange(3)
    found = asked.pull("colour", words, rows)
    assert found.shape == (len(words), *reading.stream[:3].shape)
    step = torch.randn(reading.stream[:3].shape, generator=torch.Generator().manual_seed(0)) * 0.02
    ids = torch.cat([asked.prefix, asked.rest["colour"]]).expand(3, -1)
    tokens = vlm.processor.tokenizer.convert_tokens_to_ids(list(words))

    @torch.no_grad()
    def odds(stream: torch.Tensor) -> torch.Tensor:
        with vlm.from_stream(stream.double(), 3):
            inputs = {"input_ids": ids, "pixel_values": asked.pixels[:3]}
            logits = vlm(inputs)[:, -1, tokens].double()
        return (logits - logits.mean(1, keepdim=True)).sum(0)

    vlm.to(torch.float64)
    try:
        stream = asked.stream[rows]
        change = (odds(stream + step) - odds(stream - step)) / 2
    finally:
        vlm.to(torch.float32)
    expected = (found * step).sum((1, 2, 3)).double()
    torch.testing.assert_close(expected, change, rtol=0.03, atol=1e-3)
    assert asked.pull("colour", ["a red star"], rows) is None


@torch.no_grad()
def test_answers_of_several_words_are_those_that_generate_writes(vlm) -> None:
    images = list(draw(5, seed=8).images)
    asked = AnswerPass(vlm, images, {**QUESTIONS, "long": "Is there a red star?"}, max_new_tokens=4)
    for factor, question in {**QUESTIONS, "long": "Is there a red star?"}.items():
        expected = vlm.generate(images, question, max_new_tokens=4, **GREEDY)
        assert asked.answers()[factor] == expected


@pytest.mark.slow
def test_any_judge_decides_whether_an_answer_states_a_value(vlm, sae, data) -> None:
    heard: list[tuple[str, str]] = []

    def judge(answer: str, value: str) -> bool:
        heard.append((answer, value))
        return len(heard) % 4 != 0

    settings = vp.tasks.MultimodalSettings(
        sizes=(2,), strengths=(1.0,), screened=40, finalists=1, max_new_tokens=2
    )
    result = vp.tasks.multimodal(vlm, sae, data, settings=settings, judge=judge)
    assert {value for _, value in heard} >= set(FACTORS["shape"])
    assert any(" " in answer for answer, _ in heard)
    row = result.row("replace", kind="colour", how="insertion, best")
    assert row.figures["preserved_shape"].value < 1
    assert result.row("all_patches", kind="colour", how="insertion, winner").size == 2
    assert {entry["images"] for entry in result.search} <= set(range(41))
    for goal in ("insertion", "suppression"):
        for factor, values in data.values.items():
            names = {name for g, f, name in result.edits if (g, f) == (goal, factor)}
            pairs = {f"{old}-to-{new}" for old in values for new in values if old != new}
            assert names == (pairs if "-to-" in min(names) else set(values))
    assert len(result.edit) == 1


@torch.no_grad()
@pytest.mark.slow
def test_latents_that_are_given_are_measured_in_place_of_those_that_are_found() -> None:
    """A dictionary whose first latents span the colours; the answers are those of a plain loop."""
    vlm = vp.load_vlm("demo")
    data = multimodal_data(train=120, validation=40, test=40)
    colours, label = FACTORS["colour"], data.train.labels["colour"]
    patches = AnswerPass(vlm, data.train.images, data.questions).stream[:, 1:]
    means = torch.stack([patches[label == c].mean((0, 1)) for c in range(len(colours))])
    axes = torch.linalg.svd(means - means.mean(0), full_matrices=True).Vh
    given = tuple(range(len(colours) - 1))
    planted = ControlDictionary("planted", axes).at(READ, tokens="patch")
    settings = vp.tasks.MultimodalSettings(sizes=(2,), strengths=(1.5,), latents=(*given, 0))
    result = vp.tasks.multimodal(vlm, planted, data, settings=settings)

    size = {entry["method"]: entry["size"] for entry in result.search}
    assert size == {**dict.fromkeys(EDITS, len(given)), "neurons": 2,
                    "diff_mean": 1, "diff_mean_replace": 1}  # fmt: skip
    for edit in result.edits.values():
        assert edit.changes[0].targets == given
    best = {"kind": "colour", "how": "suppression, best"}
    out = result.row("negative", **best).figures["suppressed"]
    assert out.low > result.row("random_active_latents", **best).figures["suppressed"].high
    assert out.low > 0.3

    winner = result.row("sae_without_error", kind="colour", how="suppression, winner")
    assert winner.edit.startswith("negative")
    question, images = data.questions["colour"], list(data.test.images)
    said = [colours[c] for c in data.test.labels["colour"].tolist()]
    before = vlm.generate(images, question, max_new_tokens=1, **GREEDY)
    gone: list[bool] = []
    for colour in colours:
        some = [i for i, (own, was) in enumerate(zip(said, before, strict=True)) if own == was]
        some = [i for i in some if said[i] == colour]
        with vlm.edit(result.edits["suppression", "colour", colour]):
            after = vlm.generate([images[i] for i in some], question, max_new_tokens=1, **GREEDY)
        gone += [answer != colour for answer in after]
    assert sum(gone) / len(gone) == pytest.approx(out.value)


@torch.no_grad()
@pytest.mark.slow
def test_one_word_is_what_generate_says_about_a_white_image(vlm, sae) -> None:
    from PIL import Image

    world = draw(40, seed=5)
    images, labels = list(world.images), [scene.shape for scene in world.scenes]
    clip = vp.load_model("demo")
    result = one_word(
        vlm, sae, images, labels, clip=clip, asked=images[:32], latents=[7, 2, 30] * 11,
        alpha=900.0, n_latents_on_images=2,
    )  # fmt: skip
    white = Image.new("RGB", images[0].size, "white")
    prompt, options = "What is shown in this image? Use exactly one word!", {"max_new_tokens": 5}

    def said(edit: vp.Edit | None) -> str:
        with vlm.edit(edit or vp.Edit()):
            words = vlm.generate(white, prompt, **options, **GREEDY)[0].split()
        return words[0] if words else ""

    for latent in (7, 2, 30):
        words = result.words[latent]
        assert words["none"] == said(None)
        clamp = {"tokens": "patch"}
        assert words["clamp"] == said(vp.Edit.clamp(sae, {latent: 900.0}, **clamp))
        bare = vp.Edit.clamp(sae, {latent: 900.0}, include_error=False, **clamp)
        assert words["white_image"] == said(bare)
        code = torch.zeros(1, 48)
        code[0, latent] = 900.0
        alone = sae.decode(code)
        hook = (f"vision.{READ}", lambda x, hook, alone=alone: torch.cat(
            [x[:, :1], alone.expand(1, x.shape[1] - 1, -1)], dim=1))  # fmt: skip
        with vlm.hooks(fwd_hooks=[hook]):
            assert words["unit_vector"] == said(None)
    pixels = clip.preprocess(images)
    with vlm.vision.alone():
        stream = vlm.vision(vlm.vision.preprocess(images), stop_at_layer=3)
    pooled = sae.encode(stream[:, 1:]).mean(1)
    embedded = clip.encode_image(pixels)
    scores, upper = [], []
    for latent in [7, 2, 30] * 11:
        top = pooled[:, latent].topk(16).indices
        goal = torch.nn.functional.normalize(embedded[top].mean(0), dim=0)
        scores.append(clip.encode_text([result.words[latent]["clamp"]])[0] @ goal)
        own = clip.encode_text([labels[i] for i in top.tolist()])
        upper.append((own * embedded[top]).sum(1).mean())
    expected = float(torch.stack(scores).mean())
    assert result.row("white", "clamp").score.value == pytest.approx(expected, abs=1e-4)
    assert result.row("bound", "label").score.value == pytest.approx(
        float(torch.stack(upper).mean()), abs=1e-4
    )
    assert result.row("images", "clamp").over_none is not None
    assert "white_image" in str(result.to_dict()["rows"])
    with pytest.raises(ValueError, match="3 labels come with 40 images"):
        one_word(vlm, sae, images, labels[:3], clip=clip)


@torch.no_grad()
def test_a_feature_has_what_the_model_says_before_and_after(vlm, sae) -> None:
    images, asked = list(draw(4, seed=6).images), ["What colour is shown?", "Is there a red star?"]
    found = feature_answers(
        vlm, sae, images, [3, 9], prompts=asked, strengths={3: [400.0, 900.0], 9: [-900.0]},
        max_new_tokens=2,
    )  # fmt: skip
    assert [(s.latent, s.prompt, s.strength) for s in found.answers] == [
        *((3, prompt, strength) for prompt in asked for strength in (400.0, 900.0)),
        *((9, prompt, -900.0) for prompt in asked),
    ]
    options = {"max_new_tokens": 2, **GREEDY}
    for spoken in found.answers:
        direction = sae.W_dec[spoken.latent]

        def hook(x: torch.Tensor, hook: Any, spoken: Any = spoken, d: Any = direction) -> Any:
            amount = spoken.strength - sae.encode(x)[..., spoken.latent, None]
            return torch.cat([x[:, :1], (x + amount * d)[:, 1:]], dim=1)

        assert list(spoken.before) == vlm.generate(images, spoken.prompt, **options)
        with vlm.hooks(fwd_hooks=[(f"vision.{READ}", hook)]):
            assert list(spoken.after) == vlm.generate(images, spoken.prompt, **options)
    assert any(spoken.n_changed for spoken in found.answers)
    assert len(found.of(9)) == 2
    with pytest.raises(ValueError, match="no value for latent 9"):
        feature_answers(vlm, sae, images, [9], prompts=asked, strengths={})
    with pytest.raises(ValueError, match="images= and prompts="):
        feature_answers(vlm, sae, [], [9], prompts=asked, strengths=[1.0])
