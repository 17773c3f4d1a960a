"""Steering a vision-language model: answers, changes and figures against plain ones."""

from __future__ import annotations

import pytest
import torch

import vision_plugin as vp
from benchmarks.demo_checkpoint._llava import LlavaTraining, build_model, build_processor
from tests._clip import make_sae
from vision_plugin.demo import FACTORS, checkpoint_path, draw
from vision_plugin.demo.dialogue import ONE_WORD, QUESTIONS, answer, is_there, vocabulary
from vision_plugin.demo.multimodal import multimodal_data
from vision_plugin.steering import LatentEditor
from vision_plugin.tasks import MultimodalData
from vision_plugin.tasks._answers import AnswerPass
from vision_plugin.tasks._clustered import clustered
from vision_plugin.tasks._reading import PatchReading, average_precision

READ = "blocks.2.hook_resid_post"


@pytest.fixture(scope="module")
def vlm() -> vp.VisionLanguageBridge:
    processor = build_processor(checkpoint_path())
    module = build_model(LlavaTraining(width=64), checkpoint_path(), processor)
    return vp.wrap_vlm(module.eval(), processor, name="untrained")


@torch.no_grad()
def test_answers_are_the_first_words_that_generate_writes(vlm) -> None:
    images = list(draw(6, seed=8).images)
    asked = AnswerPass(vlm, images, QUESTIONS, batch_size=4)
    found = asked.answers()
    options = {"max_new_tokens": 1, "do_sample": False}
    for factor, question in QUESTIONS.items():
        assert found[factor] == vlm.generate(images, question, **options)
    sae = make_sae(READ, 128)
    reading = PatchReading(asked.stream, 1, sae, LatentEditor(sae))
    rows = torch.tensor([1, 3, 4])
    latents, values = torch.tensor([7, 2]), torch.tensor([900.0, -400.0])
    stream = reading.with_latents(latents, lambda old: values.expand_as(old), rows)
    steered = asked.answers(stream, rows)
    assert any(
        steered[factor] != [found[factor][row] for row in rows.tolist()] for factor in QUESTIONS
    )
    with vlm.steer(sae, {7: 900.0, 2: -400.0}, tokens="patch"):
        some = [images[row] for row in rows]
        for factor, question in QUESTIONS.items():
            assert steered[factor] == vlm.generate(some, question, **options)
    bare = reading.without_error(stream, rows)
    edit = vp.Edit.clamp(sae, {7: 900.0, 2: -400.0}, tokens="patch", include_error=False)
    with vlm.edit(edit):
        _, cache = vlm.run_with_cache(some, "Who?", names_filter=f"vision.{READ}")
    torch.testing.assert_close(bare, cache[f"vision.{READ}"], rtol=1e-3, atol=1e-2)


def test_average_precision_is_the_mean_precision_at_each_member() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(20, 3, generator=generator)
    member = torch.rand(20, generator=generator) < 0.4
    found = average_precision(scores, member)
    for column in range(3):
        order = sorted(range(20), key=lambda row: -float(scores[row, column]))
        hits, total = 0, 0.0
        for place, row in enumerate(order, 1):
            if member[row]:
                hits += 1
                total += hits / place
        assert float(found[column]) == pytest.approx(total / hits)


def test_an_interval_draws_whole_images() -> None:
    once = torch.tensor([1.0, 0.0]).repeat(30)
    single = clustered(once, torch.arange(60))
    again = clustered(once.repeat(4), torch.arange(60).repeat(4))
    assert (again.low, again.value, again.high) == (single.low, single.value, single.high)
    assert 0.5 - 3 * 0.065 < single.low < 0.42 < 0.58 < single.high < 0.5 + 3 * 0.065
    with pytest.raises(ValueError, match="too few for an interval"):
        clustered(once[:20], torch.arange(20))


