"""Sharing an SAE: the folder, the card, and the way to a hub and back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sae_lens import SAE, StandardSAE, StandardSAEConfig

import vision_plugin as vp
from tests._hub_server import TOKEN, files_of, serving
from vision_plugin.sae import hub_folder, push_to_hub

HOOK = "blocks.1.hook_resid_post"
SUMMARY = {
    "monosemanticity@/home/someone/judges/clip/sae": {"mean_score": 0.25, "n_dead": 3},
    "monosemanticity@/home/someone/judges/clip/random": {"mean_score": 0.125, "n_dead": None},
    "fvu/sae": {"explained_variance": 0.5},
}


@pytest.fixture
def sae() -> StandardSAE:
    torch.manual_seed(0)
    made = StandardSAE(StandardSAEConfig(d_in=8, d_sae=16))
    made.cfg.metadata.model_name = "/home/someone/models/secret-run/dino"
    made.cfg.metadata.hook_name = HOOK
    made.cfg.metadata.dataset_path = "~/pictures/of <b>mine"
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return made


@pytest.fixture
def evaluation(tmp_path: Path) -> Path:
    file = tmp_path / "evaluation.json"
    content = {
        "schema": "vision_plugin.evaluation/1",
        "config": {"images": "/home/someone/photos", "k": 3},
        "n_images": 1200,
        "seen_in_training": True,
        "summary": SUMMARY,
        "per_latent": {"monosemanticity@/home/someone/judges/clip": {"sae": {"score": [0.5]}}},
        "left_out": {
            "stability@/home/someone/x/clip/pca": "no SAE at /home/someone/b/sae: give one"
        },
    }
    file.write_text(json.dumps(content))
    return file


def test_the_folder_holds_the_sae_and_a_card_and_no_path(sae, evaluation, tmp_path: Path) -> None:
    picture = tmp_path / "shot.PNG"
    picture.write_bytes(b"\x89PNG")
    folder = hub_folder(
        sae,
        tmp_path / "out",
        "me/saes",
        evaluation=evaluation,
        names={3: "a `wheel` | <script>", 1: "frog"},
        pictures=[picture],
    )
    files = files_of(folder)
    assert sorted(files) == [
        *("README.md", "cfg.json", "evaluation.json", "names.json", "pictures/0.png"),
        "sae_weights.safetensors",
    ]
    text = b"".join(content for name, content in files.items() if not name.endswith("tensors"))
    assert b"someone" not in text
    assert b"secret-run" not in text
    card = files["README.md"].decode()
    assert card.startswith("---\n")
    assert "library_name: saelens" in card.split("---")[1]
    assert "base_model" not in card  # a folder of this machine is no model of the hub
    assert 'vp.load_sae("me/saes")' in card
    assert "| monosemanticity@clip: mean score | 0.25 | 0.125 |" in card
    assert "| fvu: explained variance | 0.5 | - |" in card
    assert "1,200 images. The SAE was trained on these images" in card
    assert r"| 3 | a \`wheel\` \| \<script\> |" in card
    assert card.index("| 1 | frog |") < card.index("| 3 | a")
    assert r"of \<b\>mine" in card
    assert "![](pictures/0.png)" in card
    scores = json.loads(files["evaluation.json"])
    assert list(scores["per_latent"]) == ["monosemanticity@clip"]
    assert scores["left_out"] == {"stability@clip-2/pca": "no SAE at sae: give one"}
    stock = SAE.load_from_disk(folder)
    for name, tensor in sae.state_dict().items():
        assert torch.equal(stock.state_dict()[name], tensor)
    assert vp.formats.verify(folder).ok


def test_a_model_of_the_hub_is_named_as_the_base(sae, tmp_path: Path) -> None:
    sae.cfg.metadata.model_name = "openai/clip-vit-base-patch32"
    card = (hub_folder(sae, tmp_path / "out", "me/saes", sae_id="a/b") / "README.md").read_text()
    assert "base_model: openai/clip-vit-base-patch32" in card
    assert 'SAE.from_pretrained("me/saes", "a/b")' in card


def test_a_saved_sae_is_shared_with_the_evaluation_beside_it(sae, evaluation, tmp_path) -> None:
    saved = tmp_path / "saved"
    sae.save_model(saved)
    (saved / "evaluation.json").write_bytes(evaluation.read_bytes())
    (saved / "runner_cfg.json").write_text('{"images": "/home/someone"}')
    folder = hub_folder(saved, tmp_path / "out", "me/saes")
    assert "evaluation.json" in files_of(folder)
    assert "runner_cfg.json" not in files_of(folder)  # it is about this machine


@pytest.mark.parametrize(
    "content", ['[{"summary": 1}]', '{"summary": ["fvu"]}', '{"left_out": {}}']
)
def test_a_file_that_is_no_evaluation_is_refused(sae, tmp_path: Path, content: str) -> None:
    file = tmp_path / "evaluation.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"evaluation\.json is not an evaluation: name a file"):
        hub_folder(sae, tmp_path / "out", "me/saes", evaluation=file)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"repo_id": "a/b/c"}, ValueError, "repo_id='a/b/c' is no name of a repository"),
        ({"sae_id": "../x"}, ValueError, "sae_id='../x' is no folder of a repository"),
        ({"names": {16: "x"}}, ValueError, "names has latent 16, and the SAE has latents 0 to 15"),
        ({"pictures": ["no.png"]}, FileNotFoundError, "the picture no.png is not there"),
        ({"evaluation": "no.json"}, FileNotFoundError, "no.json"),
        ({"sae": "nowhere"}, FileNotFoundError, "nowhere has no cfg.json: name the folder"),
    ],
)
def test_bad_input_leaves_nothing(sae, tmp_path: Path, changes, error, message) -> None:
    arguments = {"sae": sae, "output_path": tmp_path / "out", "repo_id": "me/saes", **changes}
    with pytest.raises(error, match=message):
        hub_folder(**arguments)
    assert list(tmp_path.iterdir()) == []


PUSH = """
import sys, torch
import vision_plugin as vp
from sae_lens import SAE

