"""Which components matter: replace their direct contributions by the mean over images.

Gandelsman, Efros and Steinhardt (ICLR 2024, arXiv 2310.05916), section 3.2: what a component writes
into the image embedding is replaced by its mean over a data set, and what it writes into later
layers stays. A component whose mean does as well carries nothing about the single image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vision_plugin._rich import Table
from vision_plugin.lens._pixels import count, pixel_batches
from vision_plugin.lens._texts import embed_texts, unit

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class AblationRow:
    """What is left without some components.

    Attributes:
        name: What was replaced by its mean.
        kind: ``none``, ``all``, ``mlp``, ``attention``, ``head``, ``before`` (attention below a
            layer), ``late`` (everything but the attention of the last layers).
        place: Number of the layer or, for ``head``, layer and head; None for ``none`` and ``all``.
        cosine: Mean cosine of the embeddings with and without.
        agreement: Share of images with the same nearest class text; None without texts.
        accuracy: Share of images whose nearest class text is their own; None without labels.

    Examples:
        >>> found = vp.lens.mean_ablation(model, pixels, progress=False)
        >>> row = found.of("mlp")[0]
        >>> row.name, row.place, row.cosine <= 1
        ('MLP of layer 0', (0,), True)
    """

    name: str
    kind: str
    place: tuple[int, ...] | None
    cosine: float
    agreement: float | None
    accuracy: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return the row ready for JSON."""
        return {**vars(self), "place": None if self.place is None else list(self.place)}


