"""``vision-plugin lens``: classes, texts or words read off every layer of a model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from vision_plugin._inputs import Inputs
from vision_plugin._ours import LENS, check_replaceable
from vision_plugin._paths import local_path
from vision_plugin.cli._console import console
from vision_plugin.cli._flags import parse, pick
from vision_plugin.lens import TextLensSettings, class_lens, language_lens, text_lens


@dataclass(frozen=True, kw_only=True)
class ClassLensConfig(Inputs):
    """An image classifier and images."""

    output_path: str
    """Folder of the results; earlier results of a lens in it are replaced."""
    batch_size: int = 32
    """Number of images per forward pass."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_named(self.model_name)


@dataclass(frozen=True, kw_only=True)
class TextLensConfig(Inputs, TextLensSettings):
    """A model with a text tower, images and texts."""

    texts: str
    """Texts to compare with: ``labels`` or ``column:NAME`` of the images; or a text file, one a
    line."""
    output_path: str
    """Folder of the results; earlier results of a lens in it are replaced."""

    def __post_init__(self) -> None:
        Inputs.__post_init__(self)
        TextLensSettings.__post_init__(self)
        _check_named(self.model_name)


@dataclass(frozen=True, kw_only=True)
class LanguageLensConfig(Inputs):
    """A vision-language model, images and a question."""

    prompt: str
    """What to ask about each image."""
    output_path: str
    """Folder of the pages; earlier results of a lens in it are replaced."""
    top: int = 5
    """Words to keep per layer and position."""
    batch_size: int = 32
    """Number of images per pass."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_named(self.model_name)


def _check_named(model_name: str | None) -> None:
    if model_name is None:
        raise ValueError("name the model whose layers are read: model_name=")


def _classes(cfg: ClassLensConfig) -> Any:
    return class_lens(cfg.open_model(None), cfg.open_images(), batch_size=cfg.batch_size)


def _texts(cfg: TextLensConfig) -> Any:
    from vision_plugin.evaluation import read_concepts

    images = cfg.open_images()
    texts = read_concepts(cfg.texts, images)
    labels = cfg.labels
    if labels is None and cfg.texts.startswith("column:"):
        labels = cfg.texts  # the texts are the images' classes
    settings = pick(TextLensSettings, cfg, labels=labels)
    return text_lens(cfg.open_model(None), images, texts, settings=settings)


def _language(cfg: LanguageLensConfig) -> Any:
    from vision_plugin.models import load_vlm

    vlm = load_vlm(str(cfg.model_name), device=cfg.device)
    return language_lens(vlm, cfg.open_images(), cfg.prompt, top=cfg.top, batch_size=cfg.batch_size)


@dataclass(frozen=True)
class Lens:
    """One lens on the command line."""

    summary: str
    description: str
    config: type[Any]
    compute: Callable[[Any], Any]
    writes: str = "results.json, table.txt, figures"


LENSES: Mapping[str, Lens] = MappingProxyType(
    {
        "classes": Lens(
            "what each layer and token of a classifier says about the class",
            "Read an image classifier's tokens at every layer in class-embedding space.",
            ClassLensConfig,
            _classes,
        ),
        "text": Lens(
            "what each layer of a CLIP says to texts, raw and with fitted translators",
            "Compare every layer of a model with texts: raw, and through an affine translator that "
            "is fitted on other images.",
            TextLensConfig,
            _texts,
        ),
        "language": Lens(
            "words at every layer and image position of a vision-language model",
            "Read the language model's vocabulary at every layer and image position, as a static "
            "page per image.",
            LanguageLensConfig,
            _language,
            "results.json, index.html, a page per image",
        ),
    }
)


def run(arguments: Sequence[str]) -> None:
    """Run a lens from flags, print its table and write its folder."""
    if arguments and arguments[0] in ("-h", "--help"):
        sys.stdout.write(usage())
        raise SystemExit(0)
    if not arguments:
        raise ValueError(f"name a lens: {', '.join(LENSES)}")
    if arguments[0] not in LENSES:
        raise ValueError(f"there is no lens {arguments[0]!r}: use {', '.join(LENSES)}")
    lens = LENSES[arguments[0]]
    cfg = parse(
        lens.config, arguments[1:], command=f"lens {arguments[0]}", description=lens.description
    )
    check_replaceable(local_path(cfg.output_path), LENS)
    result = lens.compute(cfg)
    result.save(cfg.output_path)
    out = console()
    if hasattr(result, "table"):
        out.print(result.table())
    out.print(f"In {cfg.output_path}: {lens.writes}", soft_wrap=True)


def usage() -> str:
    """Return the list of lenses."""
    listed = "\n".join(f"  {name:8}  {lens.summary}" for name, lens in LENSES.items())
    return (
        f"usage: vision-plugin lens LENS [FLAGS]\n\n{listed}\n\n"
        "vision-plugin lens LENS --help lists the options of a lens.\n"
    )
