"""Dictionaries that are no autoencoders: NMF, semi-NMF, ICA, k-means.

Each is a ``Dictionary`` as an SAE is: metrics, ``vp.evaluate``, steering and ``vp.name_features``
take it, as controls beside an SAE or as explanations of their own.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from vision_plugin._extras import require_sklearn
from vision_plugin.metrics import ControlDictionary

Method = Literal["nmf", "semi_nmf", "ica", "kmeans"]

_SWEEPS = 500
_TOLERANCE = 1e-7
_EPSILON = 1e-12


class FittedDictionary(ControlDictionary):
    """A dictionary that was fitted to activations; see :func:`fit_dictionary`.

    Attributes:
        method: How it was fitted.
        W_dec: What each latent adds to the reconstruction, ``[d_sae, d_in]``.
        b_dec: What is added to every reconstruction, ``[d_in]``.
        readers: For ICA, rows whose products with the centred activation are the latents.

    Examples:
        >>> fitted = vp.lens.fit_dictionary(torch.rand(64, 8), 4, "kmeans")
        >>> fitted.method, fitted.W_dec.shape
        ('kmeans', torch.Size([4, 8]))
    """

    readers: Tensor | None

    def __init__(
        self,
        method: Method,
        directions: Float[Tensor, "d_sae d_in"],
        offset: Float[Tensor, " d_in"] | None = None,
        *,
        readers: Float[Tensor, "d_sae d_in"] | None = None,
        hook_name: str | None = None,
        tokens: str = "all",
    ) -> None:
        super().__init__(method, directions, offset, hook_name=hook_name, tokens=tokens)
        self.method: Method = method
        self.register_buffer("readers", readers, persistent=False)

    def at(self, hook_name: str, *, tokens: str = "all") -> FittedDictionary:
        """Return the same dictionary at a hook of a model, usable wherever an SAE is."""
        return FittedDictionary(
            self.method, self.W_dec, self.b_dec, readers=self.readers,
            hook_name=hook_name, tokens=tokens,
        )  # fmt: skip

    @torch.no_grad()
    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Return latents ``[..., d_sae]`` of activations ``[..., d_in]``.

        NMF and semi-NMF: the non-negative latents of least squared error. ICA: the sources, of
        either sign. k-means: 1 for the nearest centre, 0 for the others.
        """
        flat = x.reshape(-1, x.shape[-1])
        directions = self.W_dec.to(flat)
        if self.method == "kmeans":
            nearest = torch.cdist(flat, directions).argmin(-1)
            found = torch.nn.functional.one_hot(nearest, len(directions)).to(flat)
        elif self.method == "ica":
            assert self.readers is not None
            found = (flat - self.b_dec.to(flat)) @ self.readers.to(flat).T
        else:
            found = non_negative_codes(flat, directions)
        return found.view(*x.shape[:-1], -1)


def fit_dictionary(
    activations: Float[Tensor, "n d_in"],
    n_features: int,
    method: str = "nmf",
    *,
    seed: int = 0,
    max_iter: int = 500,
) -> FittedDictionary:
    """Fit a dictionary to activations, by scikit-learn where it has the method.

    Args:
        activations: Activations; for ``nmf`` none below 0, as behind a ReLU.
        n_features: Number of latents, no more than activations; for ``ica`` no more than ``d_in``.
        method: ``"nmf"``, ``"semi_nmf"`` (Ding, Li and Jordan 2010: non-negative latents of
            directions of either sign), ``"ica"`` or ``"kmeans"``.
        seed: Seed of the start.
        max_iter: Iterations at most.

    Raises:
        ValueError: the method is unknown, there are too many latents, or activations are below 0
            for ``nmf`` or not finite.
        ImportError: scikit-learn is not installed.

    Examples:
        >>> x = torch.rand(64, 8)
        >>> fitted = vp.lens.fit_dictionary(x, 4, "kmeans").at("blocks.3.hook_resid_post")
        >>> fitted.encode(x).shape
        torch.Size([64, 4])
    """
    if method not in get_args(Method):
        raise ValueError(f"method={method!r} is no dictionary: use {', '.join(get_args(Method))}")
    if not bool(activations.isfinite().all()):
        raise ValueError("activations= hold NaN or infinity: leave those rows out")
    n, d_in = activations.shape
    most = min(n, d_in) if method == "ica" else n
    if not 1 <= n_features <= most:
        raise ValueError(
            f"n_features={n_features} must lie between 1 and {most} for {method} of {n} "
            f"activations of {d_in} numbers"
        )
    if method == "nmf" and bool((activations < 0).any()):
        raise ValueError(
            "nmf takes activations that are never below 0, and these are: take them behind a "
            "ReLU, or use method='semi_nmf'"
        )
    require_sklearn("dictionaries")
    with warnings.catch_warnings():
        # The last iterations change a fit little; how well it reconstructs is what metrics say.
        warnings.filterwarnings("ignore", message=".*(did not converge|Maximum number of iter)")
        return _FITS[method](activations.detach().double().cpu(), n_features, seed, max_iter)


