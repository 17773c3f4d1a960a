"""A store of every schema version that was ever released stays readable.

``data/golden-1.0`` was written once by the code of that version; it is never written again. To add
one for a new version, run this file's ``write_golden`` and put the folder beside the others.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch

from tests.activations._stores import MLP, RESID, make_store
from vision_plugin.activations import ActivationStore, info, verify

DATA = Path(__file__).parent / "data"
GOLDEN = sorted(DATA.glob("golden-*"))


def write_golden() -> Path:
    """A store of six images, with random tokens in bfloat16."""
    torch.set_num_threads(1)
    made = DATA / "new"
    make_store(
        made,
        6,
        hook_names=[RESID, MLP],
        tokens="random:2",
        dtype="bfloat16",
        images_per_shard=4,
        seed=5,
    )
    (made / ".lock").unlink()
    return made.rename(golden_of_version(made))


def golden_of_version(store: Path) -> Path:
    """The golden store of the version that another store has."""
    manifest = json.loads((store / "manifest.json").read_text())
    return DATA / f"golden-{manifest['schema_version']}"


def test_there_is_one_of_this_version(tmp_path: Path) -> None:
    make_store(tmp_path / "store", 1)
    assert golden_of_version(tmp_path / "store") in GOLDEN


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.name)
def test_it_opens_verifies_and_reads(path: Path) -> None:
    assert verify(path).ok
    assert info(path)["complete"]
    store = ActivationStore(path)
    assert store.ids == [str(i) for i in range(6)]
    assert store.activations(RESID).shape == (6, 2, 16)
    assert store.activations(MLP).shape == (6, 2, 24)
    assert next(store.batches([RESID, MLP], 5))[MLP].shape == (5, 24)


def test_the_values_of_1_0_are_those_that_were_written() -> None:
    """Read from the file without any code of the package."""
    path = DATA / "golden-1.0"
    raw = (path / "shard-00001.safetensors").read_bytes()
    start = 8 + struct.unpack("<Q", raw[:8])[0]
    rows = torch.frombuffer(bytearray(raw[start : start + 16]), dtype=torch.int32).view(2, 2)
    size = 2 * 2 * 16 * 2
    values = torch.frombuffer(bytearray(raw[start + 16 : start + 16 + size]), dtype=torch.bfloat16)
    store = ActivationStore(path)
    assert torch.equal(store.token_rows([4, 5]), rows.long())
    assert torch.equal(store.activations(RESID, slice(4, 6)), values.view(2, 2, 16))
