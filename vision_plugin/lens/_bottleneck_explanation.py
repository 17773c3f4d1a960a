"""Why a concept bottleneck decides as it does about one image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vision_plugin._rich import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class Explanation:
    """A decision about one image as a sum over concepts.

    Attributes:
        image: Id of the image.
        decided: Class that is decided for.
        truth: The image's class.
        latents: Latents, the largest contribution first.
        names: Their names.
        contributions: Weight times latent: what each adds to the class's logit.
        rest: What all other latents add together.

    Examples:
        >>> settings = vp.lens.BottleneckSettings(labels="column:texture", epochs=5)
        >>> found = vp.concept_bottleneck(model, sae, "demo:80", settings=settings, progress=False)
        >>> why = found.explain(0, n=3)
        >>> len(why.latents), why.truth in found.data.classes
        (3, True)
    """

    image: str
    decided: str
    truth: str
    latents: Sequence[int]
    names: Sequence[str]
    contributions: Sequence[float]
    rest: float

    @property
    def logit(self) -> float:
        """The class's logit: the sum of all contributions."""
        return sum(self.contributions) + self.rest

    def table(self) -> Table:
        """Return the concepts for ``rich`` to print."""
        table = Table(title=f"{self.image}: {self.decided} (is {self.truth})")
        table.add_column("concept")
        table.add_column("adds", justify="right")
        for name, value in zip(self.names, self.contributions, strict=True):
            table.add_row(name, f"{value:+.3f}")
        table.add_row("all others", f"{self.rest:+.3f}")
        return table

    def to_dict(self) -> dict[str, Any]:
        """Return the explanation ready for JSON."""
        return {
            "image": self.image,
            "decided": self.decided,
            "truth": self.truth,
            "concepts": [
                {"latent": latent, "name": name, "contribution": value}
                for latent, name, value in zip(
                    self.latents, self.names, self.contributions, strict=True
                )
            ],
            "rest": self.rest,
        }

    def draw(self, axes: Any) -> None:
        """Draw the contributions as bars."""
        names = [*self.names, "all others"]
        values = [*self.contributions, self.rest]
        colours = ["#2c7fb8" if value >= 0 else "#c0392b" for value in values]
        axes.barh(range(len(values)), values, color=colours)
        axes.set_yticks(range(len(names)), [shortened(name) for name in names], fontsize=8)
        axes.invert_yaxis()
        axes.axvline(0, color="black", linewidth=0.6)
        axes.set_xlabel("adds to the logit")
        axes.set_title(f"{shortened(self.image)}: {self.decided} (is {self.truth})", fontsize=9)

    def plot(self) -> Figure:
        """Return the bar chart."""
        from matplotlib.figure import Figure

        canvas = Figure(figsize=(5.5, 3.4), layout="constrained")
        self.draw(canvas.add_subplot())
        return canvas


def shortened(text: str) -> str:
    """Return a text of at most 40 characters."""
    return text if len(text) <= 40 else f"{text[:37]}..."
