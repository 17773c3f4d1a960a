"""The files of a report: the index with its data, a page per feature, styles and scripts."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from vision_plugin._private import without_paths
from vision_plugin._version import __version__
from vision_plugin.report._content import Content
from vision_plugin.report._index_page import file_names, index_data, tiles
from vision_plugin.report._inputs import clean
from vision_plugin.report._scripts import write_script

MADE_BY = f"Made by vision_plugin {__version__}"
N_BAD_LISTED = 50
_N_LOOKED_AT, _N_HINTS = 200, 4
TITLES = {
    "index.html": "Features",
    "map.html": "Map",
    "images.html": "Images",
    "compare.html": "Compare",
    "summary.html": "Summary",
}


class Pages:
    """Templates, and the folder that pages are written to."""

    def __init__(self, folder: Path, addresses: Sequence[str]) -> None:
        """Escape everything, and fail on missing names.

        Args:
            folder: Folder of the report.
            addresses: Pages beside those of features, in the order of their links.
        """
        self.folder = folder
        self.links = [(address, TITLES[address]) for address in addresses]
        self.environment = Environment(
            autoescape=True,
            loader=PackageLoader("vision_plugin.report", "templates"),
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )

    def write(self, address: str, content: Content, **more: Any) -> None:
        """Write one of the pages beside those of features."""
        text = self.environment.get_template(address).render(
            root="",
            address=address,
            links=self.links,
            made_by=MADE_BY,
            title=content.title,
            facts=content.facts,
            **more,
        )
        (self.folder / address).write_text(text, encoding="utf-8", newline="\n")

    def write_assets(self) -> None:
        """Copy the style sheet and the scripts."""
        assets = self.folder / "assets"
        assets.mkdir()
        for source in files("vision_plugin.report").joinpath("templates").iterdir():
            if source.name.endswith((".js", ".css")):
                with source.open("rb") as stream, (assets / source.name).open("wb") as target:
                    shutil.copyfileobj(stream, target)

    def write_features(self, pages: Iterator[dict[str, Any]]) -> None:
        """Write ``features/<number>.html`` for each page."""
        template = self.environment.get_template("feature.html")
        (self.folder / "features").mkdir()
        for page in pages:
            text = template.render(page, root="../", address="", links=self.links, made_by=MADE_BY)
            path = self.folder / "features" / f"{page['number']}.html"
            path.write_text(text, encoding="utf-8", newline="\n")

    def write_index(self, content: Content) -> None:
        """Write ``index.html`` and ``data.js``."""
        bad = sorted(content.reader.bad.items())
        self.write(
            "index.html",
            content,
            tiles=tiles(content),
            n_features=f"{len(content.features):,}",
            n_images=f"{content.n_images:,}",
            n_all=f"{len(content.reader):,}",
            n_bad=f"{len(bad):,}",
            bad=[
                (content.id(number), clean(without_paths(why)))
                for number, why in bad[:N_BAD_LISTED]
            ],
            has_names=content.names is not None,
            searched=_searched(content),
            given=content.tokens is None,
            tokens_noun=_tokens_noun(content.tokens),
        )
        write_script(self.folder / "data.js", "REPORT", index_data(content))


def _searched(content: Content) -> str:
    """Return what the search box searches, as its hint."""
    order = content.writer.order
    has_labels = any(content.label(number) for number in order[:_N_LOOKED_AT])
    found = ["name of a feature"] if content.names is not None else []
    found += list(content.reader.columns)[:_N_HINTS] or ["label"] * has_labels
    found += ["file name"] if file_names(content) else []
    return ", ".join([*found, "#number"]) if found else "#number"


def _tokens_noun(tokens: str | None) -> str:
    return {"cls": "class token", "patch": "patches", "register": "registers"}.get(
        tokens or "", "tokens"
    )
