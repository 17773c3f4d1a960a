"""The on-the-fly stream that feeds SAELens's trainer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vision_plugin as vp
from vision_plugin.activations import ActivationStream
from vision_plugin.images import open_images
from vision_plugin.models import VisionBridge

HOOK = "blocks.1.hook_resid_post"


def drawn(n: int) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(n)]


@pytest.fixture(scope="module")
def model(tiny_clip: str) -> VisionBridge:
    return vp.load_model(tiny_clip)


def make_stream(model: VisionBridge, n: int = 20, **options: object) -> ActivationStream:
    settings = {
        "hook_names": [HOOK],
        "tokens": "all",
        "batch_size": 50,
        "images_per_forward": 4,
        "n_batches_in_buffer": 2,
        **options,
    }
    return ActivationStream(model, open_images(drawn(n)), **settings)


def test_batches_are_exact_and_endless(model) -> None:
    stream = make_stream(model, n=3)  # an epoch of 51 vectors, hardly more than one batch
    shapes = {tuple(next(stream).shape) for _ in range(30)}
    assert shapes == {(50, 32)}


def test_an_epoch_gives_each_vector_once(model) -> None:
    images = drawn(20)
    stream = make_stream(model, batch_size=17, n_batches_in_buffer=20)
    rows = torch.cat([next(stream) for _ in range(9)])  # half of the first 20 images' rows
    expected = model.harvest(model.preprocess(images), HOOK)[HOOK].flatten(0, 1)
    distances = torch.cdist(rows, expected, compute_mode="donot_use_mm_for_euclid_dist")
    assert (distances.min(dim=1).values < 1e-4).all()
    assert len(distances.argmin(dim=1).unique()) == len(rows)


def test_a_batch_mixes_many_images(model) -> None:
    images = drawn(20)
    batch = next(make_stream(model, n_batches_in_buffer=6))
    expected = model.harvest(model.preprocess(images), HOOK)[HOOK].flatten(0, 1)
    image = torch.cdist(batch, expected).argmin(dim=1) // 17
    assert len(image.unique()) >= 12


def test_everything_follows_from_the_seed(model) -> None:
    first, again = make_stream(model, seed=3), make_stream(model, seed=3)
    other = make_stream(model, seed=4)
    for _ in range(6):
        batch = next(first)
        assert torch.equal(batch, next(again))
        assert not torch.equal(batch, next(other))


@pytest.mark.parametrize(("tokens", "per_image"), [("cls", 1), ("patch", 16), ("random:5", 5)])
def test_only_the_chosen_tokens_come(model, tokens, per_image) -> None:
    images = drawn(20)
    stream = make_stream(model, tokens=tokens, batch_size=10 * per_image)
    batch = next(stream)
    everything = model.harvest(model.preprocess(images), HOOK)[HOOK].flatten(0, 1)
    token = torch.cdist(batch, everything).argmin(dim=1) % 17
    allowed = {"cls": {0}, "patch": set(range(1, 17)), "random:5": set(range(17))}[tokens]
    assert set(token.tolist()) <= allowed
    assert len(batch) == 10 * per_image


def test_input_and_output_of_a_transcoder_stand_side_by_side(model) -> None:
    names = ["blocks.1.ln2.hook_out", "blocks.1.hook_mlp_out"]
    batch = next(make_stream(model, hook_names=names))
    mlp = model.native.vision_model.encoder.layers[1].mlp
    with torch.no_grad():
        torch.testing.assert_close(mlp(batch[:, :32]), batch[:, 32:], rtol=1e-4, atol=1e-5)


def test_broken_images_are_left_out_and_too_many_are_an_error(model, tmp_path: Path) -> None:
    for i, image in enumerate(drawn(6)):
        image.save(tmp_path / f"{i}.png")
    (tmp_path / "2.png").write_bytes((tmp_path / "2.png").read_bytes()[:60])
    source = open_images(str(tmp_path))
    settings = {"hook_names": [HOOK], "tokens": "all", "batch_size": 40}
    stream = ActivationStream(model, source, **settings)
    next(stream)
    assert [source.ids[i] for i in stream.bad_images] == ["2.png"]
    with pytest.raises(ValueError, match=r"1 of 6 images cannot be read.*2\.png"):
        next(ActivationStream(model, source, **settings, max_bad_images=0))


def test_activations_that_are_not_finite_stop_the_run(tiny_clip: str) -> None:
    broken = vp.load_model(tiny_clip)
    with torch.no_grad():
        broken.native.vision_model.encoder.layers[0].mlp.fc1.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"not finite"):
        next(make_stream(broken))


def test_no_images_and_too_small_a_buffer_are_refused(model) -> None:
    with pytest.raises(ValueError, match=r"n_batches_in_buffer=1"):
        make_stream(model, n_batches_in_buffer=1)
    with pytest.raises(ValueError, match=r"there are no images"):
        ActivationStream(model, _Nothing(), hook_names=[HOOK], tokens="all", batch_size=5)


class _Nothing:
    ids: tuple[str, ...] = ()

    def __len__(self) -> int:
        return 0

    def __getitem__(self, index: int) -> Image.Image:
        raise IndexError(index)
