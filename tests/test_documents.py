"""The pages of docs/ hold: examples run, links lead somewhere, flags and lists are right."""

from __future__ import annotations

import contextlib
import doctest
import importlib
import importlib.util
import io
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from posixpath import dirname, normpath
from types import ModuleType
from typing import Any

import pytest
import yaml
from markdown.extensions.toc import slugify

from vision_plugin.cli import COMMANDS, main

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
METRICS = sorted(
    point.name
    for point in entry_points(group="vision_plugin.metrics")
    if point.value.startswith("vision_plugin.")
)
SECTIONS = ("Formula", "A good value", "What it does not say", "Edges", "Command", "Source")
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.M | re.S)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
OF_SEVERAL = {"lens", "tasks"}
"""Commands whose next word chooses what they do."""
NO_PAGE = {"cli", "hooks"}
"""Folders without public names for users."""


@cache
def generator() -> ModuleType:
    """The module that makes the generated pages."""
    spec = importlib.util.spec_from_file_location("docs_pages", DOCS / "pages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def texts() -> dict[str, str]:
    """Every page of the site by its address, written and generated."""
    written = {str(page.relative_to(DOCS)): page.read_text() for page in PAGES}
    return {**written, **generator().pages()}


def nav(entry: Any) -> list[str]:
    """The addresses in a part of the site's table of contents."""
    if isinstance(entry, str):
        return [entry]
    parts = entry.values() if isinstance(entry, dict) else entry
    return [address for part in parts for address in nav(part)]


def blocks(text: str) -> list[str]:
    """The Python blocks of a page that say they run."""
    python = [code for language, code in FENCE.findall(text) if language in ("python", "py")]
    return [code for code in python if code.startswith("# runs") or ">>> " in code]


RUNNING = [page for page in PAGES if blocks(page.read_text())]


# ---------------------------------------------------------------------------------------- metrics


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_has_a_page_that_says_what_it_does_not_say(name: str) -> None:
    text = (DOCS / "metrics" / f"{name}.md").read_text()
    headings = re.findall(r"^## (.+)$", text, re.M)
    assert [section for section in SECTIONS if section not in headings] == []
    assert re.search(rf"^vision-plugin eval .*--metrics(?: \w+)* {name}\b", text, re.M)
    assert blocks(text)
    assert f"({name}.md)" in (DOCS / "metrics" / "index.md").read_text()


def test_every_page_of_a_metric_is_of_a_metric_that_there_is() -> None:
    written = {page.stem for page in (DOCS / "metrics").glob("*.md")} - {"index"}
    assert written == set(METRICS)


# --------------------------------------------------------------------------------------- examples


@pytest.mark.parametrize("page", RUNNING, ids=lambda page: str(page.relative_to(DOCS)))
def test_the_examples_of_a_page_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # an example may write
    names: dict[str, Any] = {"__name__": "__main__"}
    runner = doctest.DocTestRunner(verbose=False)
    told: list[str] = []
    for number, code in enumerate(blocks(page.read_text())):
        if code.startswith("# runs"):
            exec(compile(code, f"{page}, block {number}", "exec"), names)
            continue
        example = doctest.DocTest(
            doctest.DocTestParser().get_examples(code), names, page.name, str(page), 0, code
        )
        runner.run(example, out=told.append, clear_globs=False)
        names = example.globs
    assert runner.failures == 0, "".join(told)


@pytest.mark.slow
def test_the_first_program_of_a_newcomer_runs(tmp_path: Path) -> None:
    (code,) = [
        code
        for _, code in FENCE.findall((DOCS / "getting-started.md").read_text())
        if code.startswith("import vision_plugin")
    ]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "mean_score" in done.stdout
    assert (tmp_path / "runs" / "first-report" / "index.html").is_file()


PREPARED = """
from vision_plugin.demo.attacks import attack
list_of_pil_images, image, images = list(world.images), world.images[:1], "demo:60"
largest, clean_means = latents.amax(0), latents.mean(0)
directions = torch.eye(128)[:2]
pairs = attack(model, "shape", 40, seed=0)
with_word, without_word, labels, printed = pairs.attacked, pairs.clean, pairs.labels, pairs.printed
texts = model.encode_text(list(vp.demo.zero_shot_prompts("shape")[0]))
vp.Edit.clamp(sae, {123: 50.0}).save("edit.json", sae="runs/sae")
"""
"""What the code of the pages takes for granted, in the drawn world."""
SMALLER = {
    "openai/clip-vit-base-patch32": "demo",
    "imagefolder:photos/": "demo:60",
    '"photos/"': '"demo:60"',
    "blocks.10.": "blocks.2.",
    "d_in=768, d_sae=24576, k=32": "d_in=128, d_sae=256, k=8",
    "20_000_000": "2_048",
}
"""What stands on the front page, and what of the drawn world is put in its place."""


@pytest.mark.parametrize(
    "page",
    [
        *(pytest.param(page, marks=pytest.mark.slow) for page in ("README.md", "docs/steering.md")),
        *(
            pytest.param(page, marks=pytest.mark.exhaustive)
            for page in ("docs/names.md", "docs/report.md", "docs/vision-language.md")
        ),
    ],
)
def test_the_code_of_a_page_runs_in_the_drawn_world(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(generator().EXAMPLES + PREPARED, names)
    if page != "README.md":  # the front page trains it
        shutil.copytree("runs/sae", "runs/my_sae")
    blocks_of_page = FENCE.findall((ROOT / page).read_text())
    python = [code for language, code in blocks_of_page if language == "python"]
    assert python
    for code in python:
        if page == "README.md":
            assert all(text in code for text in SMALLER)
        for text, smaller in SMALLER.items():
            code = code.replace(text, smaller)
        exec(compile(code, page, "exec"), names)


def test_an_example_that_prints_something_else_is_noticed() -> None:
    runner, told = doctest.DocTestRunner(verbose=False), []
    (code,) = blocks("```python\n>>> 1 + 1\n3\n\n```\n")
    examples = doctest.DocTestParser().get_examples(code)
    runner.run(doctest.DocTest(examples, {}, "page", "page", 0, code), out=told.append)
    assert runner.failures == 1
    assert "Expected" in "".join(told)


# --------------------------------------------------------------------------------------- commands


def command_lines(text: str) -> list[str]:
    """The lines of a page's blocks that call ``vision-plugin``, continued ones joined."""
    joined = [code.replace("\\\n", " ") for _, code in FENCE.findall(text)]
    lines = [line.removeprefix("$ ") for code in joined for line in code.splitlines()]
    return [line for line in lines if line.startswith("vision-plugin ")]


@cache
def flags_of(*words: str) -> frozenset[str]:
    """The flags that the help of a command lists."""
    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.suppress(SystemExit):
        main([*words, "--help"])
    return frozenset(re.findall(r"--[a-z][\w-]*", told.getvalue()))


LINES = sorted({line for page in PAGES for line in command_lines(page.read_text())})


def test_the_commands_of_the_pages_have_the_flags_that_they_use() -> None:
    wrong = []
    for line in LINES:
        words = shlex.split(line, comments=True)[1:]
        name = words[0]
        if name not in COMMANDS:
            wrong += [line] if not name.startswith("-") and name.isalpha() else []
            continue
        used = {word.partition("=")[0].replace("_", "-") for word in words if word[:2] == "--"}
        known = flags_of(*words[: 2 if name in OF_SEVERAL and len(words) > 1 else 1])
        wrong += [f"{line}: {flag}" for flag in used - known - {"--help"}]
    assert wrong == []
    assert "--sae" in flags_of("eval")


# ------------------------------------------------------------------------------------------ links


def prose(text: str) -> str:
    """A page without its blocks and its inline code, where brackets are no links."""
    return re.sub(r"`[^`\n]+`", "code", FENCE.sub("", text))


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.M)
    plain = (re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading) for heading in headings)
    return {slugify(heading.strip(), "-") for heading in plain}


