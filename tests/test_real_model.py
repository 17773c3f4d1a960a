"""A real DINOv2-S on real images, from extraction to report, exact against the native module."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sae_lens
import torch

import vision_plugin as vp
from vision_plugin.activations import ActivationStore, verify

HOOK = "blocks.11.hook_resid_post"
N = 48

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def dino(shared: Path) -> str:
    folder = shared / "models" / "dinov2-small"
    if not folder.is_dir():
        pytest.skip("needs the dinov2-small checkpoint of the data folder, which is not there")
    return str(folder)


@pytest.fixture(scope="module")
def clipart(shared: Path) -> str:
    file = shared / "data" / "clipart.parquet"
    if not file.is_file():
        pytest.skip("needs clipart.parquet of the data folder, which is not there")
    return str(file)


@pytest.fixture(scope="module")
def model(dino: str) -> vp.VisionBridge:
    return vp.load_model(dino)


@pytest.fixture(scope="module")
def store(dino: str, clipart: str, tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    folder = tmp_path_factory.mktemp("real") / "store"
    cfg = vp.activations.ExtractionConfig(
        model_name=dino,
        images=clipart,
        hook_names=(HOOK,),
        output_path=str(folder),
        n_images=N,
        batch_size=16,
        device="cpu",
    )
    return vp.extract(cfg)


@pytest.fixture(scope="module")
def trained(store: ActivationStore, dino: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real") / "sae"
    cfg = vp.VisionSAERunnerConfig(
        model_name=dino,
        images=str(store.paths[0]),
        hook_name=HOOK,
        sae=sae_lens.BatchTopKTrainingSAEConfig(d_in=384, d_sae=256, k=16, decoder_init_norm=1.0),
        training_tokens=50_000,
        train_batch_size_tokens=1024,
        lr=1e-3,
        b_dec_init_method="mean",
        output_path=str(folder),
    )
    vp.train(cfg)
    return folder


def test_a_half_precision_checkpoint_is_loaded_in_the_type_asked_for(dino: str) -> None:
    assert vp.load_model(dino).dtype == torch.float32
    assert vp.load_model(dino, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_the_store_holds_what_a_plain_hook_on_the_native_module_sees(
    store: ActivationStore, dino: str, clipart: str
) -> None:
    from transformers import AutoImageProcessor, Dinov2Model

    assert verify(store.paths[0]).ok
    native = Dinov2Model.from_pretrained(dino, dtype=torch.float32).eval()
    processor = AutoImageProcessor.from_pretrained(dino)
    images = vp.open_images(clipart, n_images=N)
    pixels = processor(images=[images[i] for i in range(16)], return_tensors="pt")["pixel_values"]
    seen: list[torch.Tensor] = []
    native.encoder.layer[11].register_forward_hook(
        lambda module, args, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.no_grad():
        native(pixel_values=pixels)
    assert torch.equal(store.activations(HOOK, range(16)), seen[0])


def test_what_is_trained_on_it_is_scored_and_shown(
    trained: Path, model: vp.VisionBridge, clipart: str, tmp_path: Path
) -> None:
    sae = sae_lens.SAE.load_from_disk(str(trained))
    images = vp.open_images(clipart, n_images=N)
    found = vp.evaluate(
        sae,
        model,
        images,
        metrics=["fvu", "sparsity", "monosemanticity"],
        controls=["neurons"],
        output_path=str(tmp_path / "scores.json"),
        progress=False,
    )
    assert found.left_out == {}
    # The residual stream of this model has a large mean: an untrained SAE explains next to nothing.
    assert found.results["fvu"]["sae"].explained_variance > 0.6
    assert found.results["fvu"]["neurons"].explained_variance == pytest.approx(1)
    assert 4 < found.results["sparsity"]["sae"].l0 < 64  # k is 16; the threshold lags behind
    pixels = model.preprocess([images[i] for i in range(4)])
    with torch.no_grad():
        latents = sae.encode(model.run_with_cache(pixels, names_filter=HOOK)[1][HOOK])
    torch.testing.assert_close(
        found.encoded.latents.to_dense()[:4], latents.amax(1), rtol=1e-4, atol=1e-4
    )
    index = vp.report(sae, model, images, tmp_path / "report", progress=False)
    about = json.loads((index.parent / "report.json").read_text())
    assert (about["n_features"], about["n_images"]) == (256, N)