def _nmf(x: Tensor, n_features: int, seed: int, max_iter: int) -> FittedDictionary:
    from sklearn.decomposition import NMF

    init = "nndsvda" if n_features <= min(x.shape) else "random"
    fitted = NMF(n_features, init=init, random_state=seed, max_iter=max_iter).fit(x.numpy())
    return FittedDictionary("nmf", _scaled(fitted.components_))


def _ica(x: Tensor, n_features: int, seed: int, max_iter: int) -> FittedDictionary:
    from sklearn.decomposition import FastICA

    fitted = FastICA(n_features, whiten="unit-variance", random_state=seed, max_iter=max_iter)
    fitted.fit(x.numpy())
    return FittedDictionary(
        "ica", _float(fitted.mixing_.T), _float(fitted.mean_), readers=_float(fitted.components_)
    )


def _kmeans(x: Tensor, n_features: int, seed: int, max_iter: int) -> FittedDictionary:
    from sklearn.cluster import KMeans

    fitted = KMeans(n_features, n_init=4, random_state=seed, max_iter=max_iter).fit(x.numpy())
    return FittedDictionary("kmeans", _float(fitted.cluster_centers_))


def _semi_nmf(x: Tensor, n_features: int, seed: int, max_iter: int) -> FittedDictionary:
    """Alternate least squares for directions and Ding's multiplicative step for latents."""
    start = _kmeans(x, n_features, seed, max_iter)
    codes = start.encode(x) + 0.2
    before = torch.inf
    for _ in range(max_iter):
        directions = torch.linalg.lstsq(codes, x, driver="gelsd").solution
        gram, target = directions @ directions.T, x @ directions.T
        grow = target.clamp(min=0) + codes @ (-gram).clamp(min=0)
        shrink = (-target).clamp(min=0) + codes @ gram.clamp(min=0)
        codes = codes * ((grow + _EPSILON) / (shrink + _EPSILON)).sqrt()
        error = float((x - codes @ directions).square().sum())
        if before - error <= 1e-6 * error:
            break
        before = error
    return FittedDictionary("semi_nmf", _scaled(torch.linalg.lstsq(codes, x).solution))


_FITS: dict[str, Callable[[Tensor, int, int, int], FittedDictionary]] = {
    "nmf": _nmf,
    "semi_nmf": _semi_nmf,
    "ica": _ica,
    "kmeans": _kmeans,
}


def non_negative_codes(
    x: Float[Tensor, "n d_in"], directions: Float[Tensor, "d_sae d_in"]
) -> Float[Tensor, "n d_sae"]:
    """Return the non-negative latents of least squared error, by coordinate descent.

    Args:
        x: Activations.
        directions: What each latent adds.
    """
    rows = directions.double()
    gram, target = rows @ rows.T, x.double() @ rows.T
    diagonal = gram.diagonal().clamp(min=_EPSILON)
    found = torch.zeros_like(target)
    for _ in range(_SWEEPS):
        largest = 0.0
        for k in range(len(rows)):
            step = (target[:, k] - found @ gram[:, k]) / diagonal[k]
            new = (found[:, k] + step).clamp(min=0)
            change = (new - found[:, k]) * diagonal[k].sqrt()
            largest = max(largest, float(change.abs().max()) if len(change) else 0.0)
            found[:, k] = new
        if largest <= _TOLERANCE * (1 + float(x.abs().max()) if x.numel() else 1):
            break
    return found.to(x.dtype)


def _scaled(components: Any) -> Tensor:
    """Return directions of norm 1, so that latents are in units of activations."""
    rows: Tensor = torch.as_tensor(components, dtype=torch.float64)
    lengths: Tensor = rows.norm(dim=1, keepdim=True).clamp(min=_EPSILON)
    return (rows / lengths).float()


def _float(values: Any) -> Tensor:
    found: Tensor = torch.as_tensor(values, dtype=torch.float64).float()
    return found


__all__ = ["FittedDictionary", "fit_dictionary", "non_negative_codes"]
