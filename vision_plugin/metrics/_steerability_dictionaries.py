"""Control dictionaries at a hook, so that they can be steered and spliced like an SAE."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vision_plugin.metrics._controls import ControlDictionary, neuron_dictionary


@dataclass
class DictionaryConfig:
    """The part of a SAELens configuration that steering, splicing and metrics read."""

    d_in: int
    d_sae: int
    hook_name: str
    tokens: str = "all"
    metadata: Any = field(init=False)

    def __post_init__(self) -> None:
        # Importing SAELens takes seconds; importing this module should not.
        from sae_lens.saes.sae import SAEMetadata

        self.metadata = SAEMetadata(hook_name=self.hook_name, tokens=self.tokens)


class HookedDictionary(nn.Module):
    """A control dictionary at a hook of a model: what takes an SAE takes this.

    Args:
        control: neurons, random directions, principal components or any other.
        hook_name: where its activations are taken.
        tokens: the kind of token it stands for.

    Example:
        >>> from vision_plugin.metrics import random_dictionary
        >>> control = random_dictionary(4, 8, k=2, seed=0)
        >>> HookedDictionary(control, "blocks.11.hook_resid_post").W_dec.shape
        torch.Size([8, 4])
    """

    use_error_term = False
    W_dec: Tensor
    b_dec: Tensor

    def __init__(self, control: ControlDictionary, hook_name: str, *, tokens: str = "all") -> None:
        super().__init__()
        d_sae, d_in = control.directions.shape
        self.cfg = DictionaryConfig(d_in, d_sae, hook_name, tokens)
        self.control = control
        self.hook_dict: dict[str, Any] = {}
        self.register_buffer("W_dec", control.directions, persistent=False)
        self.register_buffer("b_dec", control.offset, persistent=False)

    @property
    def device(self) -> torch.device:
        """Device of the directions."""
        return self.W_dec.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the directions."""
        return self.W_dec.dtype

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Latents of an activation."""
        return self.control.encode(x)

    def decode(self, feature_acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_in"]:
        """Directions weighted by the latents, and the offset."""
        return self.control.decode(feature_acts)

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """Encode and decode."""
        return self.decode(self.encode(x))


class NeuronDictionary(HookedDictionary):
    """The neurons of a hook: setting latent ``k`` overwrites dimension ``k`` of the activation.

    Args:
        hook_name: where the activation is taken.
        d_in: its width, such as ``model.cfg.d_model``.
        tokens: the kind of token it stands for.

    Example:
        >>> neurons = NeuronDictionary("blocks.11.hook_resid_post", d_in=4)
        >>> neurons.encode(torch.tensor([[1.0, -2.0, 0.5, 0.0]])).tolist()
        [[1.0, -2.0, 0.5, 0.0]]
    """

    def __init__(self, hook_name: str, *, d_in: int, tokens: str = "all") -> None:
        super().__init__(neuron_dictionary(d_in), hook_name, tokens=tokens)
