"""Checkpoints written by seven projects give those projects' own numbers through stock SAELens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sae_lens
import torch
from sae_lens import SAE
from safetensors.torch import load_file

from vision_plugin.formats import RefusedCheckpointError, convert, disk_converter, load_sae

DATA = Path(__file__).parent / "data"
NAMES = sorted(folder.name for folder in DATA.iterdir() if (folder / "about.json").exists())
REFUSED = [name for name in NAMES if name.endswith("-pickle")]
KEEPS_NEGATIVES = ["saev-topk"] + [f"saev-legacy-s{schema}-topk" for schema in (1, 2, 4)]
EXACT = [name for name in NAMES if name not in (*REFUSED, *KEEPS_NEGATIVES)]
CLASSES = {
    "batchtopk": sae_lens.JumpReLUSAE,
    "matroyshka": sae_lens.JumpReLUSAE,
    "jump": sae_lens.JumpReLUSAE,
    "gated": sae_lens.GatedSAE,
    "topk": sae_lens.TopKSAE,
}


def options_of(name: str) -> dict[str, Any]:
    """What overcomplete's files leave out and its owner knows."""
    if not name.startswith("overcomplete") or name in REFUSED:
        return {}
    written = json.loads((DATA / name / "about.json").read_text())["options"]
    if "-batchtopk" in name:
        return {"activation": "batchtopk", "threshold": written["running_threshold"]}
    if "-topk" in name:
        return {"activation": "topk", "k": written["top_k"]}
    return {"activation": "relu"} if "-vanilla" in name else {}


def expected(name: str, file: str = "expected") -> dict[str, torch.Tensor]:
    return load_file(DATA / name / f"{file}.safetensors")


@torch.no_grad()
def assert_same_numbers(sae: SAE[Any], numbers: dict[str, torch.Tensor]) -> None:
    latents = sae.encode(numbers["x"])
    torch.testing.assert_close(latents, numbers["latents"], rtol=0, atol=1e-5)
    assert torch.equal(latents != 0, numbers["latents"] != 0)
    torch.testing.assert_close(sae.decode(latents), numbers["recon"], rtol=0, atol=1e-5)
    torch.testing.assert_close(sae(numbers["x"]), numbers["recon"], rtol=0, atol=1e-5)


def test_there_are_forty_four_samples() -> None:
    assert len(NAMES) == 44
    assert len(EXACT) == 38


@pytest.mark.parametrize("name", EXACT)
def test_a_folder_gives_its_projects_latents_and_reconstruction(name: str) -> None:
    sae = load_sae(DATA / name, **options_of(name))

    kind = next((cls for part, cls in CLASSES.items() if part in name), sae_lens.StandardSAE)
    assert type(sae) is kind
    assert_same_numbers(sae, expected(name))
    assert sae.cfg.metadata.source["format"].startswith(
        {"dl": "dictionary_learning"}.get(name.split("-")[0], name.split("-")[0])
    )


@pytest.mark.parametrize("name", EXACT)
def test_the_weights_file_alone_is_enough_of_a_path(name: str) -> None:
    file = DATA / name / json.loads((DATA / name / "about.json").read_text())["weight_file"]
    assert_same_numbers(load_sae(file, **options_of(name)), expected(name))


@pytest.mark.parametrize("name", EXACT)
def test_sae_lens_loads_it_from_disk_through_its_converter(name: str) -> None:
    sae = SAE.load_from_disk(DATA / name, converter=disk_converter(**options_of(name)))
    assert_same_numbers(sae, expected(name))


@pytest.mark.parametrize("name", EXACT)
def test_converted_it_loads_in_stock_sae_lens(name: str, tmp_path: Path) -> None:
    out = convert(DATA / name, tmp_path / "converted", **options_of(name))
    assert sorted(file.name for file in out.iterdir()) == ["cfg.json", "sae_weights.safetensors"]
    assert_same_numbers(SAE.load_from_disk(out), expected(name))
    assert_same_numbers(load_sae(out), expected(name))  # our reader knows SAELens's folder too
    assert_same_numbers(load_sae(out / "sae_weights.safetensors"), expected(name))


