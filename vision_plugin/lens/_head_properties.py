"""What heads are about, and how consistent and how disentangled they are.

Madasu et al. (2024, arXiv 2409.06579) publish an association score for the first and an
entanglement score for the second, and later (2025, arXiv 2503.11103) a Concept Consistency Score.
There a language model says which property the TEXTSPAN texts of a head share, shown a few examples,
and another one judges how many of the texts have it. Neither their formulas nor their prompts and
judgements could be established, so figures here do not compare with theirs. Here each text has its
property beforehand (in a vocabulary by topics, in the drawn world by factors), so that nothing is
judged, and the scores below are stated in full, beside what texts drawn at random score.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from vision_plugin._rich import Table
from vision_plugin.lens._textspan import TextSpan

Head = tuple[int, int]
DRAWS = 2000
"""Random choices of texts behind the level of chance."""


@dataclass(frozen=True)
class HeadProperties:
    """The property of each head.

    Attributes:
        property: Commonest property among a head's texts, by head; of equals the one that comes
            first among the texts.
        consistency: Share of a head's texts with that property, by head.
        chance: Mean consistency of as many texts drawn at random from all texts.
        disentanglement: 1 less the mean overlap (Jaccard) of a head's texts with those of each
            other head, by head: 1 for texts that no other head has.

    Examples:
        >>> texts = ["red", "blue", "a circle", "a star"]
        >>> outputs = vp.lens.head_outputs(model, pixels, layers=1, progress=False)
        >>> kinds = dict(zip(texts, ("colour", "colour", "shape", "shape")))
        >>> found = vp.lens.head_properties(outputs.textspan(texts, n_texts=2), kinds)
        >>> sorted(found.summary())
        ['chance', 'consistency', 'disentanglement']
    """

    property: dict[Head, str]
    consistency: dict[Head, float]
    chance: float
    disentanglement: dict[Head, float]

    def heads_of(self, property: str, *, at_least: float = 0.0) -> list[Head]:
        """Return the heads with a property, the most consistent first.

        Args:
            property: The property.
            at_least: Smallest consistency.
        """
        found = [
            head
            for head, name in self.property.items()
            if name == property and self.consistency[head] >= at_least
        ]
        return sorted(found, key=lambda head: -self.consistency[head])

    def summary(self) -> dict[str, float]:
        """Return the means over heads, and chance."""
        n = max(1, len(self.property))
        return {
            "consistency": sum(self.consistency.values()) / n,
            "chance": self.chance,
            "disentanglement": sum(self.disentanglement.values()) / n,
        }

    def table(self) -> Table:
        """Return a row for each head, for ``rich`` to print."""
        summary = self.summary()
        table = Table(title=", ".join(f"{name} {value:.2f}" for name, value in summary.items()))
        table.add_column("head")
        table.add_column("property")
        table.add_column("consistency", justify="right")
        table.add_column("disentanglement", justify="right")
        for (layer, head), name in self.property.items():
            consistency = self.consistency[layer, head]
            apart = self.disentanglement[layer, head]
            table.add_row(f"{layer}.{head}", name, f"{consistency:.2f}", f"{apart:.2f}")
        return table

    def to_dict(self) -> dict[str, Any]:
        """Return scores by head ready for JSON."""
        return {
            **self.summary(),
            "heads": [
                {
                    "layer": layer,
                    "head": head,
                    "property": name,
                    "consistency": self.consistency[layer, head],
                    "disentanglement": self.disentanglement[layer, head],
                }
                for (layer, head), name in self.property.items()
            ],
        }


def head_properties(
    spans: Mapping[Head, TextSpan], properties: Mapping[str, str], *, seed: int = 0
) -> HeadProperties:
    """Return property, consistency and disentanglement of heads.

    Args:
        spans: TEXTSPAN of each head; heads without any text are left out.
        properties: Property of each text that could have been chosen.
        seed: Seed of the random choices behind chance.

    Raises:
        ValueError: a chosen text has no property, or no head has texts.

    Examples:
        >>> texts = ["red", "blue", "a circle", "a star"]
        >>> outputs = vp.lens.head_outputs(model, pixels, layers=1, progress=False)
        >>> kinds = dict(zip(texts, ("colour", "colour", "shape", "shape")))
        >>> found = vp.lens.head_properties(outputs.textspan(texts, n_texts=2), kinds)
        >>> list(found.property)
        [(3, 0), (3, 1), (3, 2), (3, 3)]
    """
    spans = {head: span for head, span in spans.items() if span.texts}
    if not spans:
        raise ValueError("spans= holds no head with texts: give HeadOutputs.textspan(texts)")
    missing = [text for span in spans.values() for text in span.texts if text not in properties]
    if missing:
        raise ValueError(f"properties= says nothing about the text {missing[0]!r}")
    commonest = {
        head: _commonest([properties[t] for t in span.texts]) for head, span in spans.items()
    }
    texts = {head: set(span.texts) for head, span in spans.items()}
    apart = {
        head: 1.0
        - sum(_overlap(own, other) for place, other in texts.items() if place != head)
        / max(1, len(texts) - 1)
        for head, own in texts.items()
    }
    random = np.random.default_rng(seed)
    every = list(properties.values())
    sizes = [len(span.texts) for span in spans.values()]
    draws = [
        _commonest([every[i] for i in random.choice(len(every), min(size, len(every)), False)])[1]
        for size in random.choice(sizes, DRAWS)
    ]
    return HeadProperties(
        {head: name for head, (name, _) in commonest.items()},
        {head: share for head, (_, share) in commonest.items()},
        float(np.mean(draws)),
        apart,
    )


def _commonest(names: list[str]) -> tuple[str, float]:
    name, times = Counter(names).most_common(1)[0]
    return name, times / len(names)


def _overlap(one: set[str], other: set[str]) -> float:
    return len(one & other) / len(one | other)
