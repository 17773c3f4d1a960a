"""Swaps that each method proposes for one factor, found on training pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vision_plugin.metrics import neuron_dictionary, pca_dictionary
from vision_plugin.models.dictionary import Dictionary
from vision_plugin.models.site import Site, hook_width
from vision_plugin.steering import Directions, Edit
from vision_plugin.tasks._candidates import Candidate, layer_of
from vision_plugin.tasks._das import learn_rotation
from vision_plugin.tasks._erase import leace
from vision_plugin.tasks._evidence import Reader
from vision_plugin.tasks._find import find_latents
from vision_plugin.tasks._found import FoundLatents, ranking
from vision_plugin.tasks._swap_pairs import SwapJudge

SWAP_RULES = ("attribution", "net_attribution", "difference")
"""Rules that find latents of a factor: by what their swap does to the factor's reading to first
order; the same less what it does to the others'; by the variance of their means over its values."""

Swap = Callable[[Sequence[int]], Edit]


class Place:
    """A hook and a kind of token at which swaps are found: evidence on training pairs.

    Args:
        model: A VisionBridge.
        sae: The SAE at the hook.
        tokens: Kind of token; None takes the kind that the SAE was trained on.
        pairs: Training pairs.
        batch_size: Images that run at once.
    """

    def __init__(
        self, model: Any, sae: Dictionary, tokens: str | None, pairs: SwapJudge, batch_size: int
    ) -> None:
        self.model, self.sae, self.pairs, self.batch_size = model, sae, pairs, batch_size
        self.site = Site.of(model, sae, tokens=tokens)
        self.hook_name, self.tokens = self.site.hook_name_out, self.site.tokens
        self.layer = layer_of(self.site)
        self._found: dict[str, tuple[dict[str, Tensor], Tensor, Tensor]] = {}

    @property
    def width(self) -> int:
        """Width of the activation."""
        return hook_width(self.model, self.hook_name) or int(self.sae.cfg.d_in)

    def dictionary(self, method: str) -> tuple[Dictionary, Swap]:
        """Return what a method counts in, and what makes a swap of some of it."""
        if method == "sae":
            return self.sae, lambda chosen: Edit.swap(self.sae, chosen, tokens=self.tokens)
        if method == "neurons":
            made: Any = neuron_dictionary(self.width)
            return made.at(self.hook_name, tokens=self.tokens), (
                lambda chosen: Edit.swap(self.hook_name, chosen, tokens=self.tokens)
            )
        made = pca_dictionary(self.activations.flatten(0, 1).float())
        axes = made.W_dec

        def swap(chosen: Sequence[int]) -> Edit:
            return self.directions(axes[list(chosen)])

        return made.at(self.hook_name, tokens=self.tokens), swap

    def directions(self, vectors: Tensor, readers: Tensor | None = None) -> Edit:
        """Return the swap along directions."""
        readers = None if readers is None else readers.float()
        return Edit.swap(Directions(self.hook_name, vectors.float(), readers), tokens=self.tokens)

    @property
    def activations(self) -> Float[Tensor, "n tokens d"]:
        """Activations of the training bases at the tokens that change."""
        found = self.pairs.run.activations(self.hook_name)
        return self.site.read(dict.fromkeys(self.site.hook_names, found)).target.cpu()

    def found(self, method: str, factor: str, rule: str) -> FoundLatents:
        """Return every latent of a method with a score above 0 for a factor, best first."""
        if method not in self._found:
            self._found[method] = self._evidence(method)
        effects, means, active = self._found[method]
        found = _score(rule, factor, effects, means, self.pairs)
        neutral = means.mean(0)
        return FoundLatents(rule, tuple(ranking(found)), found, self.tokens, active, neutral)

    def _evidence(self, method: str) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Return effects by factor ``[d_sae]``, mean latents of the bases, and what is active."""
        dictionary, _ = self.dictionary(method)
        site = Site.of(self.model, dictionary, tokens=self.tokens, check_model=False)
        reader = Reader(site, dictionary, self.batch_size)
        pairs = self.pairs
        means = reader.means(pairs.run).cpu()
        effects = {}
        for factor in pairs.factors:
            slope = pairs.run.slopes(site, _lead(pairs, factor), f"lead of {factor}")
            each = reader.swapped(pairs.run, pairs.sources, slope).cpu()
            effects[factor] = each[pairs.differs(factor)].mean(0)
        return effects, means, reader.active.cpu()


def _lead(pairs: SwapJudge, factor: str) -> Callable[[Tensor, slice], Tensor]:
    """Return the lead of the source's value over the base's."""

    def lead(embedding: Tensor, some: slice) -> Tensor:
        logits = pairs.readers.logits(embedding, factor)
        rows = torch.arange(len(logits))
        return logits[rows, pairs.source[factor][some]] - logits[rows, pairs.base[factor][some]]

    return lead


def _score(
    rule: str, factor: str, effects: Mapping[str, Tensor], means: Tensor, pairs: SwapJudge
) -> Tensor:
    if rule == "attribution":
        return effects[factor]
    if rule == "net_attribution":
        others = [effect.abs() for name, effect in effects.items() if name != factor]
        return effects[factor] - torch.stack(others).sum(0)
    return _between(means, pairs.base[factor]) - torch.stack(
        [_between(means, pairs.base[other]) for other in pairs.factors if other != factor]
    ).mean(0)


def _between(means: Tensor, values: Tensor) -> Tensor:
    """Return the share of each latent's variance that lies between the values of a factor."""
    total = means.var(0, correction=0).clamp(min=1e-12)
    each = [(means[values == value].mean(0), int((values == value).sum())) for value in
            values.unique()]  # fmt: skip
    overall = means.mean(0)
    between = sum(n * (mean - overall).square() for mean, n in each) / len(means)
    return torch.as_tensor(between / total)


