"""The result of a text lens: raw, with a bias, and tuned, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vision_plugin._intervals import cell
from vision_plugin._rich import Table
from vision_plugin.lens._result_folder import save_result
from vision_plugin.lens._shares import Share

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class TextLensRow:
    """One lens at one layer, on images that nothing was fitted on.

    Attributes:
        lens: ``"raw"``; ``"bias"``, moved by the difference of the means alone; or ``"tuned"``.
        layer: Number of blocks that ran; 0 is the embedding.
        ridge: Strength of the ridge that was chosen; None for the others.
        cosine: Cosine with the model's own embedding.
        agreement: Share of images that get the text that the model gives in the end.
        kl: Divergence in nats of the lens's texts from the model's.
        accuracy: Share of images that get the text of their class; None without labels.
    """

    lens: str
    layer: int
    ridge: float | None
    cosine: Share
    agreement: Share
    kl: Share
    accuracy: Share | None

    def to_dict(self) -> dict[str, Any]:
        """Return the row ready for JSON."""
        shares = {name: getattr(self, name) for name in ("cosine", "agreement", "kl", "accuracy")}
        return {
            "lens": self.lens,
            "layer": self.layer,
            "ridge": self.ridge,
            **{name: share.to_dict() for name, share in shares.items() if share is not None},
        }


@dataclass(frozen=True, eq=False)
class TextLens:
    """The text lens of a model.

    Attributes:
        model: Name of the model.
        texts: What the layers are compared with.
        settings: How translators were fitted.
        n_fitted: Images that translators were fitted on.
        rows: A row per lens and layer.
        translators: The tuned translator of each layer; call it with tokens ``[..., d_model]``.

    Examples:
        >>> found = vp.lens.text_lens(model, "demo:60", ["a star", "a circle"], progress=False)
        >>> sorted({row.lens for row in found.rows})
        ['bias', 'raw', 'tuned']
    """

    model: str
    texts: Sequence[str]
    settings: Any
    n_fitted: int
    rows: Sequence[TextLensRow]
    translators: Mapping[int, Any]

    def row(self, lens: str, layer: int) -> TextLensRow:
        """Return one row.

        Raises:
            KeyError: there is none.
        """
        return {(row.lens, row.layer): row for row in self.rows}[lens, layer]

    def table(self) -> Table:
        """Return the rows for ``rich`` to print."""
        table = Table(title=f"text lens: {self.model}, {len(self.texts)} texts")
        table.add_column("lens")
        for heading in ("layer", "cosine", "agreement", "KL", "accuracy"):
            table.add_column(heading, justify="right")
        last = None
        for row in self.rows:
            if last not in (None, row.lens):
                table.add_section()
            last = row.lens
            shares = row.cosine, row.agreement, row.kl, row.accuracy
            table.add_row(row.lens, str(row.layer), *map(cell, shares))
        return table

    def plot(self) -> dict[str, Figure]:
        """Return the curves over layers as a matplotlib figure, by name."""
        from matplotlib.figure import Figure

        canvas = Figure(figsize=(8.0, 3.2), layout="constrained")
        for place, name in enumerate(("cosine", "agreement")):
            axes = canvas.add_subplot(1, 2, place + 1)
            for lens in dict.fromkeys(row.lens for row in self.rows):
                rows = [row for row in self.rows if row.lens == lens]
                values = [getattr(row, name).value for row in rows]
                axes.plot([row.layer for row in rows], values, marker="o", markersize=3, label=lens)
            axes.set_xlabel("layer")
            axes.set_title(f"{name} with the model's own", fontsize=9)
            axes.set_ylim(min(0.0, axes.get_ylim()[0]), 1.02)
        canvas.axes[0].legend(fontsize=8)
        return {"layers": canvas}

    def to_dict(self) -> dict[str, Any]:
        """Return the result ready for JSON."""
        names = self.settings.__dataclass_fields__
        settings = {name: getattr(self.settings, name) for name in names}
        return {
            "schema": "vision_plugin.lens/text/1",
            "model": self.model,
            "texts": list(self.texts),
            "settings": {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()},
            "n_fitted": self.n_fitted,
            "rows": [row.to_dict() for row in self.rows],
        }

    def save(self, folder: str | Path) -> Path:
        """Write results.json, table.txt and the curves; earlier results of a lens are replaced.

        Raises:
            FileExistsError: something else has the name.
        """
        return save_result(folder, self.to_dict(), tables=[self.table()], figures=self.plot())
