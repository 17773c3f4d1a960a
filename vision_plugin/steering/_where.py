"""Where a change is made: on the tokens on which some latents fire, or on all the others."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Bool
from torch import Tensor

from vision_plugin.models.dictionary import Dictionary, join_heads
from vision_plugin.steering._editor import LatentEditor


@dataclass(frozen=True)
class Where:
    """Tokens that change: those on which a latent is above its threshold, as on an object.

    The latents are those of the edit's own SAE, before the edit.

    Args:
        above: Threshold by latent; one latent above its own is enough.
        outside: Take all the other tokens, such as the background of that object.

    Raises:
        ValueError: no latent is named, or a threshold is not finite.

    Examples:
        >>> where = vp.steering.Where({12: 0.5})
        >>> edit = vp.Edit.suppress(sae, [12], where=where)
        >>> print(edit.changes[0].where)
        where 12 > 0.5
    """

    above: Mapping[int, float]
    outside: bool = False

    def __post_init__(self) -> None:
        if not self.above:
            raise ValueError("where= names no latent: give a threshold for one at least")
        for latent, threshold in self.above.items():
            if not math.isfinite(threshold):
                raise ValueError(f"where= has the threshold {threshold} for latent {latent}")

    def mask(
        self, dictionary: Dictionary, editor: LatentEditor | None, source: Tensor
    ) -> Bool[Tensor, "..."]:
        """Return which tokens change, ``[batch, tokens]``.

        Args:
            dictionary: The SAE.
            editor: What knows its latents already; None encodes anew.
            source: What the SAE reads.
        """
        weights = getattr(dictionary, "W_dec", None)
        if isinstance(weights, Tensor):
            source = source.to(weights.dtype)
        reading = (editor or LatentEditor(dictionary)).read(
            join_heads(source, int(dictionary.cfg.d_in))
        )
        latents = source.new_tensor(list(self.above)).long()
        values = reading.values(latents)
        fires = (values > values.new_tensor(list(self.above.values()))).any(-1)
        return ~fires if self.outside else fires

    def __str__(self) -> str:
        shown = [f"{latent} > {threshold:g}" for latent, threshold in self.above.items()]
        some = ", ".join(shown[:3]) + (f" or {len(shown) - 3} others" if len(shown) > 3 else "")
        return f"{'outside' if self.outside else 'where'} {some}"