def swap_candidates(
    place: Place,
    method: str,
    factor: str,
    *,
    rules: Sequence[str],
    sizes: Sequence[int],
    ranks: Sequence[int],
    steps: int,
    seed: int,
    given: Sequence[int] = (),
) -> Iterator[Candidate]:
    """Propose the swaps of a method at one place.

    Args:
        place: Hook and tokens.
        method: Name of the method.
        factor: Factor to swap.
        rules: Rules that find latents.
        sizes: Numbers of latents to try.
        ranks: Numbers of directions to try.
        steps: Steps that a rotation is trained for.
        seed: Seed of what is learned.
        given: Latents of the SAE to swap in place of those that rules find.
    """
    made: Any = _given if given else _METHODS[method]
    for edit, size, how, found in made(
        place, method, factor, rules=rules, sizes=sizes, ranks=ranks, steps=steps, seed=seed,
        given=given,
    ):  # fmt: skip
        yield Candidate(method, edit, size, place.layer, f"{how}, {place.tokens}", found, True)


def swapped(sae: Dictionary, found: FoundLatents, latents: Sequence[int]) -> Edit:
    """Return the swap of an SAE's latents at the tokens at which others were found."""
    return Edit.swap(sae, latents, tokens=found.tokens)


Proposal = tuple[Edit, int, str, FoundLatents | None]


def _given(
    place: Place, method: str, factor: str, *, given: Sequence[int], **_: Any
) -> Iterator[Proposal]:
    del method, factor
    found = find_latents(place.model, place.sae, rule="list", latents=given, tokens=place.tokens)
    yield swapped(place.sae, found, found.latents), len(found), "given", found


def _by_rule(
    place: Place, method: str, factor: str, *, rules: Any, sizes: Any, **_: Any
) -> Iterator[Proposal]:
    swap = place.dictionary(method)[1]
    for rule in rules:
        every = place.found(method, factor, rule)
        for size in sizes:
            if size <= len(every):
                found = replace(every, latents=every.latents[:size])
                yield swap(found.latents), size, rule, found


def _subspace(
    place: Place, method: str, factor: str, *, ranks: Any, **_: Any
) -> Iterator[Proposal]:
    del method
    x, values = place.activations.double().mean(1), place.pairs.base[factor]
    means = torch.stack([x[values == value].mean(0) for value in values.unique()])
    basis = torch.linalg.svd(means - means.mean(0), full_matrices=False).Vh[: len(means) - 1]
    for rank in sorted({min(rank, len(basis)) for rank in (*ranks, len(basis))}):
        yield place.directions(basis[:rank]), rank, f"rank {rank}", None


def _leace(place: Place, method: str, factor: str, **_: Any) -> Iterator[Proposal]:
    del method
    x = place.activations.double()
    values = place.pairs.base[factor].repeat_interleave(x.shape[1])
    vectors, readers, _offset = leace(x.flatten(0, 1), values)
    yield place.directions(vectors, readers), len(vectors), "closed form", None


def _learned(
    place: Place, method: str, factor: str, *, ranks: Any, steps: int, seed: int, **_: Any
) -> Iterator[Proposal]:
    for rank in sorted({min(rank, place.width) for rank in ranks}):
        vectors = learn_rotation(
            place.pairs, place.site, factor, rank, isolates=method == "mdas", steps=steps, seed=seed
        )
        yield place.directions(vectors), rank, f"{steps} steps", None


def _full(place: Place, method: str, factor: str, **_: Any) -> Iterator[Proposal]:
    del method, factor
    edit = Edit.swap(place.hook_name, range(place.width), tokens=place.tokens)
    yield edit, place.width, "everything", None


_METHODS: Mapping[str, Callable[..., Iterator[Proposal]]] = MappingProxyType(
    {
        "sae": _by_rule, "neurons": _by_rule, "pca": _by_rule, "difference_subspace": _subspace,
        "leace": _leace, "das": _learned, "mdas": _learned, "full_swap": _full,
    }
)  # fmt: skip
