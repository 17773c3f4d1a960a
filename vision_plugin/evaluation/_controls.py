"""The controls that stand beside an SAE, and what they are calibrated on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vision_plugin.evaluation._facts import Facts
from vision_plugin.evaluation._loop import Subject
from vision_plugin.evaluation._offer import Place
from vision_plugin.evaluation._randomized import randomized_model
from vision_plugin.images import read_batches
from vision_plugin.metrics import neuron_dictionary, pca_dictionary, random_dictionary
from vision_plugin.models.dictionary import Dictionary
from vision_plugin.models.site import Site

CALIBRATION_IMAGES = 256
"""Images that principal components and the SAE's L0 are taken from, before the pass over all."""


def make_subjects(
    sae: Dictionary,
    site: Site,
    facts: Facts,
    *,
    controls: Sequence[str],
    batch_size: int,
    seed: int,
) -> list[Subject]:
    """Return the SAE and the controls that were asked for, without metrics yet.

    Args:
        sae: The SAE.
        site: Where it reads and writes.
        facts: What is known of the images.
        controls: ``neurons``, ``pca``, ``random`` and ``random_model``.
        batch_size: Images per forward pass of the calibration.
        seed: Seed of what is drawn at random.
    """
    model, hook, tokens = site.model, site.hook_name, site.tokens
    d_in, d_sae = int(sae.cfg.d_in), int(sae.cfg.d_sae)
    subjects = [Subject("sae", Place(site, sae, facts))]
    seen, l0 = torch.empty(0), 1.0
    if {"pca", "random"} & set(controls):
        seen, l0 = _calibrate(sae, site, facts, batch_size)
    for control in controls:
        if control == "pca":
            dictionary = pca_dictionary(seen)
        elif control == "random":
            k = min(d_sae, max(1, round(l0)))
            dictionary = random_dictionary(d_in, d_sae, k=k, seed=seed)
        else:
            dictionary = neuron_dictionary(d_in)
        host = randomized_model(model, seed=seed) if control == "random_model" else model
        placed = dictionary.at(hook, tokens=tokens).to(model.device)
        subjects.append(Subject(control, Place(Site(host, hook, hook, tokens), placed, facts)))
    return subjects


@torch.no_grad()
def _calibrate(sae: Dictionary, site: Site, facts: Facts, batch_size: int) -> tuple[Tensor, float]:
    """Return activations ``[tokens, d_in]`` of some images, and the L0 on them."""
    images = facts.images
    few = min(CALIBRATION_IMAGES, len(images))
    step = 1 if getattr(images, "sequential", False) else len(images) // few
    harvester, kept, active, n_tokens = site.harvester(), [], 0, 0
    at_once = site.images_at_once(int(sae.cfg.d_in), batch_size)
    chosen = range(0, len(images), step)[:few]
    for batch in read_batches(images, at_once, {}, indices=chosen):
        reading = site.read(harvester(site.model.preprocess(list(batch.values()))))
        active += reading.encode(sae).n_active
        n_tokens += reading.source.shape[:-1].numel()
        kept.append(reading.source.flatten(0, -2).float().cpu())
    if n_tokens == 0:
        raise ValueError("none of the images could be read")
    return torch.cat(kept), active / n_tokens