def test_questions_have_the_answers_that_scenes_give() -> None:
    scene = draw(1, seed=4).scenes[0]
    for factor, question in QUESTIONS.items():
        assert answer(question, scene) == scene.value(factor)
    assert answer(ONE_WORD, scene) == scene.shape
    assert answer(is_there(scene.shape, scene.colour), scene) == "yes"
    other = next(shape for shape in FACTORS["shape"] if shape != scene.shape)
    assert answer(is_there(other, scene.colour), scene) == "no"
    assert {value for factor in QUESTIONS for value in FACTORS[factor]} < set(vocabulary())
    with pytest.raises(ValueError, match="has no answer to 'Why"):
        answer("Why?", scene)


def test_data_that_do_not_fit_together_are_refused() -> None:
    data = multimodal_data(train=80, validation=40, test=40)
    parts = (data.train, data.validation, data.test)
    with pytest.raises(ValueError, match="two factors or more"):
        MultimodalData({"colour": "?"}, {"colour": ("red",)}, *parts, locator="colour")
    with pytest.raises(ValueError, match="locator='size'"):
        MultimodalData(data.questions, data.values, *parts, locator="size")
    with pytest.raises(ValueError, match="has no training image"):
        multimodal_data(train=5, validation=40, test=40)


def test_an_sae_of_another_hook_is_refused(vlm) -> None:
    data = multimodal_data(train=80, validation=40, test=40)
    sae = make_sae("blocks.1.hook_resid_post", 128)
    with pytest.raises(ValueError, match=r"reads blocks\.2\.hook_resid_post"):
        vp.tasks.multimodal(vlm, sae, data)


@torch.no_grad()
def test_a_model_that_answers_at_random_is_refused_before_the_search(vlm) -> None:
    data = multimodal_data(train=80, validation=40, test=40)
    with pytest.raises(ValueError, match=r"answers \d+ of 40 questions about the .* an interval"):
        vp.tasks.multimodal(vlm, make_sae(READ, 128), data)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strengths": ()}, "numbers above 0"),
        ({"strengths": (1.0, float("nan"))}, "numbers above 0"),
        ({"sizes": ()}, "from 1 up"),
        ({"preserved": 1.0}, "between 0 and 1"),
        ({"targets": 0}, "1 or more"),
    ],
)
def test_settings_that_cannot_be_searched_are_refused(changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        vp.tasks.MultimodalSettings(**changes)


def test_more_latents_than_there_are_are_refused(vlm) -> None:
    data = multimodal_data(train=80, validation=40, test=40)
    settings = vp.tasks.MultimodalSettings(sizes=(1, 1000))
    with pytest.raises(ValueError, match="allows at most 48"):
        vp.tasks.multimodal(vlm, make_sae(READ, 128), data, settings=settings)


@pytest.mark.parametrize("latent", [-1, 48])
def test_latents_that_the_sae_lacks_are_refused(vlm, latent: int) -> None:
    data = multimodal_data(train=80, validation=40, test=40)
    settings = vp.tasks.MultimodalSettings(latents=(3, latent))
    with pytest.raises(ValueError, match=f"latent {latent} is out of range: the SAE has 48"):
        vp.tasks.multimodal(vlm, make_sae(READ, 128), data, settings=settings)


def test_a_table_shows_its_figures_where_a_terminal_is_narrow() -> None:
    from rich.console import Console

    from vision_plugin.steering import Edit
    from vision_plugin.tasks import Figure, MultimodalResult, Row

    changed, kept = Figure(0.977, 0.953, 0.997), Figure(0.939, 0.917, 0.959)
    rows = [
        Row("sae", "background", "test", 0, None, "reconstruction in place of the layer", "", {
            "accuracy": changed}),
        Row("random_active_latents", "background", "test", 30, 2, "suppression, preserving", "", {
            "suppressed": changed, "preserved": kept}),
    ]  # fmt: skip
    result = MultimodalResult("demo", "sae", {}, rows, [], [], Edit(), {})
    console = Console(width=80)
    with console.capture() as captured:
        console.print(result.table())
    lines = [line for line in captured.get().splitlines() if "0.977 ±0.022" in line]
    assert len(lines) == 2
    assert "0.939 ±0.021" in lines[1]
    assert "0.939" not in lines[0]
