"""Cross-domain generalisation: does an SAE still work on images unlike its training set?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vision_plugin._extras import require_sklearn
from vision_plugin.metrics._fidelity import visaebench_fvu
from vision_plugin.metrics._imagecodes import Array, ImageCodes, class_f_scores, probe_columns
from vision_plugin.metrics._latents import check_finite
from vision_plugin.metrics._probing import check_classes, probe_accuracy, split
from vision_plugin.metrics._result import MetricResult

__all__ = ["CrossDomain", "CrossDomainResult", "DomainScores"]

HOME = "home"
"""Name of the domain that the SAE was trained on."""


@dataclass(frozen=True)
class DomainScores(MetricResult):
    """Scores of an SAE on one domain.

    Attributes:
        composite: mean of reconstruction quality, coverage, overlap and probe accuracy.
        fvu: fraction of variance unexplained, by VISAEBench's formula; 1 for constant activations.
        reconstruction_quality: ``1 - fvu``, cut to [0, 1].
        coverage: share of the latents active at home that are active here.
        overlap: Jaccard index of the latents active at home and here.
        probe_accuracy: accuracy of logistic regression on the latents that best separate classes.
        n_images: number of images of this domain.
        n_active: number of latents active here.

    Examples:
        >>> labels = torch.arange(40) % 2
        >>> codes = torch.eye(2)[labels]
        >>> metric = vp.metrics.CrossDomain(n_features=2, domains=["sketches"], k_probe=1)
        >>> for domain in ("home", "sketches"):
        ...     metric.update(
        ...         codes, domain=domain, labels=labels, activations=codes, reconstruction=codes
        ...     )
        >>> scores = metric.compute().domains["sketches"]
        >>> scores.coverage, scores.overlap, scores.probe_accuracy
        (1.0, 1.0, 1.0)
    """

    composite: float
    fvu: float
    reconstruction_quality: float
    coverage: float
    overlap: float
    probe_accuracy: float
    n_images: int
    n_active: int


@dataclass(frozen=True)
class CrossDomainResult(MetricResult):
    """Mean composite over the domains, and each domain's scores.

    Attributes:
        composite: mean composite of the domains.
        domains: scores by domain.
        n_active_home: number of latents active at home.

    Examples:
        >>> labels = torch.arange(40) % 2
        >>> codes = torch.eye(2)[labels]
        >>> metric = vp.metrics.CrossDomain(n_features=2, domains=["sketches"], k_probe=1)
        >>> for domain in ("home", "sketches"):
        ...     metric.update(
        ...         codes, domain=domain, labels=labels, activations=codes, reconstruction=codes
        ...     )
        >>> metric.compute().n_active_home
        2
    """

    composite: float
    domains: dict[str, DomainScores]
    n_active_home: int

    def summary(self) -> dict[str, float | int]:
        """Return the mean and each domain's composite."""
        each = {f"composite_{name}": scores.composite for name, scores in self.domains.items()}
        return {"composite": self.composite, **each, "n_active_home": self.n_active_home}


