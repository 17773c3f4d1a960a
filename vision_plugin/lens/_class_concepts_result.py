"""The result of taking a class apart into concepts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vision_plugin._rich import Table
from vision_plugin.images import read_batches
from vision_plugin.lens._craft import ConceptImportance
from vision_plugin.lens._result_folder import save_result
from vision_plugin.models.dictionary import Dictionary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = 8
"""Concepts in the figure of pictures."""


@dataclass(frozen=True)
class Deletion:
    """Mean absolute change of the answer with 0, 1, 2, ... concepts taken out.

    Examples:
        >>> vp.lens.Deletion((0.0, 2.0, 2.5), (0.0, 0.5, 2.5), (0.0, 1.0, 2.5)).areas()["random"]
        1.1666666666666667

    Attributes:
        important_first: The most important concepts first.
        important_last: The least important concepts first.
        random: Mean over random orders.
    """

    important_first: tuple[float, ...]
    important_last: tuple[float, ...]
    random: tuple[float, ...]

    def areas(self) -> dict[str, float]:
        """Return the mean height of each curve."""
        return {name: sum(curve) / len(curve) for name, curve in asdict(self).items()}


@dataclass(frozen=True, eq=False)
class ClassConcepts:
    """Concepts of a class; see :func:`vision_plugin.lens.class_concepts`.

    Examples:
        >>> settings = vp.lens.ClassConceptsSettings(
        ...     labels="column:shape", n_features=2, n_images=1, design=2
        ... )
        >>> found = vp.lens.class_concepts(
        ...     model, "demo:120", "star", settings=settings, progress=False
        ... )
        >>> found.deletion.random[0], len(found.fires_on)
        (0.0, 2)

    Attributes:
        model: Name of the model.
        class_name: The class.
        hook_name: Hook of the dictionary.
        settings: How the class was taken apart.
        read_by: What gives the answer: ``"zero-shot"`` or ``"a linear probe"``.
        n_fitted: Images that the dictionary was fitted to; 0 where one was given.
        explained_variance: Explained variance on the images that importance is measured on.
        importance: Total Sobol index of each concept.
        fires_on: Share of the class's other images on which each concept is above 0.
        strongest: Places of those images on which each concept is strongest.
        alone: Mean change of the answer when each concept alone is taken out.
        deletion: How far the answer moves while concepts are taken out.
        dictionary: The dictionary, which metrics, steering and names take.
        images: The image source.
    """

    model: str
    class_name: str
    hook_name: str
    settings: Any
    read_by: str
    n_fitted: int
    explained_variance: float
    importance: ConceptImportance
    fires_on: Sequence[float]
    strongest: Sequence[Sequence[int]]
    alone: Sequence[float]
    deletion: Deletion
    dictionary: Dictionary
    images: Any

    def table(self) -> Table:
        """Return every concept, the most important first, for ``rich`` to print."""
        table = Table(title=f"concepts of {self.class_name}: {self.model}, {self.hook_name}")
        for heading in ("latent", "total Sobol index", "answer without", "fires on"):
            table.add_column(heading, justify="right")
        table.add_column("strongest on")
        ids = self.images.ids
        latents = self.importance.latents
        for latent in self.importance.ranked():
            place = latents.index(latent)
            index = float(self.importance.importance[place])
            table.add_row(
                str(latent), f"{index:.3f}", f"{self.alone[place]:+.2f}",
                f"{self.fires_on[place]:.0%}",
                ", ".join(str(ids[at]) for at in self.strongest[place][:3]),
            )  # fmt: skip
        return table

    def deletion_table(self) -> Table:
        """Return how far the answer moves over the deletion of all concepts, by order."""
        table = Table(title="how far the answer moves while concepts are taken out")
        table.add_column("order")
        for heading in ("one out", "half out", "all out", "mean"):
            table.add_column(heading, justify="right")
        areas = self.deletion.areas()
        for name, curve in asdict(self.deletion).items():
            values = curve[1], curve[len(curve) // 2], curve[-1], areas[name]
            table.add_row(name.replace("_", " "), *(f"{value:.2f}" for value in values))
        return table

    def plot_deletion(self) -> Figure:
        """Return how far the answer moves over the number of concepts that are taken out."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(5, 3.2), layout="constrained")
        axes = figure.add_subplot()
        for name, curve in asdict(self.deletion).items():
            axes.plot(range(len(curve)), curve, label=name.replace("_", " "))
        axes.set(xlabel="concepts taken out", ylabel=f"change of the answer for {self.class_name}")
        axes.legend(fontsize="small")
        return figure

    def plot_images(self) -> Figure:
        """Return the strongest images of the most important concepts, a row for each."""
        from matplotlib.figure import Figure

        latents, shown = self.importance.latents, self.importance.ranked()[:SHOWN]
        rows = [self.strongest[latents.index(latent)] for latent in shown]
        wanted = sorted({place for row in rows for place in row})
        pictures = {
            place: picture
            for batch in read_batches(self.images, 64, {}, indices=wanted)
            for place, picture in batch.items()
        }
        across = max(len(row) for row in rows)
        figure = Figure(figsize=(across + 0.6, len(rows)), layout="constrained")
        grid = figure.subplots(len(rows), across, squeeze=False)
        for axes in grid.flat:
            axes.set(xticks=[], yticks=[])
            axes.set_frame_on(False)
        for line, (latent, row) in enumerate(zip(shown, rows, strict=True)):
            grid[line][0].set_ylabel(str(latent), rotation=0, ha="right", va="center")
            for column, place in enumerate(row):
                if place in pictures:
                    grid[line][column].imshow(pictures[place])
        return figure

    def to_dict(self) -> dict[str, Any]:
        """Return the figures ready for JSON."""
        return {
            "schema": "vision_plugin.lens/class_concepts/1",
            "model": self.model,
            "class": self.class_name,
            "hook_name": self.hook_name,
            "settings": asdict(self.settings),
            "read_by": self.read_by,
            "n_fitted": self.n_fitted,
            "explained_variance": self.explained_variance,
            "importance": self.importance.to_dict(),
            "fires_on": list(self.fires_on),
            "strongest": [[str(self.images.ids[at]) for at in row] for row in self.strongest],
            "alone": list(self.alone),
            "deletion": {**asdict(self.deletion), "mean": self.deletion.areas()},
        }

    def save(self, folder: str | Path) -> Path:
        """Write results.json, table.txt and three figures; earlier results are replaced."""
        return save_result(
            folder,
            self.to_dict(),
            tables=[self.table(), self.deletion_table()],
            figures={
                "importance": self.importance.plot(),
                "deletion": self.plot_deletion(),
                "images": self.plot_images(),
            },
        )
