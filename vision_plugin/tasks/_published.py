"""Published typographic attacks on local disks: RTA-100, PAINT, Disentangling and SCAM.

They are told apart by their layout. RTA-100 and PAINT are folders of files that are named
``label=TRUE_text=PRINTED.png``; Disentangling is a folder of photographs with
``annotations.json``; SCAM is a table with the columns ``type``, ``object_label`` and
``attack_word``, in whatever ``vp.open_images`` takes.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vision_plugin._paths import local_path
from vision_plugin._untrusted import read_json
from vision_plugin.images import ImageSource, open_images
from vision_plugin.tasks._attack import Attack, TypographicData
from vision_plugin.tasks._labelled import TEMPLATE, check_template, parts
from vision_plugin.tasks._unpaired import Unpaired

logger = logging.getLogger(__name__)

ANNOTATIONS = ("annotations.json", "annotation.json")
SCAM_COLUMNS = ("type", "object_label", "attack_word")
SCAM_TYPES = ("SCAM", "SynthSCAM")
_NAMED = re.compile(r"label=(?P<label>.+?)_text=(?P<text>[^_]+)(_.*)?")
_ONE_PHOTOGRAPH = "the set has no photographs of the same scenes without the word"


@dataclass(frozen=True, eq=False)
class PublishedSet:
    """A published set of attacked images.

    Attributes:
        name: Name for tables.
        classes: Names of the true and of the printed classes.
        prompts: Sentence about each class.
        attack: The images, with clean twins where the set has them.

    Examples:
        >>> from pathlib import Path
        >>> Path("attacks").mkdir()
        >>> for n in range(4):
        ...     world.images[n].save(f"attacks/label=star_text=circle_{n}.png")
        ...     world.images[n + 4].save(f"attacks/label=circle_text=star_{n}.png")
        >>> (found,) = vp.tasks.read_published(model, "attacks")
        >>> found.classes, found.without_clean
        (('circle', 'star'), 'the set has no photographs of the same scenes without the word')
    """

    name: str
    classes: tuple[str, ...]
    prompts: tuple[str, ...]
    attack: Attack | Unpaired

    @property
    def without_clean(self) -> str:
        """Why there are no figures on clean images; empty where there are."""
        return self.attack.why if isinstance(self.attack, Unpaired) else ""

    def data(
        self, *, train: int = 600, validation: int = 400, test: int = 1000, seed: int = 0
    ) -> TypographicData:
        """Return the set in three splits of different images.

        Args:
            train: Most pairs in which latents are found.
            validation: Most pairs on which is chosen.
            test: Most pairs that are reported on. Where the set has fewer than all three, the
                splits keep these proportions.
            seed: Seed of the splits.

        Raises:
            ValueError: the set has no clean images, or too few for an interval.
        """
        if isinstance(self.attack, Unpaired):
            raise ValueError(
                f"{self.name}: {self.attack.why}, so latents cannot be found on it: find them on "
                "labelled images with printed words, and report on this set with published="
            )
        pairs = self.attack
        places = parts(list(range(len(pairs))), (train, validation, test), seed)
        every = torch.arange(len(pairs))
        found, chosen, reported = (
            pairs.where(torch.isin(every, torch.tensor(part))) for part in places
        )
        return TypographicData(self.name, self.classes, self.prompts, found, chosen, reported)


@dataclass(frozen=True)
class _Entry:
    """One attacked image: its place in the source, that of its clean twin, and both names."""

    place: int
    label: str
    printed: str
    clean: int | None = None


def read_published(model: Any, source: Any, *, template: str = TEMPLATE) -> list[PublishedSet]:
    """Read a local copy of a published set of typographic attacks.

    Args:
        model: A VisionBridge, which prepares the images.
        source: The folder, or for SCAM whatever ``vp.open_images`` takes.
        template: Sentence about a class, with ``{}`` for its name.

    Returns:
        The set; for SCAM the photographs and the synthetic ones, as two sets.

    Raises:
        ValueError: the source is in none of the layouts, or nothing in it is an attack.

    Examples:
        >>> from pathlib import Path
        >>> Path("rta-100").mkdir()
        >>> for n in range(4):
        ...     world.images[n].save(f"rta-100/label=star_text=circle_{n}.png")
        >>> (found,) = vp.tasks.read_published(model, "rta-100")
        >>> len(found.attack.labels)
        4
    """
    check_template(template)
    annotated = _annotations(source)
    images = open_images(source)
    where = str(images.description.get("path", "images"))
    name = Path(where).name or where
    if annotated is not None:
        return [_as_set(model, images, name, _disentangling(images, annotated), template)]
    if set(SCAM_COLUMNS) <= set(images.column_names):
        sets = _scam(images)
        if not sets:
            raise ValueError(
                f"{where} has SCAM's columns and no row of the type {' or '.join(SCAM_TYPES)}: it "
                "is not the data set, or not all of it"
            )
        return [_as_set(model, images, kind, sets[kind], template) for kind in sets]
    return [_as_set(model, images, name, _named(images, where), template)]


def is_published(source: Any) -> bool:
    """Return whether a source is in one of the layouts.

    Args:
        source: A folder, or whatever ``vp.open_images`` takes.

    Examples:
        >>> vp.tasks.is_published("demo:8")
        False
    """
    if _annotations(source) is not None:
        return True
    images = open_images(source)
    named = _NAMED.fullmatch(PurePosixPath(images.ids[0]).stem) is not None
    return named or set(SCAM_COLUMNS) <= set(images.column_names)


def _annotations(source: Any) -> Mapping[str, Any] | None:
    """Return Disentangling's annotations; None where the source is something else."""
    if not isinstance(source, (str, Path)):
        return None
    folder = local_path(source)
    path = next((folder / name for name in ANNOTATIONS if (folder / name).is_file()), None)
    if path is None:
        return None
    found = read_json(path)
    if not isinstance(found, dict) or not all(
        isinstance(entry, dict) and {"true object", "typographic attack label"} <= set(entry)
        for entry in found.values()
    ):
        raise ValueError(
            f'{path} does not name a "true object" and a "typographic attack label" for each '
            "image: it is not the annotation of the Disentangling data set"
        )
    return found


