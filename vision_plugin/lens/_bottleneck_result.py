"""The result of a concept bottleneck: figures, explanations, and what removing concepts does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vision_plugin._intervals import cell
from vision_plugin._rich import Table
from vision_plugin.lens._bottleneck_data import Codes, LabelledCodes, latents_named
from vision_plugin.lens._bottleneck_explanation import Explanation, shortened
from vision_plugin.lens._bottleneck_head import SparseHead, concepts_needed
from vision_plugin.lens._result_folder import save_result
from vision_plugin.lens._shares import Share, mean_of, share_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NEEDED = (0.9, 0.95, 0.99)
"""Shares of a decision's positive contributions of which the number of concepts is told."""
RANDOM_DRAWS = 5
"""Sets of random latents that stand beside latents that are removed."""
SHOWN = 10


@dataclass(frozen=True, eq=False)
class Scored:
    """One method on the test images.

    Attributes:
        method: ``"bottleneck"``, ``"probe_embedding"``, ``"probe_neurons"`` or ``"zero_shot"``; or
            what was removed from the bottleneck.
        accuracy: Share of right answers.
        worst_group: Accuracy of the worst group.
        worst: Name of that group.
        removed: Number of latents that were removed.
    """

    method: str
    accuracy: Share
    worst_group: Share
    worst: str
    removed: int = 0

    @classmethod
    def of(
        cls,
        method: str,
        answers: Int[Tensor, " t"],
        data: LabelledCodes,
        parts: Mapping[str, Tensor],
        removed: int = 0,
    ) -> Scored:
        """Return the figures of a method's answers to the test images."""
        test = parts["test"]
        right = answers == data.labels[test]
        names = [data.groups[row] for row in test.tolist()]
        of_group = {
            name: share_of(right[torch.tensor([n == name for n in names])])
            for name in sorted(set(names))
        }
        worst = min(of_group, key=lambda name: of_group[name].value)
        return cls(method, share_of(right), of_group[worst], worst, removed)

    def to_dict(self) -> dict[str, Any]:
        """Return the figures ready for JSON."""
        return {
            "method": self.method,
            "removed": self.removed,
            "accuracy": self.accuracy.to_dict(),
            "worst_group": self.worst_group.to_dict(),
            "worst": self.worst,
        }


