"""Checks of the arguments of a report, each brought to one form."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

MAX_TEXT = 300


def clean(text: object) -> str:
    """Return text without control characters and lone surrogates, fit for any file and page."""
    kept = str(text)[: MAX_TEXT + 1]
    if not kept.isprintable():  # printable text has neither, and is most of it
        kept = "".join(
            "\N{REPLACEMENT CHARACTER}" if unicodedata.category(c) in ("Cc", "Cs") else c
            for c in kept
        )
    return kept if len(kept) <= MAX_TEXT else kept[: MAX_TEXT - 1] + "\N{HORIZONTAL ELLIPSIS}"


def read_scores(
    scores: Mapping[str, Any] | None, d_sae: int
) -> dict[str, np.ndarray[Any, np.dtype[np.float64]]]:
    """Return scores as float64 arrays of ``d_sae`` numbers, NaN where there is none.

    Raises:
        ValueError: a column has another length, or holds something that is not a number.
    """
    columns = {}
    for name, values in (scores or {}).items():
        if isinstance(values, Tensor):
            values = values.detach().cpu().double().numpy()
        try:
            column = np.array([np.nan if v is None else v for v in values], dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"scores[{name!r}] holds something that is not a number: {error}"
            ) from None
        if column.shape != (d_sae,):
            raise ValueError(
                f"scores[{name!r}] has shape {column.shape}, but the SAE has {d_sae} latents: give "
                "one number per latent, NaN where there is none"
            )
        if clean(name) in columns:
            raise ValueError(f"scores= has two columns that read {clean(name)!r}: rename one")
        columns[clean(name)] = column
    return columns


def read_features(features: Sequence[int] | Tensor | None, d_sae: int) -> list[int]:
    """Return the latents to report, ascending and without repeats.

    Raises:
        ValueError: there are none, or one is out of range.
    """
    if features is None:
        return list(range(d_sae))
    chosen = features.tolist() if isinstance(features, Tensor) else list(features)
    if not chosen:
        raise ValueError("features= is empty: name at least one latent, or leave it out for all")
    for latent in chosen:
        check_latent(latent, d_sae, "features")
    return sorted({int(latent) for latent in chosen})


def check_latent(latent: Any, d_sae: int, where: str) -> None:
    """Raise ValueError if ``latent`` is not the number of a latent of the SAE."""
    if isinstance(latent, bool) or not isinstance(latent, (int, np.integer)):
        raise ValueError(f"{where}= names {latent!r}, which is not the number of a latent")
    if not 0 <= latent < d_sae:
        raise ValueError(f"{where}= names latent {latent}: the SAE has {d_sae}, from 0")


def check_latents(latents: Any, n_images: int, d_sae: int) -> None:
    """Raise ValueError if precomputed latents do not fit the images and the SAE."""
    shape = tuple(getattr(latents, "shape", ()))
    if shape != (n_images, d_sae):
        raise ValueError(
            f"latents= has shape {shape}, but there are {n_images} images and {d_sae} latents: "
            "give one row per image (the largest, or mean, over its tokens)"
        )
