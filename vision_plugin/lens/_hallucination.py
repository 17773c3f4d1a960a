"""Hallucinated objects in a vision-language model: detected, localised, erased, steered away.

The model is asked whether objects are there that are and that are not. Every method's settings are
chosen on one half of the images by the mean of both shares of right answers; figures are of the
other half.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vision_plugin.lens._hallucination_data import ObjectQuestions
from vision_plugin.lens._hallucination_edits import (
    DIRECTION_KINDS,
    erase,
    vti_textual,
    vti_visual,
    with_random_directions,
    with_strength,
    word_direction,
)
from vision_plugin.lens._hallucination_pass import QuestionPass
from vision_plugin.lens._hallucination_result import (
    Hallucination,
    HallucinationRow,
    Localised,
    balanced,
    localised,
)
from vision_plugin.lens._shares import auroc_of
from vision_plugin.steering import Edit

logger = logging.getLogger(__name__)

Announce = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class HallucinationSettings:
    """What is searched through on the choosing half.

    Examples:
        >>> vp.lens.HallucinationSettings(layers=(1,)).weights
        (1.0, 2.0, 5.0)
    """

    layers: tuple[int, ...] = ()
    """Layers of the language model to erase at, 0 for what enters the first block; by default every
    layer behind which a block follows."""
    weights: tuple[float, ...] = (1.0, 2.0, 5.0)
    """Weights of the erasure: 1 takes a positive coefficient away, more turns it round."""
    strengths: tuple[float, ...] = (0.9, 3.0, 10.0)
    """Strengths of latent-space steering; the authors use 0.9."""
    demonstrations: int = 40
    """Images of the choosing half that latent-space steering learns from."""
    n_masks: int = 20
    """Masked copies of each demonstration."""
    masked: float = 0.99
    """Share of the patches that a mask hides."""
    n_random: int = 3
    """Random directions that stand beside each edit."""
    batch_size: int = 64
    """Questions per pass."""
    seed: int = 0
    """Seed of the halves, the masks and the random directions."""

    def __post_init__(self) -> None:
        if not self.weights or not self.strengths:
            raise ValueError("weights= and strengths= need at least one number each")
        for name in ("demonstrations", "n_masks", "n_random", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 < self.masked < 1:
            raise ValueError(f"masked={self.masked} must lie between 0 and 1")


def hallucination(
    vlm: Any,
    data: ObjectQuestions,
    *,
    settings: HallucinationSettings | None = None,
    announce: Announce = logger.info,
) -> Hallucination:
    """Ask a vision-language model about objects, and mend what it sees that is not there.

    Args:
        vlm: A VisionLanguageBridge.
        data: Questions about present and absent objects.
        settings: What is searched through.
        announce: Called with one line per stage.

    Raises:
        ValueError: there are too few questions, or a word is not in the vocabulary.

    Examples:
        >>> from vision_plugin.demo.objects import object_questions
        >>> settings = vp.lens.HallucinationSettings(
        ...     layers=(1,),
        ...     weights=(1.0,),
        ...     strengths=(0.9,),
        ...     demonstrations=4,
        ...     n_masks=1,
        ...     n_random=1,
        ... )
        >>> found = vp.lens.hallucination(vlm, object_questions(60, absent=1), settings=settings)
        >>> found.n_questions
        (60, 60)
    """
    cfg = settings or HallucinationSettings()
    choosing, reported = data.halves(cfg.seed)
    study = _Study(vlm, cfg, choosing, reported)
    announce(f"reading the vocabulary at the tokens of {len(data.images)} images")
    rows = [study.plain(), study.threshold("answer_threshold"), study.threshold("confidence")]
    for kind in (*DIRECTION_KINDS, "diff_mean"):
        announce(f"erasing directions: {kind}")
        rows += study.erased(kind)
    for name in ("visual", "textual"):
        announce(f"latent-space steering: {name}")
        rows += study.steered(name)
    return Hallucination(
        model=str(vlm.cfg.model_name),
        settings=cfg,
        n_questions=(len(choosing), len(reported)),
        rows=rows,
        detection={
            "confidence": auroc_of(study.confidence[1], reported.there),
            "answer": auroc_of(study.before[1], reported.there),
        },
        localisation=study.localisation(),
        maps=study.maps[1],
        objects=data.objects,
        edits=study.edits,
    )


class _Study:
    """Both halves, with what the model says of them as it is."""

    def __init__(self, vlm: Any, cfg: HallucinationSettings, *halves: ObjectQuestions) -> None:
        self.vlm, self.cfg, self.halves = vlm, cfg, halves
        self.passes = [QuestionPass(vlm, half, batch_size=cfg.batch_size) for half in halves]
        self.before = [one.margins() for one in self.passes]
        self.others = self.passes[1].other_answers()
        self.maps = [one.confidence_maps() for one in self.passes]
        self.confidence = [
            found[half.image, half.asked].amax(-1)
            for found, half in zip(self.maps, halves, strict=True)
        ]
        self.edits: dict[str, Edit] = {}
        n_layers = self.passes[0].reading.n_layers
        self.layers = cfg.layers or tuple(range(n_layers))

    # ------------------------------------------------------------------ without edits

    def plain(self) -> HallucinationRow:
        """Return what the model says as it is."""
        return HallucinationRow.of("none", "", self.before[1] > 0, self.halves[1].there)

    def threshold(self, name: str) -> HallucinationRow:
        """Return what a threshold, chosen on one half, says without any edit."""
        scores = self.before if name == "answer_threshold" else self.confidence
        cut = _best_cut(scores[0], self.halves[0].there)
        return HallucinationRow.of(
            name, f"yes above {cut:.3g}", scores[1] > cut, self.halves[1].there
        )

    # ------------------------------------------------------------------ erasure

    def erased(self, kind: str) -> list[HallucinationRow]:
        """Return ProjectAway with a kind of direction, gated by confidence and not, and random."""
        best: tuple[float, int, float, float] | None = None
        there = self.halves[0].there
        directions = {layer: self._directions(kind, layer) for layer in self.layers}
        for layer in self.layers:
            for weight in self.cfg.weights:
                after = self.passes[0].margins(self._edits(directions[layer], layer, weight))
                for cut in _cuts(self.confidence[0]):
                    gate = self.confidence[0] <= cut
                    right = balanced(torch.where(gate, after, self.before[0]) > 0, there)
                    if best is None or right > best[0]:
                        best = right, layer, weight, cut
        assert best is not None
        _, layer, weight, cut = best
        edits = self._edits(directions[layer], layer, weight)
        gate = self.confidence[1] <= cut
        how = f"layer {layer}, weight {weight:g}"
        for number, name in enumerate(self.halves[1].objects):
            if len(edits(number)):
                self.edits[f"erase-{kind}-{_safe(name)}"] = edits(number)
        gated = f"{how}, confidence up to {cut:.3g}"
        row = self._row(f"project_away:{kind}", gated, edits, None, gate)
        name = f"project_away:{kind}, always"
        always = self._row(name, how, edits, None, None, asks_others=False)
        drawn = []
        for seed in range(self.cfg.n_random):
            noise = self._noise(directions[layer], seed)
            own = self._edits(noise, layer, weight)
            drawn.append(self._row("random", how, own, None, gate, asks_others=False))
        return [row, always, _middle(drawn, f"random direction:{kind}", gated)]

    def _edits(self, directions: Tensor, layer: int, weight: float) -> Callable[[int], Edit]:
        hook = self.passes[0].reading.hooks[layer]

        def edit(number: int) -> Edit:
            known = bool(directions[number].any())
            return erase(hook, directions[number], weight) if known else Edit()

        return edit

    def _directions(self, kind: str, layer: int) -> Float[Tensor, "objects d_model"]:
        for known in DIRECTION_KINDS:
            if kind == known:
                named = partial(word_direction, self.vlm, layer=layer, kind=known)
                return torch.stack([named(name).cpu() for name in self.halves[0].objects])
        half = self.halves[0]
        states = self._states[:, layer]
        found = []
        for number in range(len(half.objects)):
            shown = half.image[(half.asked == number) & half.there].unique()
            if len(shown) == 0:
                found.append(torch.zeros(states.shape[1]))  # nothing to tell it by: no edit
                continue
            found.append(states[shown].mean(0) - states.mean(0))
        return torch.stack(found)

    @cached_property
    def _states(self) -> Tensor:
        return self.passes[0].mean_states()

    def _noise(self, like: Tensor, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.cfg.seed + 1000 + seed)
        drawn = torch.randn(like.shape, generator=generator)
        scaled: Tensor = drawn / drawn.norm(dim=1, keepdim=True) * like.norm(dim=1, keepdim=True)
        return scaled

    # ------------------------------------------------------------------ steering

    def steered(self, part: str) -> list[HallucinationRow]:
        """Return latent-space steering of the tower or of the language model, and random."""
        edit = self._vti(part)
        there = self.halves[0].there
        best: tuple[float, float] | None = None
        for strength in self.cfg.strengths:
            own = with_strength(edit, strength)
            right = balanced(self.passes[0].margins(*_sided(part, own)) > 0, there)
            if best is None or right > best[0]:
                best = right, strength
        assert best is not None
        chosen = with_strength(edit, best[1])
        self.edits[f"vti-{part}"] = chosen
        how = f"strength {best[1]:g}"
        row = self._row(f"vti:{part}", how, *_sided(part, chosen), None)
        drawn = [
            self._row(
                "random",
                how,
                *_sided(part, with_random_directions(chosen, seed)),
                None,
                asks_others=False,
            )
            for seed in range(self.cfg.n_random)
        ]
        return [row, _middle(drawn, f"random vti:{part}", how)]

    def _vti(self, part: str) -> Edit:
        half, cfg = self.halves[0], self.cfg
        if part == "visual":
            some = list(half.images[: cfg.demonstrations])
            return vti_visual(
                self.vlm, some, strength=1.0, n_masks=cfg.n_masks, masked=cfg.masked, seed=cfg.seed
            )
        # As many present as absent objects: "say no" would mend one kind alone.
        yes, no = half.there.nonzero()[:, 0], (~half.there).nonzero()[:, 0]
        n = min(cfg.demonstrations // 2, len(yes), len(no))
        rows = [*yes[:n].tolist(), *no[:n].tolist()]
        right = [half.answers[0] if bool(half.there[row]) else half.answers[1] for row in rows]
        wrong = [half.answers[1] if bool(half.there[row]) else half.answers[0] for row in rows]
        return vti_textual(
            self.vlm,
            [half.images[int(half.image[row])] for row in rows],
            [half.question.format(half.objects[int(half.asked[row])]) for row in rows],
            right,
            wrong,
            strength=1.0,
        )

    # ------------------------------------------------------------------ figures

    def _row(
        self,
        method: str,
        how: str,
        language: Callable[[int], Edit],
        tower: Edit | None,
        gate: Bool[Tensor, " q"] | None,
        *,
        asks_others: bool = True,
    ) -> HallucinationRow:
        """Return the figures of an edit on the reported half, made where the gate is open."""
        where = torch.ones_like(self.halves[1].there) if gate is None else gate
        after = self.passes[1].margins(language, tower, where)
        margins = torch.where(where, after, self.before[1])
        found = {}
        if asks_others:
            found = self.passes[1].other_answers(language, tower, where)
        kept = [
            torch.where(where, answers == self.others[name], torch.ones_like(where))
            for name, answers in found.items()
        ]
        preserved = torch.stack(kept).double().mean(0) if kept else None
        return HallucinationRow.of(method, how, margins > 0, self.halves[1].there, preserved)

    def localisation(self) -> list[Localised]:
        """Return how well maps of a present object find it, beside maps of an absent one."""
        found = []
        maps, half = self.maps[1], self.halves[1]
        masks = self.passes[1].object_masks(maps.shape[-1])
        if masks is None:
            return []
        for method, there in (("confidence", True), ("confidence of an absent object", False)):
            rows = (half.there == there).nonzero()[:, 0]
            own = maps[half.image[rows], half.asked[rows]]
            found.append(localised(method, own, masks[half.image[rows]]))
        generator = torch.Generator().manual_seed(self.cfg.seed)
        rows = half.there.nonzero()[:, 0]
        chance = torch.rand(len(rows), maps.shape[-1], generator=generator)
        return [*found, localised("random map", chance, masks[half.image[rows]])]


def _sided(part: str, edit: Edit) -> tuple[Callable[[int], Edit], Edit | None]:
    """Return an edit as that of the language model for any object, or as that of the tower."""
    if part == "visual":
        return (lambda number: Edit()), edit
    return (lambda number: edit), None


def _cuts(scores: Float[Tensor, " q"]) -> list[float]:
    """Return thresholds to try: none of the scores, deciles, and all of them."""
    inner = torch.quantile(scores.double(), torch.linspace(0.1, 0.9, 9).double()).tolist()
    return [float(scores.min()) - 1.0, *inner, float(scores.max())]


def _best_cut(scores: Float[Tensor, " q"], there: Bool[Tensor, " q"]) -> float:
    ordered = scores.double().unique()
    middles: list[float] = ((ordered[1:] + ordered[:-1]) / 2).tolist()
    cuts = [float(ordered[0]) - 1.0, *middles]
    return max(cuts, key=lambda cut: balanced(scores > cut, there))


def _middle(rows: Sequence[HallucinationRow], method: str, how: str) -> HallucinationRow:
    """Return the row in the middle by its share of right answers, under another name."""
    ordered = sorted(rows, key=lambda row: row.balanced.value)
    return replace(ordered[len(ordered) // 2], method=method, how=how)


def _safe(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name)
