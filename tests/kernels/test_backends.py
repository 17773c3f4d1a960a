"""Choosing a backend, falling back from one that is missing or fails, and saying so."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import warnings
from importlib.metadata import EntryPoint

import pytest
import torch

from vision_plugin import kernels
from vision_plugin.kernels import _backends
from vision_plugin.kernels._torch_backend import TorchBackend

from .reference import inputs


class Failing(TorchBackend):
    """A backend whose selection fails while it runs."""

    name = "failing"

    def encode_topk(self, *arguments):
        """Fail."""
        raise RuntimeError("the device caught fire")


class NeedsOtherDevice(TorchBackend):
    """A backend that serves no device here."""

    name = "elsewhere"

    def unusable(self, device_type):
        """Never usable."""
        return f"{device_type} is not an abacus"


FAILING = Failing()
NEEDS_OTHER_DEVICE = NeedsOtherDevice()


@pytest.fixture
def publish(monkeypatch):
    """Publish backends under the entry-point group, as an installed package would."""

    def publish(**values):
        points = [EntryPoint(name, value, _backends.GROUP) for name, value in values.items()]
        monkeypatch.setattr(_backends, "entry_points", lambda group: points)
        _backends.forget()

    yield publish
    monkeypatch.undo()
    _backends.forget()


def _encode(**keywords):
    t = inputs(3, 4, 10)
    return kernels.topk_encode(t["x"], t["W_enc"], t["b_enc"], 2, **keywords)


def test_the_reference_serves_the_cpu_and_is_chosen_there_without_a_word():
    _backends.forget()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kernels.choose("cpu") == "torch"
        _encode()
    status = kernels.available()
    assert "cpu" in status["torch"].devices
    assert status["torch"].reason is None


def test_the_report_says_why_triton_cannot_run_here():
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is present, so Triton runs here")
    status = kernels.available()["triton"]
    assert status.devices == ()
    assert "Triton" in status.reason


def test_asking_for_triton_by_name_on_a_cpu_fails_with_the_reason():
    with pytest.raises(kernels.BackendUnavailableError, match="compiles for CUDA and not for cpu"):
        _encode(backend="triton")


def test_an_unknown_name_fails_and_lists_the_known_ones():
    with pytest.raises(kernels.BackendUnavailableError, match="known: torch, triton"):
        _encode(backend="abacus")
    with (
        pytest.raises(kernels.BackendUnavailableError, match="known: torch, triton"),
        kernels.use_backend("abacus"),
    ):
        pass


def test_the_environment_and_the_block_name_a_backend(monkeypatch, publish):
    monkeypatch.setenv(_backends.ENVIRONMENT_VARIABLE, "triton")
    publish()  # forgets that a process has read it, now and at the end
    with pytest.raises(kernels.BackendUnavailableError, match="'triton' was asked for"):
        _encode()
    with kernels.use_backend("torch"):
        _encode()
    with pytest.raises(kernels.BackendUnavailableError, match="'triton' was asked for"):
        _encode()


def test_a_backend_that_fails_while_running_is_replaced_with_one_warning(publish):
    publish(failing="tests.kernels.test_backends:FAILING")
    expected = _encode(backend="torch")
    with pytest.warns(RuntimeWarning, match="'failing'.*the device caught fire") as caught:
        first = _encode()
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = _encode()
    for result in (first, second):
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
    assert "caught fire" in (kernels.available()["failing"].reason or "")


def test_a_failing_backend_asked_for_by_name_fails_with_the_reason(publish):
    publish(failing="tests.kernels.test_backends:FAILING")
    with pytest.raises(kernels.BackendUnavailableError, match="the device caught fire"):
        _encode(backend="failing")


def test_a_backend_that_cannot_be_imported_says_what_is_missing(publish):
    publish(broken="a_package_that_is_not_there.kernels:BACKEND")
    assert "a_package_that_is_not_there" in kernels.available()["broken"].reason
    with pytest.raises(kernels.BackendUnavailableError, match="No module named"):
        _encode(backend="broken")
    with pytest.warns(RuntimeWarning, match="'broken'.*No module named") as caught:
        _encode()
        _encode()
    assert len(caught) == 1


def test_a_missing_preferred_backend_on_a_gpu_warns_once_and_falls_back(publish):
    publish(elsewhere="tests.kernels.test_backends:NEEDS_OTHER_DEVICE")
    with pytest.warns(RuntimeWarning, match="'elsewhere'.*cuda is not an abacus"):
        chosen = kernels.choose("cuda")
    assert chosen in ("torch", "triton")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kernels.choose("cuda") == chosen


def test_another_package_cannot_take_a_built_in_name(publish, caplog):
    publish(torch="tests.kernels.test_backends:FAILING")
    _encode(backend="torch")
    assert "belongs to vision_plugin" in caplog.text


def test_running_out_of_memory_is_not_hidden_by_a_fallback(publish, monkeypatch):
    publish(failing="tests.kernels.test_backends:FAILING")

    def out_of_memory(*arguments):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(FAILING, "encode_topk", out_of_memory, raising=False)
    with pytest.raises(torch.OutOfMemoryError):
        _encode()


def test_the_kernels_need_torch_alone():
    code = """
        import sys

        class Refuse:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in REFUSED:
                    raise ModuleNotFoundError(f"{name} is refused", name=name)

        REFUSED = {"sae_lens", "transformer_lens", "jaxtyping", "beartype", "wrapt", "rich",
                   "transformers", "einops", "safetensors", "datasets", "torchmetrics",
                   "PIL", "tyro", "jinja2"}
        import torch  # which looks for some of these itself
        sys.meta_path.insert(0, Refuse())
        from vision_plugin import kernels
        x, W, b = torch.randn(3, 4), torch.randn(4, 9), torch.randn(9)
        values, indices = kernels.topk_encode(x, W, b, 2)
        kernels.sparse_decode(values, indices, torch.randn(9, 4))
        print(sorted(kernels.available()), REFUSED & set(sys.modules))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['torch', 'triton'] set()"
