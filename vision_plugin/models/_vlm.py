"""A vision-language model as one object: our bridge of its tower, TransformerLens's of the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, overload

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens.ActivationCache import ActivationCache
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge

from vision_plugin.models._attaching import Attaching
from vision_plugin.models._bridge import HookList, NamesFilter, VisionBridge
from vision_plugin.models._hook_names import check_hook_names
from vision_plugin.models._modes import Modes, in_eval_mode
from vision_plugin.models._own_hooks import hooked
from vision_plugin.models._vlm_hooks import PREFIX, kept_in, of_part
from vision_plugin.models._vlm_prompts import batches_of, check_inputs, prepare
from vision_plugin.models._vlm_tower import Reach
from vision_plugin.models._vlm_weights import VisionLanguageWeights


class VisionLanguageBridge(Attaching, VisionLanguageWeights):
    """A vision-language model under TransformerLens names, whose tower takes SAEs and edits.

    :func:`vision_plugin.load_vlm` and :func:`vision_plugin.wrap_vlm` make it. It computes what the
    native module computes, to the bit. The language model's hooks have TransformerLens's names, the
    tower's have the prefix ``vision.``; TransformerLens's other attributes (``blocks``, ``W_U``,
    ``to_tokens``) are here too.

    Attributes:
        native: The module that was loaded or passed in, untouched.
        vision: Bridge of the tower: a VisionBridge. What is attached to it acts on the answers.
        language: TransformerLens's bridge of the language model.
        processor: transformers' processor; None where the module was wrapped without one.

    Examples:
        >>> len(vlm.generate(world.images[:2], "What colour is shown?"))
        2
        >>> logits, cache = vlm.run_with_cache(world.images[:1], "What colour is shown?")
        >>> cache["vision.blocks.1.hook_resid_post"].shape
        torch.Size([1, 65, 128])
    """

    def __init__(
        self,
        native: nn.Module,
        vision: VisionBridge,
        language: TransformerBridge,
        reach: Reach,
        processor: Any = None,
        *,
        tower_path: str,
    ) -> None:
        self.native, self.vision, self.language = native, vision, language
        self.reach, self.processor, self.tower_path = reach, processor, tower_path
        self.modes = Modes()
        self._setup_weights()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "language" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.__dict__["language"], name)

    @property
    def cfg(self) -> Any:
        """TransformerLens's configuration of the language model; ``vision.cfg`` is the tower's."""
        return self.language.cfg

    @property
    def original_model(self) -> nn.Module:
        """The bridged copy of the module's structure, which shares the native module's weights."""
        module: nn.Module = self.language.original_model
        return module

    # ------------------------------------------------------------------ SAEs and edits

    @property
    def _tower(self) -> Any:
        return self.vision

    def _check_place(self, hook_name: str, tokens: str) -> None:
        self.vision.check_hook_names([hook_name])
        self.reach.check(hook_name, tokens)

    # ------------------------------------------------------------------ inputs

    def prepare(self, images: Any, prompt: str | Sequence[str] | None = None) -> dict[str, Any]:
        """Return the model's inputs on its device: ``input_ids``, ``pixel_values`` and others.

        Args:
            images: One PIL image; a list with one for each prompt; or a list of lists, the images
                of each prompt. Inputs that this method returned are passed through.
            prompt: One prompt for all, or one for each. The processor's chat template puts the
                images in front, unless the prompt has image tokens itself.

        Raises:
            ValueError: there is no processor, no prompt or no image, the numbers of images, prompts
                and image tokens differ, or there is no place for an image.
        """
        name = self.cfg.model_name
        if isinstance(images, Mapping):
            token = getattr(self.native.config, "image_token_id", None)
            check_inputs(images, name, token)
            found: Mapping[str, Any] = images
        elif self.processor is None:
            raise ValueError(
                f"{name} was wrapped without its processor: use wrap_vlm(module, processor=...), "
                "or pass the inputs that you prepared"
            )
        elif prompt is None:
            raise ValueError("prompt= is missing: say what to ask about the images")
        else:
            found = prepare(self.processor, images, prompt, name=name)
        return {key: self._placed(value) for key, value in found.items()}

    def _placed(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        dtype = self.vision.dtype if value.is_floating_point() else value.dtype
        return value.to(device=self.device, dtype=dtype)

    # ------------------------------------------------------------------ running

    def __call__(self, images: Any, prompt: str | Sequence[str] | None = None) -> Tensor:
        """Return logits ``[batch, tokens, d_vocab]``; arguments as in :meth:`prepare`."""
        return self.forward(images, prompt)

    def forward(
        self, images: Any, prompt: str | Sequence[str] | None = None
    ) -> Float[Tensor, "batch tokens d_vocab"]:
        """Return the logits of a pass over images and prompts; arguments as in :meth:`prepare`."""
        inputs = self.prepare(images, prompt)
        ids = inputs.pop("input_ids")
        with self.vision.alone():
            self._renew_loans()
            logits: Tensor = self.language(ids, **inputs)
        return logits

    @overload
    def generate(
        self, images: Any, prompt: str | Sequence[str] | None = ..., *,
        return_type: Literal["text"] = ..., seed: int | None = ..., batch_size: int = ...,
        **options: Any,
    ) -> list[str]: ...  # fmt: skip

    @overload
    def generate(
        self, images: Any, prompt: str | Sequence[str] | None = ..., *,
        return_type: Literal["tokens", "output"], seed: int | None = ..., batch_size: int = ...,
        **options: Any,
    ) -> Any: ...  # fmt: skip

    @torch.no_grad()
    def generate(
        self,
        images: Any,
        prompt: str | Sequence[str] | None = None,
        *,
        return_type: Literal["text", "tokens", "output"] = "text",
        seed: int | None = None,
        batch_size: int = 32,
        **options: Any,
    ) -> Any:
        """Write answers, as the native module's ``generate`` does.

        Args:
            images: See :meth:`prepare`.
            prompt: See :meth:`prepare`.
            return_type: ``"text"`` for the answers; ``"tokens"`` for their token ids ``[batch,
                new]``; ``"output"`` for what transformers returns, for one batch.
            seed: Seed of sampling (``do_sample=True``); None takes torch's global generator.
            batch_size: Prompts that run at once; inputs that :meth:`prepare` returned run together.
            **options: Options of transformers' ``generate``: ``max_new_tokens``, ``do_sample``,
                ``temperature`` and so on.

        Returns:
            One answer per prompt, without the prompt and special tokens.

        Raises:
            ValueError: see :meth:`prepare`; or an SAE or an edit lies behind what is read.
        """
        if return_type not in ("text", "tokens", "output"):
            raise ValueError(f"return_type={return_type!r}: use 'text', 'tokens' or 'output'")
        batches = batches_of(images, prompt, batch_size)
        if return_type == "output" and len(batches) > 1:
            raise ValueError("return_type='output' takes one batch: raise batch_size=")
        native: Any = self.original_model
        found: list[Tensor] = []
        with in_eval_mode(self), self.vision.alone(), self._seeded(seed):
            for batch, asked in batches:
                inputs = self.prepare(batch, asked)
                if return_type == "text" and self.processor is None:
                    raise ValueError(
                        f"{self.cfg.model_name} was wrapped without its processor, so its answers "
                        "cannot be spelled out: use return_type='tokens'"
                    )
                self._renew_loans()
                output = native.generate(**inputs, **options)
                if return_type == "output":
                    return output
                ids = output if isinstance(output, Tensor) else output.sequences
                found.append(ids[:, inputs["input_ids"].shape[1] :])
        if return_type == "tokens":
            return _joined(found, self._padding)
        texts = [self._decoded(ids) for ids in found]
        return [text for batch_of in texts for text in batch_of]

    @property
    def _padding(self) -> int:
        native: Any = self.native
        config = native.generation_config
        end = config.eos_token_id
        end = end[0] if isinstance(end, list) else end
        return int(next(found for found in (config.pad_token_id, end, 0) if found is not None))

    def _decoded(self, ids: Int[Tensor, "batch new"]) -> list[str]:
        texts = self.processor.batch_decode(ids, skip_special_tokens=True)
        return [str(text).strip() for text in texts]

    @contextmanager
    def _seeded(self, seed: int | None) -> Iterator[None]:
        if seed is None:
            yield
            return
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            yield

    @contextmanager
    def from_stream(
        self, stream: Float[Tensor, "images tokens d_model"], start_at_layer: int
    ) -> Iterator[None]:
        """Run the tower from a block on, with a residual stream of your own, in a ``with`` block.

        Args:
            stream: What enters that block, for each image of the inputs.
            start_at_layer: First block to run.
        """
        tower: Any = self.original_model.get_submodule(self.tower_path)
        before = tower.stream, tower.start
        tower.stream, tower.start = stream, start_at_layer
        try:
            yield
        finally:
            tower.stream, tower.start = before

    # ------------------------------------------------------------------ hooks

    @property
    def hook_dict(self) -> dict[str, HookPoint]:
        """Every hook point of both parts by each of its names."""
        tower = {f"{PREFIX}{name}": point for name, point in self.vision.hook_dict.items()}
        return {**self.language.hook_dict, **tower}

    def check_hook_names(self, names: Sequence[object]) -> None:
        """Raise UnknownHookError if no hook point has one of the names."""
        check_hook_names(names, self.hook_dict, self.cfg.model_name)

    @contextmanager
    def hooks(self, fwd_hooks: HookList = (), bwd_hooks: HookList = ()) -> Iterator[Any]:
        """Run hook functions by name, or by a function of names, within a ``with`` block.

        Raises:
            UnknownHookError: the model has no hook of a name.
        """
        self.check_hook_names([name for name, _ in (*fwd_hooks, *bwd_hooks)])
        with ExitStack() as stack:
            for bridge, inside in ((self.language, False), (self.vision, True)):
                ours = {
                    "fwd_hooks": of_part(fwd_hooks, inside),
                    "bwd_hooks": of_part(bwd_hooks, inside),
                }
                stack.enter_context(bridge.hooks(**ours))
            yield self

    def run_with_hooks(
        self,
        images: Any,
        prompt: str | Sequence[str] | None = None,
        *,
        fwd_hooks: HookList = (),
        bwd_hooks: HookList = (),
    ) -> Float[Tensor, "batch tokens d_vocab"]:
        """Return the logits of a pass with hooks; unknown names are errors."""
        with self.hooks(fwd_hooks, bwd_hooks):
            return self.forward(images, prompt)

    def add_hook(
        self,
        name: str,
        hook_fn: Callable[..., Any],
        dir: Literal["fwd", "bwd"] = "fwd",
        is_permanent: bool = False,
    ) -> None:
        """Add a hook by any of its names until :meth:`reset_hooks`."""
        self.check_hook_names([name])
        self.hook_dict[name].add_hook(hook_fn, dir=dir, is_permanent=is_permanent)

    def reset_hooks(self, including_permanent: bool = False) -> None:
        """Remove the hooks of both parts."""
        for bridge in (self.language, self.vision):
            bridge.reset_hooks(including_permanent=including_permanent)

    def run_with_cache(
        self,
        images: Any,
        prompt: str | Sequence[str] | None = None,
        *,
        names_filter: NamesFilter = None,
        return_cache_object: bool = True,
    ) -> tuple[Float[Tensor, "batch tokens d_vocab"], Any]:
        """Return logits and the activations of both parts, in one pass.

        Args:
            images: See :meth:`prepare`.
            prompt: See :meth:`prepare`.
            names_filter: A name, several, or a function that selects names; None keeps everything.
                To keep patterns or scores, the language model computes its attention step by step,
                which differs from the native kernel in the last bits.
            return_cache_object: Return an ActivationCache; False returns a plain dictionary.

        Raises:
            UnknownHookError: the model has no hook of a name in ``names_filter``.
        """
        selects = self._selection(names_filter)
        cache: dict[str, Tensor] = {}
        points = self.vision.hook_dict
        chosen = [name for name in points if selects(f"{PREFIX}{name}")]
        inputs = self.prepare(images, prompt)
        ids = inputs.pop("input_ids")
        readers = {name: kept_in(cache, f"{PREFIX}{name}") for name in chosen}
        with self.vision.alone(), hooked(self.vision, readers):
            self._renew_loans()
            logits, found = self.language.run_with_cache(
                ids, return_cache_object=False,
                names_filter=None if names_filter is None else selects,
                output_attentions=False, **inputs,
            )  # fmt: skip
        cache.update(found)
        if not return_cache_object:
            return logits, cache
        return logits, ActivationCache(cache, self.language, has_batch_dim=True)

    def _selection(self, names_filter: NamesFilter) -> Callable[[str], bool]:
        if names_filter is None:
            return lambda name: True
        if callable(names_filter):
            return names_filter
        names = [names_filter] if isinstance(names_filter, str) else list(names_filter)
        self.check_hook_names(names)
        return set(names).__contains__


def _joined(parts: list[Tensor], padding: int) -> Int[Tensor, "batch new"]:
    longest = max(part.shape[1] for part in parts)
    return torch.cat(
        [nn.functional.pad(part, (0, longest - part.shape[1]), value=padding) for part in parts]
    )
