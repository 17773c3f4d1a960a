"""A module in train mode is read in eval mode by the toolkit, and is in train mode afterwards."""

from __future__ import annotations

import copy
import json
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import TopKSAE, TopKSAEConfig, TopKTrainingSAEConfig
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

import vision_plugin as vp
from benchmarks._family_cases import VISION
from tests.sae._runs import images
from vision_plugin.activations import ActivationStore, ActivationStream
from vision_plugin.images import open_images
from vision_plugin.models import VisionBridge

HOOK = "blocks.1.hook_resid_post"
CONCEPTS = ["a red circle", "a blue square", "a green star"]


def vit() -> nn.Module:
    return ViTModel(ViTConfig(**VISION, hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5))


def timm_vit() -> nn.Module:
    import timm

    return timm.create_model("test_vit", proj_drop_rate=0.5, drop_path_rate=0.5, img_size=32)


def open_clip_vit() -> nn.Module:
    import open_clip

    vision = {"image_size": 32, "layers": 2, "width": 32, "head_width": 8, "patch_size": 8}
    text = {"context_length": 8, "vocab_size": 99, "width": 32, "heads": 2, "layers": 1}
    return open_clip.CLIP(16, {**vision, "patch_dropout": 0.5}, text)


@pytest.fixture(params=[vit, timm_vit, open_clip_vit])
def trained(request: pytest.FixtureRequest) -> nn.Module:
    """A module with dropout in train mode, of which one part is frozen in eval mode."""
    torch.manual_seed(0)
    module: nn.Module = request.param().train()
    next(m for m in module.modules() if isinstance(m, nn.LayerNorm)).eval()
    return module


def modes(model: VisionBridge) -> dict[str, bool]:
    named = {f"native.{name}": part for name, part in model.native.named_modules()}
    named |= {f"copy.{name}": part for name, part in model.original_model.named_modules()}
    return {name: part.training for name, part in named.items()}


