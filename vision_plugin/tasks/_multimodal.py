"""Steering a vision-language model through its tower: put a value into its answers, or take it out.

Pach et al. 2025 (arXiv 2504.02821) clamp one latent of an SAE in LLaVA's tower. Here every method
is chosen on validation images and reported on test images, by exact answers: how often the answer
changes as it should, and how often the answers to the other questions stay unchanged and right.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vision_plugin.models.dictionary import Dictionary
from vision_plugin.models.site import Site
from vision_plugin.steering import Edit, LatentEditor
from vision_plugin.tasks._answers import check_reads_one_block
from vision_plugin.tasks._find import find_latents
from vision_plugin.tasks._multimodal_change import edits_of
from vision_plugin.tasks._multimodal_data import MultimodalData
from vision_plugin.tasks._multimodal_result import Dialogue, MultimodalResult
from vision_plugin.tasks._multimodal_settings import (
    DONE,
    EDITS,
    GOAL_METHODS,
    Goal,
    MultimodalSettings,
    Recipe,
    methods_of,
    recipes,
)
from vision_plugin.tasks._multimodal_split import Judge, Split, is_the_value
from vision_plugin.tasks._reading import learn
from vision_plugin.tasks._settings import listed

logger = logging.getLogger(__name__)

Announce = Callable[[str], None]


def multimodal(
    vlm: Any,
    sae: Dictionary,
    data: MultimodalData,
    *,
    settings: MultimodalSettings | None = None,
    judge: Judge = is_the_value,
    name: str = "",
    announce: Announce = logger.info,
) -> MultimodalResult:
    """Insert and suppress values in the answers of a vision-language model.

    Args:
        vlm: A VisionLanguageBridge that reads the output of one block of its tower.
        sae: An SAE at that output, of its patches.
        data: Questions, values and images.
        settings: What is searched through.
        judge: Says whether an answer states a value, ``judge(answer, value)``; by default an
            answer has to be the value's one word. Free answers need ``max_new_tokens`` too.
        name: Name of the SAE, for records.
        announce: Called with one line per stage.

    Raises:
        ValueError: the SAE belongs to another hook or model or lacks a latent, or the model cannot
            answer.

    Examples:
        >>> from vision_plugin.demo.multimodal import multimodal_data
        >>> data = multimodal_data(train=100, validation=40, test=40)
        >>> settings = vp.tasks.MultimodalSettings(
        ...     sizes=(1,), strengths=(1.5,), targets=1, screened=4
        ... )
        >>> found = vp.tasks.multimodal(vlm, sae, data, settings=settings)
        >>> sorted({row.kind for row in found.rows})
        ['background', 'colour', 'shape', 'texture']
    """
    settings = settings or MultimodalSettings()
    check_reads_one_block(vlm)
    site = Site.of(vlm.vision, sae)
    hook_name = site.hook_name_out
    if site.hook_names != [hook_name] or hook_name not in vlm.reach.hook_names:
        raise ValueError(
            f"the SAE works at {hook_name}, but {vlm.cfg.model_name} reads "
            f"{', '.join(vlm.reach.hook_names)}: use an SAE of that hook"
        )
    vlm.reach.check(hook_name, site.tokens)
    widest = min(int(sae.cfg.d_in), int(sae.cfg.d_sae))
    if max(settings.sizes) > widest:
        raise ValueError(
            f"sizes={settings.sizes}: an SAE of {sae.cfg.d_sae} latents at {sae.cfg.d_in} "
            f"dimensions allows at most {widest}"
        )
    given = find_latents(vlm.vision, sae, rule="list", latents=settings.latents).latents
    settings = replace(settings, latents=given)
    editor = LatentEditor(sae)
    announce(f"finding latents on {len(data.train)} images")
    train = Split(vlm, sae, editor, data, data.train, settings)
    knowledge = learn(
        train.reading,
        dict(data.train.labels),
        data.locator,
        set(data.beside),
        most=max(settings.sizes),
        pull=partial(_pull, train, data),
    ).with_latents(given)
    del train
    validation = Split(vlm, sae, editor, data, data.validation, settings, knowledge, judge)
    test = Split(vlm, sae, editor, data, data.test, settings, knowledge, judge)
    validation.check_answers("validation")
    test.check_answers("test")
    rows = test.unchanged()
    search: list[dict[str, Any]] = []
    dialogues: list[Dialogue] = []
    edits: dict[tuple[str, str, str], Edit] = {}
    best: tuple[float, Edit] = (-1.0, Edit())
    for factor, values in data.values.items():
        for goal in GOAL_METHODS:
            announce(f"{goal} of a {factor}: choosing on {len(data.validation)} images")
            tried = _searched(validation, goal, factor, settings)
            search += [_entry(goal, factor, *one) for one in tried]
            for choice, recipe in _chosen(tried, goal, settings):
                rows.append(test.row(goal, factor, recipe, choice))
                if choice == "best" and recipe.method in ("clamp", "negative"):
                    rows.append(test.row(goal, factor, recipe, choice, random=True))
            winner, score = _winner(tried, goal)
            rows.append(test.row(goal, factor, winner, "winner", error=False))
            rows.append(test.row(goal, factor, replace(winner, patches="all"), "winner"))
            dialogues += test.dialogues(goal, factor, winner)
            for number in range(len(values)):
                for named, edit in edits_of(sae, data, knowledge, factor, winner, number).items():
                    edits[goal, factor, named] = edit
                    best = max(best, (score, edit), key=lambda pair: pair[0])
    return MultimodalResult(
        model=str(vlm.cfg.model_name),
        sae=name or hook_name,
        settings=_listed(settings, data),
        rows=rows,
        search=search,
        dialogues=dialogues,
        edit=best[1],
        edits=edits,
    )


Tried = tuple[Recipe, dict[str, Any]]


def _pull(train: Split, data: MultimodalData, factor: str, mask: Tensor) -> Tensor | None:
    """Return in which direction the patches of a few training images raise each value."""
    labels = data.train.labels[factor]
    rows = torch.arange(min(train.settings.pulled, len(labels)))
    found = train.answering.pull(factor, data.values[factor], rows)
    if found is None:
        return None
    summed = (found[:, :, train.reading.first :] * mask[rows]).sum(2)
    own = torch.nn.functional.one_hot(labels[rows], len(found)).T.bool().to(summed.device)
    return summed.masked_fill(own.unsqueeze(-1), 0).mean(1)


def _searched(
    validation: Split, goal: Goal, factor: str, settings: MultimodalSettings
) -> list[Tried]:
    """Return what validation says: of every recipe on a few images, of the best ones on all."""
    found: list[Tried] = []
    for method in methods_of(goal, settings):
        mine = [recipe for recipe in recipes(goal, settings) if recipe.method == method]
        first = [
            (recipe, validation.tried(goal, factor, recipe, settings.screened)) for recipe in mine
        ]
        if len(validation.asked) > settings.screened:
            again = {
                recipe
                for score in (_balance, partial(_above, floor=settings.preserved))
                for recipe, _ in sorted(first, key=lambda one: score(one[1], goal), reverse=True)[
                    : settings.finalists
                ]
            }
            first = [
                (r, validation.tried(goal, factor, r) if r in again else seen) for r, seen in first
            ]
        found += first
    return found


def _balance(seen: Mapping[str, Any], goal: Goal) -> float:
    """Return the smaller one of what is done and what is preserved."""
    return float(min(seen[DONE[goal]], seen["preserved"]))


def _above(seen: Mapping[str, Any], goal: Goal, *, floor: float) -> float:
    """Return what is done where enough is preserved for sure, and what is missing where not."""
    left = seen["preserved"] - seen["preserved_error"] - floor
    return float(seen[DONE[goal]] if left >= 0 else left)


def _final(tried: Sequence[Tried]) -> list[Tried]:
    most = max(seen["images"] for _, seen in tried)
    return [one for one in tried if one[1]["images"] == most]


def _chosen(
    tried: Sequence[Tried], goal: Goal, settings: MultimodalSettings
) -> Iterator[tuple[str, Recipe]]:
    """Yield each method's recipe that does best in both respects, and the best above the floor."""
    for method in methods_of(goal, settings):
        mine = _final([one for one in tried if one[0].method == method])
        yield "best", max(mine, key=lambda one: _balance(one[1], goal))[0]
        scores = [_above(seen, goal, floor=settings.preserved) for _, seen in mine]
        if max(scores) >= 0:
            yield "preserving", mine[scores.index(max(scores))][0]


def _winner(tried: Sequence[Tried], goal: Goal) -> tuple[Recipe, float]:
    """Return the best recipe that an Edit can make, with its score."""
    mine = _final([one for one in tried if one[0].method in EDITS])
    recipe, seen = max(mine, key=lambda one: _balance(one[1], goal))
    return recipe, _balance(seen, goal)


def _entry(goal: Goal, factor: str, recipe: Recipe, seen: dict[str, Any]) -> dict[str, Any]:
    return {
        "kind": factor, "goal": goal, "method": recipe.method, "size": recipe.size,
        "strength": recipe.strength, **seen,
    }  # fmt: skip


def _listed(settings: MultimodalSettings, data: MultimodalData) -> dict[str, Any]:
    sizes = {name: len(getattr(data, name)) for name in ("train", "validation", "test")}
    return {**listed(settings), "images": sizes}
