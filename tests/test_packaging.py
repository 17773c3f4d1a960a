"""What is installed, what importing costs, and what the hosts see of it."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_package_list_is_the_folders_on_disk() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {
        ".".join(file.parent.relative_to(ROOT).parts)
        for file in (ROOT / "vision_plugin").rglob("__init__.py")
    }
    assert set(settings["packages"]) == folders | {"vision_plugin.hooks"}
    assert settings["package-dir"]["vision_plugin.hooks"] == "hooks"


def test_importing_is_quick_and_brings_no_torch() -> None:
    code = (
        "import sys, time; start = time.process_time(); import vision_plugin; "
        "print(time.process_time() - start, 'torch' in sys.modules, 'sae_lens' in sys.modules)"
    )
    # Processor time, and the best of several: a busy machine does not make the import slower.
    seconds, torch, sae_lens = min(python(code).split() for _ in range(5))
    assert (torch, sae_lens) == ("False", "False")
    assert float(seconds) < 0.3


@pytest.mark.slow
@pytest.mark.parametrize("order", ["vision_plugin, sae_lens", "sae_lens, vision_plugin"])
def test_sae_lens_knows_us_in_either_order(order: str) -> None:
    code = f"""
import {order}
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY as registry
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
assert "vision_plugin_topk" in registry, sorted(registry)
assert "vision-clip-b-32-resid-post" in get_pretrained_saes_directory()
"""
    python(code)


def test_the_hosts_are_unchanged_without_us() -> None:
    code = """
import sae_lens, sys
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY as registry
from transformer_lens.model_bridge.sources.transformers import SUPPORTED_ARCHITECTURES
assert "vision_plugin" not in sys.modules
assert not any("vision" in name for name in registry)
assert "CLIPModel" not in SUPPORTED_ARCHITECTURES
"""
    python(code)


def test_the_adapters_are_never_a_top_level_package(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import hooks"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "the adapters are the package 'vision_plugin.hooks'" in done.stderr


def test_vision_plugin_reaches_the_adapters_through_entry_points_only() -> None:
    static = re.compile(r"^\s*(from|import) vision_plugin\.hooks", re.MULTILINE)
    for file in (ROOT / "vision_plugin").rglob("*.py"):
        assert not static.search(file.read_text()), file


def test_the_lock_names_no_address() -> None:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pinned = re.compile(r"[a-z0-9._-]+==[^ ;/:@]+( ; .*)?")
    assert lines
    assert all(pinned.fullmatch(line) for line in lines)


def test_no_code_of_ours_reads_or_writes_pickles() -> None:
    """Calls, as the parser sees them: a message that tells a person to call one is no call."""
    for file in [*(ROOT / "vision_plugin").rglob("*.py"), *(ROOT / "hooks").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("torch.save", "pickle.load", "pickle.loads", "pickle.dump"), (
                    file
                )
                unsafe = [k for k in node.keywords if k.arg == "weights_only"]
                assert all(ast.literal_eval(k.value) is True for k in unsafe), file