@dataclass(frozen=True, eq=False)
class ConceptBottleneck:
    """A bottleneck beside its baselines.

    Attributes:
        model: Name of the model.
        sae: Hook of the SAE.
        settings: How it was fitted.
        data: The images.
        parts: Images of training, validation and test.
        codes: Latents, scaled by one number so that an image's mean norm is 1.
        head: The linear head.
        names: Names of latents.
        rows: The methods on test images.
        left_out: Reason by method that could not run.

    Examples:
        >>> settings = vp.lens.BottleneckSettings(labels="column:texture", epochs=5)
        >>> found = vp.concept_bottleneck(model, sae, "demo:80", settings=settings, progress=False)
        >>> [row.method for row in found.rows]
        ['bottleneck', 'probe_embedding', 'probe_neurons', 'zero_shot']
    """

    model: str
    sae: str
    settings: Any
    data: LabelledCodes
    parts: Mapping[str, Int[Tensor, " m"]]
    codes: Codes
    head: SparseHead
    names: Mapping[int, str]
    rows: Sequence[Scored]
    left_out: Mapping[str, str] = field(default_factory=dict)

    def name(self, latent: int) -> str:
        """Return a latent's name; its number where it has none."""
        return self.names.get(latent, f"latent {latent}")

    def row(self, method: str) -> Scored:
        """Return the figures of one method.

        Raises:
            KeyError: it did not run.
        """
        found = {row.method: row for row in self.rows}
        return found[method]

    # ------------------------------------------------------------------ concepts

    def contributions(
        self, rows: Int[Tensor, " m"], classes: Int[Tensor, " m"]
    ) -> Float[Tensor, "m d_sae"]:
        """Return what each latent adds to the logit of a class, for some images."""
        return self.head.weight[classes] * self.codes.dense(rows)

    @cached_property
    def answers(self) -> Int[Tensor, " t"]:
        """Classes that the bottleneck decides for on the test images."""
        return self.head.logits(self.codes, self.parts["test"]).argmax(1)

    @cached_property
    def concepts_needed(self) -> dict[float, Share]:
        """Mean number of concepts that make up 90, 95 and 99% of a decision.

        A decision's parts are the positive contributions to the class that is decided for.
        """
        test = self.parts["test"]
        counts = [
            concepts_needed(self.contributions(test[some], self.answers[some]), NEEDED)
            for some in torch.arange(len(test)).split(1024)
        ]
        found = torch.cat(counts)
        return {share: mean_of(found[:, place]) for place, share in enumerate(NEEDED)}

    def strongest(self, label: str, n: int = SHOWN) -> list[tuple[int, str, float]]:
        """Return the latents with the largest weights for a class: number, name and weight.

        Raises:
            ValueError: there is no such class.
        """
        if label not in self.data.classes:
            raise ValueError(f"there is no class {label!r}: use one of {self.data.classes}")
        weights = self.head.weight[list(self.data.classes).index(label)]
        top = weights.topk(min(n, len(weights)))
        return [
            (latent, self.name(latent), value)
            for latent, value in zip(top.indices.tolist(), top.values.tolist(), strict=True)
            if value > 0
        ]

    def explain(self, image: int | str, n: int = SHOWN) -> Explanation:
        """Return why an image is taken for its class.

        Args:
            image: Place among the images with labels, or the image's id.
            n: Most concepts to name; the others are summed up.

        Raises:
            ValueError: there is no such image.
        """
        ids = list(self.data.ids)
        if isinstance(image, str):
            if image not in ids:
                raise ValueError(f"there is no image {image!r}: ids are such as {ids[0]!r}")
            image = ids.index(image)
        if not 0 <= image < len(ids):
            raise ValueError(f"there is no image {image}: there are {len(ids)}, from 0")
        row = torch.tensor([image])
        decided = int(self.head.logits(self.codes, row).argmax())
        added = self.contributions(row, torch.tensor([decided]))[0].double()
        order = added.abs().argsort(descending=True)[:n]
        latents = [latent for latent in order.tolist() if float(added[latent]) != 0]
        values = [float(added[latent]) for latent in latents]
        return Explanation(
            image=ids[image],
            decided=self.data.classes[decided],
            truth=self.data.classes[int(self.data.labels[image])],
            latents=latents,
            names=[self.name(latent) for latent in latents],
            contributions=values,
            rest=float(added.sum()) - sum(values),
        )

    def without(self, concepts: Sequence[int | str]) -> list[Scored]:
        """Return what removing concepts does to the test images, beside random latents.

        Nothing is fitted again: the latents count as 0.

        Args:
            concepts: Numbers or names of latents; one name may be several latents'.

        Returns:
            The bottleneck as it is; without the concepts; without as many random latents among
            those that fire on at least as many training images as the rarest of the concepts (the
            middle one of several draws).

        Raises:
            ValueError: there is no such concept.
        """
        latents = latents_named(concepts, self.names, self.codes.width)
        if not latents:
            raise ValueError("name at least one concept to remove")
        test = self.parts["test"]
        shown = ", ".join(dict.fromkeys(self.name(latent) for latent in latents))
        answers = self.head.logits(self.codes, test, without=latents).argmax(1)
        what = f"without {shortened(shown)}"
        removed = Scored.of(what, answers, self.data, self.parts, len(latents))
        return [self.row("bottleneck"), removed, self._random(latents)]

    def _random(self, latents: Sequence[int]) -> Scored:
        firing = self.codes.firing(self.parts["train"])
        others = firing >= firing[list(latents)].min().clamp(min=1e-9)
        others[list(latents)] = False
        pool = others.nonzero()[:, 0]
        generator = torch.Generator().manual_seed(self.settings.seed)
        drawn = []
        for _ in range(RANDOM_DRAWS):
            some = pool[torch.randperm(len(pool), generator=generator)][: len(latents)].tolist()
            answers = self.head.logits(self.codes, self.parts["test"], without=some).argmax(1)
            drawn.append(Scored.of("random latents", answers, self.data, self.parts, len(some)))
        return sorted(drawn, key=lambda one: one.accuracy.value)[RANDOM_DRAWS // 2]

    # ------------------------------------------------------------------ tables and files

    def table(self, removals: Sequence[Scored] = ()) -> Table:
        """Return the methods, and removals of concepts, for ``rich`` to print."""
        table = Table(title=f"concept bottleneck: {self.model}, {self.sae}")
        table.add_column("method", no_wrap=True)
        for heading in ("latents removed", "accuracy", "worst group", "which"):
            table.add_column(heading, justify="right")
        for row in [*self.rows, *removals]:
            table.add_row(
                row.method,
                str(row.removed or ""),
                cell(row.accuracy),
                cell(row.worst_group),
                row.worst,
            )
        return table

    def concepts_table(self) -> Table:
        """Return how many concepts a decision needs, for ``rich`` to print."""
        table = Table(title="concepts per decision")
        table.add_column("share of the decision", justify="right")
        table.add_column("concepts", justify="right")
        for share, found in self.concepts_needed.items():
            half = (found.high - found.low) / 2
            table.add_row(f"{share:.0%}", f"{found.value:.1f} ±{half:.1f}")
        return table

    def plot(self, images: Sequence[int | str] | None = None) -> dict[str, Figure]:
        """Return matplotlib figures by name: accuracies, and explanations of images.

        Args:
            images: Images to explain; by default the first test image of up to six classes.
        """
        from matplotlib.figure import Figure

        canvas = Figure(figsize=(5.5, 2.6), layout="constrained")
        axes = canvas.add_subplot()
        for figure, colour in (("accuracy", "#2c7fb8"), ("worst_group", "#c0392b")):
            shares = [getattr(row, figure) for row in self.rows]
            axes.errorbar(
                [one.value for one in shares],
                range(len(shares)),
                xerr=[[one.value - one.low for one in shares], [o.high - o.value for o in shares]],
                fmt="o",
                markersize=4,
                color=colour,
                label=figure.replace("_", " "),
            )
        axes.set_yticks(range(len(self.rows)), [row.method for row in self.rows], fontsize=8)
        axes.invert_yaxis()
        axes.set_xlim(-0.02, 1.02)
        axes.legend(fontsize=8)
        explained = [self.explain(image, n=8) for image in self._shown(images)]
        if not explained:
            return {"accuracy": canvas}
        columns = min(2, len(explained))
        lines = -(-len(explained) // columns)
        bars = Figure(figsize=(5.4 * columns, 2.7 * lines), layout="constrained")
        for place, one in enumerate(explained):
            one.draw(bars.add_subplot(lines, columns, place + 1))
        return {"accuracy": canvas, "explanations": bars}

    def _shown(self, images: Sequence[int | str] | None) -> Sequence[int | str]:
        if images is not None:
            return images
        test = self.parts["test"].tolist()
        first: dict[int, int] = {}
        for row in test:
            first.setdefault(int(self.data.labels[row]), row)
        return list(first.values())[:6]

    def to_dict(self, removals: Sequence[Scored] = ()) -> dict[str, Any]:
        """Return the result ready for JSON."""
        names = self.settings.__dataclass_fields__
        settings = {name: getattr(self.settings, name) for name in names}
        return {
            "schema": "vision_plugin.lens/bottleneck/1",
            "model": self.model,
            "sae": self.sae,
            "settings": {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()},
            "images": {name: len(rows) for name, rows in self.parts.items()},
            "classes": list(self.data.classes),
            "l1": self.head.l1,
            "learning_rate": self.head.learning_rate,
            "rows": [row.to_dict() for row in [*self.rows, *removals]],
            "left_out": dict(self.left_out),
            "concepts_needed": {f"{s:g}": v.to_dict() for s, v in self.concepts_needed.items()},
            "strongest": {
                label: [
                    {"latent": latent, "name": name, "weight": weight}
                    for latent, name, weight in self.strongest(label)
                ]
                for label in self.data.classes
            },
            "explanations": [self.explain(image).to_dict() for image in self._shown(None)],
        }

    def save(self, folder: str | Path, *, removals: Sequence[Scored] = ()) -> Path:
        """Write results.json, table.txt and figures; earlier results of a lens are replaced.

        Args:
            folder: Folder to make.
            removals: What :meth:`without` returned, to be written with the others.

        Raises:
            FileExistsError: something else has the name.
        """
        extra = [row for row in removals if row.method != "bottleneck"]
        return save_result(
            folder,
            self.to_dict(extra),
            tables=[self.table(extra), self.concepts_table()],
            figures=self.plot(),
        )