@torch.no_grad()
def test_harvesting_reads_in_eval_mode_says_so_once_and_restores_every_part(
    trained: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    pixels = torch.randn(2, 3, 32, 32)
    expected = vp.wrap(copy.deepcopy(trained).eval()).harvest(pixels, HOOK)[HOOK]
    model = vp.wrap(trained, name="mine")
    before = modes(model)
    assert any(before.values())
    assert not all(before.values())
    with caplog.at_level(logging.WARNING):
        assert torch.equal(model.harvest(pixels, HOOK)[HOOK], expected)
        assert torch.equal(model.harvest(pixels, HOOK)[HOOK], expected)
    assert modes(model) == before
    said = [record for record in caplog.records if "mine is in train mode" in record.message]
    assert len(said) == 1
    assert not torch.equal(model(pixels), model(pixels)), "the user's own passes stay as they are"


def test_the_mode_comes_back_after_an_error(trained: nn.Module) -> None:
    model = vp.wrap(trained)
    before = modes(model)
    with pytest.raises((RuntimeError, ValueError, AssertionError)):
        model.harvest(torch.randn(2, 5, 32, 32), HOOK)
    assert modes(model) == before


class Labelled(list):
    """Images with ids and labels, as an image source has them."""

    def __init__(self, images: list[Any]) -> None:
        super().__init__(images)
        self.ids = [str(number) for number in range(len(images))]
        self.labels = [CONCEPTS[number % 3] for number in range(len(images))]


class Toolkit:
    """One CLIP with dropout in train mode, and the same in eval mode."""

    def __init__(self, folder: str) -> None:
        self.eval, self.train = vp.load_model(folder), vp.load_model(folder)
        for tree in (self.train.native, self.train.original_model):
            for part in tree.modules():
                if hasattr(part, "dropout"):
                    part.dropout = 0.5
        self.train.train()
        torch.manual_seed(0)
        self.sae = TopKSAE(TopKSAEConfig(d_in=32, d_sae=40, k=4))
        self.sae.cfg.metadata.hook_name = HOOK
        self.images = images(10)


@pytest.fixture
def toolkit(tiny_clip: str) -> Toolkit:
    return Toolkit(tiny_clip)


def texts(kit: Toolkit, model: VisionBridge, path: Path) -> Any:
    return model.encode_text(CONCEPTS)


def extraction(kit: Toolkit, model: VisionBridge, path: Path) -> Any:
    from vision_plugin.activations import ExtractionConfig, extract

    cfg = ExtractionConfig(
        model_name="tiny", images="images", hook_names=(HOOK,), output_path=str(path / "store")
    )
    extract(cfg, model=model, images=open_images(kit.images))
    return ActivationStore(path / "store").activations(HOOK)


def stream(kit: Toolkit, model: VisionBridge, path: Path) -> Any:
    made = ActivationStream(
        model,
        open_images(kit.images),
        hook_names=[HOOK],
        tokens="all",
        batch_size=50,
        images_per_forward=4,
        n_batches_in_buffer=2,
    )
    return next(made)


def evaluation(kit: Toolkit, model: VisionBridge, path: Path) -> Any:
    vp.evaluate(
        kit.sae,
        model,
        kit.images,
        metrics=["monosemanticity", "fvu", "sparsity"],
        controls=("neurons", "pca", "random"),
        output_path=str(path / "scores.json"),
    )
    return json.loads((path / "scores.json").read_text())["summary"]


def steerability(kit: Toolkit, model: VisionBridge, path: Path) -> Any:
    found = []
    for name in (HOOK, "blocks.1.attn.hook_z", "blocks.2.hook_resid_post"):
        kit.sae.cfg.metadata.hook_name = name
        pixels = model.preprocess(kit.images)
        text_embeddings = model.encode_text(CONCEPTS)
        scores = vp.metrics.steerability(model, kit.sae, pixels, text_embeddings, latents=range(5))
        found.append(scores.delta)
    return torch.stack(found)


def effect(kit: Toolkit, model: VisionBridge, path: Path) -> Any:
    from vision_plugin.steering import steering_effect

    pixels = model.preprocess(kit.images)
    embedded = model.encode_text(CONCEPTS)
    return steering_effect(model, kit.sae, pixels, embedded, {3: 20.0}, concepts=CONCEPTS).after


def report(kit: Toolkit, model: VisionBridge, path: Path) -> Any:
    vp.report(
        kit.sae, model, kit.images, output_path=path / "report", concepts=CONCEPTS, features=[0, 1]
    )
    pages = sorted((path / "report").rglob("*.html"))
    return {page.name: page.read_text() for page in pages}


def validation(kit: Toolkit, model: VisionBridge, path: Path) -> Any:
    from vision_plugin.sae import Validator

    source = Labelled(kit.images)
    validator = Validator(model, source, [HOOK], tokens="all", n_images=6)
    return validator.score(kit.sae)


def training(kit: Toolkit, model: VisionBridge, path: Path) -> Any:
    cfg = vp.VisionSAERunnerConfig(
        model_name="tiny",
        images="images",
        hook_name=HOOK,
        sae=TopKTrainingSAEConfig(d_in=32, d_sae=48, k=4),
        training_tokens=3 * 64,
        train_batch_size_tokens=64,
        output_path=str(path / "sae"),
    )
    runner = vp.VisionSAETrainingRunner(cfg, model=model, images=open_images(kit.images))
    return runner.run().W_dec.detach()


@pytest.mark.parametrize(
    "read",
    [
        *(texts, extraction, stream, evaluation, steerability, effect, report, validation),
        training,
    ],
)
def test_the_toolkit_reads_as_in_eval_mode(
    toolkit: Toolkit, read: Callable[..., Any], tmp_path: Path
) -> None:
    before = modes(toolkit.train)
    expected = read(toolkit, toolkit.eval, tmp_path / "eval")
    found = read(toolkit, toolkit.train, tmp_path / "train")
    if isinstance(expected, Tensor):
        assert torch.equal(found, expected)
    else:
        assert found == expected
    assert modes(toolkit.train) == before
    assert all(before.values())


def test_a_reader_does_not_end_the_eval_mode_of_another(toolkit: Toolkit) -> None:
    from vision_plugin.models.site import in_eval_mode

    model, inside, go_on = toolkit.train, threading.Event(), threading.Event()

    def long_reader() -> None:
        with in_eval_mode(model):
            inside.set()
            go_on.wait(10)
            states.append(model.native.training)

    states: list[bool] = []
    thread = threading.Thread(target=long_reader)
    thread.start()
    inside.wait(10)
    with in_eval_mode(model):
        states.append(model.native.training)
    states.append(model.native.training)
    go_on.set()
    thread.join()
    assert states == [False, False, False]
    assert model.native.training
