"""The tree's contracts hold, and they notice an arrow that is drawn backwards."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.metrics_stub import STUB, exports

ROOT = Path(__file__).parents[1]
PUBLIC = {
    "activations": 26,
    "evaluation": 35,
    "formats": 15,
    "images": 8,
    "lens": 75,
    "models": 20,
    "sae": 28,
    "scale": 13,
    "steering": 23,
    "tasks": 43,
}
"""Number of public names of each folder: a new one is a decision, so it changes this table."""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the package and its contracts, to be damaged."""
    ignore = shutil.ignore_patterns("__pycache__", "checkpoint", "llava")
    shutil.copytree(ROOT / "vision_plugin", tmp_path / "vision_plugin", ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    """Check the contracts of the package in a folder, and of no other that is installed."""
    code = (
        "import sys; sys.path.insert(0, '.');"
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in str(f).lower()];"
        "from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    )
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("file", "line", "contract"),
    [
        (None, "", ""),
        ("kernels/_csr.py", "import vision_plugin.models", "Folders import folders below them"),
        ("models/_tokens.py", "from vision_plugin import steering", "Folders import folders below"),
        ("sae/_team.py", "import ray", "The folder scale alone knows Ray"),
        ("metrics/_top.py", "from vision_plugin.evaluation import evaluate", "Folders import fold"),
        ("activations/_errors.py", "import vision_plugin.evaluation", "Folders import folders"),
        ("sae/_wandb.py", "from vision_plugin.sae import _session", "in circles"),
        ("report/_heat.py", "from vision_plugin.models import _tokens", "a private module"),
        ("kernels/_select.py", "import transformers", "The kernels need torch alone"),
    ],
)
def test_an_arrow_drawn_backwards_is_refused(
    checkout: Path, file: str | None, line: str, contract: str
) -> None:
    if file is not None:
        path = checkout / "vision_plugin" / file
        future = "from __future__ import annotations\n"
        text = path.read_text()
        assert future in text
        path.write_text(text.replace(future, f"{future}\n{line}\n", 1))
    done = lint(checkout)
    if file is None:
        assert done.returncode == 0, done.stdout + done.stderr
        return
    assert done.returncode != 0, done.stdout
    assert contract in done.stdout


def test_the_adapters_import_public_names_alone() -> None:
    """The linter does not see ``hooks/``, which lies beside the package."""
    private = re.compile(
        r"vision_plugin\.(?!hooks)\w+\._|from vision_plugin\.(?!hooks)\w+ import _"
    )
    for file in (ROOT / "hooks").glob("*.py"):
        assert not private.search(file.read_text()), file


@pytest.mark.parametrize("folder", sorted(PUBLIC))
def test_each_folder_lists_its_public_names(folder: str) -> None:
    import vision_plugin

    package = getattr(vision_plugin, folder)
    stub = (ROOT / "vision_plugin" / folder / "__init__.pyi").read_text()
    names = re.findall(r"import (\w+) as \1$", stub, re.MULTILINE)
    assert len(names) == len(set(names)) == PUBLIC[folder]
    assert sorted(package.__all__) == sorted(names)
    for name in names:
        assert getattr(package, name) is not None


def test_the_public_names_of_the_metrics_follow_from_their_modules() -> None:
    assert STUB.read_text() == exports(), "run `make exports`"


def test_names_of_the_metrics_are_given_once() -> None:
    names = re.findall(r"import (\w+) as", STUB.read_text())
    assert len(names) == len(set(names))


def test_no_module_is_long_and_none_is_empty() -> None:
    for file in [*(ROOT / "vision_plugin").rglob("*.py"), *(ROOT / "hooks").glob("*.py")]:
        lines = file.read_text().count("\n")
        assert 1 <= lines <= 420, f"{file} has {lines} lines: split it by what it does"
        assert ast.get_docstring(ast.parse(file.read_text())), f"{file} does not say what it is"
