"""The Triton kernels without a GPU: interpreted against the reference, and compiled ahead."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


def _cases(mode: str, tmp: Path) -> dict:
    environment = os.environ | {
        "TRITON_INTERPRET": "1" if mode in ("interpret", "short") else "0",
        "TRITON_CACHE_DIR": str(tmp / "triton"),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.triton_cases", mode],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_kernels_match_the_reference_in_the_interpreter(tmp_path):
    cases = _cases("short", tmp_path)
    assert cases == dict.fromkeys(("few latents", "batch topk", "tiled product"), "ok")


@pytest.mark.exhaustive
def test_every_kernel_matches_the_reference_in_the_interpreter(tmp_path):
    cases = _cases("interpret", tmp_path)
    assert len(cases) > 30
    assert {name: found for name, found in cases.items() if found != "ok"} == {}


@pytest.mark.exhaustive
def test_every_kernel_compiles_for_a100_and_h100_without_spills(tmp_path):
    report = _cases("compile", tmp_path)
    assert any(name.endswith("sm_80") for name in report)
    assert any(name.endswith("sm_90") for name in report)
    assert {name: found for name, found in report.items() if found["spilled"]} == {}


def test_the_annotation_hook_leaves_the_kernels_source_to_triton():
    from triton.runtime import JITFunction

    from vision_plugin.kernels import _triton_encoder_kernels, _triton_kernels

    for module in (_triton_encoder_kernels, _triton_kernels):
        kernels = [value for value in vars(module).values() if isinstance(value, JITFunction)]
        assert len(kernels) > 5
        for kernel in kernels:
            assert kernel.fn.__globals__ is vars(module), "Triton would look for tl elsewhere"
            assert not hasattr(kernel.fn, "__wrapped__")


@pytest.mark.exhaustive
def test_the_variable_length_functions_compile(tmp_path):
    assert _cases("eager", tmp_path) == {"batch topk": "ok"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", ["random", "ties", "skewed"])
def test_every_kernel_matches_the_reference_on_a_gpu(kind):
    from vision_plugin import kernels

    from .reference import inputs

    results = []
    for backend in ("triton", "torch"):
        leaves = {
            name: tensor.float().cuda().requires_grad_()
            for name, tensor in inputs(300, 100, 4000, kind=kind).items()
        }
        values, indices = kernels.topk_encode(
            leaves["x"], leaves["W_enc"], leaves["b_enc"], 20, b_in=leaves["b_in"], backend=backend
        )
        out = kernels.sparse_decode(values, indices, leaves["W_dec"], backend=backend)
        out.pow(2).mean().backward()
        grads = [leaf.grad for name, leaf in leaves.items() if name != "b_dec"]
        results.append((indices, values, out, *grads))
    assert torch.equal(results[0][0], results[1][0])
    for found, expected in zip(results[0][1:], results[1][1:], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
