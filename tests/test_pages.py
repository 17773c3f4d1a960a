"""The documents show what was run, not what someone remembers of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import readme
from vision_plugin.cli import COMMANDS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize(
    ("page", "name"),
    [(page, name) for page, names in readme.SECTIONS.items() for name in names],
)
def test_a_page_shows_the_results_that_are_kept(page: str, name: str) -> None:
    shown = f"<!-- {name} -->\n{readme.section(name)}\n<!-- /{name} -->"
    assert shown in (ROOT / page).read_text(), "run `python -m benchmarks.readme`"


def test_the_readme_fits_a_front_page() -> None:
    assert len(README.splitlines()) <= 150


def test_the_worked_example_of_a_family_is_the_code_that_is_tested() -> None:
    assert readme.worked_example() in (ROOT / "CONTRIBUTING.md").read_text()


def test_the_readme_lists_every_command() -> None:
    for name, command in COMMANDS.items():
        assert command.summary
        assert f"`vision-plugin {name}`" in README


def test_every_file_that_a_page_points_to_is_there() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        links = re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text())
        assert all((ROOT / link).exists() for link in links), (page, links)
