"""Find the latents that carry a nuisance: what two kinds of images differ in, or what misleads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vision_plugin.metrics import neuron_dictionary
from vision_plugin.models.dictionary import Dictionary
from vision_plugin.models.site import Site
from vision_plugin.tasks._evidence import Evidence, as_pixels, gather
from vision_plugin.tasks._found import FoundLatents, ranking

Rule = Callable[[Evidence], Tensor]
"""Returns a score for every latent; a latent at or below 0 is none of those looked for."""


def difference(evidence: Evidence) -> Tensor:
    """Return the difference of the means with and without the nuisance."""
    return evidence.present.mean(0) - evidence.absent.mean(0)


def class_difference(evidence: Evidence) -> Tensor:
    """Return the difference of the means within each class, averaged over the classes."""
    present, absent = evidence.labels_of("class_difference")
    both = [c for c in present.unique().tolist() if bool((absent == c).any())]
    if not both:
        raise ValueError(
            "no class has images both with and without what is looked for: give more images, or "
            "another rule="
        )
    each = [
        evidence.present[present == c].mean(0) - evidence.absent[absent == c].mean(0) for c in both
    ]
    return torch.stack(each).mean(0)


def auroc(evidence: Evidence) -> Tensor:
    """Return how well a latent tells the two kinds of images apart: 2 AUROC - 1, ties as half."""
    n_present, n_absent = len(evidence.present), len(evidence.absent)
    values = torch.cat([evidence.present, evidence.absent])
    ordered = values.sort(0).values.T.contiguous()
    query = values[:n_present].T.contiguous()
    below = torch.searchsorted(ordered, query)
    up_to = torch.searchsorted(ordered, query, right=True)
    ranks = ((below + up_to + 1).double() / 2).sum(1)
    wins = ranks - n_present * (n_present + 1) / 2
    return (2 * wins / (n_present * n_absent) - 1).to(values.dtype)


def attribution(evidence: Evidence) -> Tensor:
    """Return the share of each latent in the wrong answer's lead over the right one.

    That is the gradient of (logit of the wrong class - logit of the true class) through the latent,
    times the latent's change from the clean image to the misleading one, summed over images.
    """
    return evidence.blame_of("attribution")


def net_attribution(evidence: Evidence) -> Tensor:
    """Return what setting a latent to its clean mean takes off the wrong answer's lead, to first
    order, less what it takes off the right answer's lead on clean images."""
    blame, merit = evidence.shares_of("net_attribution")
    return blame - merit


def unused(evidence: Evidence) -> Tensor:
    """Return how seldom clean images use a latent that is active somewhere: 1 for never.

    These are the latents of whatever clean images do not show, words that nobody printed yet
    included; taking them away changes clean images least.
    """
    share = (evidence.absent > 0).double().mean(0)
    return 1 - share.to(evidence.absent.dtype)


RULES: Mapping[str, Rule] = MappingProxyType(
    {
        "difference": difference,
        "class_difference": class_difference,
        "auroc": auroc,
        "attribution": attribution,
        "net_attribution": net_attribution,
        "unused": unused,
    }
)
"""Rules by name; ``"name"`` and ``"list"`` choose latents that you know.

Examples:
    >>> sorted(vp.tasks.RULES)
    ['attribution', 'auroc', 'class_difference', 'difference', 'net_attribution', 'unused']
"""

GRADIENT_RULES = frozenset({"attribution", "net_attribution"})
"""Rules that follow gradients from answers to latents."""


