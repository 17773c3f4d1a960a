"""The change that setting one latent makes to an activation.

For a decoder that is affine in the latents, setting latent ``k`` to ``s`` adds
``gain(x) (s - f_k(x)) d_k``, where ``gain`` is 1 or, for an SAE that rescales its input and undoes
that in ``decode``, a number per token. Directions and gains are read off the SAE and checked
against its own ``decode``. An SAE that fails the check is steered by differences of its decoder's
output, one latent at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vision_plugin.kernels import SparseLatents
from vision_plugin.models.dictionary import Dictionary, bare, encode
from vision_plugin.steering._latent_change import latent_change

logger = logging.getLogger(__name__)

_RESCALING = ("layer_norm", "constant_norm_rescale")
_N_PROBES = 8
_TOLERANCE = 1e-4
_SPARSE_SHARE = 1 / 8
"""Largest share of active latents for which compressed rows take less memory than dense ones."""

_GAIN_ELEMENTS = 2**24
"""Most dense latents held at once while gains are read off the decoder (64 MiB)."""


@dataclass(frozen=True)
class Reading:
    """An SAE's latents of some tokens.

    Attributes:
        source: the activation that was encoded, ``[..., d_in]``.
        rows: the latents, ``[tokens, d_sae]``: compressed rows, or dense ones.
        gain: the decoder's gain at each token, ``[..., 1]``; None where it is 1 everywhere.
    """

    source: Tensor
    rows: SparseLatents | Tensor
    gain: Tensor | None

    @property
    def n_elements(self) -> int:
        """Return how many numbers the latents take."""
        rows = self.rows
        return rows.values.numel() if isinstance(rows, SparseLatents) else rows.numel()

    def values(self, latents: Tensor) -> Tensor:
        """Return some latents at every token, ``[..., k]``."""
        if isinstance(self.rows, SparseLatents):
            chosen = self.rows.columns(latents)
        else:
            chosen = self.rows[:, latents]
        return chosen.view(*self.source.shape[:-1], len(latents))


class LatentEditor:
    """Compute the change of an activation for any latent of one SAE.

    Args:
        sae: An SAE or another dictionary.

    Examples:
        >>> editor = vp.steering.LatentEditor(sae)
        >>> reading = editor.read(acts)
        >>> editor.coefficients(reading, torch.tensor([12, 13]), 50.0).shape
        torch.Size([8, 65, 2])
    """

    def __init__(self, sae: Dictionary) -> None:
        self.sae = sae
        self.directions: Tensor | None = None
        self.has_gain = False
        self._examined = False

    @torch.no_grad()
    def read(self, source: Tensor) -> Reading:
        """Encode ``source`` ``[..., d_in]``; the first call examines the decoder on it."""
        if not self._examined:
            self._examine(source)
        with bare(self.sae):
            rows = self._latents(source)
        gain = None
        if self.directions is not None and self.has_gain:
            gain = self._gain(source, self.directions)
        return Reading(source, rows, gain)

    def coefficients(self, reading: Reading, latents: Tensor, strength: float) -> Tensor:
        """Return the factors of the directions, ``[..., k]``."""
        difference: Tensor = strength - reading.values(latents)
        return difference if reading.gain is None else difference * reading.gain

    @torch.no_grad()
    def change_by_decoding(self, reading: Reading, latent: int, strength: float) -> Tensor:
        """Return the change ``[..., d_out]`` for a decoder that is not affine."""
        return latent_change(self.sae, reading.source, torch.tensor([latent]), _set_to(strength))

    def _latents(self, source: Tensor) -> SparseLatents | Tensor:
        """Return the latents of every token: compressed rows where few are active, else dense."""
        rows = encode(self.sae, source)
        if not isinstance(rows, SparseLatents):
            return rows
        sparse = rows.values.numel() <= _SPARSE_SHARE * rows.batch * rows.d_sae
        return rows if sparse else rows.to_dense()

    def _examine(self, source: Tensor) -> None:
        self._examined = True
        tokens = source.reshape(-1, source.shape[-1])
        step = max(1, len(tokens) // _N_PROBES)
        probe = tokens[::step][:_N_PROBES]
        normalization = getattr(self.sae.cfg, "normalize_activations", "none")
        for directions in _candidates(self.sae):
            on_device = directions.to(source.device)
            gain = self._gain(probe, on_device)
            has_gain = normalization in _RESCALING or bool((gain - 1).abs().max() > _TOLERANCE)
            if self._agrees(probe, on_device, gain if has_gain else torch.ones_like(gain)):
                self.directions, self.has_gain = on_device, has_gain
                return
        logger.info(
            "the decoder of this SAE is not affine in its latents: each latent is decoded alone"
        )

    def _gain(self, source: Tensor, directions: Tensor) -> Tensor:
        """Return the length of a decoded direction at each token, as a share of its own length."""
        reference = int(directions.norm(dim=1).argmax())
        direction = directions[reference].double()
        d_sae = int(self.sae.cfg.d_sae)
        parts = []
        for tokens in torch.split(source.flatten(0, -2), max(1, _GAIN_ELEMENTS // d_sae)):
            zero = torch.zeros(len(tokens), d_sae, dtype=source.dtype, device=source.device)
            one = zero.clone()
            one[:, reference] = 1.0
            with bare(self.sae):
                # An SAE that rescales keeps the scale of an encode for the next decode only.
                self.sae.encode(tokens)
                at_one = self.sae.decode(one).double()
                self.sae.encode(tokens)
                at_zero = self.sae.decode(zero).double()
            parts.append((at_one - at_zero) @ direction)
        gain = torch.cat(parts) / direction.square().sum().clamp(min=1e-30)
        column: Tensor = gain.to(source.dtype).view(*source.shape[:-1], 1)
        return column

    def _agrees(self, probe: Tensor, directions: Tensor, gain: Tensor) -> bool:
        """Return whether directions and gain predict the decoder's change on a few latents."""
        with bare(self.sae):
            values = self.sae.encode(probe)
        d_sae = int(self.sae.cfg.d_sae)
        spread = range(0, d_sae, max(1, d_sae // _N_PROBES))
        strongest = values.abs().sum(0).topk(min(_N_PROBES, d_sae)).indices.tolist()
        strength = 1.0 + float(values.abs().max())
        chosen = torch.tensor(sorted({*spread, *strongest}), device=probe.device)
        # All latents in one pass, a row for each latent and token: it reads the weights four times.
        tiled, latent = probe.repeat(len(chosen), 1), chosen.repeat_interleave(len(probe))
        at = torch.arange(len(tiled), device=probe.device)
        with bare(self.sae):
            before = self.sae.decode(self.sae.encode(tiled))
            new = self.sae.encode(tiled).clone()
            old = new[at, latent]
            new[at, latent] = strength
            exact = self.sae.decode(new) - before
        predicted = gain.repeat(len(chosen), 1) * (strength - old)[:, None] * directions[latent]
        if predicted.shape != exact.shape:
            return False
        size = exact.abs().view(len(chosen), -1).amax(1) + float(probe.abs().max()) * 1e-2
        off = (predicted - exact).abs().view(len(chosen), -1).amax(1)
        return not bool((off > _TOLERANCE * size).any())  # NaN is told later, with its latent


def _set_to(strength: float) -> Callable[[Tensor], Tensor]:
    return lambda old: torch.full_like(old, strength)


def _candidates(sae: Dictionary) -> list[Tensor]:
    """Return the directions that a decoder may have: its rows, or its rows at norm 1."""
    rows = getattr(sae, "W_dec", None)
    if not isinstance(rows, Tensor) or rows.shape[0] != sae.cfg.d_sae:
        return []
    rows = rows.detach()
    unit = rows / rows.norm(dim=1, keepdim=True)
    rescales = bool(getattr(sae.cfg, "rescale_acts_by_decoder_norm", False))
    return [unit, rows] if rescales else [rows, unit]
