"""What the small LLaVA of the drawn world is asked, and the right answers."""

from __future__ import annotations

from types import MappingProxyType

from vision_plugin.demo._factors import FACTORS, Scene

QUESTIONS = MappingProxyType(
    {factor: f"What {factor} is shown?" for factor in ("shape", "colour", "texture", "background")}
)
"""Question about each factor; the answer is the factor's value."""

ONE_WORD = "What is shown in this image? Use exactly one word!"
"""The prompt of Pach et al. 2025 (arXiv 2504.02821); the answer is the shape."""


def is_there(shape: str, colour: str | None = None) -> str:
    """Return the question whether an image shows a shape, or a shape of a colour."""
    words = [word for word in (colour, shape) if word is not None]
    return f"Is there a {' '.join(words)}?"


def answer(question: str, scene: Scene) -> str:
    """Return the right answer to a question about a scene.

    Args:
        question: One of ``QUESTIONS``, ``ONE_WORD``, or a question of :func:`is_there`.
        scene: What the image shows.

    Raises:
        ValueError: the question is none of these.
    """
    for factor, text in QUESTIONS.items():
        if question == text:
            return scene.value(factor)
    if question == ONE_WORD:
        return scene.shape
    if not question.startswith("Is there a "):
        raise ValueError(
            f"the demo world has no answer to {question!r}: ask one of "
            f"{', '.join(map(repr, (*QUESTIONS.values(), ONE_WORD)))} or 'Is there a ...?'"
        )
    named = question.removeprefix("Is there a ").removesuffix("?").split()
    return "yes" if set(named) <= {scene.shape, scene.colour} else "no"


def vocabulary() -> list[str]:
    """Return every word of the questions, the answers and the template, each once, in order."""
    answers = [value for factor in QUESTIONS for value in FACTORS[factor]]
    questions = [*QUESTIONS.values(), ONE_WORD, is_there("star")]
    spaced = " ".join(questions).replace("?", " ? ").replace("!", " ! ").lower().split()
    return list(dict.fromkeys(["user", "assistant", ":", *spaced, *answers, "yes", "no"]))