def find_latents(
    model: Any,
    sae: Dictionary,
    images: Any = None,
    *,
    rule: str = "attribution",
    n: int = 20,
    present: Sequence[bool] | Tensor | None = None,
    clean: Any = None,
    labels: Sequence[int] | Int[Tensor, " n"] | None = None,
    wrong: Sequence[int] | Int[Tensor, " n"] | None = None,
    texts: Float[Tensor, "c d_embed"] | None = None,
    latents: Iterable[int] | None = None,
    names: Sequence[str] | None = None,
    words: Iterable[str] | None = None,
    tokens: str | None = None,
    neurons: bool = False,
    batch_size: int = 64,
    check_model: bool = True,
) -> FoundLatents:
    """Find the latents of an SAE that carry what some images have and others lack.

    Rules: ``"difference"`` of means, ``"class_difference"`` within classes, ``"auroc"``,
    ``"unused"`` by clean images, ``"attribution"`` and ``"net_attribution"`` of the wrong answer,
    ``"name"`` (names that contain one of some words), ``"list"`` (latents that you give).

    Args:
        model: A VisionBridge; for attribution one with a space shared with text.
        sae: An SAE at one of the model's hooks.
        images: Images, or pixels ``[n, channels, height, width]``: those that have it, or both
            kinds with ``present``.
        rule: Name of a rule.
        n: Largest number of latents to choose, for rules that score.
        present: Which of the images have it; None where ``clean`` holds those without.
        clean: The same images without it, in the same order.
        labels: True class of each image, for rules that look at classes or answers.
        wrong: Class that each image misleads to, for attribution.
        texts: Unit text embeddings of the classes, for attribution.
        latents: Latents of the rule ``"list"``.
        names: Names of all latents, for the rule ``"name"``.
        words: Words of which a name must contain one.
        tokens: Kind of token to read at; None takes the kind that the SAE was trained on.
        neurons: Whether to choose as many neurons of the same activation by the same rule, for
            rules that score.
        batch_size: Images that run at once.
        check_model: Refuse an SAE that was trained on another model.

    Raises:
        ValueError: the rule is unknown, or lacks what it needs; the message says what.

    Examples:
        >>> striped = [scene.texture == "striped" for scene in world.scenes]
        >>> found = vp.find_latents(model, sae, pixels, rule="difference", present=striped, n=3)
        >>> found.scores.shape, len(found.latents) <= 3
        (torch.Size([256]), True)
    """
    if rule not in (*RULES, "name", "list"):
        known = ", ".join((*RULES, "name", "list"))
        raise ValueError(f"rule={rule!r} is not a rule for finding latents: use one of {known}")
    if n < 1:
        raise ValueError(f"n={n} must be at least 1")
    site = Site.of(model, sae, tokens=tokens, check_model=check_model)
    size = int(sae.cfg.d_sae)
    if rule in ("name", "list"):
        chosen = _listed(latents, size) if rule == "list" else _named(names, words, size)
        return _without_scores(rule, chosen, size, site.tokens)
    if images is None:
        raise ValueError(f"rule={rule!r} looks at images: give images=")
    images = as_pixels(model, images)
    clean = None if clean is None else as_pixels(model, clean)
    evidence = gather(
        site, sae, images, present=present, clean=clean, labels=labels, wrong=wrong, texts=texts,
        with_gradients=rule in GRADIENT_RULES, batch_size=batch_size,
    )  # fmt: skip
    found = choose(evidence, rule, n)
    if not neurons:
        return found
    identity = neuron_dictionary(int(sae.cfg.d_in)).at(site.hook_name, tokens=site.tokens)
    beside = find_latents(
        model, identity, images, rule=rule, n=max(1, len(found)), present=present, clean=clean,
        labels=labels, wrong=wrong, texts=texts, tokens=site.tokens, batch_size=batch_size,
    )  # fmt: skip
    beside = replace(beside, latents=beside.latents[: len(found)], noun="neuron")
    return replace(found, neurons=beside)


def choose(evidence: Evidence, rule: str, n: int) -> FoundLatents:
    """Return the best latents by a rule of :data:`RULES`."""
    scores = RULES[rule](evidence)
    chosen = tuple(ranking(scores)[:n])
    return FoundLatents(
        rule, chosen, scores, evidence.tokens, evidence.active, evidence.absent.mean(0)
    )


def _listed(latents: Iterable[int] | None, size: int) -> list[int]:
    if latents is None:
        raise ValueError("rule='list' takes the latents that you name: give latents=")
    return each_once(latents, size)


def each_once(latents: Iterable[int], size: int) -> list[int]:
    """Return given latents without repeats; raise ValueError if the SAE lacks one of them."""
    chosen = list(dict.fromkeys(int(latent) for latent in latents))
    bad = [latent for latent in chosen if not 0 <= latent < size]
    if bad:
        raise ValueError(
            f"latent {bad[0]} is out of range: the SAE has {size}, from 0, so the list belongs to "
            "another SAE"
        )
    return chosen


def _named(names: Sequence[str] | None, words: Iterable[str] | None, size: int) -> list[int]:
    if names is None or words is None:
        raise ValueError("rule='name' looks for words in names: give names= and words=")
    if len(names) != size:
        raise ValueError(
            f"names= has {len(names)} names for the SAE's {size} latents: they belong to another "
            "SAE"
        )
    wanted = {word.lower() for word in words}
    return [i for i, name in enumerate(names) if wanted & set(str(name).lower().split())]


def _without_scores(rule: str, chosen: list[int], size: int, tokens: str) -> FoundLatents:
    scores = torch.full((size,), torch.nan)
    everything = torch.ones(size, dtype=torch.bool)
    return FoundLatents(rule, tuple(chosen), scores, tokens, everything, torch.zeros(size))
