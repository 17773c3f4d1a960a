"""Edits that each method proposes, found on the training pairs; validation chooses among them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vision_plugin.metrics import neuron_dictionary, pca_dictionary, random_dictionary
from vision_plugin.models.dictionary import Dictionary
from vision_plugin.models.site import Site, in_eval_mode
from vision_plugin.steering import Directions, Edit, EditPass
from vision_plugin.tasks._attack import Attack
from vision_plugin.tasks._erase import leace, probe_direction
from vision_plugin.tasks._evidence import gather
from vision_plugin.tasks._find import GRADIENT_RULES, choose, each_once
from vision_plugin.tasks._found import FoundLatents
from vision_plugin.tasks._measure import Figure
from vision_plugin.tasks._row import Row

TOKENS = ("cls", "all")
RANKS = (5, 20)
CUTS: Mapping[str, tuple[float, ...]] = MappingProxyType({"unused": (0.99, 0.97, 0.95, 0.9)})
"""Scores from which on latents are taken, for rules that many latents meet equally well."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """One edit that a method proposes.

    Attributes:
        method: Name of the method.
        edit: The edit.
        size: Number of latents, neurons, directions or heads.
        layer: Block behind which it is made.
        how: Rule and kind of token, for tables.
        found: Latents of the edit; None for other methods.
        fixed: Whether the size is part of the recipe, and does not follow from scores or words.
    """

    method: str
    edit: Edit
    size: int
    layer: int | None
    how: str
    found: FoundLatents | None = None
    fixed: bool = False

    @property
    def recipe(self) -> tuple[str, int | None, int | None, str]:
        """What stays when it is found again on other pairs."""
        return self.method, self.size if self.fixed else None, self.layer, self.how

    def entry(self, kind: str, **seen: Any) -> dict[str, Any]:
        """Return what validation saw of it, for records."""
        about = {name: getattr(self, name) for name in ("method", "size", "layer", "how")}
        return {"kind": kind, **about, **seen}

    def row(self, kind: str, split: str, figures: Mapping[str, Figure]) -> Row:
        """Return a row of results about it."""
        about = (self.size, self.layer, self.how, str(self.edit))
        return Row(self.method, kind, split, *about, figures)


def latent_candidates(
    method: str,
    model: Any,
    sae: Dictionary,
    train: Attack,
    runs: tuple[EditPass, EditPass],
    texts: Tensor,
    *,
    rules: Sequence[str],
    sizes: Sequence[int],
    tokens: Sequence[str],
    batch_size: int,
    given: Sequence[int] = (),
) -> Iterator[Candidate]:
    """Propose latents by every rule and size, set to their mean on clean images.

    ``runs`` are the clean and the attacked images of ``train``, run once.
    Latents that are given are proposed in place of those.
    """
    for kind in tokens:
        site = Site.of(model, sae, tokens=kind)
        evidence = gather(
            site, sae, runs[1], present=None, clean=runs[0], labels=train.labels,
            wrong=train.printed, texts=texts, batch_size=batch_size,
            with_gradients=not GRADIENT_RULES.isdisjoint(rules),
        )  # fmt: skip
        layer = layer_of(site)
        if given:
            found = listed(given, kind, evidence.active, evidence.absent.mean(0))
            edit = suppressed(sae, found)
            yield Candidate(method, edit, len(found), layer, f"given, {kind}", found, True)
        for rule in () if given else rules:
            every = choose(evidence, rule, int(sae.cfg.d_sae))
            for least in CUTS.get(rule, ()):
                latents = (every.scores >= least).nonzero().flatten().tolist()
                found = replace(every, latents=tuple(latents))
                if latents:
                    how = f"{rule} {least:.0%}, {kind}"
                    edit = suppressed(sae, found)
                    yield Candidate(method, edit, len(latents), layer, how, found)
            for size in () if rule in CUTS else sizes:
                found = every.best(size)
                if len(found) == size:
                    edit = suppressed(sae, found)
                    yield Candidate(method, edit, size, layer, f"{rule}, {kind}", found, True)


def listed(latents: Sequence[int], tokens: str, active: Tensor, clean_mean: Tensor) -> FoundLatents:
    """Return latents that are given as if a rule had found them.

    Raises:
        ValueError: the SAE has no such latent.
    """
    scores = torch.full((len(active),), torch.nan)
    chosen = tuple(each_once(latents, len(active)))
    return FoundLatents("list", chosen, scores, tokens, active, clean_mean)


def suppressed(sae: Dictionary, found: FoundLatents, latents: Sequence[int] | None = None) -> Edit:
    """Return the edit that sets latents to their mean on clean images.

    Args:
        sae: The SAE.
        found: Latents that were found.
        latents: Other latents of the same SAE in their place, such as random ones.
    """
    chosen = found.latents if latents is None else latents
    return Edit.suppress(sae, chosen, to=found.clean_mean, tokens=found.tokens)


def control_dictionaries(
    model: Any, sae: Dictionary, pixels: Float[Tensor, "n channels height width"], *, seed: int
) -> dict[str, Dictionary]:
    """Return neurons, random directions and principal components at an SAE's hook."""
    site = Site.of(model, sae)
    with torch.no_grad(), in_eval_mode(model):
        _, cache = model.run_with_cache(
            pixels[:64], names_filter=site.hook_name, return_cache_object=False
        )
    activations = site.read({**cache, site.hook_name_out: cache[site.hook_name]}).source
    width, tokens = int(sae.cfg.d_in), site.tokens
    made = {
        "neurons": neuron_dictionary(width),
        "random_dictionary": random_dictionary(width, int(sae.cfg.d_sae), k=None, seed=seed),
        "pca": pca_dictionary(activations.flatten(0, 1)),
    }
    return {name: control.at(site.hook_name, tokens=tokens) for name, control in made.items()}