@dataclass(frozen=True)
class MeanAblation:
    """Rows of a mean ablation.

    Attributes:
        model_name: Name of the model.
        n_images: Number of images.
        rows: What is left without each component.

    Examples:
        >>> found = vp.lens.mean_ablation(model, pixels, progress=False)
        >>> [row.name for row in found.of("mlp")]
        ['MLP of layer 0', 'MLP of layer 1', 'MLP of layer 2', 'MLP of layer 3']
    """

    model_name: str
    n_images: int
    rows: tuple[AblationRow, ...]

    def of(self, kind: str) -> list[AblationRow]:
        """Return the rows of one kind."""
        return [row for row in self.rows if row.kind == kind]

    def heads(self, n: int) -> list[tuple[int, int]]:
        """Return the heads whose mean does worst, the worst first: by accuracy, agreement, cosine.

        Each is judged by the first of the three that there is; ties by the cosine.
        """

        def kept(row: AblationRow) -> tuple[float, float]:
            best = row.accuracy if row.accuracy is not None else row.agreement
            return (row.cosine if best is None else best, row.cosine)

        rows = sorted(self.of("head"), key=kept)[:n]
        return [(row.place[0], row.place[1]) for row in rows if row.place is not None]

    def table(self) -> Table:
        """Return all rows but those of single heads, for ``rich`` to print."""
        table = Table(title=f"mean ablation: {self.model_name}, {self.n_images:,} images")
        table.add_column("replaced by its mean")
        for heading in ("cosine", "agreement", "accuracy"):
            table.add_column(heading, justify="right")
        last = None
        for row in self.rows:
            if row.kind == "head":
                continue
            if last not in (None, row.kind):
                table.add_section()
            last = row.kind
            cells = (row.cosine, row.agreement, row.accuracy)
            table.add_row(row.name, *("" if v is None else f"{v:.3f}" for v in cells))
        return table

    def plot(self) -> Figure:
        """Return a figure: single layers, everything but late attention, and single heads."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(14, 3.8), layout="constrained")
        left, middle, right = figure.subplots(1, 3)
        measure, title = self._measure()
        whole = measure(self.of("none")[0])
        for kind, colour in (("attention", "#0072B2"), ("mlp", "#D55E00")):
            rows = self.of(kind)
            left.plot(range(len(rows)), [measure(row) for row in rows], "o-", color=colour,
                      label=f"without the {kind} of a layer")  # fmt: skip
        left.set_xlabel("layer")
        rows = self.of("late")
        middle.plot(range(1, len(rows) + 1), [measure(row) for row in rows], "o-", color="#009E73",
                    label="only the attention of the last layers")  # fmt: skip
        rows = self.of("before")
        middle.plot(range(len(rows), 0, -1), [measure(row) for row in rows], "o--",
                    color="#0072B2", label="attention of the last layers, all MLPs")  # fmt: skip
        middle.set_xlabel("last layers whose attention is kept")
        for axes in (left, middle):
            axes.axhline(whole, color="black", linewidth=0.6)
            axes.set_ylabel(title)
            axes.legend(fontsize=8)
        values = self._head_map(measure)
        drawn = right.imshow(whole - values.numpy(), cmap="Reds", vmin=0, aspect="auto")
        right.set_title(f"loss of {title} without one head", fontsize=10)
        right.set_xlabel("head")
        right.set_ylabel("layer")
        figure.colorbar(drawn, ax=right)
        return figure

    def to_dict(self) -> dict[str, Any]:
        """Return the rows ready for JSON."""
        return {
            "model_name": self.model_name,
            "n_images": self.n_images,
            "rows": [row.to_dict() for row in self.rows],
        }

    def _measure(self) -> tuple[Any, str]:
        first = self.rows[0]
        if first.accuracy is not None:
            return (lambda row: row.accuracy), "accuracy"
        if first.agreement is not None:
            return (lambda row: row.agreement), "agreement"
        return (lambda row: row.cosine), "cosine"

    def _head_map(self, measure: Any) -> Tensor:
        rows = [row for row in self.of("head") if row.place is not None]
        places = [row.place for row in rows if row.place is not None]
        shape = [1 + max(place[axis] for place in places) for axis in (0, 1)]
        values = torch.zeros(shape)
        for row, place in zip(rows, places, strict=True):
            values[place[0], place[1]] = measure(row)
        return values


def mean_ablation(
    model: Any,
    images: Any,
    *,
    classes: Sequence[str] | Tensor | None = None,
    labels: Sequence[int] | None = None,
    batch_size: int = 32,
    progress: bool = True,
) -> MeanAblation:
    """Replace each component's direct contribution by its mean, alone and many together.

    Two passes over the images: one for the means, one for the ablations.

    Args:
        model: A VisionBridge.
        images: Whatever ``open_images`` takes, or pixels.
        classes: Texts of the classes, or their embeddings ``[c, d_embed]``; None compares
            embeddings alone.
        labels: Number of each image's class.
        batch_size: Images at once.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: labels come without classes, or not one for each image.

    Examples:
        >>> found = vp.lens.mean_ablation(
        ...     model, pixels, classes=["a red circle", "a blue square"], progress=False
        ... )
        >>> found.n_images, round(found.rows[0].agreement, 3)
        (8, 1.0)
    """
    n = count(images)
    if labels is not None and (classes is None or len(labels) != n):
        raise ValueError(
            f"labels= holds {len(labels)} classes of {n} images: give one for each, and classes="
        )
    texts = None
    if classes is not None:
        embedded = classes if isinstance(classes, Tensor) else embed_texts(
            model, classes, argument="classes"
        )  # fmt: skip
        texts = unit(embedded.double())
    named = _Parts(model, images, batch_size, progress)
    mean, n_read = named.mean()
    sets = ablated_sets(int(model.cfg.n_layers), int(model.cfg.n_heads), named.names)
    mask = torch.zeros(len(sets), len(named.names), dtype=torch.float64, device=mean.device)
    for row, (_, _, _, parts) in enumerate(sets):
        mask[row, parts] = 1.0
    sums = torch.zeros(3, len(sets), dtype=torch.float64, device=mean.device)
    for places, values in named:
        total = values.sum(1)
        left = total[:, None] + torch.einsum("rp,bpd->brd", mask, mean - values)
        left, whole = unit(left), unit(total)
        sums[0] += torch.einsum("brd,bd->r", left, whole)
        if texts is not None:
            seen = (left @ texts.T).argmax(-1)
            sums[1] += (seen == (whole @ texts.T).argmax(-1)[:, None]).sum(0)
            if labels is not None:
                own = torch.tensor([labels[place] for place in places], device=seen.device)
                sums[2] += (seen == own[:, None]).sum(0)
    cosine, agreement, accuracy = (sums / n_read).tolist()
    rows = [
        AblationRow(
            name,
            kind,
            place,
            cosine[row],
            None if texts is None else agreement[row],
            None if labels is None else accuracy[row],
        )
        for row, (name, kind, place, _) in enumerate(sets)
    ]
    return MeanAblation(str(model.cfg.model_name), n_read, tuple(rows))


def ablated_sets(
    n_layers: int, n_heads: int, names: Sequence[str]
) -> list[tuple[str, str, tuple[int, ...] | None, list[int]]]:
    """Return name, kind, place and parts of each ablation."""
    place_of = {name: place for place, name in enumerate(names)}
    heads = [[place_of[f"head {layer}.{h}"] for h in range(n_heads)] for layer in range(n_layers)]
    mlps = [place_of[f"mlp {layer}"] for layer in range(n_layers)]
    attention = [part for layer in heads for part in layer]
    rest = [place_of["embed"], *mlps]
    if "pool mlp" in place_of:
        rest.append(place_of["pool mlp"])
    sets: list[tuple[str, str, tuple[int, ...] | None, list[int]]] = [
        ("nothing", "none", None, []),
        ("all MLPs", "all", None, mlps),
        ("all attention", "all", None, attention),
        ("everything but attention", "all", None, rest),
    ]
    if "pool mlp" in place_of:
        sets.append(("the MLP of the pool", "all", None, [place_of["pool mlp"]]))
    for layer in range(n_layers):
        sets.append((f"attention of layer {layer}", "attention", (layer,), heads[layer]))
    for layer in range(n_layers):
        sets.append((f"MLP of layer {layer}", "mlp", (layer,), [mlps[layer]]))
    for layer in range(n_layers):
        below = [part for before in heads[:layer] for part in before]
        sets.append((f"attention below layer {layer}", "before", (layer,), below))
    for kept in range(1, n_layers + 1):
        below = [part for before in heads[: n_layers - kept] for part in before]
        name = f"all but the attention of the last {kept}"
        sets.append((name, "late", (kept,), [*rest, *below]))
    for layer in range(n_layers):
        for head in range(n_heads):
            sets.append((f"head {layer}.{head}", "head", (layer, head), [heads[layer][head]]))
    return sets


class _Parts:
    """The named parts of all images, batch by batch, as often as they are asked for."""

    def __init__(self, model: Any, images: Any, batch_size: int, progress: bool) -> None:
        self.model, self.images = model, images
        self.batch_size, self.progress = batch_size, progress
        self.names: list[str] = []

    def __iter__(self) -> Iterator[tuple[list[int], Tensor]]:
        """Yield places of images and their parts, ``[b, parts, d]``, in double precision."""
        batches = pixel_batches(
            self.model,
            self.images,
            batch_size=self.batch_size,
            title="taking apart",
            progress=self.progress,
        )
        for places, pixels in batches:
            found = dict(self.model.decompose(pixels, tokens=False).parts())
            self.names = list(found)
            yield places, torch.stack([part.double() for part in found.values()], 1)

    def mean(self) -> tuple[Tensor, int]:
        """Return the mean of each part, ``[parts, d]``, and the number of images."""
        total, n = None, 0
        for places, parts in self:
            total = parts.sum(0) if total is None else total + parts.sum(0)
            n += len(places)
        assert total is not None  # pixel_batches has seen an image
        return total / n, n