folder, sae_id = sys.argv[1:]
print(vp.push_to_hub(folder, "me/saes", sae_id=sae_id))
stock = SAE.from_pretrained("me/saes", sae_id)
ours = vp.load_sae("me/saes", sae_id)
saved = SAE.load_from_disk(folder).state_dict()
for name, tensor in saved.items():
    assert torch.equal(stock.state_dict()[name], tensor)
    assert torch.equal(ours.state_dict()[name], tensor)
"""


@pytest.mark.slow
def test_to_a_hub_and_back_into_stock_saelens(sae, tmp_path: Path) -> None:
    """Over HTTP, with the real client; large files go through LFS."""
    sae.save_model(tmp_path / "saved")
    with serving() as (hub, address):
        environment = {
            **os.environ,
            "HF_ENDPOINT": address,
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
        }
        for sae_id in ("layer_1", "layer_2/wide"):
            done = subprocess.run(
                [sys.executable, "-c", PUSH, str(tmp_path / "saved"), sae_id],
                env=environment,
                capture_output=True,
                text=True,
                timeout=120,
            )
            assert done.returncode == 0, done.stderr[-2000:]
            assert "/me/saes/commit/" in done.stdout
        files = hub.repositories["me/saes"]
    for sae_id in ("layer_1", "layer_2/wide"):
        names = {"README.md", "cfg.json", "sae_weights.safetensors"}
        assert {f"{sae_id}/{name}" for name in names} <= files.keys()
    uploaded = files["layer_1/sae_weights.safetensors"]
    assert uploaded == (tmp_path / "saved" / "sae_weights.safetensors").read_bytes()
    assert any(request.startswith("PUT /lfs/") for request in hub.requests)


def test_a_hub_that_refuses_or_is_silent_is_one_sentence(sae) -> None:
    with serving() as (hub, address):
        hub.refuses = True
        with pytest.raises(ConnectionError, match=r"me/saes was not uploaded to .*hf auth login"):
            push_to_hub(sae, "me/saes", endpoint=address, token=TOKEN)
        assert hub.repositories == {}
    with pytest.raises(ConnectionError, match=r"me/saes was not uploaded to .*run it again"):
        push_to_hub(sae, "me/saes", endpoint="http://127.0.0.1:9", token=TOKEN)
