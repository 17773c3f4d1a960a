"""Latents that were found, with a score for each latent, and sets of equal size beside them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vision_plugin._rich import Table


@dataclass(frozen=True, eq=False)
class FoundLatents:
    """Latents that carry what was looked for, best first.

    Attributes:
        rule: Name of the rule that scored them.
        latents: Numbers of the chosen latents.
        scores: Score of every latent; NaN where the rule gives none.
        tokens: Kind of token that they were read at.
        active: Whether each latent is active on any image that was looked at.
        clean_mean: Mean of each latent on the images without what was looked for, at these tokens.
        noun: What the numbers count: ``"latent"`` or ``"neuron"``.
        neurons: The neurons that the same rule chooses, as many; None where it was not asked for.

    Examples:
        >>> striped = [scene.texture == "striped" for scene in world.scenes]
        >>> found = vp.find_latents(model, sae, pixels, rule="auroc", present=striped, n=3)
        >>> found.rule, found.tokens, found.noun
        ('auroc', 'all', 'latent')
    """

    rule: str
    latents: tuple[int, ...]
    scores: Float[Tensor, " d_sae"]
    tokens: str
    active: Bool[Tensor, " d_sae"]
    clean_mean: Float[Tensor, " d_sae"]
    noun: str = "latent"
    neurons: FoundLatents | None = None

    def __len__(self) -> int:
        return len(self.latents)

    def best(self, n: int) -> FoundLatents:
        """Return the ``n`` best latents by score, fewer where fewer have one above 0."""
        ranked = ranking(self.scores)[:n]
        neurons = None if self.neurons is None else self.neurons.best(n)
        return replace(self, latents=tuple(ranked), neurons=neurons)

    def random(self, seed: int, *, active: bool = False) -> tuple[int, ...]:
        """Return as many random latents, none of which was chosen.

        Where fewer others are there than were chosen, chosen ones are drawn too.

        Args:
            seed: Seed of the draw.
            active: Whether to draw from the latents that are active on some image, as long as
                there are enough.
        """
        everything = torch.ones_like(self.active)
        others = self.active.clone() if active else everything.clone()
        others[list(self.latents)] = False
        pools = [others, self.active if active else everything, everything]
        pool = next(p for p in pools if int(p.sum()) >= len(self)).nonzero().flatten()
        order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
        drawn: list[int] = pool[order[: len(self)]].tolist()
        return tuple(drawn)

    def table(self, n: int = 20) -> Table:
        """Return the best latents with their scores, for ``rich`` to print."""
        table = Table(title=f"{self.noun}s by {self.rule}, tokens {self.tokens}")
        for heading in (self.noun, "score", "clean mean"):
            table.add_column(heading, justify="right")
        for latent in self.latents[:n]:
            score, mean = float(self.scores[latent]), float(self.clean_mean[latent])
            table.add_row(str(latent), f"{score:.4g}", f"{mean:.4g}")
        return table


def ranking(scores: Float[Tensor, " d_sae"]) -> list[int]:
    """Return the latents with a score above 0, the highest first; of equals the first."""
    known = scores.nan_to_num(nan=-torch.inf)
    order = torch.sort(known, descending=True, stable=True).indices
    ranked: list[int] = order[known[order] > 0].tolist()
    return ranked