def direction_candidates(
    model: Any,
    train: Attack,
    runs: tuple[EditPass, EditPass],
    *,
    layers: Sequence[int],
    tokens: Sequence[str],
) -> Iterator[Candidate]:
    """Propose DiffMean, difference subspaces, LEACE and the probe's direction behind each block."""
    clean, attacked = runs
    for layer in layers:
        for kind in tokens:
            rows = model.token_layout().indices(kind)
            without = clean.stream(layer + 1)[:, rows].cpu().double()
            with_word = attacked.stream(layer + 1)[:, rows].cpu().double()
            yield from _directions(layer, kind, without, with_word, train.printed)


def _directions(
    layer: int,
    tokens: str,
    without: Float[Tensor, "n tokens d"],
    with_word: Float[Tensor, "n tokens d"],
    printed: Tensor,
) -> Iterator[Candidate]:
    centre = without.mean((0, 1)).float()
    moved = (with_word - without).mean(1)
    mean = moved.mean(0)

    projected = partial(projection, layer=layer, centre=centre, tokens=tokens)
    yield projected("diff_mean", mean[None], tokens)
    each = torch.stack([moved[printed == word].mean(0) for word in printed.unique()])
    basis = torch.linalg.svd(each, full_matrices=False).Vh
    for rank in RANKS:
        yield projected("difference_subspace", basis[:rank], f"rank up to {rank}, {tokens}")
    both = torch.cat([without.flatten(0, 1), with_word.flatten(0, 1)])
    n_tokens = without.shape[1]
    word = torch.cat([torch.zeros(len(printed)).long(), printed + 1]).repeat_interleave(n_tokens)
    yield erasure(leace(both, word), tokens, layer=layer, tokens=tokens)
    yield projected("probe", probe_direction(both, word > 0)[None], tokens)


def projection(
    method: str, vectors: Tensor, how: str, *, layer: int, centre: Tensor, tokens: str
) -> Candidate:
    """Return the candidate that projects directions out behind a block."""
    directions = Directions(f"blocks.{layer}.hook_resid_post", vectors.float())
    edit = Edit.project(directions, centre=centre, tokens=tokens)
    return Candidate(method, edit, len(edit.changes[0].targets), layer, how)


def erasure(
    found: tuple[Tensor, Tensor, Tensor], how: str, *, layer: int, tokens: str
) -> Candidate:
    """Return LEACE's candidate from its vectors, readers and offset."""
    vectors, readers, offset = (part.float() for part in found)
    erase = Directions(f"blocks.{layer}.hook_resid_post", vectors, readers, offset)
    return Candidate("leace", Edit.project(erase, tokens=tokens), len(vectors), layer, how)


def layer_of(site: Site) -> int | None:
    """Return the block of a site's hook; None for a hook outside the blocks."""
    parts = site.hook_name_out.split(".")
    return int(parts[1]) if parts[0] == "blocks" else None
