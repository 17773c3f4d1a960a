"""Checksums of saved SAEs: damage is found, and what others wrote is said to be unchecked."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sae_lens import SAE

from tests.formats.test_samples import DATA, assert_same_numbers, expected
from vision_plugin.cli import main
from vision_plugin.formats import CheckpointError, convert, info, load_sae, seal, verify

SAMPLE = "dl-topk"
FILES = ("cfg.json", "sae_weights.safetensors")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """An SAE's folder that this package wrote."""
    return convert(DATA / SAMPLE, tmp_path / "sae")


def test_every_flipped_byte_of_the_weights_is_found(saved: Path) -> None:
    path = saved / "sae_weights.safetensors"
    content = path.read_bytes()
    for at in range(0, len(content), len(content) // 40):
        damaged = bytearray(content)
        damaged[at] ^= 0x01
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"sae_weights\.safetensors"):
            load_sae(saved)
        assert [problem.split(":")[0] for problem in verify(saved).problems] == [path.name]
    path.write_bytes(content)
    assert_same_numbers(load_sae(saved), expected(SAMPLE))
    assert verify(saved).ok


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(share=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_of_the_settings_is_found_or_changes_nothing(
    saved: Path, share: float, bit: int
) -> None:
    path = saved / "cfg.json"
    content = path.read_bytes()
    before = load_sae(saved).cfg.to_dict()
    damaged = bytearray(content)
    damaged[int(share * len(content))] ^= 1 << bit
    path.write_bytes(damaged)
    with contextlib.suppress(CheckpointError):
        assert load_sae(saved).cfg.to_dict() == before
    path.write_bytes(content)


def test_files_beside_the_weights_are_checked_by_verify(saved: Path) -> None:
    (saved / "runner_cfg.json").write_text("{}")
    (saved / "sparsity.safetensors").write_bytes(b"12345")
    seal(saved)
    assert verify(saved).n_files == 4
    (saved / "runner_cfg.json").write_text("[]")
    (saved / "sparsity.safetensors").unlink()
    problems = verify(saved).problems
    assert problems[0].startswith("runner_cfg.json: expected SHA-256")
    assert problems[1] == "sparsity.safetensors: it is missing"
    load_sae(saved)  # needs neither


def test_saelens_reads_the_folder_and_drops_checksums_that_would_be_wrong(
    saved: Path, tmp_path: Path
) -> None:
    stock = SAE.load_from_disk(saved)
    assert_same_numbers(stock, expected(SAMPLE))
    assert "sha256" not in stock.cfg.metadata
    stock.W_dec.data *= 2
    stock.save_model(tmp_path / "changed")
    again = load_sae(tmp_path / "changed")
    assert torch.equal(again.W_dec, stock.W_dec)
    with pytest.raises(ValueError, match="records no checksums"):
        verify(tmp_path / "changed")


@pytest.mark.parametrize(
    "recorded",
    [
        [],
        "x",
        {"cfg.json": 1},
        {"cfg.json": "0" * 63},
        {"../../etc/passwd": "0" * 64},
        {"/etc/passwd": "0" * 64},
        {"a\nb": "0" * 64},
    ],
)
def test_checksums_that_are_none_are_refused(recorded: object, saved: Path) -> None:
    config = json.loads((saved / "cfg.json").read_text()) | {"sha256": recorded}
    (saved / "cfg.json").write_text(json.dumps(config))
    for function in (load_sae, verify, info):
        with pytest.raises(CheckpointError, match=r"checksums in its cfg\.json are dam"):
            function(saved)


def test_info_says_what_is_checked(saved: Path, tmp_path: Path) -> None:
    facts = info(saved)
    assert facts["architecture"] == "topk"
    assert facts["checksums"] == "SHA-256 of 2 files; vision-plugin verify compares them"
    assert "sha256" not in facts
    assert info(saved / "sae_weights.safetensors") == facts
    load_sae(saved).save_model(tmp_path / "foreign")
    for foreign in (tmp_path / "foreign", DATA / SAMPLE, DATA / SAMPLE / "ae.pt"):
        facts = info(foreign)
        assert facts["architecture"] == "topk"
        assert facts["d_in"] == 32
        assert facts["checksums"].startswith("none: another program wrote it")


def test_the_commands_check_and_tell(
    saved: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(saved)]) == 0
    assert "2 files" in capfd.readouterr().out
    assert main(["info", str(saved)]) == 0
    assert "checksums: SHA-256 of 2 files" in capfd.readouterr().out
    assert main(["info", str(DATA / SAMPLE)]) == 0
    assert "checksums: none" in capfd.readouterr().out
    weights = saved / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    assert main(["verify", str(saved)]) != 0
    told = " ".join(capfd.readouterr().err.split())
    assert "is damaged" in told
    assert "DAMAGED sae_weights.safetensors: expected SHA-256" in told
    load_sae(DATA / SAMPLE).save_model(tmp_path / "foreign")
    assert main(["verify", str(tmp_path / "foreign")]) != 0
    assert "records no checksums" in capfd.readouterr().err
