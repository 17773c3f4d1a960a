"""Disentanglement: swap one factor of an image for another image's, and leave the others.

Every method proposes parts of an activation whose values are taken from a source image. Validation
chooses one swap for each method and factor, by the mean of cause (the factor reads as the source's)
and isolate (the others read as the base's), as RAVEL scores them: Huang et al. 2024 (arXiv
2402.17700). The test pairs are reported.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vision_plugin.models.dictionary import Dictionary
from vision_plugin.steering import Edit
from vision_plugin.tasks._candidates import Candidate
from vision_plugin.tasks._factors import FactorData, Readers
from vision_plugin.tasks._find import find_latents
from vision_plugin.tasks._result import TaskResult
from vision_plugin.tasks._row import Row
from vision_plugin.tasks._search import at_random, sizes_below
from vision_plugin.tasks._settings import check_known, listed
from vision_plugin.tasks._swap_candidates import SWAP_RULES, Place, swap_candidates, swapped
from vision_plugin.tasks._swap_pairs import SwapJudge, figures_of, scores

logger = logging.getLogger(__name__)

RAVEL_METHODS = (
    "none", "sae", "random_latents", "neurons", "pca", "difference_subspace", "leace", "das",
    "mdas", "full_swap",
)  # fmt: skip
MEAN = "mean of all"
"""Kind of the rows that average the factors."""

Announce = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class RavelSettings:
    """What a disentanglement task searches through.

    Examples:
        >>> vp.tasks.RavelSettings(sizes=(1, 5)).tokens
        'cls'
    """

    rules: tuple[str, ...] = SWAP_RULES
    """Rules that find latents, neurons and principal components."""
    latents: tuple[int, ...] = ()
    """Latents of the SAE to swap in place of those that rules find."""
    sizes: tuple[int, ...] = (1, 2, 5, 10, 20, 50, 100)
    """Numbers of latents, neurons and principal components to try."""
    ranks: tuple[int, ...] = (4, 8, 16)
    """Numbers of directions to try, for subspaces and learned rotations."""
    steps: int = 100
    """Steps that a rotation is trained for."""
    tokens: str | None = "cls"
    """Kind of token to swap; None takes the kind that each SAE was trained on."""
    methods: tuple[str, ...] = RAVEL_METHODS
    """Methods to run."""
    sources: int = 2
    """Source images of each base image."""
    random_seeds: int = 3
    """Draws of random latents, whose figures are averaged."""
    batch_size: int = 100
    """Images that run at once."""
    seed: int = 0
    """Seed of the pairs, of random latents, of rotations and of the bootstrap."""

    def __post_init__(self) -> None:
        check_known(self, methods=RAVEL_METHODS, rules=SWAP_RULES)
        if self.latents and "sae" not in self.methods:
            raise ValueError("latents= are swapped by the method 'sae': name it in methods=")
        for name in ("sizes", "ranks"):
            numbers = getattr(self, name)
            if not numbers or min(numbers) < 1:
                raise ValueError(f"{name}={numbers} must be numbers from 1 up")
        for name in ("steps", "sources", "random_seeds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


def ravel(
    model: Any,
    sae: Dictionary | Sequence[Dictionary],
    images: FactorData,
    *,
    settings: RavelSettings | None = None,
    name: str = "",
    announce: Announce = logger.info,
) -> TaskResult:
    """Measure how well latents, and every alternative, stand for one factor each.

    Args:
        model: A VisionBridge, with or without a text tower.
        sae: An SAE, or several at different layers, among which validation chooses too.
        images: Images with known factors.
        settings: What is searched through.
        name: Name of the SAE, for records.
        announce: Called with one line per stage.

    Raises:
        ValueError: an SAE belongs to another model or hook or lacks a latent, latents are given
            beside several SAEs, nothing reads the factors, or there are too few pairs for an
            interval.
        ImportError: probes are to be fitted and scikit-learn is missing.

    Examples:
        >>> sizes = {"readers": 60, "train": 60, "validation": 60, "test": 60, "least": 5}
        >>> data = vp.tasks.read_factors(model, "demo:300", ["texture", "size"], **sizes)
        >>> settings = vp.tasks.RavelSettings(
        ...     sizes=(2,), methods=("sae",), rules=("difference",), sources=1
        ... )
        >>> found = vp.tasks.ravel(model, sae, data, settings=settings)
        >>> sorted({row.kind for row in found.rows})
        ['mean of all', 'size', 'texture']
    """
    settings = settings or RavelSettings()
    saes = [sae] if isinstance(sae, Dictionary) else list(sae)
    if settings.latents:
        if len(saes) != 1:
            raise ValueError(f"latents= are numbers of one SAE, and sae= has {len(saes)}")
        find_latents(model, saes[0], rule="list", latents=settings.latents)  # refuses others
    run = _Run(model, saes, images, settings, announce)
    chosen = {factor: run.chosen(factor) for factor in run.factors}
    announce(f"Reporting on {len(run.test)} test pairs")
    swap = Edit()
    for of in chosen.values():
        swap += of["sae"].edit if "sae" in of else Edit()
    return TaskResult(
        task="ravel",
        model=str(model.cfg.model_name),
        sae=name or ", ".join(str(one.cfg.metadata.get("hook_name")) for one in saes),
        settings=run.settings_found(),
        rows=list(run.rows(chosen)),
        edit=swap,
        edits={
            (factor, method): candidate.edit
            for factor, of in chosen.items()
            for method, candidate in of.items()
        },
        search=run.entries,
        shown=("cause", "isolate", "disentangle", "disentangle_over_none", "moved"),
        drawn=("cause", "isolate"),
        raised="disentangle",
    )


class _Run:
    """The pairs of three splits, the places of swaps, and the search."""

    def __init__(
        self,
        model: Any,
        saes: Sequence[Dictionary],
        data: FactorData,
        settings: RavelSettings,
        announce: Announce,
    ) -> None:
        self.data, self.settings, self.announce = data, settings, announce
        self.factors = list(data.factors)
        announce(f"Reading {', '.join(self.factors)}")
        self.readers = Readers(model, data, settings.batch_size)

        def judge(name: str, number: int) -> SwapJudge:
            return SwapJudge(
                model, data.splits[name], self.factors, self.readers, name=name,
                sources=settings.sources, seed=settings.seed + number,
                batch_size=settings.batch_size,
            )  # fmt: skip

        self.train, self.validation, self.test = (
            judge(name, number) for number, name in enumerate(("train", "validation", "test"))
        )
        self.places = [
            Place(model, one, settings.tokens, self.train, settings.batch_size) for one in saes
        ]
        self.entries: list[dict[str, Any]] = []

    def chosen(self, factor: str) -> dict[str, Candidate]:
        """Return the swap that validation chooses for each method."""
        self.announce(f"{factor}: finding on {len(self.train)} pairs, choosing on validation")
        found = {}
        for method in self.settings.methods:
            if method == "none":
                found[method] = Candidate("none", Edit(), 0, None, "")
            elif method != "random_latents":
                found[method] = self._best(method, factor)
        return found

    def _best(self, method: str, factor: str) -> Candidate:
        best, most = Candidate(method, Edit(), 0, None, "no swap does better than none"), None
        if method != "full_swap":
            most = self.validation.means(best.edit, factor)["disentangle"]
        for candidate in self._proposed(method, factor):
            seen = self.validation.means(candidate.edit, factor)
            self.entries.append(candidate.entry(factor, **seen))
            # The full swap is there for the cause that it reaches, isolation apart.
            score = seen["cause" if method == "full_swap" else "disentangle"]
            if most is None or score > most:
                best, most = candidate, score
        return best

    def _proposed(self, method: str, factor: str) -> Iterator[Candidate]:
        settings = self.settings
        for place in self.places:
            dictionary = (
                place.dictionary(method)[0] if method in ("sae", "neurons", "pca") else None
            )
            sizes = () if dictionary is None else sizes_below(settings.sizes, dictionary)
            yield from swap_candidates(
                place, method, factor, rules=settings.rules, sizes=sizes, ranks=settings.ranks,
                steps=settings.steps, seed=settings.seed,
                given=settings.latents if method == "sae" else (),
            )  # fmt: skip

    def rows(self, chosen: dict[str, dict[str, Candidate]]) -> Iterator[Row]:
        """Yield a row for each factor and method, and for the mean of the factors."""
        counts = self.test.resampled(self.settings.seed)
        every: dict[str, list[dict[str, Tensor]]] = {}
        for factor in self.factors:
            measured = list(self._measured(factor, chosen[factor]))
            drawn = {candidate.method: scores(values, counts) for candidate, values in measured}
            for candidate, _ in measured:
                every.setdefault(candidate.method, []).append(drawn[candidate.method])
                yield _row(candidate, factor, drawn)
        means = {
            method: {
                name: torch.stack([one[name] for one in each]).mean(0)
                for name in ("cause", "isolate", "disentangle", "moved")
            }
            for method, each in every.items()
        }
        for method in means:
            yield _row(Candidate(method, Edit(), 0, None, "of each factor"), MEAN, means)

    def _measured(
        self, factor: str, chosen: dict[str, Candidate]
    ) -> Iterator[tuple[Candidate, dict[str, Tensor]]]:
        for method, candidate in chosen.items():
            yield candidate, self.test.under(candidate.edit, factor)
            if method == "sae" and candidate.found and "random_latents" in self.settings.methods:
                under = partial(self.test.under, factor=factor)
                draws = self.settings.random_seeds
                yield at_random(candidate, "random_latents", swapped, draws, under)

    def settings_found(self) -> dict[str, Any]:
        """Return the settings, the numbers of images and pairs, and how the factors are read."""
        judges = {"train": self.train, "validation": self.validation, "test": self.test}
        return {
            **listed(self.settings),
            "factors": {name: list(values) for name, values in self.data.factors.items()},
            "readers": self.readers.kind,
            "images": {name: len(split) for name, split in self.data.splits.items()},
            "pairs": {name: len(judge) for name, judge in judges.items()},
            "read_right": {name: judge.share_known for name, judge in judges.items()},
        }


def _row(candidate: Candidate, kind: str, drawn: dict[str, dict[str, Tensor]]) -> Row:
    """Return a row, with how far its score is above those of others on the same pairs."""
    own = drawn[candidate.method]
    against = [m for m in drawn if candidate.method == "sae" or m == "none"]
    over = {
        f"disentangle_over_{method}": own["disentangle"] - drawn[method]["disentangle"]
        for method in against
        if method != candidate.method
    }
    return candidate.row(kind, "test", figures_of({**own, **over}))
