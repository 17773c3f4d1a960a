"""The change of an activation by latents that take new values, by decoding twice."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from vision_plugin.models.dictionary import Dictionary, bare


def latent_change(
    sae: Dictionary, activation: Tensor, index: Tensor, operate: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return the change that new values of latents make to an activation, ``[..., d_out]``.

    Args:
        sae: A ``sae_lens.SAE``.
        activation: Activation ``[..., d_in]``.
        index: Numbers of the latents, ``[m]``.
        operate: Returns new values ``[..., m]`` of the latents' old ones.

    Examples:
        >>> x = torch.zeros(1, 128)
        >>> change = vp.steering.latent_change(sae, x, torch.tensor([3]), lambda old: old + 2)
        >>> torch.allclose(change[0], 2 * sae.W_dec[3], atol=1e-4)
        True
    """
    with bare(sae):
        # Some SAEs keep the input's scale from encode to decode: encode before every decode.
        before: Tensor = sae.decode(sae.encode(activation))
        latents = sae.encode(activation)
        index = index.to(latents.device)
        new = latents.index_copy(-1, index, operate(latents[..., index]).to(latents))
        after: Tensor = sae.decode(new)
    return after - before
