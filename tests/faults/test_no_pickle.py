"""No pickle is written or read: the source has none, and a payload in a store does nothing.

One module reads the pickles of foreign checkpoints, with an unpickler that builds tensors and plain
containers only; its own tests hold it to that.
"""

from __future__ import annotations

import ast
import os
import pickle
from pathlib import Path

import pytest

import vision_plugin
from tests.activations._stores import RESID, config, tiny_model
from vision_plugin.activations import ActivationStore, StoreError, extract, verify
from vision_plugin.images import open_images

FORBIDDEN = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
PACKAGE = Path(vision_plugin.__file__).parent
RESTRICTED = PACKAGE / "formats" / "_unpickle.py"
SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if path != RESTRICTED)


def test_the_one_module_that_is_left_out_is_there() -> None:
    assert RESTRICTED.is_file()


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_source_neither_imports_nor_calls_it(source: Path) -> None:
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            assert not FORBIDDEN & {alias.name.partition(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert (node.module or "").partition(".")[0] not in FORBIDDEN
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert called not in ("torch.save", "np.load", "np.save", "eval", "exec")
            assert called != "torch.load" or given.get("weights_only") == "True"
            assert "allow_pickle" not in given


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize(
    "code",
    [
        *("import pickle", "from joblib import load", "eval(text)", "np.load(path)"),
        *("torch.load(path)", "torch.load(path, weights_only=False)", "torch.save(x, path)"),
        "read(path, allow_pickle=True)",
    ],
)
def test_the_scan_finds_it(tmp_path: Path, code: str) -> None:
    (tmp_path / "source.py").write_text(code)
    with pytest.raises(AssertionError):
        test_the_source_neither_imports_nor_calls_it(tmp_path / "source.py")


def test_the_payload_would_leave_a_trace(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Payload(tmp_path / "trace")))  # noqa: S301
    assert (tmp_path / "trace").is_dir()


@pytest.mark.parametrize(
    "file", ["manifest.json", "plan.json", "shard-00000.json", "shard-00000.safetensors"]
)
def test_a_payload_in_a_store_leaves_none(store_path: Path, tmp_path: Path, file: str) -> None:
    trace = tmp_path / "trace"
    (store_path / file).write_bytes(pickle.dumps(Payload(trace)))
    if file == "plan.json":
        (store_path / "manifest.json").unlink()
    with pytest.raises(StoreError):
        ActivationStore(store_path).activations(RESID)
    assert not verify(store_path).ok
    assert not trace.exists()


def test_a_payload_among_images_leaves_none(tmp_path: Path, folder: Path) -> None:
    trace = tmp_path / "trace"
    (folder / "cat" / "0.png").write_bytes(pickle.dumps(Payload(trace)))
    store = extract(config(tmp_path / "s"), model=tiny_model(), images=open_images(folder))
    assert [bad.id for bad in store.bad_images] == ["cat/0.png"]
    assert not trace.exists()


def test_nothing_in_a_store_is_a_pickle(sound_store: Path) -> None:
    for path in sound_store.iterdir():
        assert path.suffix in (".json", ".safetensors") or path.name == ".lock"
        with pytest.raises((pickle.UnpicklingError, EOFError, ValueError, IndexError, KeyError)):
            pickle.loads(path.read_bytes())  # noqa: S301
