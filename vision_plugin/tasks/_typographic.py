"""Typographic attacks: a printed word that names something else fools a model; what mends that.

Every method proposes edits on the training pairs. Validation chooses one for each method, within a
cap on the loss of clean accuracy. The test pairs are reported, and so are words that nothing was
found or chosen on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain
from typing import Any

from vision_plugin.models.dictionary import Dictionary
from vision_plugin.steering import Edit, EditPass
from vision_plugin.tasks._attack import Attack, TypographicData
from vision_plugin.tasks._candidates import (
    TOKENS,
    Candidate,
    control_dictionaries,
    direction_candidates,
    latent_candidates,
)
from vision_plugin.tasks._find import RULES
from vision_plugin.tasks._heads import choose_heads, has_heads
from vision_plugin.tasks._measure import Judge, Questions, figures
from vision_plugin.tasks._published import PublishedSet
from vision_plugin.tasks._result import CONTROLS, TaskResult
from vision_plugin.tasks._row import Row
from vision_plugin.tasks._search import Search, sizes_below
from vision_plugin.tasks._settings import check_known, check_sizes, listed
from vision_plugin.tasks._unpaired import judge_of

logger = logging.getLogger(__name__)

METHODS = (
    "none", "sae", "random_latents", "random_active_latents", "neurons", "random_dictionary",
    "pca", "diff_mean", "difference_subspace", "leace", "probe", "heads",
)  # fmt: skip
UNSEEN = ("none", "sae", "diff_mean", "difference_subspace", "leace", "heads")
"""Methods that are also run with half of the words left out."""

Announce = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class TypographicSettings:
    """What a typographic task searches through.

    Examples:
        >>> vp.tasks.TypographicSettings(sizes=(10,)).rules
        ('attribution', 'net_attribution', 'unused')
    """

    rules: tuple[str, ...] = ("attribution", "net_attribution", "unused")
    """Rules that find latents."""
    sizes: tuple[int, ...] = (10, 20, 50, 100, 200)
    """Numbers of latents to try."""
    latents: tuple[int, ...] = ()
    """Latents of the SAE to suppress in place of those that rules find."""
    tokens: tuple[str, ...] = TOKENS
    """Kinds of token to edit."""
    methods: tuple[str, ...] = METHODS
    """Methods to run."""
    cap: float = 0.02
    """Largest loss of clean accuracy on validation."""
    random_seeds: int = 3
    """Draws of random latents, whose figures are averaged."""
    unseen_words: bool = True
    """Whether to leave half of the words out, too, and report on them."""
    batch_size: int = 100
    """Images that run at once."""
    seed: int = 0
    """Seed of random latents and of the bootstrap."""

    def __post_init__(self) -> None:
        check_known(self, methods=METHODS, rules=RULES)
        check_sizes(self.sizes)
        if not 0 <= self.cap < 1:
            raise ValueError(f"cap={self.cap} is a share of the clean images: from 0 to 1")


def check_reads_text(model: Any) -> None:
    """Raise ValueError unless a model compares images with texts.

    Args:
        model: A VisionBridge.

    Raises:
        ValueError: the model has no space shared with text.

    Examples:
        >>> try:
        ...     vp.tasks.check_reads_text(vlm.vision)
        ... except ValueError:
        ...     print("a tower without a text tower")
        a tower without a text tower
    """
    if not model.adapter.has_joint_space:
        raise ValueError(
            f"{model.cfg.model_name} has no space shared with text, so a printed word cannot fool "
            "it in zero-shot classification: use a model with a text tower (CLIP)"
        )


def typographic(
    model: Any,
    sae: Dictionary | Sequence[Dictionary],
    images: TypographicData | Sequence[TypographicData],
    *,
    settings: TypographicSettings | None = None,
    published: Sequence[PublishedSet] = (),
    name: str = "",
    announce: Announce = logger.info,
) -> TaskResult:
    """Repair a model that printed words fool, with latents and with every baseline.

    Args:
        model: A VisionBridge with a space shared with text.
        sae: An SAE, or several at different layers, among which validation chooses too.
        images: One kind of attack, or several.
        settings: What is searched through.
        published: Published sets of attacked images to report on, too, with the chosen edits.
        name: Name of the SAE, for records.
        announce: Called with one line per stage.

    Raises:
        ValueError: the model has no text tower, an SAE belongs to another model, or a split is too
            small for an interval.

    Examples:
        >>> from vision_plugin.demo.attacks import typographic_data
        >>> data = typographic_data(model, "shape", train=40, validation=30, test=30)
        >>> settings = vp.tasks.TypographicSettings(
        ...     methods=("none", "sae"),
        ...     sizes=(5,),
        ...     rules=("attribution",),
        ...     tokens=("cls",),
        ...     unseen_words=False,
        ... )
        >>> found = vp.tasks.typographic(model, sae, data, settings=settings)
        >>> [row.method for row in found.rows]
        ['none', 'sae']
    """
    check_reads_text(model)
    saes = [sae] if isinstance(sae, Dictionary) else list(sae)
    kinds = [images] if isinstance(images, TypographicData) else list(images)
    settings = settings or TypographicSettings()
    rows: list[Row] = []
    edits: dict[tuple[str, str], Edit] = {}
    search: list[dict[str, Any]] = []
    judges: list[Judge] = []
    for data in kinds:
        announce(f"{data.kind}: finding on {len(data.train)} pairs, choosing on validation")
        run = _Run(model, saes, data, settings)
        chosen = run.search.chosen()
        search += run.search.entries
        announce(f"{data.kind}: reporting on {len(data.test)} test pairs")
        judge = run.judge(data.test)
        judges.append(judge)
        rows += run.rows(chosen, [(judge, chosen)], "test")
        edits.update({(data.kind, found.method): found.edit for found in chosen.values()})
        for other in published:
            announce(f"{data.kind}: reporting on {len(other.attack)} images of {other.name}")
            asked = Questions(model, other.prompts, {})
            beside = judge_of(model, other.attack, asked, settings.batch_size)
            rows += run.rows(chosen, [(beside, chosen)], other.name)
        if settings.unseen_words:
            announce(f"{data.kind}: the same with half of the words left out, twice")
            rows += _unseen(model, saes, data, settings)
    mended = Edit()
    for data in kinds:
        mended += edits.get((data.kind, "sae"), Edit())
    if len(kinds) > 1 and "sae" in settings.methods:
        for data, judge in zip(kinds, judges, strict=True):
            found = figures(judge.values(judge.answers(mended)), seed=settings.seed)
            size = sum(len(change.targets) for change in mended.changes)
            rows.append(Row("sae_all_kinds", data.kind, "test", size, None, "", str(mended), found))
    return TaskResult(
        task="typographic",
        model=str(model.cfg.model_name),
        sae=name or ", ".join(str(one.cfg.metadata.get("hook_name")) for one in saes),
        settings={**_settings(settings, kinds), "published": _published(published)},
        rows=rows,
        edit=mended,
        edits=edits,
        search=search,
    )


class _Run:
    """One kind of attack: candidates of every method, and the search among them."""

    def __init__(
        self,
        model: Any,
        saes: Sequence[Dictionary],
        data: TypographicData,
        settings: TypographicSettings,
    ) -> None:
        self.model, self.saes, self.data, self.settings = model, saes, data, settings
        self.questions = Questions(model, data.prompts, data.others)
        validation = self.judge(data.validation)
        greedy = {}
        if has_heads(model):
            greedy["heads"] = partial(
                choose_heads, model, data.train, validation, cap=settings.cap,
                batch_size=settings.batch_size,
            )  # fmt: skip
        self.search = Search(
            kind=data.kind,
            methods=[m for m in METHODS if m in settings.methods and (m != "heads" or greedy)],
            validation=validation,
            proposed=self._proposed,
            greedy=greedy,
            cap=settings.cap,
            random_seeds=settings.random_seeds,
        )

    def judge(self, attack: Attack) -> Judge:
        """Return the judge of a split."""
        return Judge(self.model, attack, self.questions, self.settings.batch_size)

    def rows(
        self,
        chosen: dict[str, Candidate],
        parts: Sequence[tuple[Judge, dict[str, Candidate]]],
        split: str,
    ) -> list[Row]:
        """Return a row per method, the pairs of several parts taken together."""
        return [
            candidate.row(self.data.kind, split, figures(values, seed=self.settings.seed))
            for candidate, values in self.search.measured(chosen, parts)
        ]

    def _proposed(self, method: str) -> Iterable[Candidate]:
        """Return the candidates of a method, found on the training pairs."""
        if method == "sae":
            each = (self._latents("sae", sae, self.settings.rules) for sae in self.saes)
            return chain.from_iterable(each)
        if method in CONTROLS:
            return self._latents(method, self._controls[method], ("attribution",))
        return [candidate for candidate in self._directions if candidate.method == method]

    @cached_property
    def _train(self) -> tuple[EditPass, EditPass]:
        """The clean and the attacked training images, run once."""
        train, size = self.data.train, self.settings.batch_size
        return (
            EditPass(self.model, train.clean, batch_size=size),
            EditPass(self.model, train.attacked, batch_size=size),
        )

    @cached_property
    def _controls(self) -> dict[str, Dictionary]:
        return control_dictionaries(
            self.model, self.saes[0], self.data.train.clean, seed=self.settings.seed
        )

    @cached_property
    def _directions(self) -> list[Candidate]:
        return list(
            direction_candidates(
                self.model,
                self.data.train,
                self._train,
                layers=range(int(self.model.cfg.n_layers)),
                tokens=self.settings.tokens,
            )
        )

    def _latents(
        self, method: str, dictionary: Dictionary, rules: Sequence[str]
    ) -> Iterable[Candidate]:
        return latent_candidates(
            method, self.model, dictionary, self.data.train, self._train, self.questions.texts,
            rules=rules, sizes=sizes_below(self.settings.sizes, dictionary),
            tokens=self.settings.tokens, batch_size=self.settings.batch_size,
            given=self.settings.latents if method == "sae" else (),
        )  # fmt: skip


def _unseen(
    model: Any,
    saes: Sequence[Dictionary],
    data: TypographicData,
    settings: TypographicSettings,
) -> list[Row]:
    """Return rows on words that nothing was found or chosen on, both halves taken together.

    Rule, size, layer and token are chosen on words of the known half that the edit was not found
    with; then the edit is found again with all words of that half.
    """
    methods = tuple(method for method in settings.methods if method in UNSEEN)
    fewer = replace(settings, methods=methods)
    parts: list[tuple[Judge, dict[str, Candidate]]] = []
    for known, unseen in data.halves():
        chosen = _Run(model, saes, known.apart(), fewer).search.chosen()
        run = _Run(model, saes, known, fewer)
        parts.append((run.judge(unseen), run.search.found_again(chosen)))
    return run.rows(parts[0][1], parts, "unseen_words")


def _published(sets: Sequence[PublishedSet]) -> dict[str, Any]:
    """Return the size of each published set, and why it has no figures on clean images."""
    return {
        one.name: {"images": len(one.attack), "without_clean": one.without_clean or None}
        for one in sets
    }


def _settings(settings: TypographicSettings, kinds: Sequence[TypographicData]) -> dict[str, Any]:
    numbers = {
        data.kind: {
            "train": len(data.train), "validation": len(data.validation), "test": len(data.test)
        }
        for data in kinds
    }  # fmt: skip
    return {**listed(settings), "pairs": numbers}
