"""load_model from checkpoints on disk: transformers, LLaVA's tower, open_clip, timm."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vision_plugin as vp
from benchmarks._family_cases import VISION, Case, llava_cases, small_timm, transformers_cases
from vision_plugin.models import UnsupportedModelError

CASES = {case.name: case for case in [*transformers_cases(), *llava_cases()]}


@pytest.fixture
def images() -> list[Image.Image]:
    noise = np.random.default_rng(0).integers(0, 256, (2, 40, 60, 3), dtype=np.uint8)
    return [Image.fromarray(image) for image in noise]


@pytest.mark.parametrize(
    "name",
    [
        "CLIPVisionModelWithProjection",
        "SiglipModel",
        "Siglip2VisionModel",
        "Dinov2WithRegistersModel",
        "DINOv3ViTModel",
        "ViTForImageClassification",
        "DeiTModel",
        "ViTMAEModel",
    ],
)
def test_a_saved_checkpoint_loads_to_the_same_output(name: str, tmp_path: Path) -> None:
    case: Case = CASES[name]
    module = case.build()
    module.save_pretrained(tmp_path)
    model = vp.load_model(str(tmp_path))
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(pixels), case.native(module, pixels))


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("Llava")])
def test_of_a_llava_checkpoint_the_tower_is_loaded(name: str, tmp_path: Path) -> None:
    module = CASES[name].build()
    module.save_pretrained(tmp_path)
    model = vp.load_model(str(tmp_path))
    pixels = torch.randn(2, 3, 32, 32)
    tower = module.model.vision_tower
    with torch.no_grad():
        assert torch.equal(model(pixels), tower(pixel_values=pixels).last_hidden_state)
    assert type(model.native) is type(tower)


def test_the_encoder_of_a_masked_autoencoder_with_its_decoder(tmp_path: Path) -> None:
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    sizes = {"decoder_hidden_size": 32, "decoder_num_hidden_layers": 1}
    config = ViTMAEConfig(**VISION, **sizes, decoder_num_attention_heads=4)
    module = ViTMAEForPreTraining(config).eval()
    module.save_pretrained(tmp_path)
    model = vp.load_model(str(tmp_path))
    assert type(model.native).__name__ == "ViTMAEModel"
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = CASES["ViTMAEModel"].native(module.vit, pixels)
        assert torch.equal(model(pixels), expected)
        assert torch.equal(model(pixels), model(pixels))
    assert model.native.config.mask_ratio == 0.75


def test_preprocessing_decides_the_size_of_towers_that_take_any(
    tmp_path: Path, images: list[Image.Image]
) -> None:
    from transformers import BitImageProcessor

    CASES["Dinov2Model"].build().save_pretrained(tmp_path)
    size = {"height": 24, "width": 24}
    BitImageProcessor(size={"shortest_edge": 24}, crop_size=size).save_pretrained(tmp_path)
    model = vp.load_model(str(tmp_path))
    assert model.preprocess(images).shape == (2, 3, 24, 24)
    assert model.token_layout().grid == (3, 3)


def test_naflex_images_become_pixels_that_cut_back_to_the_processors_patches(
    images: list[Image.Image],
) -> None:
    from transformers import Siglip2ImageProcessor

    from benchmarks._family_cases import naflex_arguments

    processor = Siglip2ImageProcessor(patch_size=8, max_num_patches=16)
    model = vp.wrap(CASES["Siglip2VisionModel"].build(), image_processor=processor)
    pixels = model.preprocess(images)
    assert pixels.shape == (2, 3, 32, 32)
    square = [p.resize((32, 32), Image.Resampling.BILINEAR) for p in images]
    native = processor(images=square, return_tensors="pt")
    assert torch.equal(naflex_arguments(pixels, 8)["pixel_values"], native["pixel_values"])


def test_siglip_texts_are_padded_to_full_length_and_scored_by_sigmoid() -> None:
    from transformers import SiglipConfig, SiglipModel

    from benchmarks.demo_checkpoint._tokenizer import build_tokenizer

    tokenizer = build_tokenizer(("a red circle", "a blue square"), max_length=16)
    config = CASES["SiglipModel"].build().config
    config.text_config.vocab_size = max(len(tokenizer), 99)
    module = SiglipModel(SiglipConfig(**config.to_dict())).eval()
    model = vp.wrap(module, tokenizer=tokenizer)
    texts, pixels = ["a red circle", "a blue square"], torch.randn(2, 3, 32, 32)
    ids = tokenizer(texts, padding="max_length", max_length=16, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        native = module(input_ids=ids, pixel_values=pixels).logits_per_image
        cosine = model.encode_image(pixels) @ model.encode_text(texts).T
    torch.testing.assert_close(cosine * model.logit_scale + model.logit_bias, native)
    assert model.score_function == "sigmoid"


@pytest.fixture
def open_clip_folder(tmp_path: Path) -> tuple[Path, torch.nn.Module]:
    import open_clip
    from safetensors.torch import save_file

    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    vision = {"image_size": 32, "layers": 2, "width": 32, "head_width": 8, "patch_size": 8}
    settings = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    module = open_clip.CLIP(**settings).eval()
    save_file(module.state_dict(), tmp_path / "open_clip_model.safetensors")
    config = {"model_cfg": settings, "preprocess_cfg": {"size": 32}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    return tmp_path, module


def test_open_clip_loads_a_local_folder_with_texts(
    open_clip_folder: tuple[Path, torch.nn.Module], images: list[Image.Image]
) -> None:
    import open_clip

    folder, module = open_clip_folder
    model = vp.load_model(f"open_clip:{folder}")
    pixels = model.preprocess(images)
    tokens = open_clip.tokenize(["a dog", "a cat"])
    with torch.no_grad():
        assert torch.equal(model(pixels), module.encode_image(pixels))
        expected = module.encode_text(tokens, normalize=True)
    torch.testing.assert_close(model.encode_text(["a dog", "a cat"]), expected)
    assert model.logit_scale == pytest.approx(float(module.logit_scale.exp()))


def test_open_clip_wants_to_know_which_weights() -> None:
    with pytest.raises(ValueError, match=r"pretrained=.*openai"):
        vp.load_model("open_clip:ViT-B-32")


def test_timm_loads_a_checkpoint_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    module = timm.create_model("test_vit").eval()
    file = tmp_path / "weights.pth"
    torch.save(module.state_dict(), file)
    model = vp.load_model("timm:test_vit", pretrained=str(file))
    pixels = torch.randn(1, 3, 160, 160)
    with torch.no_grad():
        assert torch.equal(model(pixels), module(pixels))


def test_timm_loads_a_local_folder(tmp_path: Path, images: list[Image.Image]) -> None:
    import timm
    from safetensors.torch import save_file

    module = timm.create_model("test_vit").eval()
    save_file(module.state_dict(), tmp_path / "model.safetensors")
    config = {"architecture": "test_vit", "num_classes": 1000, "pretrained_cfg": module.default_cfg}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = vp.load_model(f"timm:{tmp_path}")
    pixels = model.preprocess(images)
    assert pixels.shape == (2, 3, 160, 160)
    with torch.no_grad():
        assert torch.equal(model(pixels), module(pixels))


def test_timm_models_in_transformers_wrapper_are_unwrapped() -> None:
    from transformers import TimmWrapperConfig, TimmWrapperModel

    wrapper = TimmWrapperModel(TimmWrapperConfig(architecture="test_vit")).eval()
    model = vp.wrap(wrapper)
    pixels = torch.randn(1, 3, 160, 160)
    with torch.no_grad():
        assert torch.equal(model(pixels), wrapper.timm_model(pixels))


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("timm:no_such_model", "no_such_model"),
        ("open_clip:no-such-model", "no-such-model"),
        ("no/such-checkpoint", "neither a local folder"),
    ],
)
def test_what_is_not_there_is_named(name: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        vp.load_model(name)


def test_pretrained_does_not_apply_to_transformers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not apply"):
        vp.load_model(str(tmp_path), pretrained="openai")


def test_a_tower_of_another_kind_in_a_saved_llava_is_refused(tmp_path: Path) -> None:
    config = json.loads(CASES["LlavaForConditionalGeneration"].build().config.to_json_string())
    config["vision_config"] = {"model_type": "convnext"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="ConvNext"):
        vp.load_model(str(tmp_path))


def test_splicing_follows_the_size_of_the_image() -> None:
    model = vp.wrap(CASES["DINOv3ViTModel"].build())
    seen: list[tuple[int, int]] = []
    model.run_with_hooks(
        torch.randn(1, 3, 24, 40),
        fwd_hooks=[
            ("blocks.0.hook_resid_post", lambda x, hook: seen.append(model.token_layout().grid))
        ],
    )
    assert seen == [(3, 5)]
    assert model.token_layout().grid == (4, 4)


def test_gated_mlp_shows_gate_and_linear_part() -> None:
    module = small_timm("vit_giant_patch14_dinov2").eval()
    model = vp.wrap(module)
    pixels = torch.randn(1, 3, 56, 56)
    with torch.no_grad():
        _, cache = model.run_with_cache(pixels)
    gate, linear = cache["blocks.0.mlp.hook_pre"], cache["blocks.0.mlp.hook_pre_linear"]
    torch.testing.assert_close(
        torch.nn.functional.silu(gate) * linear, cache["blocks.0.mlp.hook_post"]
    )
    fused = module.blocks[0].mlp.fc1(cache["blocks.0.ln2.hook_out"])
    assert torch.equal(torch.cat([gate, linear], -1), fused)
