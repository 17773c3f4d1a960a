"""The change of an activation by latents that take new values, by decoding twice."""

from __future__ import annotations

from torch import Tensor

from vision_plugin.models.dictionary import Dictionary, bare


def latent_change(sae: Dictionary, activation: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """Return the change that overwriting latents makes to an activation, ``[..., d_in]``.

    Args:
        sae: A ``sae_lens.SAE``.
        activation: Activation ``[..., d_in]``.
        index: Numbers of the latents, ``[m]``.
        values: New values of the latents, ``[m]``.
    """
    with bare(sae):
        # Some SAEs keep the input's scale from encode to decode: encode before every decode.
        before: Tensor = sae.decode(sae.encode(activation))
        latents = sae.encode(activation).clone()
        latents[..., index.to(latents.device)] = values.to(latents)
        after: Tensor = sae.decode(latents)
    return after - before
