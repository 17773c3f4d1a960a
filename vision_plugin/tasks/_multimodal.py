"""Steering a vision-language model through its tower: put a value into its answers, or take it out.

Pach et al. 2025 (arXiv 2504.02821) clamp one latent of an SAE in LLaVA's tower. Here every method
is chosen on validation images and reported on test images, by exact answers: how often the answer
changes as it should, and how often the answers to the other questions stay unchanged and right.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from vision_plugin.models.dictionary import Dictionary
from vision_plugin.models.site import Site
from vision_plugin.steering import LatentEditor
from vision_plugin.tasks._answers import check_reads_one_block
from vision_plugin.tasks._multimodal_data import MultimodalData
from vision_plugin.tasks._multimodal_result import Dialogue, MultimodalResult
from vision_plugin.tasks._multimodal_settings import (
    GOAL_METHODS,
    Goal,
    MultimodalSettings,
    Recipe,
    recipes,
)
from vision_plugin.tasks._multimodal_split import Split
from vision_plugin.tasks._reading import learn
from vision_plugin.tasks._row import listed

logger = logging.getLogger(__name__)

Announce = Callable[[str], None]


def multimodal(
    vlm: Any,
    sae: Dictionary,
    data: MultimodalData,
    *,
    settings: MultimodalSettings | None = None,
    name: str = "",
    announce: Announce = logger.info,
) -> MultimodalResult:
    """Insert and suppress values in the answers of a vision-language model.

    Args:
        vlm: A VisionLanguageBridge that reads the output of one block of its tower.
        sae: An SAE at that output, of its patches.
        data: Questions, values and images.
        settings: What is searched through.
        name: Name of the SAE, for records.
        announce: Called with one line per stage.

    Raises:
        ValueError: the SAE belongs to another hook or model, or the model cannot answer.
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
    editor = LatentEditor(sae)
    announce(f"finding latents on {len(data.train)} images")
    train = Split(vlm, sae, editor, data, data.train, settings)
    knowledge = learn(
        train.reading,
        dict(data.train.labels),
        data.locator,
        set(data.beside),
        most=max(settings.sizes),
    )
    del train
    validation = Split(vlm, sae, editor, data, data.validation, settings, knowledge)
    test = Split(vlm, sae, editor, data, data.test, settings, knowledge)
    validation.check_answers("validation")
    test.check_answers("test")
    rows = test.unchanged()
    search: list[dict[str, Any]] = []
    dialogues: list[Dialogue] = []
    for factor in data.questions:
        for goal in GOAL_METHODS:
            announce(f"{goal} of a {factor}: choosing on {len(data.validation)} images")
            seen = [(recipe, *validation.tried(goal, factor, recipe)) for recipe in
                    recipes(goal, settings)]  # fmt: skip
            search += [_searched(goal, factor, *entry) for entry in seen]
            for method in GOAL_METHODS[goal]:
                mine = [entry for entry in seen if entry[0].method == method]
                for choice, recipe in _choices(mine, settings.preserved).items():
                    rows.append(test.row(goal, factor, recipe, choice))
                    if choice == "best" and method in ("clamp", "negative"):
                        rows.append(test.row(goal, factor, recipe, choice, random=True))
                        rows.append(test.row(goal, factor, recipe, choice, error=False))
                    if choice == "best" and method in ("transfer", "negative"):
                        dialogues += test.dialogues(goal, factor, recipe)
    return MultimodalResult(
        model=str(vlm.cfg.model_name),
        sae=name or hook_name,
        settings=_listed(settings, data),
        rows=rows,
        search=search,
        dialogues=dialogues,
    )


def _choices(tried: Sequence[tuple[Recipe, float, float]], floor: float) -> dict[str, Recipe]:
    """Return the recipe that does best in both respects, and the best one above a floor."""
    best = max(tried, key=lambda entry: min(entry[1], entry[2]))
    found = {"best": best[0]}
    above = [entry for entry in tried if entry[2] >= floor]
    if above:
        found["preserving"] = max(above, key=lambda entry: entry[1])[0]
    return found


def _searched(goal: Goal, factor: str, recipe: Recipe, done: float, kept: float) -> dict[str, Any]:
    name = "inserted" if goal == "insertion" else "suppressed"
    return {
        "kind": factor, "goal": goal, "method": recipe.method, "size": recipe.size,
        "strength": recipe.strength, name: done, "preserved": kept,
    }  # fmt: skip


def _listed(settings: MultimodalSettings, data: MultimodalData) -> dict[str, Any]:
    sizes = {name: len(getattr(data, name)) for name in ("train", "validation", "test")}
    return {**listed(settings), "images": sizes}
