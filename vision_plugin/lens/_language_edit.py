"""Edits in the language model of a vision-language model: the same ``Edit`` as in a tower."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from vision_plugin.lens._language_reading import LanguageReading
from vision_plugin.models import TokenLayout
from vision_plugin.models.site import hooked
from vision_plugin.steering import Edit


@dataclass(frozen=True)
class PromptLayout(TokenLayout):
    """Order of a prompt's tokens: the image's count as patches, all others as text.

    Attributes:
        image_rows: Places of the image's tokens; none in a step that writes one token more.
        length: Number of tokens of the pass.
    """

    image_rows: tuple[int, ...] = ()
    length: int = 0

    @property
    def n_patches(self) -> int:
        """Number of the image's tokens."""
        return self.grid[0] * self.grid[1]

    @property
    def n_tokens(self) -> int:
        """Number of tokens of the pass."""
        return self.length

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kind of each token: ``"patch"`` or ``"text"``."""
        inside = set(self.image_rows)
        return tuple("patch" if row in inside else "text" for row in range(self.length))

    def indices(self, kind: str) -> Int[Tensor, "selected"]:
        """Return the rows of one kind.

        Raises:
            ValueError: a language model has no such kind of token.
        """
        if kind not in ("patch", "all"):
            raise ValueError(
                f"a language model has no {kind!r} token: use tokens='patch' for the image's "
                "tokens, or 'all'"
            )
        rows = self.image_rows if kind == "patch" else range(self.length)
        return torch.tensor(list(rows), dtype=torch.long)


class LanguageView:
    """A language model as an ``Edit`` sees a model: hooks by name and the order of the tokens.

    Args:
        vlm: A VisionLanguageBridge.
        input_ids: The prompts; the image has to stand at the same place in all of them.

    Raises:
        ValueError: the images stand at different places.
    """

    def __init__(self, vlm: Any, input_ids: Int[Tensor, "batch tokens"]) -> None:
        reading = LanguageReading(vlm)
        rows = reading.image_rows(input_ids)
        if not bool((rows == rows[:1]).all()):
            raise ValueError(
                "the image stands at different places in these prompts, so one edit cannot know "
                "its tokens: run prompts of one length together"
            )
        self.vlm, self.cfg, self.n_passes = vlm, vlm.language.cfg, 0
        self.image_rows = tuple(rows[0].tolist())
        self.grid = reading.grid(len(self.image_rows))
        self.prompt_length = self._length = int(input_ids.shape[1])
        self.hook_dict = vlm.language.hook_dict
        self.first = reading.hooks[0]

    def check_hook_names(self, names: Sequence[object]) -> None:
        """Raise UnknownHookError if the language model has no hook of a name."""
        self.vlm.check_hook_names(names)
        missing = [name for name in names if name not in self.hook_dict]
        if missing:
            raise ValueError(
                f"{missing[0]} is a hook of the tower: use vlm.edit(edit) with the name that the "
                "tower has for it"
            )

    def token_layout(self) -> PromptLayout:
        """Return the order of the tokens of the pass that is under way."""
        whole = self._length == self.prompt_length
        return PromptLayout(0, 0, self.grid, self.image_rows if whole else (), self._length)

    def note(self, activation: Tensor, hook: Any) -> None:
        """Note how many tokens the pass has; a step behind a cache has one."""
        del hook
        self._length = int(activation.shape[1])
        self.n_passes += 1


@contextmanager
def edit_language(
    vlm: Any, edit: Edit, inputs: Mapping[str, Any], *, check_model: bool = True
) -> Iterator[None]:
    """Make the changes of an Edit in the language model within a ``with`` block.

    ``tokens="patch"`` are the image's tokens, ``"all"`` every token, those that are written too.
    Edits of the tower are ``vlm.edit``'s; both may be made at once.

    Args:
        vlm: A VisionLanguageBridge.
        edit: Changes at hooks of the language model, such as ``blocks.1.hook_resid_post``.
        inputs: What ``vlm.prepare`` returned for the prompts that run in the block.
        check_model: Refuse an SAE that was trained on another model.

    Raises:
        ValueError: the edit does not fit, or the image stands at different places in the prompts.

    Examples:
        >>> inputs = vlm.prepare(world.images[:1], "Is there a star?")
        >>> with vp.lens.edit_language(vlm, vp.lens.project_away(vlm, "star", 1), inputs):
        ...     answers = vlm.generate(inputs)
        >>> len(answers)
        1
    """
    view = LanguageView(vlm, inputs["input_ids"])
    with hooked(view, {view.first: view.note}), edit.on(view, check_model=check_model):
        yield
