"""The model card of an SAE: what it is, how to load it, its scores, its names, its pictures."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from vision_plugin._version import __version__
from vision_plugin.evaluation import DICTIONARY_TITLES, summary_by_metric

MOST_NAMES = 40
_MARKED = "vision-plugin"
_SIZES = {"d_in": "width of the activations", "d_sae": "latents", "architecture": "architecture"}
_METADATA = {
    "hook_name": "hook",
    "tokens": "tokens",
    "training_architecture": "trained as",
    "dataset_path": "images",
    "n_images": "number of images",
}
_QUALITY = {
    "n_alive": "latents that fire",
    "n_dead": "dead latents",
    "n_dense": "dense latents",
    "l0": "L0 per token",
    "explained_variance": "explained variance",
}


def card(
    config: Mapping[str, Any],
    *,
    repo_id: str,
    sae_id: str,
    evaluation: Mapping[str, Any] | None = None,
    names: Mapping[int, str] | None = None,
    pictures: Sequence[str] = (),
) -> str:
    """Return a model card in Markdown, with the metadata that the hub reads in front.

    Args:
        config: Content of the SAE's ``cfg.json``.
        repo_id: Repository, ``owner/name``.
        sae_id: Folder of the SAE in the repository; empty where it lies at the top.
        evaluation: Content of the ``evaluation.json`` that ``vp.evaluate`` wrote.
        names: Name of each latent that has one.
        pictures: Paths of pictures, relative to the card.
    """
    metadata = config.get("metadata") or {}
    model = metadata.get("model_name")
    data = ModelCardData(
        library_name="saelens",
        tags=["sparse-autoencoder", "vision", "interpretability", _MARKED],
        base_model=model if isinstance(model, str) and model.count("/") == 1 else None,
    )
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {_plain(sae_id or repo_id.rpartition('/')[2])}",
        f"A sparse autoencoder of `{_code(metadata.get('hook_name', '?'))}` of "
        f"`{_code(model or 'a model without a name')}`.",
        _loading(repo_id, sae_id),
        "## What it is",
        _facts(config, metadata),
    ]
    if evaluation is not None:
        parts += ["## Scores", _scores(evaluation)]
    if names:
        parts += ["## Names of features", _names(names)]
    if pictures:
        parts += ["## Pictures", "\n\n".join(f"![]({_url(path)})" for path in pictures)]
    parts.append(f"Written by vision_plugin {__version__} in SAELens's format.")
    return "\n\n".join(parts) + "\n"


def _loading(repo_id: str, sae_id: str) -> str:
    which = f'"{repo_id}"' + (f', "{sae_id}"' if sae_id else "")
    stock = f'"{repo_id}", "{sae_id or "."}"'
    return (
        "```python\n"
        "import vision_plugin as vp\n\n"
        f"sae = vp.load_sae({which})\n\n"
        "from sae_lens import SAE  # the same SAE in SAELens alone\n\n"
        f"sae = SAE.from_pretrained({stock})\n"
        "```"
    )


def _facts(config: Mapping[str, Any], metadata: Mapping[str, Any]) -> str:
    rows = [(label, config.get(key)) for key, label in _SIZES.items()]
    rows += [(label, metadata.get(key)) for key, label in _METADATA.items()]
    quality = metadata.get("quality") or {}
    measured = f"on {_cell(quality.get('n_vectors'))} vectors of the training stream"
    rows += [(f"{label}, {measured}", quality.get(key)) for key, label in _QUALITY.items()]
    return _table(("", "value"), [(label, _cell(v)) for label, v in rows if v is not None])


def _scores(evaluation: Mapping[str, Any]) -> str:
    """Return the numbers of every metric, the SAE beside its controls."""
    columns, by_metric = summary_by_metric(evaluation.get("summary") or {})
    table = [
        (f"{metric}: {name.replace('_', ' ')}", *(_cell(of.get(column)) for column in columns))
        for metric, numbers in by_metric.items()
        for name, of in numbers.items()
        if any(value is not None for value in of.values())
    ]
    seen = (
        "The SAE was trained on these images, where it scores higher than on others."
        if evaluation.get("seen_in_training")
        else "The SAE was not trained on these images, as far as its metadata says."
    )
    note = f"{_cell(evaluation.get('n_images'))} images. {seen}"
    return f"{note}\n\n{_table(('', *(DICTIONARY_TITLES.get(c, c) for c in columns)), table)}"


def _names(names: Mapping[int, str]) -> str:
    first = sorted(names)[:MOST_NAMES]
    more = f"\n\n{len(names):,} latents have a name; `names.json` holds all." * (
        len(names) > len(first)
    )
    return _table(("latent", "name"), [(str(latent), names[latent]) for latent in first]) + more


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(heading) - 1)]
    lines = [[_plain(cell) for cell in row] for row in (heading, *rows)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [lines[0], rule, *lines[1:]])


def _cell(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return "-" if value is None else str(value).lower()
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else "-"
    return str(value)


def _plain(text: str) -> str:
    """Escape what Markdown and HTML would read as more than text."""
    flat = " ".join(str(text).split())
    return re.sub(r"([\\`*_\[\]<>|#!&])", r"\\\1", flat)


def _code(text: Any) -> str:
    return " ".join(str(text).split()).replace("`", "'")


def _url(path: str) -> str:
    return Path(path).as_posix().replace(" ", "%20")
