"""How much of an answer depends on each concept: CRAFT's total Sobol indices."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import qmc, sobol_indices
from torch import Tensor

from vision_plugin._rich import Table
from vision_plugin.models.dictionary import Dictionary, encode_and_decode
from vision_plugin.models.site import Site, in_eval_mode

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Score = Callable[[Tensor], Tensor]
"""Returns an answer for each image embedding, ``[n, d_embed]`` to ``[n]``."""
_FLAT = 1e-12


@dataclass(frozen=True, eq=False)
class ConceptImportance:
    """Total Sobol indices of concepts.

    Attributes:
        latents: Numbers of the concepts that were scaled.
        importance: Mean over images of each concept's total index; NaN where no image has one.
        each: The indices of each image, ``[n, k]``; NaN for an image whose answer never changes.
        design: Points of the design.
        n_passes: Forward passes per image.

    Examples:
        >>> red = model.encode_text(["a red object"])[0]
        >>> found = vp.lens.concept_importance(
        ...     model, sae, pixels[:1], lambda e: e @ red, latents=[12, 13], design=4
        ... )
        >>> found.latents, found.n_passes
        ((12, 13), 16)
    """

    latents: tuple[int, ...]
    importance: Float[Tensor, " k"]
    each: Float[Tensor, "n k"]
    design: int
    n_passes: int

    def ranked(self) -> list[int]:
        """Return the latents, the most important first."""
        order = self.importance.nan_to_num(nan=-1.0).argsort(descending=True, stable=True)
        return [self.latents[place] for place in order.tolist()]

    def table(self, n: int = 20) -> Table:
        """Return the most important concepts, for ``rich`` to print."""
        table = Table(title=f"total Sobol indices over {len(self.each)} images")
        for heading in ("latent", "importance"):
            table.add_column(heading, justify="right")
        index = dict(zip(self.latents, self.importance.tolist(), strict=True))
        for latent in self.ranked()[:n]:
            table.add_row(str(latent), f"{index[latent]:.3f}")
        return table

    def plot(self, n: int = 20) -> Figure:
        """Return a bar for each of the most important concepts."""
        from matplotlib.figure import Figure

        index = dict(zip(self.latents, self.importance.nan_to_num().tolist(), strict=True))
        shown = self.ranked()[:n]
        figure = Figure(figsize=(4.6, 0.25 * len(shown) + 1), layout="constrained")
        axes = figure.add_subplot()
        axes.barh([str(latent) for latent in shown], [index[latent] for latent in shown])
        axes.invert_yaxis()
        axes.set(xlabel="total Sobol index", ylabel="latent")
        return figure

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON types."""
        return {
            "latents": list(self.latents),
            "importance": [v if math.isfinite(v) else None for v in self.importance.tolist()],
            "n_images": len(self.each),
            "design": self.design,
            "n_passes": self.n_passes,
        }


@torch.no_grad()
def concept_importance(
    model: Any,
    dictionary: Dictionary,
    pixels: Float[Tensor, "n channels height width"],
    score: Score,
    *,
    latents: list[int] | None = None,
    design: int = 32,
    tokens: str | None = None,
    batch_size: int = 64,
    check_model: bool = True,
    seed: int = 0,
) -> ConceptImportance:
    """Return how much of a model's answer depends on each concept (CRAFT, arXiv 2211.10154).

    In each image, the latents of a concept are multiplied at all tokens by a factor between 0 and
    1, quasi-random (Sobol's sequence) and one for each concept, decoded, and put in place of the
    activation. A concept's total index is the share of the answer's variance that needs its factor
    (Jansen's estimator): ``mean (f(A) - f(A with the factor of B))^2 / (2 Var f)``.

    Args:
        model: A VisionBridge.
        dictionary: A dictionary at one of its hooks, such as ``fit_dictionary(...).at(hook)``.
        pixels: Images prepared by ``model.preprocess``.
        score: Function from embeddings ``[n, d]``, as ``model.image_features`` gives them, to an
            answer for each, such as the logit of a class.
        latents: Concepts to scale; None takes all that are above 0 on one of the images.
        design: Points of the design, a power of 2; an image takes ``design * (concepts + 2)``
            passes.
        tokens: Kind of token; None takes the kind that the dictionary was trained on.
        batch_size: Images that run at once.
        check_model: Refuse a dictionary that was trained on another model.
        seed: Seed of the sequence.

    Raises:
        ValueError: the design is no power of 2, a latent is out of range, or none is active.

    Examples:
        >>> red = model.encode_text(["a red object"])[0]
        >>> found = vp.lens.concept_importance(
        ...     model, sae, pixels[:1], lambda e: e @ red, latents=[12, 13], design=4
        ... )
        >>> found.each.shape
        torch.Size([1, 2])
    """
    check_design(design)
    site = Site.of(model, dictionary, tokens=tokens, check_model=check_model)
    scaled = Scaled(site, dictionary, pixels, score, batch_size)
    return importance_of(scaled, latents, design, seed)