def _disentangling(images: ImageSource, annotated: Mapping[str, Any]) -> list[_Entry]:
    """Return the photographs with a label; those of an object alone are not their twins."""
    places = {PurePosixPath(id).name: place for place, id in enumerate(images.ids)}
    missing = [name for name in annotated if PurePosixPath(name).name not in places]
    if missing:
        logger.warning("%d annotated images are not there, as %s", len(missing), missing[0])
    entries = []
    for name, entry in annotated.items():
        place = places.get(PurePosixPath(name).name)
        printed = str(entry["typographic attack label"] or "").strip()
        if place is not None and printed:
            entries.append(_Entry(place, str(entry["true object"]).strip(), printed))
    return entries


def _scam(images: ImageSource) -> dict[str, list[_Entry]]:
    """Return the entries of each type of attack, with the same scene of NoSCAM as clean twin.

    The end of the column ``id`` numbers the scenes; without it, the rows of each type do.
    """
    types = [str(value) for value in images.column("type")]
    seen: dict[str, int] = {}
    scenes = []
    for kind in types:
        seen[kind] = seen.get(kind, 0) + 1
        scenes.append(str(seen[kind]))
    if "id" in images.column_names:
        scenes = [str(value).rpartition("_")[2] for value in images.column("id")]
    pairs = list(zip(types, scenes, strict=True))
    clean = {scene: place for place, (kind, scene) in enumerate(pairs) if kind == "NoSCAM"}
    rows = list(zip(images.column("object_label"), images.column("attack_word"), strict=True))
    found: dict[str, list[_Entry]] = {}
    for place, (kind, scene) in enumerate(pairs):
        if kind in SCAM_TYPES:
            label, printed = (str(value).strip() for value in rows[place])
            entry = _Entry(place, label, printed, clean.get(scene))
            found.setdefault(kind, []).append(entry)
    return found


def _named(images: ImageSource, where: str) -> list[_Entry]:
    """Return the images whose file names say label and text, as RTA-100's and PAINT's do."""
    entries, others = [], []
    for place, id in enumerate(images.ids):
        match = _NAMED.fullmatch(PurePosixPath(id).stem)
        if match is None:
            others.append(id)
        else:
            entries.append(_Entry(place, match["label"].strip(), match["text"].strip()))
    if not entries:
        raise ValueError(
            f"{where} is in no layout of a published attack: RTA-100 and PAINT name files "
            "label=TRUE_text=PRINTED.png, Disentangling has annotations.json, and SCAM the columns "
            f"{', '.join(SCAM_COLUMNS)}; the first image is {images.ids[0]}"
        )
    if others:
        logger.warning("%d files are left out, as %s: no label=, text=", len(others), others[0])
    return entries


def _as_set(
    model: Any, images: ImageSource, name: str, entries: list[_Entry], template: str
) -> PublishedSet:
    harmless = [entry for entry in entries if entry.label == entry.printed]
    if harmless:
        logger.warning("%s: %d images name their own class and are left out", name, len(harmless))
    entries = [entry for entry in entries if entry.label != entry.printed]
    if not entries:
        raise ValueError(f"{name} has no image whose word names another class")
    classes = tuple(sorted({name for e in entries for name in (e.label, e.printed)}))
    number = {name: i for i, name in enumerate(classes)}
    labels = torch.tensor([number[entry.label] for entry in entries])
    printed = torch.tensor([number[entry.printed] for entry in entries])
    attacked = _pixels(model, images, [entry.place for entry in entries])
    twins = [entry.clean for entry in entries if entry.clean is not None]
    attack: Attack | Unpaired
    if len(twins) == len(entries):
        attack = Attack(_pixels(model, images, twins), attacked, labels, printed)
    else:
        missing = f"{len(entries) - len(twins)} of {len(entries)} images have no row of NoSCAM"
        attack = Unpaired(attacked, labels, printed, missing if twins else _ONE_PHOTOGRAPH)
    return PublishedSet(name, classes, tuple(template.format(c) for c in classes), attack)


def _pixels(model: Any, images: ImageSource, places: list[int]) -> Tensor:
    """Return pixels of some images, read in batches."""
    parts = []
    for start in range(0, len(places), 64):
        batch: list[Image.Image] = [images[place] for place in places[start : start + 64]]
        parts.append(model.preprocess(batch))
    return torch.cat(parts)
