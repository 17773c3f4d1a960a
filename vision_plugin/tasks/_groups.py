"""Worst-group repair: a nuisance goes along with a label in training, and a probe relies on it.

A linear probe on the image embedding is fitted on biased images and stays as it is. Every method
proposes edits of the model on the same images; validation chooses one for each method by the worst
group's accuracy, within a cap on the loss of average accuracy. The test images are reported.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from vision_plugin.models.dictionary import Dictionary
from vision_plugin.steering import Edit, EditPass
from vision_plugin.tasks._candidates import Candidate, control_dictionaries
from vision_plugin.tasks._group_candidates import (
    group_direction_candidates,
    group_latent_candidates,
)
from vision_plugin.tasks._group_data import GroupData, GroupSplit
from vision_plugin.tasks._group_evidence import GROUP_RULES
from vision_plugin.tasks._group_judge import GroupJudge, group_figures
from vision_plugin.tasks._measure import unit
from vision_plugin.tasks._probe import Probe, group_weights
from vision_plugin.tasks._result import CONTROLS, TaskResult
from vision_plugin.tasks._row import Row
from vision_plugin.tasks._search import Search, sizes_below
from vision_plugin.tasks._settings import check_known, check_sizes, listed

logger = logging.getLogger(__name__)

GROUP_METHODS = (
    "none", "sae", "random_latents", "random_active_latents", "neurons", "random_dictionary",
    "pca", "diff_mean", "difference_subspace", "leace", "probe", "reweighted", "balanced",
)  # fmt: skip
"""Every method of the tasks of groups: the SAE, the baselines, and probes fitted anew.

Examples:
    >>> vp.tasks.GROUP_METHODS[:2]
    ('none', 'sae')
