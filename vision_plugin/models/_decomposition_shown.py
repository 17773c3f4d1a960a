"""A decomposition as a table and as a figure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from vision_plugin._rich import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ATTENTION, MLP = "#0072B2", "#D55E00"


def table(found: Any) -> Table:
    """Return the table of a Decomposition: a row for each layer, and one for each other part."""
    shares = found.shares()
    lengths = {name: float(part.norm(dim=-1).mean()) for name, part in found.parts()}
    shown = Table(title=f"{found.model_name}, {len(found):,} images")
    shown.add_column("part")
    for heading in ("share of\nattention", "of its\nbiases", "of the\nMLP", "in all", "length"):
        shown.add_column(heading, justify="right")
    by_layer = found.by_layer().norm(dim=-1).mean(0).tolist()
    shown.add_row("embed", "", "", "", _share(shares["embed"]), f"{lengths['embed']:.3f}")
    for layer in range(found.n_layers):
        heads = sum(share for name, share in shares.items() if _is_attention(name, layer))
        bias, mlp = shares[f"attention bias {layer}"], shares[f"mlp {layer}"]
        cells = [_share(value) for value in (heads, bias, mlp, heads + bias + mlp)]
        shown.add_row(f"layer {layer}", *cells, f"{by_layer[layer]:.3f}")
    for name in ("bias", "pool mlp", "hooks"):
        if name in shares:
            shown.add_row(name, "", "", "", _share(shares[name]), f"{lengths[name]:.3f}")
    return shown


def plot(found: Any) -> Figure:
    """Return the figure of a Decomposition."""
    from matplotlib.figure import Figure

    shares = found.shares()
    panels = 1 + found.has_heads + (found.has_tokens or found.pool is not None)
    figure = Figure(figsize=(4.6 * panels, 3.8), layout="constrained")
    axes = iter(figure.subplots(1, panels, squeeze=False)[0])
    _draw_layers(next(axes), found, shares)
    if found.has_heads:
        n_heads = found.by_head().shape[2]
        values = [
            [shares[f"head {layer}.{head}"] for head in range(n_heads)]
            for layer in range(found.n_layers)
        ]
        place = next(axes)
        _draw_map(figure, place, torch.tensor(values), "share of each head")
        place.set_xlabel("head")
        place.set_ylabel("layer")
    if found.has_tokens or found.pool is not None:
        _draw_map(figure, next(axes), found.patch_shares().cpu(), "share of each patch")
    return figure


def _draw_layers(axes: Any, found: Any, shares: dict[str, float]) -> None:
    layers = range(found.n_layers)
    attention = [
        sum(share for name, share in shares.items() if _is_attention(name, layer))
        + shares[f"attention bias {layer}"]
        for layer in layers
    ]
    axes.bar([i - 0.2 for i in layers], attention, 0.4, color=ATTENTION, label="attention")
    axes.bar(
        [i + 0.2 for i in layers],
        [shares[f"mlp {layer}"] for layer in layers],
        0.4,
        color=MLP,
        label="MLP",
    )
    axes.axhline(0, color="black", linewidth=0.6)
    axes.set_xlabel("layer")
    axes.set_title(f"share of the embedding (embed {shares['embed']:+.2f})", fontsize=10)
    axes.legend(fontsize=8)


def _draw_map(figure: Any, axes: Any, values: Any, title: str) -> None:
    limit = float(values.abs().max()) or 1.0
    drawn = axes.imshow(values.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
    axes.set_title(title, fontsize=10)
    figure.colorbar(drawn, ax=axes)


def _is_attention(name: str, layer: int) -> bool:
    return name == f"attention {layer}" or name.startswith(f"head {layer}.")


def _share(value: float) -> str:
    return f"{value:+.3f}"
