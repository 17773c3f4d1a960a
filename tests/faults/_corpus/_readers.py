"""Ways to read an input as a user does: each opens it and takes out everything that is in it."""

from __future__ import annotations

import itertools
from pathlib import Path

import torch

from vision_plugin.activations import ActivationStore, info, verify
from vision_plugin.evaluation import Facts, read_concepts
from vision_plugin.formats import load_sae
from vision_plugin.images import open_images
from vision_plugin.lens import read_names, read_vocabulary
from vision_plugin.steering import Edit

AT_MOST = 30
"""Images that are decoded of a source."""


def sae(path: Path) -> None:
    """Load an SAE, encode two rows with it, and decode them."""
    loaded = load_sae(path)
    rows = torch.zeros(2, loaded.cfg.d_in, dtype=loaded.W_dec.dtype)
    loaded.decode(loaded.encode(rows))


def images(path: Path) -> None:
    """Open images, and read ids, labels, every column and every image."""
    source = open_images(str(path))
    source.ids, source.labels, source.description  # noqa: B018
    for name in source.column_names:
        source.column(name)
    for index in range(min(AT_MOST, len(source))):
        source[index]


def store(path: Path) -> None:
    """Open a store, and read every activation, id and label."""
    opened = ActivationStore(path)
    opened.ids, opened.labels  # noqa: B018
    for name in opened.hook_names:
        opened.activations(name)
    opened.batches(opened.hook_names, 64).next_batch()


def store_facts(path: Path) -> None:
    """Ask what is in a store."""
    info(path)


def store_check(path: Path) -> None:
    """Check a store; what the check finds is refused as the command refuses it."""
    report = verify(path)
    if not report.ok:
        raise ValueError(f"{path} is damaged. {report}")


def edit(path: Path) -> None:
    """Load a saved edit."""
    Edit.load(path)


def names(path: Path) -> None:
    """Read names of features, and take out everything that is in them."""
    found = read_names(path)
    texts = found.texts(better_than_chance=True) | found.texts()
    for name in texts.values():
        found.find(name)
    found.table(), found.summary_table(), found.to_dict()


def vocabulary(path: Path) -> None:
    """Read a vocabulary."""
    read_vocabulary(path)


def concepts(path: Path) -> None:
    """Read a text file of concepts."""
    read_concepts(str(path), ())


class _Two:
    """Two images as far as facts about them go."""

    ids = ("cat/0.png", "dog/1.jpg")
    labels = ("cat", "dog")


def taxonomy(path: Path) -> None:
    """Read a taxonomy of two images, and the groups of classes in it."""
    facts = Facts(_Two(), taxonomy=str(path))
    facts.taxonomy_paths, facts.sibling_groups  # noqa: B018


def masks(path: Path) -> None:
    """Read the masks of two images."""
    found = Facts(_Two(), masks=str(path)).masks
    assert found is not None
    for image in range(2):
        found.of_image(image)


def scores(path: Path) -> None:
    """Read an evaluation's scores as the report does."""
    from vision_plugin.cli._report import read_scores
    from vision_plugin.report._evaluation import chance_of, score_table, scores_of

    found = read_scores(str(path), "")
    evaluation = found.get("evaluation", {})
    columns = scores_of(evaluation)
    assert all(len(list(itertools.islice(column, 5))) <= 5 for column in columns.values())
    chance_of(evaluation)
    score_table(evaluation)