@pytest.mark.parametrize("name", [name for name in EXACT if "topk" not in name or "batch" in name])
def test_folding_the_decoder_norm_keeps_the_function(name: str) -> None:
    numbers = expected(name)
    plain = load_sae(DATA / name, **options_of(name))
    folded = load_sae(DATA / name, fold_W_dec_norm=True, **options_of(name))
    norms = plain.W_dec.norm(dim=-1)
    with torch.no_grad():
        torch.testing.assert_close(folded(numbers["x"]), numbers["recon"], rtol=0, atol=1e-5)
        torch.testing.assert_close(
            folded.encode(numbers["x"]), plain.encode(numbers["x"]) * norms, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("name", REFUSED)
def test_a_pickled_module_is_refused_with_how_to_save_it_again(name: str) -> None:
    with pytest.raises(RefusedCheckpointError, match=r"torch\.save\(sae\.state_dict\(\)") as caught:
        load_sae(DATA / name)
    assert "overcomplete.sae." in str(caught.value)
    assert "model.pth" in str(caught.value)


@pytest.mark.parametrize("name", KEEPS_NEGATIVES)
def test_a_top_k_that_keeps_negative_latents_is_refused_unless_asked(name: str) -> None:
    with pytest.raises(RefusedCheckpointError, match="negative_latents='clip'"):
        load_sae(DATA / name)

    numbers = expected(name)
    sae = load_sae(DATA / name, negative_latents="clip")
    latents = sae.encode(numbers["x"])
    torch.testing.assert_close(latents, numbers["latents"].clamp(min=0), rtol=0, atol=1e-5)
    has_negatives = (numbers["latents"] < 0).any(dim=1)
    assert has_negatives.any()
    positive = ~has_negatives
    torch.testing.assert_close(
        sae.decode(latents)[positive], numbers["recon"][positive], rtol=0, atol=1e-5
    )
    assert sae.cfg.metadata.negative_latents == "clipped"


@pytest.mark.parametrize("name", ["topk", "topk-bn", "batchtopk", "vanilla"])
def test_an_overcomplete_state_dict_alone_does_not_say_what_it_is(name: str) -> None:
    with pytest.raises(RefusedCheckpointError, match=r"activation='topk'.*running_threshold"):
        load_sae(DATA / f"overcomplete-{name}")


def test_a_bare_ae_file_of_two_possible_classes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ae.pt").write_bytes((DATA / "dl-batchtopk" / "ae.pt").read_bytes())
    with pytest.raises(RefusedCheckpointError, match=r"config\.json"):
        load_sae(tmp_path)
    assert_same_numbers(load_sae(tmp_path, activation="batchtopk"), expected("dl-batchtopk"))


@pytest.mark.parametrize("name", ["dl-standard", "dl-jumprelu", "dl-matroyshka"])
def test_a_bare_ae_file_of_one_possible_class_loads(name: str, tmp_path: Path) -> None:
    (tmp_path / "ae.pt").write_bytes((DATA / name / "ae.pt").read_bytes())
    assert_same_numbers(load_sae(tmp_path / "ae.pt"), expected(name))


def test_a_step_checkpoint_finds_the_config_above_its_folder(tmp_path: Path) -> None:
    run = "imagenet_train_activations_clip-vit-large-patch14-336_22_post_mlp_residual_batch_top_k"
    folder = tmp_path / run / "trainer_0" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "ae_100000.pt").write_bytes((DATA / "dl-batchtopk" / "ae.pt").read_bytes())
    config = (DATA / "dl-batchtopk" / "config.json").read_bytes()
    (folder.parent / "config.json").write_bytes(config)

    sae = load_sae(folder / "ae_100000.pt")

    assert_same_numbers(sae, expected("dl-batchtopk"))
    assert sae.cfg.metadata.model_name == "openai/clip-vit-large-patch14-336"
    assert sae.cfg.metadata.hook_name == "blocks.22.hook_resid_post"


def test_dictionary_learnings_thresholded_top_k_can_be_asked_for() -> None:
    sae = load_sae(DATA / "dl-topk", activation="batchtopk")
    assert_same_numbers(sae, expected("dl-topk", "expected_threshold"))


def test_visaebench_rows_can_be_normalised_as_overcomplete_does() -> None:
    sae = load_sae(DATA / "visaebench-oc-topk", row_normalization="l2")
    assert_same_numbers(sae, expected("visaebench-oc-topk", "expected_overcomplete"))


def test_a_legacy_saev_file_follows_the_code_that_wrote_it() -> None:
    name = "saev-legacy-pre-relu"
    current = expected(name, "expected_current_saev")
    sae = load_sae(DATA / name)
    assert not torch.allclose(sae.encode(current["x"]), current["latents"], atol=1e-3)


def test_metadata_names_model_hook_tokens_and_source() -> None:
    prisma = load_sae(DATA / "prisma-relu-pt").cfg.metadata
    assert prisma.model_name == "open_clip:hf-hub:laion/CLIP-ViT-B-32-DataComp.XL-s13B-b90K"
    assert prisma.hook_name == "blocks.9.hook_resid_post"
    assert prisma.tokens == "all"
    assert prisma.source == {"format": "prisma", "file": "n_images_130007.pt"}
    assert prisma.input_normalization == "layer_norm"
    patchsae = load_sae(DATA / "patchsae-relu-pklgz").cfg.metadata
    assert patchsae.hook_name == "blocks.10.hook_resid_post"  # block -2 of twelve
    visaebench = load_sae(DATA / "visaebench-topk").cfg.metadata
    assert (visaebench.hook_name, visaebench.tokens) == ("blocks.11.hook_resid_post", "patch")
    assert "not in the file" in visaebench.input_normalization