def check_design(design: int) -> None:
    """Raise ValueError unless a number of points is one that Sobol's sequence is balanced at."""
    if design < 2 or design & (design - 1):
        raise ValueError(f"design={design} must be a power of 2 from 2 up, as Sobol's points need")


def importance_of(
    scaled: Scaled, latents: list[int] | None, design: int, seed: int
) -> ConceptImportance:
    """Return the total Sobol indices of latents; None takes all that are active on an image."""
    chosen = _chosen(latents, scaled.codes)
    factors = _factors(design, len(chosen), seed)
    each = torch.stack(
        [
            _total_indices(scaled.answers(image, chosen, factors), design, len(chosen))
            for image in range(len(scaled.pixels))
        ]
    )
    return ConceptImportance(
        tuple(chosen), each.nanmean(0), each, design, design * (len(chosen) + 2)
    )


class Scaled:
    """Images whose latents are multiplied by factors, decoded, and put in place.

    Args:
        site: Hook and tokens.
        dictionary: The dictionary at the hook.
        pixels: Images prepared by ``model.preprocess``, ``[n, channels, height, width]``.
        score: Answer for each image embedding.
        batch_size: Images that run at once.

    Attributes:
        codes: Latents of the images, ``[n, tokens, d_sae]``.
    """

    def __init__(
        self, site: Site, dictionary: Dictionary, pixels: Tensor, score: Score, batch_size: int
    ) -> None:
        self.site, self.dictionary, self.pixels = site, dictionary, pixels
        self.score, self.batch_size = score, batch_size
        reading = site.read(site.harvester()(pixels))
        self.codes = dense_latents(dictionary, reading.source)
        self.activations, self._rows = reading.source, reading.rows

    @torch.no_grad()
    def answers(
        self, image: int, latents: Sequence[int], factors: Float[Tensor, "points k"]
    ) -> Float[Tensor, " points"]:
        """Return the answer on one image for each row of factors of some latents."""
        parts = []
        for some in factors.split(self.batch_size):
            codes = self.codes[image].expand(len(some), -1, -1).clone()
            codes[:, :, list(latents)] *= some[:, None].to(codes)
            values = self.dictionary.decode(codes)
            same = self.pixels[image].expand(len(some), *self.pixels.shape[1:])
            rows = self._rows[image].expand(len(some), -1)
            with in_eval_mode(self.site.model), self.site.replaced(rows, values):
                parts.append(self.score(self.site.model.image_features(same)).double().cpu())
        return torch.cat(parts)


def dense_latents(
    dictionary: Dictionary, source: Float[Tensor, "n tokens d"]
) -> Float[Tensor, "n tokens d_sae"]:
    """Return the latents of activations as one dense tensor."""
    codes, _ = encode_and_decode(dictionary, source)
    dense = codes if isinstance(codes, Tensor) else codes.to_dense()
    return dense.view(*source.shape[:2], -1)


def _chosen(latents: list[int] | None, dense: Tensor) -> list[int]:
    d_sae = dense.shape[-1]
    if latents is None:
        latents = torch.nonzero((dense != 0).flatten(0, 1).any(0)).flatten().tolist()
    bad = [latent for latent in latents if not 0 <= latent < d_sae]
    if bad:
        raise ValueError(f"latent {bad[0]} is out of range: there are {d_sae}, from 0")
    if not latents:
        raise ValueError("no latent is active on these images: give other images, or latents=")
    return latents


def _factors(design: int, k: int, seed: int) -> Float[Tensor, "points k"]:
    """Return the points A, B, and A with one coordinate of B after the other."""
    drawn = qmc.Sobol(2 * k, seed=seed).random(design)
    a, b = drawn[:, :k], drawn[:, k:]
    mixed = np.repeat(a[None], k, axis=0)
    for place in range(k):
        mixed[place, :, place] = b[:, place]
    return torch.as_tensor(np.concatenate([a, b, mixed.reshape(-1, k)])).float()


def _total_indices(answers: Tensor, design: int, k: int) -> Float[Tensor, " k"]:
    f = answers.numpy()
    f_a, f_b, f_ab = f[:design], f[design : 2 * design], f[2 * design :].reshape(k, 1, design)
    if np.ptp(f[: 2 * design]) <= _FLAT * max(1.0, float(np.abs(f).max())):
        return torch.full((k,), torch.nan, dtype=torch.float64)
    functions = {"f_A": f_a[None], "f_B": f_b[None], "f_AB": f_ab}
    found = sobol_indices(func=functions, n=design)
    return torch.as_tensor(found.total_order.reshape(k))


__all__ = ["ConceptImportance", "concept_importance"]
