"""A sparsity study as a table and as a figure."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vision_plugin._rich import Console, Table
from vision_plugin.evaluation._sparsity_result import SAEStudy, SparsityStudy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMES = {"cls": "CLS", "register": "registers", "patch": "patches", "all": "all"}
COLOURS = {"cls": "#D55E00", "register": "#CC79A7", "patch": "#0072B2", "all": "#666666"}
"""Colours of Okabe and Ito's palette, which colour-blind people can tell apart too."""
MAPS_IN_A_ROW = 6
TABLE_WIDTH = 120


def table_of(result: SparsityStudy) -> Table:
    """Return a table with a row for each SAE and kind of token.

    Args:
        result: A study.

    Examples:
        >>> cfg = vp.evaluation.SparsityStudyConfig(
        ...     saes=("runs/sae",), images="demo:8", output_path=None
        ... )
        >>> study = vp.evaluation.sparsity_study(cfg, model=model)
        >>> vp.evaluation.table_of(study).row_count
        3
    """
    table = Table(title=f"{result.n_images:,} images, {result.model_name}")
    for heading in ("SAE", "hook"):
        table.add_column(heading, overflow="fold")
    table.add_column("tokens", no_wrap=True)
    for heading in ("L0", "explained\nvariance", "cosine", "dead", "dense", "latents"):
        table.add_column(heading, justify="right", no_wrap=True)
    for one in result.saes:
        for place, (kind, found) in enumerate(one.kinds.items()):
            is_last = place == len(one.kinds) - 1
            table.add_row(
                *((one.sae, one.hook_name) if place == 0 else ("", "")),
                NAMES[kind],
                _number(found.sparsity.l0, 1),
                _number(found.fidelity.explained_variance, 3),
                _number(found.fidelity.cosine, 3),
                f"{found.sparsity.n_dead:,}",
                f"{found.sparsity.n_dense:,}",
                f"{one.d_sae:,}",
                end_section=is_last,
            )
    return table


def text_of(result: SparsityStudy) -> str:
    """Return the table as plain text.

    Args:
        result: A study.

    Examples:
        >>> cfg = vp.evaluation.SparsityStudyConfig(
        ...     saes=("runs/sae",), images="demo:8", output_path=None
        ... )
        >>> study = vp.evaluation.sparsity_study(cfg, model=model)
        >>> "patch" in vp.evaluation.text_of(study)
        True
    """
    console = Console(
        file=io.StringIO(), width=TABLE_WIDTH, color_system=None, markup=False, emoji=False,
        force_jupyter=False,
    )  # fmt: skip
    with console.capture() as captured:
        console.print(table_of(result))
    return captured.get()


def figure_of(result: SparsityStudy) -> Figure:
    """Return a figure of L0 and explained variance per layer, and a patch map of L0 per SAE.

    The maps share one scale, from the smallest to the largest mean L0 of any patch.

    Args:
        result: A study.

    Examples:
        >>> cfg = vp.evaluation.SparsityStudyConfig(
        ...     saes=("runs/sae",), images="demo:8", output_path=None
        ... )
        >>> figure = vp.evaluation.figure_of(vp.evaluation.sparsity_study(cfg, model=model))
        >>> type(figure).__name__
        'Figure'
    """
    from matplotlib.figure import Figure

    mapped = [one for one in result.saes if one.patch_map is not None]
    n_rows = math.ceil(len(mapped) / MAPS_IN_A_ROW)
    figure = Figure(figsize=(11, 4 + 2.1 * n_rows), layout="constrained")
    if not mapped:
        _draw_lines(figure, result)
        return figure
    halves: Any = figure.subfigures(2, 1, height_ratios=(4, 2.1 * n_rows))
    above, below = halves
    _draw_lines(above, result)
    _draw_maps(below, mapped, n_rows)
    return figure


def labels_of(saes: Sequence[SAEStudy]) -> list[str]:
    """Return a short label for each SAE: its layer if that is unique, or else its hook.

    Args:
        saes: The SAEs of a study.

    Examples:
        >>> cfg = vp.evaluation.SparsityStudyConfig(
        ...     saes=("runs/sae",), images="demo:8", output_path=None
        ... )
        >>> study = vp.evaluation.sparsity_study(cfg, model=model)
        >>> vp.evaluation.labels_of(study.saes)
        ['layer 2']
    """
    layers = [one.layer for one in saes]
    sites = {re.sub(r"\d+", "", one.hook_name, count=1) for one in saes}
    if None not in layers and len(set(layers)) == len(layers) and len(sites) == 1:
        return [f"layer {layer}" for layer in layers]
    hooks = [one.hook_name for one in saes]
    if len(set(hooks)) == len(hooks):
        return hooks
    return [f"{one.hook_name}\n{Path(one.sae).name}" for one in saes]


def _draw_lines(figure: Any, result: SparsityStudy) -> None:
    left, right = figure.subplots(1, 2)
    kinds = [kind for kind in NAMES if any(kind in one.kinds for one in result.saes)]
    for kind in kinds:
        found = [(place, one.kinds.get(kind)) for place, one in enumerate(result.saes)]
        shown = [(place, study) for place, study in found if study is not None]
        places = [place for place, _ in shown]
        style = {"color": COLOURS[kind], "label": NAMES[kind], "marker": "o"}
        style["linestyle"] = "--" if kind == "all" else "-"
        left.plot(places, [study.sparsity.l0 for _, study in shown], **style)
        right.plot(places, [study.fidelity.explained_variance for _, study in shown], **style)
    labels = labels_of(result.saes)
    is_long = len(labels) > 6 or max(map(len, labels)) > 12
    for axes, title in ((left, "L0"), (right, "explained variance")):
        axes.set_title(title)
        axes.set_xticks(range(len(labels)), labels)
        axes.tick_params(axis="x", labelrotation=90 if is_long else 0, labelsize=8)
        axes.grid(alpha=0.3)
    left.set_ylim(bottom=0)
    left.set_ylabel("mean active latents per token")
    right.set_ylabel("share of the variance")
    left.legend()


def _draw_maps(figure: Any, mapped: Sequence[SAEStudy], n_rows: int) -> None:
    from matplotlib.colors import Normalize

    n_columns = min(len(mapped), MAPS_IN_A_ROW)
    grid = figure.subplots(n_rows, n_columns, squeeze=False)
    maps = [one.patch_map.numpy() for one in mapped if one.patch_map is not None]
    low, high = min(values.min() for values in maps), max(values.max() for values in maps)
    scale = Normalize(low, high)
    axes = grid.flatten().tolist()
    for place in axes:
        place.set_axis_off()
    for place, values, label in zip(axes, maps, labels_of(mapped), strict=False):
        drawn = place.imshow(values, norm=scale, cmap="viridis")
        place.set_title(label, fontsize=8)
    figure.colorbar(drawn, ax=grid, label="L0 per patch")


def _number(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:,.{digits}f}"
