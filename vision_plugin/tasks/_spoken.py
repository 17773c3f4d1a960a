"""What a model says about images before and after one feature is turned up or down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from PIL.Image import Image

from vision_plugin.models.dictionary import Dictionary


@dataclass(frozen=True)
class Spoken:
    """Answers about a few images with one latent set to one value.

    Attributes:
        latent: Number of the latent.
        prompt: What is asked.
        strength: Value that the latent is set to.
        before: Answer to each image, unchanged.
        after: Answer to each image, with the latent set.

    Examples:
        >>> question = {"prompts": ["What colour is shown?"], "strengths": [50.0]}
        >>> found = vp.tasks.feature_answers(vlm, sae, world.images[:2], [12], **question)
        >>> said = found.of(12)[0]
        >>> said.latent, said.strength, len(said.before)
        (12, 50.0, 2)
    """

    latent: int
    prompt: str
    strength: float
    before: tuple[str, ...]
    after: tuple[str, ...]

    @property
    def n_changed(self) -> int:
        """Number of answers that differ."""
        return sum(a != b for a, b in zip(self.before, self.after, strict=True))


@dataclass(frozen=True, eq=False)
class FeatureAnswers:
    """What a model says before and after, by feature.

    Attributes:
        model: Name of the model.
        images: The images that are asked about.
        answers: One entry per latent, prompt and strength, in that order.

    Examples:
        >>> question = {"prompts": ["What colour is shown?"], "strengths": [50.0]}
        >>> found = vp.tasks.feature_answers(vlm, sae, world.images[:2], [12], **question)
        >>> len(found.answers), len(found.of(13))
        (1, 0)
    """

    model: str
    images: Sequence[Image]
    answers: Sequence[Spoken]

    def of(self, latent: int) -> list[Spoken]:
        """Return the answers of one latent; none where it was not asked for."""
        return [spoken for spoken in self.answers if spoken.latent == latent]

    def to_dict(self) -> dict[str, Any]:
        """Return the answers ready for JSON, without the images."""
        return {"model": self.model, "answers": [asdict(spoken) for spoken in self.answers]}


@torch.no_grad()
def feature_answers(
    vlm: Any,
    sae: Dictionary,
    images: Sequence[Image],
    latents: Sequence[int],
    *,
    prompts: Sequence[str],
    strengths: Sequence[float] | Mapping[int, Sequence[float]],
    tokens: str | None = None,
    check_model: bool = True,
    batch_size: int = 32,
    **options: Any,
) -> FeatureAnswers:
    """Ask about a few images, with each latent at each strength.

    Args:
        vlm: A VisionLanguageBridge.
        sae: An SAE of its tower.
        images: The images, each asked about alone.
        latents: Numbers of the latents.
        prompts: What is asked.
        strengths: Values that a latent is set to; or values for each latent.
        tokens: Kind of token that changes; None takes the kind that the SAE was trained on.
        check_model: Refuse an SAE that was trained on another tower.
        batch_size: Images that run at once.
        **options: Options of ``vlm.generate``; answers are greedy by default.

    Raises:
        ValueError: there is no image or prompt, a latent has no strength, or the SAE does not fit.

    Examples:
        >>> question = {"prompts": ["What colour is shown?"], "strengths": [50.0]}
        >>> found = vp.tasks.feature_answers(vlm, sae, world.images[:2], [12, 13], **question)
        >>> [said.latent for said in found.answers]
        [12, 13]
    """
    if not images or not prompts:
        raise ValueError("give images= and prompts= to ask about")
    values = {
        latent: strengths.get(latent, ()) if isinstance(strengths, Mapping) else strengths
        for latent in latents
    }
    silent = [latent for latent, some in values.items() if not len(some)]
    if silent:
        raise ValueError(f"strengths= has no value for latent {silent[0]}: give one at least")
    asked = {"do_sample": False, "batch_size": batch_size, **options}
    before = {prompt: tuple(vlm.generate(list(images), prompt, **asked)) for prompt in prompts}
    found: dict[tuple[int, str, float], Spoken] = {}
    for latent, some in values.items():
        for strength in some:
            with vlm.steer(sae, {latent: strength}, tokens=tokens, check_model=check_model):
                for prompt in prompts:
                    after = tuple(vlm.generate(list(images), prompt, **asked))
                    found[latent, prompt, strength] = Spoken(
                        latent, prompt, float(strength), before[prompt], after
                    )
    order = [
        (latent, prompt, strength)
        for latent, some in values.items()
        for prompt in prompts
        for strength in some
    ]
    return FeatureAnswers(vlm.cfg.model_name, list(images), [found[key] for key in order])
