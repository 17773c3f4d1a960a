"""Every public name has an example in the reference, and each example prints what it says."""

from __future__ import annotations

import ast
import doctest
import importlib
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import vision_plugin as vp
from tests.test_documents import generator

ROOT = Path(__file__).parents[1]
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
LACKING: frozenset[str] = frozenset()
"""Public names that have no example yet, as ``folder.name``."""
LONG = frozenset(
    {
        "evaluation.write_study",
        "lens.Check",
        "lens.ConceptBottleneck",
        "lens.Decomposed",
        "lens.Explanation",
        "lens.FeatureNames",
        "lens.NameCandidates",
        "lens.TextLens",
        "lens.decompose_images",
        "lens.read_names",
        "sae.Quality",
        "sae.VisionMultiSAETrainingRunner",
        "sae.VisionSAETrainingRunner",
        "scale.launch",
        "scale.train_by_latents",
        "scale.train_in_lanes",
        "tasks.GroupData",
        "tasks.LabelledImages",
        "tasks.TaskResult",
        "tasks.attribute",
        "tasks.background",
        "tasks.ravel",
        "tasks.read_celeba",
        "tasks.read_factors",
        "tasks.read_waterbirds",
        "tasks.typographic",
    }
)
"""Public names whose examples take more than a second."""
LONGEST = frozenset({"lens.Hallucination", "lens.hallucination", "tasks.multimodal"})
"""Those whose examples make a vision-language model, and let it speak."""


def docstrings(body: list[ast.stmt], within: str = "") -> Iterator[tuple[str, str, int]]:
    """Yield name, docstring and line of each class, function and constant that has one."""
    for node, following in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            if text := ast.get_docstring(node):
                yield within + node.name, text, node.lineno
            if isinstance(node, ast.ClassDef):
                yield from docstrings(node.body, f"{within}{node.name}.")
        elif isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(following, ast.Expr):
            name = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            text = getattr(following.value, "value", None)
            if isinstance(name, ast.Name) and isinstance(text, str):
                yield within + name.id, text, node.lineno


@cache
def documented(module: str) -> dict[str, tuple[str, str, int]]:
    """Return docstring, file and line by the names of a module."""
    path = ROOT.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    found = docstrings(ast.parse(file.read_text()).body)
    return {name: (text, str(file), line) for name, text, line in found}


def modules() -> list[str]:
    """Return the modules of the package."""
    files = sorted((ROOT / "vision_plugin").rglob("*.py"))
    parts = [file.relative_to(ROOT).with_suffix("").parts for file in files]
    return [".".join(names).removesuffix(".__init__") for names in parts]


def public() -> dict[str, str]:
    """Return where each public name is defined, by ``folder.name``."""
    listed = generator().reference().items()
    return {f"{folder}.{name}": path for folder, names in listed for name, path in names.items()}


def has_example(path: str) -> bool:
    """Return whether the docstring at a path, or where it is imported from, has an example."""
    module, _, name = path.rpartition(".")
    if name in documented(module):
        return ">>> " in documented(module)[name][0]
    origin = getattr(getattr(importlib.import_module(module), name, None), "__module__", module)
    return origin != module and has_example(f"{origin}.{name}")


EXAMPLES = {
    f"{module}.{name}": entry
    for module in modules()
    for name, entry in documented(module).items()
    if ">>> " in entry[0]
}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The names that the examples start from, in a folder that they may write into."""
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("examples"))
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(generator().EXAMPLES, "the start of the examples", "exec"), names)
    yield names
    os.chdir(before)


def cases() -> list[Any]:
    """Return the examples by the names of their docstrings, marked as what they cost."""
    marks = {public()[name]: pytest.mark.slow for name in LONG}
    marks |= {public()[name]: pytest.mark.exhaustive for name in LONGEST}
    marks["vision_plugin.scale._engine.RayEngine"] = pytest.mark.scale
    return [pytest.param(name, marks=marks.get(name, ())) for name in sorted(EXAMPLES)]


@pytest.mark.parametrize("name", cases())
def test_an_example_prints_what_it_says(name: str, start: dict[str, Any]) -> None:
    text, file, line = EXAMPLES[name]
    examples = doctest.DocTestParser().get_examples(text)
    assert not any(doctest.SKIP in example.options for example in examples)
    runner = doctest.DocTestRunner(verbose=False, optionflags=FLAGS)
    told: list[str] = []
    runner.run(doctest.DocTest(examples, dict(start), name, file, line, text), out=told.append)
    assert runner.failures == 0, "".join(told)


def test_every_public_name_has_an_example() -> None:
    without = {name for name, path in public().items() if not has_example(path)}
    assert sorted(without - LACKING) == [], "write an example"
    assert sorted(LACKING - without) == [], "take these off the list: they have one, or are gone"


def test_the_reference_lists_the_names_of_the_package_itself() -> None:
    listed = set(generator().names("vision_plugin"))
    own = {name for name in vp.__all__ if not isinstance(getattr(vp, name), ModuleType)}
    assert listed == own - {"__version__"} | {"report"}


def test_a_name_without_an_example_is_noticed() -> None:
    (found,) = docstrings(ast.parse('def f():\n    """Do.\n\n    >>> 1\n    """').body)
    assert found == ("f", "Do.\n\n>>> 1", 1)
    assert [name for name, *_ in docstrings(ast.parse('A = 1\n"""One."""\nB = 2').body)] == ["A"]
    assert not has_example("vision_plugin.demo._factors._PAIRS")
