"""Shuffled batches: exact, complete, mixed, and the same again from a saved place."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.activations._stores import D_MLP, D_MODEL, MLP, N_TOKENS, RESID, make_store
from vision_plugin.activations import (
    ActivationStore,
    ShardError,
    ShuffledBatches,
    StoreMismatchError,
)

N = 30
ROWS = N * N_TOKENS

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    from vision_plugin.activations import _making

    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_making, "CHUNK_BYTES", 4000)  # some four images
        return make_store(tmp_path_factory.mktemp("b") / "s", N, hook_names=[RESID, MLP])


def rows_of(tensor: torch.Tensor) -> torch.Tensor:
    """Rows in a standing order."""
    return torch.unique(tensor, dim=0)


@given(
    batch_size=st.integers(16, 400),
    n_batches_in_buffer=st.integers(2, 30),
    seed=st.integers(0, 5),
)
@settings(max_examples=15, deadline=None)
def test_every_row_once_per_epoch_in_batches_of_exact_size(
    store: ActivationStore, batch_size: int, n_batches_in_buffer: int, seed: int
) -> None:
    batches = store.batches(RESID, batch_size, seed=seed, n_batches_in_buffer=n_batches_in_buffer)
    served = []
    while sum(map(len, served)) < 2 * ROWS:
        batch = next(batches)
        assert batch.shape == (batch_size, D_MODEL)
        served.append(batch)
    rows = torch.cat(served)
    everything = rows_of(store.activations(RESID).flatten(0, 1))
    assert torch.equal(rows_of(rows[:ROWS]), everything)
    assert torch.equal(rows_of(rows[ROWS : 2 * ROWS]), everything)


@given(taken=st.integers(0, 40), batch_size=st.integers(1, 200), buffer=st.integers(2, 20))
@settings(max_examples=15, deadline=None)
def test_from_a_saved_place_the_same_batches_follow(
    store: ActivationStore, taken: int, batch_size: int, buffer: int
) -> None:
    first = store.batches(RESID, batch_size, seed=1, n_batches_in_buffer=buffer)
    for _ in range(taken):
        next(first)
    state = json.loads(json.dumps(first.state_dict()))
    second = store.batches(RESID, batch_size, seed=1, n_batches_in_buffer=buffer)
    second.load_state_dict(state)
    assert second.state_dict() == first.state_dict()
    for _ in range(5):
        assert torch.equal(next(first), next(second))


def test_a_place_can_be_gone_back_to(store: ActivationStore) -> None:
    batches = store.batches(RESID, 50)
    next(batches)
    state = batches.state_dict()
    after = [next(batches) for _ in range(15)]
    batches.load_state_dict(state)
    assert all(torch.equal(next(batches), batch) for batch in after)


def test_the_seed_decides_the_order(store: ActivationStore) -> None:
    a, b, c = (store.batches(RESID, 64, seed=seed) for seed in (1, 1, 2))
    first = next(a)
    assert torch.equal(first, next(b))
    assert not torch.equal(first, next(c))


def test_epochs_differ(store: ActivationStore) -> None:
    batches = store.batches(RESID, ROWS)
    assert not torch.equal(next(batches), next(batches))


def test_a_batch_mixes_many_images(store: ActivationStore) -> None:
    batch = store.batches(RESID, 60, n_batches_in_buffer=20).next_batch()
    assert len(batch.images.unique()) > 20


def test_hooks_read_together_stay_together(store: ActivationStore) -> None:
    batches = store.batches([RESID, MLP], 70)
    for _ in range(12):
        batch = batches.next_batch()
        place = (batch.images, batch.rows)
        assert torch.equal(batch.activations[RESID], store.activations(RESID)[place])
        assert torch.equal(batch.activations[MLP], store.activations(MLP)[place])
    found = next(batches)
    assert isinstance(found, dict)
    assert found[MLP].shape == (70, D_MLP)


def test_the_type_is_as_asked_for(store: ActivationStore) -> None:
    assert next(store.batches(RESID, 3)).dtype == torch.float32
    assert next(store.batches(RESID, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_memory_is_bounded_by_the_buffer(store: ActivationStore) -> None:
    batches = store.batches(RESID, 10, n_batches_in_buffer=30)
    for _ in range(100):
        next(batches)
        assert batches._window is None or len(batches._window.order) <= 150


def test_a_batch_that_is_held_stays_as_it_is_and_memory_is_used_again(
    store: ActivationStore,
) -> None:
    batches = store.batches(RESID, 40, n_batches_in_buffer=10)
    held, places = [], set()
    for _ in range(60):
        batch = batches.next_batch()
        vectors = batch.activations[RESID]
        places.add(vectors.untyped_storage().data_ptr())
        if len(held) < 5:
            held.append((batch, vectors.clone()))
    assert all(torch.equal(batch.activations[RESID], before) for batch, before in held)
    windows_read = 60 * 40 // len(batches._reader.begin(0, 0))
    assert len(places) < windows_read


def test_batches_go_on_after_a_read_that_failed(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", 20)
    shard = tmp_path / "s" / "shard-00001.safetensors"
    batches = store.batches(RESID, 20 * N_TOKENS)
    shard.rename(tmp_path / "away")
    for _ in range(2):
        with pytest.raises(ShardError, match="missing"):
            next(batches)
    (tmp_path / "away").rename(shard)
    assert torch.equal(next(batches), next(store.batches(RESID, 20 * N_TOKENS)))


def test_images_with_their_labels_come_along(folder: Path, tmp_path: Path) -> None:
    from tests.activations._stores import config, tiny_model
    from vision_plugin.activations import extract

    store = extract(config(tmp_path / "s"), model=tiny_model(), images=folder)
    batch = store.batches(RESID, 6 * N_TOKENS).next_batch()
    assert store.labels is not None
    for image, row, vector in zip(
        batch.images.tolist(), batch.rows.tolist(), batch.activations[RESID], strict=True
    ):
        assert torch.equal(store.activations(RESID, image)[0, row], vector)
        assert store.ids[image].startswith(store.labels[image])


@pytest.mark.parametrize("changes", [{"seed": 2}, {"batch_size": 51}, {"n_batches_in_buffer": 4}])
def test_a_place_in_other_batches_is_refused(
    store: ActivationStore, changes: dict[str, int]
) -> None:
    state = store.batches(RESID, 50).state_dict()
    other = store.batches(RESID, **{"batch_size": 50, **changes})
    with pytest.raises(StoreMismatchError, match="the saved position is of other batches"):
        other.load_state_dict(state)


def test_a_place_in_another_store_is_refused(store: ActivationStore, tmp_path: Path) -> None:
    state = make_store(tmp_path / "s", 20).batches(RESID, 50).state_dict()
    with pytest.raises(StoreMismatchError, match="store: "):
        store.batches(RESID, 50).load_state_dict(state)


@pytest.mark.parametrize(
    ("hook_names", "batch_size", "buffer", "message"),
    [
        ("blocks.0.hook_resid_pre", 5, 20, "no activations of"),
        ([], 5, 20, "at least one hook"),
        (RESID, 0, 20, "batch_size=0"),
        (RESID, 5, 1, "use 2 or more"),
    ],
)
def test_what_cannot_be_served(
    store: ActivationStore, hook_names: object, batch_size: int, buffer: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        store.batches(hook_names, batch_size, n_batches_in_buffer=buffer)


def test_closing_stops_the_reader(store: ActivationStore) -> None:
    before = threading.active_count()
    batches: ShuffledBatches = store.batches(RESID, 50)
    next(batches)
    batches.close()
    assert threading.active_count() == before
