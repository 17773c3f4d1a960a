"""Images and prompts of a vision-language model, against its processor called by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vision_plugin as vp
from benchmarks.demo_checkpoint._llava import PROMPT, LlavaTraining, build_model, build_processor
from tests._clip import make_sae
from vision_plugin.demo import checkpoint_path, draw

READ = "blocks.2.hook_resid_post"
GREEDY = {"max_new_tokens": 3, "do_sample": False}
ASKED = "What colour is shown?"


@pytest.fixture(scope="module")
def processor() -> Any:
    return build_processor(checkpoint_path())


@pytest.fixture(scope="module")
def vlm(processor: Any) -> vp.VisionLanguageBridge:
    module = build_model(LlavaTraining(width=64), checkpoint_path(), processor)
    return vp.wrap_vlm(module.eval(), processor, name="untrained")


@pytest.fixture(scope="module")
def images() -> list[Any]:
    return list(draw(5, seed=3).images)


def assert_one_sentence(refused: pytest.ExceptionInfo[ValueError]) -> None:
    """A message says what is wrong and what to do, on one line and in one sentence."""
    text = str(refused.value)
    assert "\n" not in text
    assert ". " not in text
    assert len(text) < 400


def by_hand(vlm, processor, texts, images) -> list[str]:
    inputs = processor(text=texts, images=images, padding=True, return_tensors="pt")
    ids = vlm.native.generate(**inputs, **GREEDY)[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]


def test_a_question_is_put_into_the_template_with_its_image(vlm, processor, images) -> None:
    expected = by_hand(vlm, processor, [PROMPT.format(ASKED)] * 5, images)
    assert len(set(expected)) > 1
    assert vlm.generate(images, ASKED, **GREEDY) == expected
    assert vlm.generate(images, PROMPT.format(ASKED), **GREEDY) == expected
    assert vlm.generate(images, [ASKED] * 5, batch_size=2, **GREEDY) == expected
    assert vlm.generate(images[1], ASKED, **GREEDY) == expected[1:2]
    assert vlm.generate(vlm.prepare(images, ASKED), **GREEDY) == expected


def test_prompts_start_once_as_in_training(vlm, processor, images) -> None:
    inputs = vlm.prepare(images[:2], [ASKED, "Is there a red star?"])
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    start = processor.tokenizer.bos_token_id
    assert [int((row == start).sum()) for row in ids] == [1, 1]
    assert all(int(row[keep][0]) == start for row, keep in zip(ids, mask, strict=True))
    trained = PROMPT.format(ASKED).replace("<image>", "<image>" * 64)
    assert ids[0][mask[0]].tolist() == processor.tokenizer(trained)["input_ids"]
    assert processor.tokenizer.unk_token_id not in ids


def test_a_template_that_writes_the_start_itself_does_not_double_it(vlm, images) -> None:
    processor = build_processor(checkpoint_path())
    expected = vlm.prepare(images[:2], ASKED)["input_ids"]
    start = processor.tokenizer.bos_token
    processor.chat_template = start + processor.chat_template
    other = vp.wrap_vlm(vlm.native, processor)
    assert processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": ASKED}]}],
        add_generation_prompt=True,
    ).startswith(start)
    assert torch.equal(other.prepare(images[:2], ASKED)["input_ids"], expected)


def test_several_images_of_one_prompt_come_as_a_list_in_the_list(vlm, processor, images) -> None:
    pairs = [images[:2], images[2:4]]
    text = PROMPT.format(ASKED).replace("<image>", "<image> <image>")
    expected = by_hand(vlm, processor, [text, text], pairs)
    assert vlm.generate(pairs, ASKED, **GREEDY) == expected
    assert vlm.generate(pairs, text, **GREEDY) == expected
    assert vlm.prepare(pairs, ASKED)["pixel_values"].shape[0] == 4


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (lambda i: (i[:2], "<image> <image> Which?"), r"2 image tokens .* comes with 1 image:"),
        (lambda i: (i[:2], [ASKED]), "1 prompts come with 2 images"),
        (lambda i: ([], ASKED), "images= is empty"),
        (lambda i: ([i[0], [i[1]]], ASKED), "mixes images and lists"),
        (lambda i: (["cat.png"], ASKED), "number 0 is a str"),
        (lambda i: (i[:2], None), "prompt= is missing"),
    ],
)
def test_bad_input_is_one_sentence(vlm, images, asked, message) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        vlm.generate(*asked(images))
    assert_one_sentence(refused)


def test_tensors_without_an_image_token_are_refused(vlm, processor, images) -> None:
    inputs = dict(vlm.prepare(images[:1], ASKED))
    inputs["input_ids"] = processor.tokenizer(ASKED, return_tensors="pt")["input_ids"]
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    for run in (vlm, vlm.generate, vlm.run_with_cache):
        with pytest.raises(ValueError, match=r"input_ids .* hold no image token") as refused:
            run(inputs)
        assert_one_sentence(refused)


def test_a_prompt_without_a_place_for_its_image_is_refused(vlm, processor, images) -> None:
    bare = vp.wrap_vlm(vlm.native, build_processor(checkpoint_path()))
    bare.processor.chat_template = None
    with pytest.raises(ValueError, match=r"has no image token, and .* no chat template") as refused:
        bare.generate(images, ASKED)
    assert_one_sentence(refused)


@torch.no_grad()
def test_the_tower_prepares_images_as_the_processor_does(vlm, images) -> None:
    pixels = vlm.vision.preprocess(images)
    assert torch.equal(pixels, vlm.prepare(images, ASKED)["pixel_values"])
    stream = vlm.vision(pixels, stop_at_layer=3)
    inputs = vlm.prepare(images, ASKED)
    plain = vlm(inputs)
    assert not torch.allclose(plain[0], plain[-1], atol=1e-3)
    with vlm.from_stream(stream, 3):
        torch.testing.assert_close(vlm(inputs), plain, rtol=1e-4, atol=1e-4)
    with vlm.from_stream(stream.roll(1, 0), 3):
        torch.testing.assert_close(vlm(inputs)[0], plain[-1], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_mended_model_is_a_file(vlm, processor, images, tmp_path) -> None:
    vlm.native.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    sae = make_sae(READ, 128)
    sae.cfg.metadata.tokens = "patch"
    sae.save_model(str(tmp_path / "sae"))
    edit = vp.Edit.clamp(sae, {3: 900.0})
    edit.save(tmp_path / "edit.json", sae="sae")
    mended = vp.load_vlm(tmp_path / "model", edit=tmp_path / "edit.json")
    inputs = vlm.prepare(images, ASKED)

    def clamped(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        new = output + (900.0 - sae.encode(output)[..., 3:4]) * sae.W_dec[3]
        return torch.cat([output[:, :1], new[:, 1:]], dim=1)

    plain = vlm.native(**inputs).logits
    layer = vlm.vision.native.encoder.layers[2]
    handle = layer.register_forward_hook(clamped, prepend=True)
    try:
        expected = vlm.native(**inputs).logits
        said = by_hand(vlm, processor, [PROMPT.format(ASKED)] * 5, images)
    finally:
        handle.remove()
    assert (expected - plain).abs().max() > 0.1
    torch.testing.assert_close(mended(inputs), expected, rtol=1e-4, atol=1e-4)
    assert mended.generate(images, ASKED, **GREEDY) == said
    with mended.edit(vp.Edit.clamp(READ, {4: 9.0})):
        pass
    mended.reset_hooks()
    torch.testing.assert_close(mended(inputs), expected, rtol=1e-4, atol=1e-4)
    mended.reset_edits()
    assert torch.equal(mended(inputs), plain)
    sae.cfg.metadata.hook_name = "blocks.3.hook_resid_post"
    sae.save_model(str(tmp_path / "sae"))
    vp.Edit.clamp(sae, {3: 900.0}).save(tmp_path / "behind.json", sae="sae")
    with pytest.raises(ValueError, match="behind what the language model"):
        vp.load_vlm(tmp_path / "model", edit=tmp_path / "behind.json")


@torch.no_grad()
def test_device_map_is_transformers_own(vlm, processor, images, tmp_path) -> None:
    vlm.native.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    expected = vlm.generate(images, ASKED, **GREEDY)
    for device_map in ("auto", {"": "cpu"}):
        loaded = vp.load_vlm(tmp_path, device_map=device_map)
        assert loaded.generate(images, ASKED, **GREEDY) == expected
