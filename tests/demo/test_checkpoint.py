"""The packaged checkpoint, as a user loads it: what it knows, and how printed words fool it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoProcessor, AutoTokenizer, CLIPModel, CLIPTokenizerFast

from benchmarks.demo_checkpoint._evaluation import EVALUATION_SEED, ZeroShot
from benchmarks.demo_checkpoint.train_clip import TrainClip, run
from vision_plugin.demo import TRAINING_SEED, checkpoint_path, concept_vocabulary, draw

IMAGES = 300
# Fresh for this test: neither the training's images nor those of the evaluation on file.
SEED = 31_415_926

OFFLINE = """
import socket, sys
def refuse(*args, **kwargs):
    raise OSError("the network was asked for")
socket.socket.connect = refuse
socket.getaddrinfo = refuse
from transformers import AutoProcessor, CLIPModel
model = CLIPModel.from_pretrained(sys.argv[1])
processor = AutoProcessor.from_pretrained(sys.argv[1])
from vision_plugin.demo import draw
inputs = processor(
    text=["a picture of a star"], images=[draw(1, seed=3).images[0]], return_tensors="pt"
)
assert model(**inputs).logits_per_image.shape == (1, 1)
"""


@pytest.fixture(scope="module")
def judge() -> ZeroShot:
    return ZeroShot(checkpoint_path())


def test_it_loads_offline_with_the_networks_door_shut() -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    command = [sys.executable, "-c", OFFLINE, str(checkpoint_path())]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_it_is_small_and_holds_no_pickle() -> None:
    files = [path for path in checkpoint_path().iterdir() if path.is_file()]
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md"}
    assert sum(path.stat().st_size for path in files) < 5_000_000
    for path in files:
        head = path.read_bytes()[:2]
        assert head != b"PK"  # a zip, as torch.save writes
        assert head[:1] != b"\x80"  # a pickle


def test_weights_are_half_on_disk_and_single_in_memory() -> None:
    with safe_open(checkpoint_path() / "model.safetensors", "pt") as stored:
        kinds = {stored.get_tensor(name).dtype for name in stored.keys()}  # noqa: SIM118
    assert kinds == {torch.float16}
    assert {p.dtype for p in CLIPModel.from_pretrained(checkpoint_path()).parameters()} == {
        torch.float32
    }


def test_the_vision_tower_has_middle_layers() -> None:
    model = CLIPModel.from_pretrained(checkpoint_path())
    assert len(model.vision_model.encoder.layers) >= 4


def test_it_names_what_new_images_show(judge: ZeroShot) -> None:
    accuracy = judge.accuracies(draw(IMAGES, seed=SEED, combinations="training").scenes)
    assert accuracy["shape"] >= 0.95
    assert accuracy["colour"] >= 0.95
    assert accuracy["texture"] >= 0.90
    for factor in ("background", "position", "size"):
        assert accuracy[factor] >= 0.95, factor


@pytest.mark.slow
def test_it_mostly_names_pairs_of_shape_and_colour_it_never_saw(judge: ZeroShot) -> None:
    accuracy = judge.accuracies(draw(IMAGES, seed=SEED, combinations="held out").scenes)
    assert accuracy["colour"] >= 0.95
    # In training, the colour alone ruled one shape out; chance is 0.11.
    assert accuracy["shape"] >= 0.50


@pytest.mark.parametrize("factor", ["shape", pytest.param("colour", marks=pytest.mark.slow)])
def test_a_printed_word_fools_it(judge: ZeroShot, factor: str) -> None:
    scenes = draw(
        IMAGES,
        seed=SEED + 1,
        words=1.0,
        naming=factor,  # type: ignore[arg-type] # parametrised literal
        conflicting=True,
    ).scenes
    attack = judge.attack(scenes, judge.embed(scenes), factor)
    assert attack.accuracy_without_word >= 0.90
    assert attack.accuracy_without_word - attack.accuracy_with_word >= 0.30
    assert attack.word_wins >= 0.40


def test_the_figures_on_file_are_those_of_the_file(judge: ZeroShot) -> None:
    record = json.loads((checkpoint_path() / "evaluation.json").read_text())
    figures = record["evaluation"]
    assert record["training"]["seed"] == TRAINING_SEED
    assert figures["seed"] == EVALUATION_SEED
    scenes = draw(IMAGES, seed=EVALUATION_SEED, combinations="training").scenes
    for factor, share in judge.accuracies(scenes).items():
        assert abs(share - figures["unseen_images"][factor]) < 0.05, factor


def test_its_tokenizer_knows_the_vocabulary_and_spells_out_the_rest() -> None:
    tokenizer = CLIPTokenizerFast.from_pretrained(checkpoint_path())
    assert tokenizer("a star") == AutoTokenizer.from_pretrained(checkpoint_path())("a star")
    assert tokenizer.model_max_length == 32
    for concept in concept_vocabulary():
        tokens = tokenizer(concept.text)["input_ids"]
        assert len(tokens) == len(concept.text.split()) + 2
        assert tokenizer.decode(tokens, skip_special_tokens=True).strip() == concept.text
    unknown = tokenizer("Zürich!")["input_ids"]
    assert tokenizer.eos_token_id not in unknown[:-1]
    assert tokenizer.decode(unknown, skip_special_tokens=True).replace(" ", "") == "zürich!"


def test_the_processor_gives_what_the_vision_tower_takes() -> None:
    processor = AutoProcessor.from_pretrained(checkpoint_path())
    inputs = processor(images=list(draw(2, seed=0, image_size=200).images), return_tensors="pt")
    side = CLIPModel.from_pretrained(checkpoint_path()).config.vision_config.image_size
    assert inputs["pixel_values"].shape == (2, 3, side, side)


@pytest.mark.slow
def test_training_again_gives_the_same_bits(tmp_path: Path) -> None:
    from benchmarks.demo_checkpoint._training import ClipTraining

    tiny = ClipTraining(images=96, epochs=1, batch_size=32, text_steps=3, width=64)
    for name in ("one", "two"):
        measured = run(TrainClip(out=tmp_path / name, training=tiny, evaluation_images=8))
        record = json.loads((tmp_path / name / "evaluation.json").read_text())
        assert record["evaluation"] == asdict(measured)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []
    for name in ("tokenizer.json", "config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert "| shape |" in (tmp_path / "one" / "README.md").read_text()