class CrossDomain(ImageCodes):
    """Reconstruction, coverage, overlap and probing on domains the SAE was not trained on.

    These are VISAEBench's four numbers and their mean. Coverage divides by latents active at home;
    with none active it is 1, and the overlap 0.

    Args:
        n_features: number of latents.
        domains: names of the foreign domains; ``"home"`` is the SAE's own.
        k_probe: number of latents in the probe.
        test_size: share of the images held out to test the probe.
        seed: seed of the split into training and test images.

    Examples:
        >>> labels = torch.arange(40) % 2
        >>> codes = torch.eye(2)[labels]  # latents and activations alike
        >>> metric = vp.metrics.CrossDomain(n_features=2, domains=["sketches"], k_probe=1)
        >>> for domain in ("home", "sketches"):
        ...     metric.update(
        ...         codes, domain=domain, labels=labels, activations=codes, reconstruction=codes
        ...     )
        >>> list(metric.compute().domains)
        ['sketches']
    """

    higher_is_better = True
    active: Tensor
    sums: Tensor
    features: list[Tensor]
    values: list[Tensor]

    def __init__(
        self,
        *,
        n_features: int,
        domains: Sequence[str],
        k_probe: int = 10,
        test_size: float = 0.2,
        seed: int = 42,
        **kwargs: Any,
    ) -> None:
        super().__init__(n_features=n_features, **kwargs)
        if not domains or HOME in domains or len(set(domains)) < len(domains):
            raise ValueError(f"domains={list(domains)} must be distinct names other than {HOME!r}")
        self.domains = (HOME, *domains)
        self.k_probe, self.test_size, self.seed = k_probe, test_size, seed
        self.add_rows_state("domain", torch.zeros(0, dtype=torch.int64))
        shape = (len(self.domains), n_features)
        self.add_state("active", torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="max")
        # tokens, sum x, sum x^2, sum residual, sum residual^2
        sums = torch.zeros(len(self.domains), 5, dtype=torch.float64)
        self.add_state("sums", sums, dist_reduce_fx="sum")

    def update(
        self,
        latents: Tensor,
        *,
        domain: str,
        labels: Tensor | Sequence[int] | None = None,
        activations: Float[Tensor, "*tokens d_in"] | None = None,
        reconstruction: Float[Tensor, "*reconstructed d_out"] | None = None,
    ) -> None:
        """Add images of one domain.

        Args:
            latents: ``[n, n_features]``, max-pooled over patches.
            domain: ``"home"`` (latents are all that is used) or one of ``domains``.
            labels: class of each image.
            activations: the same images' tokens ``[..., d_in]``, centred and scaled as for the SAE.
            reconstruction: reconstruction of ``activations``, of the same shape.

        Raises:
            ValueError: the domain is unknown, or an argument it needs is missing or does not fit.
        """
        if domain not in self.domains:
            raise ValueError(f"domain {domain!r} is not one of {list(self.domains)}")
        index = self.domains.index(domain)
        if domain == HOME:
            labels = torch.zeros(latents.shape[0], dtype=torch.int64)
        elif labels is None or activations is None or reconstruction is None:
            raise ValueError(
                f"domain {domain!r} needs labels, activations and reconstruction beside latents"
            )
        else:
            self.sums[index] += _token_sums(activations, reconstruction).to(self.device)
        before = len(self.features)
        self.add_images(latents, labels)
        (features,), (values,) = self.features[before:], self.values[before:]
        self.active[index, features[values > 0]] = 1
        self.add_rows("domain", torch.full((latents.shape[0],), index, device=self.device))

    def compute(self) -> CrossDomainResult:
        """Score every foreign domain on all images seen, by all processes.

        Raises:
            ValueError: a domain has no images, or labels of one class only.
        """
        require_sklearn("the probing metrics")
        codes, labels = self.codes(), self.label_array()
        domain: Array = self.rows("domain").cpu().numpy()
        active: Array = self.active.cpu().numpy().astype(bool)
        scores = {}
        for index, name in enumerate(self.domains[1:], start=1):
            rows = np.flatnonzero(domain == index)
            if not len(rows):
                raise ValueError(f"domain {name!r} has no images; update with domain={name!r}")
            scores[name] = self._score(codes[rows], labels[rows], active[0], active[index], index)
        return CrossDomainResult(
            composite=float(np.mean([found.composite for found in scores.values()])),
            domains=scores,
            n_active_home=int(active[0].sum()),
        )

    def _score(
        self, codes: Any, labels: Array, home: Array, here: Array, index: int
    ) -> DomainScores:
        n_tokens, *sums = self.sums[index].tolist()
        fvu = visaebench_fvu(int(n_tokens), *sums)
        fvu = 1.0 if math.isnan(fvu) else max(fvu, 0.0)
        both, either, at_home = (home & here).sum(), (home | here).sum(), home.sum()
        coverage = float(both / at_home) if at_home else 1.0
        overlap = float(both / either) if either else 0.0
        check_classes(labels)
        train, test = split(labels, self.test_size, self.seed)
        ranked = np.argsort(class_f_scores(codes[train], labels[train]))[::-1][: self.k_probe]
        accuracy = probe_accuracy(probe_columns(codes, ranked), labels, train, test, self.seed)
        quality = max(0.0, min(1.0, 1.0 - fvu))
        return DomainScores(
            composite=float(np.mean([quality, coverage, overlap, accuracy])),
            fvu=fvu,
            reconstruction_quality=quality,
            coverage=coverage,
            overlap=overlap,
            probe_accuracy=accuracy,
            n_images=len(labels),
            n_active=int(here.sum()),
        )


def _token_sums(activations: Tensor, reconstruction: Tensor) -> Tensor:
    if activations.shape != reconstruction.shape:
        raise ValueError(
            f"activations {tuple(activations.shape)} and reconstruction "
            f"{tuple(reconstruction.shape)} must have one shape"
        )
    check_finite(activations, "activations")
    check_finite(reconstruction, "reconstruction")
    n_tokens = activations.numel() // activations.shape[-1]
    x, residual = activations.detach().double(), (activations - reconstruction).detach().double()
    return torch.stack(
        [
            torch.tensor(float(n_tokens), dtype=torch.float64, device=x.device),
            x.sum(),
            x.square().sum(),
            residual.sum(),
            residual.square().sum(),
        ]
    )