def dead_links(pages: dict[str, str], files: set[str]) -> list[str]:
    """The relative links of pages that lead nowhere."""
    dead = []
    for address, text in pages.items():
        for link in LINK.findall(prose(text)):
            if re.match(r"[a-z]+:", link):
                continue
            path, _, anchor = link.partition("#")
            target = normpath(f"{dirname(address)}/{path}".lstrip("/")) if path else address
            is_there = target in files or target in pages
            if not is_there or (anchor and anchor not in anchors(pages.get(target, ""))):
                dead.append(f"{address}: {link}")
    return dead


def test_no_link_inside_the_site_is_dead() -> None:
    files = {str(file.relative_to(DOCS)) for file in DOCS.rglob("*") if file.is_file()}
    files |= {f"measured/{picture.name}" for picture in generator().pictures()}
    assert dead_links(texts(), files) == []


def test_a_dead_link_is_noticed() -> None:
    pages = {
        "a/one.md": "# One\n[there](../two.md#the-part) ![no](no.png) [no](two.md)",
        "two.md": "# Two\n## The `part`\n[no](a/one.md#gone)\n```\n[code](x.md)\n```\n",
    }
    found = dead_links(pages, set())
    assert found == ["a/one.md: no.png", "a/one.md: two.md", "two.md: a/one.md#gone"]


def test_every_page_is_in_the_table_of_contents() -> None:
    listed = nav(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert [page for page in listed if page not in texts() and not page.endswith(".ipynb")] == []
    written = {str(page.relative_to(DOCS)) for page in PAGES}
    assert written - set(listed) == set()


# -------------------------------------------------------------------------------------- reference


def test_the_reference_has_a_page_for_every_folder() -> None:
    package = ROOT / "vision_plugin"
    folders = {file.parent.name for file in package.glob("*/__init__.py")}
    assert set(generator().FOLDERS) == folders - NO_PAGE


@pytest.mark.parametrize("folder", sorted(generator().FOLDERS))
def test_the_reference_lists_the_public_names_of_a_folder(folder: str) -> None:
    module = importlib.import_module(f"vision_plugin.{folder}")
    assert sorted(generator().reference()[folder]) == sorted(module.__all__)


# --------------------------------------------------------------------------------------- spelling


def test_the_words_are_spelled_right(tmp_path: Path) -> None:
    codespell = [sys.executable, "-m", "codespell_lib", "--toml", str(ROOT / "pyproject.toml")]
    pages = [str(DOCS), str(ROOT / "README.md"), str(ROOT / "CONTRIBUTING.md")]
    found = subprocess.run([*codespell, *pages], capture_output=True, text=True, check=False)
    assert (found.stdout, found.returncode) == ("", 0), found.stderr
    (tmp_path / "wrong.md").write_text("The langauge of the page.\n")
    noticed = subprocess.run(
        [*codespell, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert "langauge ==> language" in noticed.stdout