"""
PROBES = ("reweighted", "balanced")
"""Methods that fit another probe and leave the model as it is."""
CONTROL_RULES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"random_dictionary": ("difference",), "pca": ("difference",)}
)
"""Rules for control dictionaries; neurons are found by all the rules that latents are."""
TOKENS = ("patch", "cls", "all")

Announce = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class GroupSettings:
    """What a worst-group task searches through.

    Examples:
        >>> vp.tasks.GroupSettings(sizes=(2, 5)).rules
        ('difference', 'auroc', 'attribution')
    """

    rules: tuple[str, ...] = ("difference", "auroc", "attribution")
    """Rules that find latents."""
    sizes: tuple[int, ...] = (2, 5, 10, 20, 50)
    """Numbers of latents to try."""
    latents: tuple[int, ...] = ()
    """Latents of the SAE to suppress in place of those that rules find."""
    tokens: tuple[str, ...] = ("patch", "cls")
    """Kinds of token to edit, as far as the model has them."""
    methods: tuple[str, ...] = GROUP_METHODS
    """Methods to run."""
    cap: float = 0.02
    """Largest loss of average accuracy on validation."""
    random_seeds: int = 3
    """Draws of random latents, whose figures are averaged."""
    batch_size: int = 100
    """Images that run at once."""
    seed: int = 0
    """Seed of random latents and of the bootstrap."""

    def __post_init__(self) -> None:
        check_known(self, methods=GROUP_METHODS, rules=GROUP_RULES, tokens=TOKENS)
        check_sizes(self.sizes)
        if not 0 <= self.cap < 1:
            raise ValueError(f"cap={self.cap} is a share of the images: from 0 to 1")


def background(
    model: Any,
    sae: Dictionary | Sequence[Dictionary],
    images: GroupData,
    *,
    settings: GroupSettings | None = None,
    name: str = "",
    announce: Announce = logger.info,
) -> TaskResult:
    """Repair a probe that relies on the background, as in Waterbirds, with every baseline.

    Args:
        model: A VisionBridge, with or without a text tower.
        sae: An SAE, or several at different layers, among which validation chooses too.
        images: Images in groups: what is asked, and the background.
        settings: What is searched through.
        name: Name of the SAE, for records.
        announce: Called with one line per stage.

    Raises:
        ValueError: an SAE belongs to another model, or the images do not.
        ImportError: scikit-learn is missing.

    Examples:
        >>> from vision_plugin.demo.groups import group_data
        >>> data = group_data(model, "background", usual=30, unusual=4, validation=30, test=30)
        >>> settings = vp.tasks.GroupSettings(
        ...     rules=("difference",), sizes=(2,), methods=("none", "sae")
        ... )
        >>> found = vp.tasks.background(model, sae, data, settings=settings)
        >>> [row.method for row in found.rows]
        ['none', 'sae']
    """
    return _repair("background", model, sae, images, settings, name, announce)


def attribute(
    model: Any,
    sae: Dictionary | Sequence[Dictionary],
    images: GroupData,
    *,
    settings: GroupSettings | None = None,
    name: str = "",
    announce: Announce = logger.info,
) -> TaskResult:
    """Repair a probe of one attribute that relies on another, as in CelebA, with every baseline.

    Arguments and errors are those of :func:`background`.

    Examples:
        >>> from vision_plugin.demo.groups import group_data
        >>> data = group_data(model, "attribute", usual=30, unusual=4, validation=30, test=30)
        >>> settings = vp.tasks.GroupSettings(
        ...     rules=("difference",), sizes=(2,), methods=("none", "sae")
        ... )
        >>> found = vp.tasks.attribute(model, sae, data, settings=settings)
        >>> sorted(found.row("sae", kind="texture").figures)[:2]
        ['accuracy', 'accuracy (dotted, purple)']
    """
    return _repair("attribute", model, sae, images, settings, name, announce)


def _repair(
    task: str,
    model: Any,
    sae: Dictionary | Sequence[Dictionary],
    data: GroupData,
    settings: GroupSettings | None,
    name: str,
    announce: Announce,
) -> TaskResult:
    settings = settings or GroupSettings()
    saes = [sae] if isinstance(sae, Dictionary) else list(sae)
    announce(f"{data.kind}: fitting the probe on {len(data.train)} biased images")
    run = _Run(model, saes, data, settings)
    announce(f"{data.kind}: choosing on {len(data.validation)} validation images")
    chosen = run.search.chosen()
    announce(f"{data.kind}: reporting on {len(data.test)} test images")
    rows = run.rows(chosen)
    edits = {(data.kind, found.method): found.edit for found in chosen.values()}
    return TaskResult(
        task=task,
        model=str(model.cfg.model_name),
        sae=name or ", ".join(str(one.cfg.metadata.get("hook_name")) for one in saes),
        settings=_settings(settings, data),
        rows=rows,
        edit=edits.get((data.kind, "sae"), Edit()),
        edits=edits,
        search=run.search.entries,
        shown=("worst_group", "accuracy", "worst_group_over_none", "refit_worst_group", "kl"),
        drawn=("worst_group", "accuracy"),
        raised=GroupJudge.raised,
    )


class _Run:
    """One set of groups: the probes, the candidates of every method, and the search among them."""

    def __init__(
        self,
        model: Any,
        saes: Sequence[Dictionary],
        data: GroupData,
        settings: GroupSettings,
    ) -> None:
        self.model, self.saes, self.data, self.settings = model, saes, data, settings
        has_class_token = int(model.token_layout().n_cls) > 0
        self.tokens = [kind for kind in settings.tokens if kind != "cls" or has_class_token]
        self._train = EditPass(model, data.train.pixels, batch_size=settings.batch_size)
        self._embedded = unit(self._train.embed())
        self.probe = Probe.fit(self._embedded, data.train.labels)
        self._others = {
            name: Probe.fit(self._embedded, values)
            for name, values in data.train.others.items()
            if len(values.unique()) > 1
        }
        self.search = Search(
            kind=data.kind,
            methods=[m for m in GROUP_METHODS if m in settings.methods and m not in PROBES],
            validation=self.judge(data.validation, refits=False),
            proposed=self._proposed,
            greedy={},
            cap=settings.cap,
            random_seeds=settings.random_seeds,
        )

    def judge(self, split: GroupSplit, *, refits: bool) -> GroupJudge:
        """Return the judge of a split."""
        largest = torch.tensor(self.data.train.sizes).topk(2).indices.tolist()
        return GroupJudge(
            self.model, split, self.probe, others=self._others, usual=tuple(largest),
            refit=self._refit if refits else None, batch_size=self.settings.batch_size,
        )  # fmt: skip

    def rows(self, chosen: dict[str, Candidate]) -> list[Row]:
        """Return a row per method on the test images."""
        judge = self.judge(self.data.test, refits=True)
        measured = list(self.search.measured(chosen, [(judge, chosen)]))
        for method in (m for m in PROBES if m in self.settings.methods):
            nothing = Candidate(method, Edit(), 0, None, "another probe, the same model")
            measured.append((nothing, judge.values(judge.before, self._other_probe(method))))
        every = {candidate.method: values for candidate, values in measured}
        rows = []
        for candidate, values in measured:
            beside = {m: v for m, v in every.items() if m == "none" or candidate.method == "sae"}
            beside.pop(candidate.method, None)
            figures = group_figures(values, self.data.group_names, beside, seed=self.settings.seed)
            rows.append(candidate.row(self.data.kind, "test", figures))
        return rows

    def _refit(self, edit: Edit) -> Probe:
        """Return a probe fitted on the biased images under an edit."""
        embedded = unit(self._train.embed(edit)) if len(edit) else self._embedded
        return Probe.fit(embedded, self.data.train.labels)

    def _other_probe(self, method: str) -> Probe:
        """Return a probe fitted with the groups weighted alike, or on images without the bias."""
        train = self.data.train
        if method == "reweighted":
            return Probe.fit(self._embedded, train.labels, group_weights(train.groups))
        split = self.data.balanced or train.balanced(self.settings.seed)
        images = EditPass(self.model, split.pixels, batch_size=self.settings.batch_size)
        return Probe.fit(unit(images.embed()), split.labels)

    def _proposed(self, method: str) -> Iterable[Candidate]:
        """Return the candidates of a method, found on the training images."""
        if method == "sae":
            each = (self._latents("sae", sae, self.settings.rules) for sae in self.saes)
            return chain.from_iterable(each)
        if method in CONTROLS:
            rules = CONTROL_RULES.get(method, self.settings.rules)
            each = (self._latents(method, controls[method], rules) for controls in self._controls)
            return chain.from_iterable(each)
        return [candidate for candidate in self._directions if candidate.method == method]

    @cached_property
    def _controls(self) -> list[dict[str, Dictionary]]:
        pixels: Tensor = self.data.train.pixels[:: max(1, len(self.data.train) // 64)]
        return [
            control_dictionaries(self.model, sae, pixels, seed=self.settings.seed)
            for sae in self.saes
        ]

    @cached_property
    def _directions(self) -> list[Candidate]:
        return list(
            group_direction_candidates(self.model, self._train, self.data.train, tokens=self.tokens)
        )

    def _latents(
        self, method: str, dictionary: Dictionary, rules: Sequence[str]
    ) -> Iterable[Candidate]:
        return group_latent_candidates(
            method, self.model, dictionary, self.data.train, self._train, self.probe, rules=rules,
            sizes=sizes_below(self.settings.sizes, dictionary), tokens=self.tokens,
            batch_size=self.settings.batch_size,
            given=self.settings.latents if method == "sae" else (),
        )  # fmt: skip


def _settings(settings: GroupSettings, data: GroupData) -> dict[str, Any]:
    images = {
        split: dict(zip(data.group_names, getattr(data, split).sizes, strict=True))
        for split in ("train", "validation", "test")
    }
    return {
        **listed(settings),
        "label": data.kind,
        "nuisance": data.nuisance,
        "classes": list(data.classes),
        "values": list(data.values),
        "images": images,
    }
