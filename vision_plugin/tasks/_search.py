"""The search that every task makes: methods propose edits, validation chooses one for each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from vision_plugin.models.dictionary import Dictionary
from vision_plugin.steering import Edit
from vision_plugin.tasks._candidates import Candidate, suppressed
from vision_plugin.tasks._found import FoundLatents
from vision_plugin.tasks._measure import Share, averaged, pooled

RANDOM = {"random_latents": False, "random_active_latents": True}
"""Methods that draw as many latents as the SAE's edit has, and whether from active ones alone."""


@runtime_checkable
class Judged(Protocol):
    """Images of one split, judged under any edit."""

    raised: str
    """Name of the figure that a repair raises."""
    kept: str
    """Name of the figure that may fall by the cap."""

    def score(self, edit: Edit, *, above: float = -1.0) -> Share:
        """Return the figure that a repair raises.

        Once it cannot exceed ``above`` on all images, it may be that of the images seen so far.
        """

    def upkeep(self, edit: Edit, *, least: float = 0.0) -> Share:
        """Return the figure that may fall by the cap.

        Once it cannot reach ``least`` on all images, it may be that of the images seen so far.
        """

    def under(self, edit: Edit) -> dict[str, Tensor]:
        """Return every figure as a value per image."""


@dataclass(frozen=True)
class Search:
    """One kind of task: the choice among candidates, and what the chosen ones do.

    Attributes:
        kind: What the task is about, such as ``"shape"``.
        methods: Methods to run, in the order of the table.
        validation: Judge of the split on which is chosen.
        proposed: Returns the candidates of a method, found on the training images.
        greedy: Methods that make their own search on validation.
        cap: Largest loss of the figure that is kept.
        random_seeds: Draws of random latents, whose figures are averaged.
        entries: What validation saw of each candidate.
    """

    kind: str
    methods: Sequence[str]
    validation: Judged
    proposed: Callable[[str], Iterable[Candidate]]
    greedy: Mapping[str, Callable[[], Candidate]]
    cap: float
    random_seeds: int
    entries: list[dict[str, Any]] = field(default_factory=list)

    def chosen(self) -> dict[str, Candidate]:
        """Return the candidate that validation chooses for each method."""
        found: dict[str, Candidate] = {}
        for method in self.methods:
            if method == "none":
                found[method] = Candidate("none", Edit(), 0, None, "")
            elif method in self.greedy:
                found[method] = self.greedy[method]()
            elif method not in RANDOM:
                found[method] = self._best(method)
        return found

    def found_again(self, chosen: Mapping[str, Candidate]) -> dict[str, Candidate]:
        """Return candidates of the same recipes, found on this search's training images.

        What a greedy method chose stays. What chose no edit, or is not found here, stays without.
        """
        again = dict(chosen)
        for method, candidate in chosen.items():
            if method in self.greedy or not len(candidate.edit):
                continue
            same = (c for c in self.proposed(method) if c.recipe == candidate.recipe)
            nothing = replace(candidate, edit=Edit(), size=0, found=None)
            again[method] = next(same, nothing)
        return again

    def measured(
        self,
        chosen: Mapping[str, Candidate],
        parts: Sequence[tuple[Judged, Mapping[str, Candidate]]],
    ) -> Iterator[tuple[Candidate, dict[str, Tensor]]]:
        """Yield each method's candidate with values per image, those of several parts together.

        Random latents stand beside the SAE's where there is one part.
        """
        for method, candidate in chosen.items():
            yield candidate, pooled([judge.under(of[method].edit) for judge, of in parts])
            if method == "sae" and candidate.found is not None and len(parts) == 1:
                under = parts[0][0].under
                for random in (name for name in RANDOM if name in self.methods):
                    yield at_random(candidate, random, suppressed, self.random_seeds, under)

    def _best(self, method: str) -> Candidate:
        """Return the candidate that raises its figure most under the cap.

        No edit is always among them, so a method that only does harm changes nothing. A candidate
        is looked at on further images only while it can still become the best one.
        """
        judge = self.validation
        best = Candidate(method, Edit(), 0, None, "no edit stays within the cap")
        most = judge.score(best.edit).value
        floor = judge.upkeep(best.edit).value - self.cap
        for candidate in self.proposed(method):
            score = judge.score(candidate.edit, above=most)
            upkeep = None
            if score.whole and score.value > most:
                upkeep = judge.upkeep(candidate.edit, least=floor)
                if upkeep.whole and upkeep.value >= floor:
                    best, most = candidate, score.value
            kept = None if upkeep is None else upkeep.value
            seen = {judge.raised: score.value, "images": score.n, judge.kept: kept}
            self.entries.append(candidate.entry(self.kind, **seen))
        return best


def at_random(
    candidate: Candidate,
    method: str,
    edit_of: Callable[[Dictionary, FoundLatents, Sequence[int]], Edit],
    draws: int,
    under: Callable[[Edit], dict[str, Tensor]],
) -> tuple[Candidate, dict[str, Tensor]]:
    """Return a candidate with random latents in place of its own, and its values over the draws.

    ``edit_of`` edits latents that stand in for those that were found; ``method`` is in ``RANDOM``.
    """
    found = candidate.found
    assert found is not None
    (sae,) = candidate.edit.dictionaries
    edits = [edit_of(sae, found, found.random(s, active=RANDOM[method])) for s in range(draws)]
    drawn = replace(candidate, method=method, how=f"{draws} draws", edit=edits[0])
    return drawn, averaged([under(edit) for edit in edits])


def sizes_below(sizes: Sequence[int], dictionary: Dictionary) -> list[int]:
    """Return the numbers of latents to try that a dictionary has; half of them where none is."""
    width = int(dictionary.cfg.d_sae)
    return [size for size in sizes if size < width] or [width // 2]
