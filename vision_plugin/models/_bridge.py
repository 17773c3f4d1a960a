"""The bridge that users hold: a native vision transformer under TransformerLens names."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformer_lens.ActivationCache import ActivationCache
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.exceptions import StopAtLayerException

from vision_plugin.models._embeddings import Embeddings
from vision_plugin.models._errors import HOW_TO_ADD, UnsupportedModelError
from vision_plugin.models._harvest import Harvester
from vision_plugin.models._hook_names import check_hook_names
from vision_plugin.models._hook_points import make_quiet
from vision_plugin.models._modes import Modes
from vision_plugin.models._processing import ImageProcessor, TextProcessor
from vision_plugin.models._splicing import Splicing
from vision_plugin.models._tokens import TokenLayout
from vision_plugin.models._weights import Weights, share_weights

NamesFilter = str | list[str] | Callable[[str], bool] | None
HookList = Sequence[tuple[str | Callable[[str], bool], Callable[..., Any]]]


class VisionBridge(Weights, Embeddings, Splicing, TransformerBridge):
    """A vision transformer as a TransformerLens bridge, with SAEs and steering.

    :func:`vision_plugin.load_model` and :func:`vision_plugin.wrap` make it. It computes what the
    native module computes, to the bit. ``model.native`` is that module, untouched, and shares its
    weights with the bridge. Extraction uses plain forward hooks on it, which cost next to nothing.

    Examples:
        >>> out, cache = model.run_with_cache(pixels)
        >>> cache["resid_post", 2].shape
        torch.Size([8, 65, 128])
        >>> with model.steer(sae, {12: 50.0}):
        ...     steered = model.encode_image(pixels)
        >>> steered.shape
        torch.Size([8, 64])
    """

    def __init__(
        self,
        module: nn.Module,
        adapter: Any,
        *,
        native: nn.Module,
        image_processor: ImageProcessor | None = None,
        tokenizer: TextProcessor | None = None,
        revision: str | None = None,
    ) -> None:
        super().__init__(module, adapter, None)
        self.__dict__["native"] = native
        self.image_processor = image_processor
        self.tokenizer = tokenizer
        self.revision = revision
        self._pending_stop: int | None = None
        self.n_passes = 0
        self._hook_dict: dict[str, HookPoint] | None = None
        self.modes = Modes()
        self._one_at_a_time = threading.RLock()
        self._setup_weights()
        self._setup_splicing()
        make_quiet(self)

    @classmethod
    def over(
        cls, module: nn.Module, *, name: str, architecture: str, adapter_class: Any
    ) -> VisionBridge:
        """Return a bridge over a native module, without any preprocessing.

        Raises:
            UnsupportedModelError: a part did not match the adapter.
        """
        adapter = _make_adapter(adapter_class, architecture, module, name)
        try:
            structure = share_weights(module)
            adapter.prepare_model(structure)
            return cls(structure, adapter, native=module)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{name}: {error}. {HOW_TO_ADD}") from None
        except AttributeError as error:
            raise UnsupportedModelError(
                f"{name}: the adapter for {architecture} expects a part that this module does not "
                f"have ({error}). {HOW_TO_ADD}"
            ) from error

    adapter: Any
    _image_size: tuple[int, int] | None = None

    native: nn.Module
    """The module that was loaded or passed in; it contains no bridge component."""

    # ------------------------------------------------------------------ forward

    def forward(  # type: ignore[override]
        self,
        input: Tensor | None = None,
        return_type: str | None = "logits",
        *,
        start_at_layer: int | None = None,
        stop_at_layer: int | None = None,
        pixel_values: Tensor | None = None,
        image_size: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the model, or a range of its blocks.

        Args:
            input: Pixels [batch, channels, height, width]; with ``start_at_layer``, the residual
                stream [batch, tokens, d_model] that enters that block.
            return_type: ``"logits"``, or None to run the model and return nothing.
            start_at_layer: First block to run; the number of blocks runs the head alone.
            stop_at_layer: Block to stop before; the result is then the residual stream that would
                enter it. The number of blocks stops after the last block, and a negative number
                counts from the end.
            pixel_values: Another name for ``input``.
            image_size: Height and width in pixels of the image behind a residual stream; by default
                the checkpoint's own size.
            **kwargs: Arguments for the native forward.

        Returns:
            The image embedding in the joint space (not normalised) where the model has one, else
            the native last hidden state, [batch, tokens, d_model].

        Raises:
            ValueError: there is no input, ``return_type`` is unknown, a layer is out of range, or a
                residual stream does not have the model's width or length.
        """
        if return_type not in ("logits", None):
            raise ValueError(
                f"return_type={return_type!r} does not apply to images: use 'logits' or None"
            )
        data = input if pixel_values is None else pixel_values
        if not isinstance(data, Tensor):
            raise ValueError(
                f"the model takes a tensor of pixels, not {type(data).__name__}: "
                "model.preprocess(images) makes one"
            )
        with self.alone():
            stop = stop_at_layer if stop_at_layer is not None else self._pending_stop
            try:
                output = self._run(data, start_at_layer, stop, image_size, kwargs)
            except StopAtLayerException as stopped:
                return stopped.layer_output
        return None if return_type is None else self.adapter.image_output(output)

    def _run(
        self,
        data: Tensor,
        start: int | None,
        stop: int | None,
        image_size: tuple[int, int] | None,
        kwargs: dict[str, Any],
    ) -> Any:
        """Return the native output of a pass over a range of the blocks."""
        start = None if start is None else self._layer(start, "start_at_layer")
        stop = None if stop is None else self._layer(stop, "stop_at_layer")
        if start is not None:
            self._check_residual(data, image_size)
        elif "spatial_shapes" not in kwargs:
            self.check_pixels(data)
        with self.alone():
            if not torch.compiler.is_compiling():
                self._renew_loans()
                self.n_passes += 1
            pixels = data if start is None else self._placeholder(data, image_size)
            if "pos_embed" in self._modules:
                self.pos_embed._current_batch_size = data.shape[0]
            height, width = pixels.shape[-2:]
            self._image_size = (height, width) if pixels.ndim == 4 else None
            try:
                with self._stretch(data, start, stop):
                    return self.original_model(pixel_values=pixels, **kwargs)
            finally:
                self._image_size = None

    def alone(self) -> AbstractContextManager[Any]:
        """Return a context in which no other thread runs this model.

        A pass keeps its stop, its image size and its hooks on the model's parts, so passes of
        several threads come one after the other. Hooks and SAEs that stay attached between passes
        are the model's and act on every thread's passes.
        """
        return nullcontext() if torch.compiler.is_compiling() else self._one_at_a_time

    def _layer(self, layer: int, argument: str) -> int:
        n_layers = int(self.cfg.n_layers)
        if not -n_layers <= layer <= n_layers:
            raise ValueError(
                f"{argument}={layer} is out of range: {self.cfg.model_name} has {n_layers} blocks"
            )
        return layer + n_layers if layer < 0 else layer

    def check_pixels(self, pixels: Tensor) -> None:
        """Raise ValueError unless pixels are a batch of images."""
        if pixels.ndim != 4:
            raise ValueError(
                f"{self.cfg.model_name} takes a batch of images [batch, channels, height, width], "
                f"got {list(pixels.shape)}: for one image, give pixels[:1] in place of pixels[0]"
            )

    def _check_residual(self, residual: Tensor, image_size: tuple[int, int] | None) -> None:
        expected = (self.token_layout(image_size).n_tokens, self.cfg.d_model)
        if residual.ndim != 3 or tuple(residual.shape[1:]) != expected:
            raise ValueError(
                f"start_at_layer takes a residual stream [batch, {expected[0]}, {expected[1]}] of "
                f"{self.cfg.model_name}, got {list(residual.shape)}"
            )

    def _placeholder(self, residual: Tensor, image_size: tuple[int, int] | None) -> Tensor:
        """Return pixels of the right shape and no memory, for native code that reads the shape."""
        dims = self.adapter.tower_dimensions
        height, width = image_size or dims.image_size
        return residual.new_zeros(1).expand(residual.shape[0], dims.n_channels, height, width)

    @contextmanager
    def _stretch(self, residual: Tensor, start: int | None, stop: int | None) -> Iterator[None]:
        """Tell the blocks which of them this pass runs."""
        if start is None and stop is None:
            yield
            return
        blocks = list(self.blocks)
        bypassed = [part for name in ("embed", "embed_ln") if (part := getattr(self, name, None))]
        try:
            if start is not None:
                for part in bypassed:
                    part._bypass = residual
                for block in blocks[:start]:
                    block._skipped = True
                blocks[max(start - 1, 0)]._injected = residual
            if stop is not None and stop == len(blocks):
                blocks[-1]._stop = "after"
            elif stop is not None:
                blocks[stop]._stop = "before"
            yield
        finally:
            for part in bypassed:
                part._bypass = None
            for block in blocks:
                block._skipped, block._injected, block._stop = False, None, None

    # ------------------------------------------------------------------ hooks

    @property
    def hook_dict(self) -> dict[str, HookPoint]:
        """Every hook point by each of its names, with the hook points inside attached SAEs."""
        if self._hook_dict is None:
            hooks = super().hook_dict
            hooks["hook_embed"] = hooks.get("embed_ln.hook_out", hooks["embed.hook_out"])
            self._hook_dict = hooks
        return {**self._hook_dict, **self.splice_hooks()}

    def check_hook_names(self, names: Sequence[object]) -> None:
        """Raise UnknownHookError if no hook point has one of the names."""
        check_hook_names(names, self.hook_dict, self.cfg.model_name)

    def run_with_cache(  # type: ignore[override]
        self,
        input: Tensor,
        return_cache_object: bool = True,
        remove_batch_dim: bool = False,
        names_filter: NamesFilter = None,
        stop_at_layer: int | None = None,
        **kwargs: Any,
    ) -> tuple[Any, ActivationCache | dict[str, Tensor]]:
        """Run the model and keep its activations, as TransformerLens does.

        Args:
            input: Pixels, or with ``start_at_layer`` a residual stream.
            return_cache_object: Return an ActivationCache; False returns a plain dictionary.
            remove_batch_dim: Drop a batch dimension of one.
            names_filter: A name, several, or a function that selects names; None keeps every
                activation.
            stop_at_layer: Block to stop before, see :meth:`forward`.
            **kwargs: Further arguments of TransformerLens's ``run_with_cache`` and of the forward.

        Raises:
            UnknownHookError: the model has no hook of a name in ``names_filter``.
        """
        if names_filter is not None and not callable(names_filter):
            self.check_hook_names(_as_list(names_filter))
        with self.alone():
            self._pending_stop = stop_at_layer
            try:
                output, cache = super().run_with_cache(
                    input,
                    return_cache_object=return_cache_object,
                    remove_batch_dim=remove_batch_dim,
                    names_filter=names_filter,
                    **kwargs,
                )
            finally:
                self._pending_stop = None
        if isinstance(cache, ActivationCache):
            # hook_embed is the input of the first block, which already contains the positions.
            cache.has_pos_embed = False
        return output, cache

    def run_with_hooks(  # type: ignore[override]
        self, input: Tensor, fwd_hooks: HookList = (), bwd_hooks: HookList = (), **kwargs: Any
    ) -> Any:
        """Run the model with hooks, as TransformerLens does; unknown names are errors."""
        self.check_hook_names([name for name, _ in (*fwd_hooks, *bwd_hooks)])
        with self.alone():
            return super().run_with_hooks(
                input, fwd_hooks=list(fwd_hooks), bwd_hooks=list(bwd_hooks), **kwargs
            )

    def hooks(  # type: ignore[override]
        self, fwd_hooks: HookList = (), bwd_hooks: HookList = (), **kwargs: Any
    ) -> AbstractContextManager[Any]:
        """Return a context with hooks for a ``with`` block; unknown names are errors."""
        self.check_hook_names([name for name, _ in (*fwd_hooks, *bwd_hooks)])
        context: AbstractContextManager[Any] = super().hooks(  # type: ignore[no-untyped-call]
            fwd_hooks=list(fwd_hooks), bwd_hooks=list(bwd_hooks), **kwargs
        )
        return context

    def add_hook(
        self,
        name: str | Callable[[str], bool],
        hook_fn: Callable[..., Any],
        dir: Literal["fwd", "bwd"] = "fwd",
        is_permanent: bool = False,
    ) -> None:
        """Add a hook by any of its names, or to all hook points that a function selects."""
        if not isinstance(name, str):
            super().add_hook(name, hook_fn, dir=dir, is_permanent=is_permanent)
            return
        self.check_hook_names([name])
        self.check_hooks_to_add(name)
        self.hook_dict[name].add_hook(hook_fn, dir=dir, is_permanent=is_permanent)

    def harvest(self, pixels: Tensor, hook_names: str | Sequence[str]) -> dict[str, Tensor]:
        """Return activations by hook name, read by plain hooks on the native module, no gradients.

        It costs little more than the native forward up to the last hook. For many batches, one
        :class:`~vision_plugin.models.Harvester` is faster.
        """
        names = [hook_names] if isinstance(hook_names, str) else list(hook_names)
        return Harvester(self, names)(pixels)

    def token_layout(self, image_size: tuple[int, int] | None = None) -> TokenLayout:
        """Return kinds and order of the tokens for images of a height and width in pixels.

        The default is the size of the pass in progress, or else the checkpoint's own size.
        """
        size = image_size or self._image_size
        layout: TokenLayout = self.adapter.tower_dimensions.layout(size)
        return layout

    # ------------------------------------------------------------------ mode

    def train(self, mode: bool = True) -> VisionBridge:
        """Switch the mode of the bridge and of the native module."""
        super().train(mode)
        if "native" in self.__dict__:
            self.native.train(mode)
        return self


def _as_list(names: str | list[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _make_adapter(adapter_class: Any, architecture: str, module: nn.Module, name: str) -> Any:
    # The adapter reads the true sizes from the module in prepare_model.
    cfg = TransformerBridgeConfig(
        d_model=1, d_head=1, n_layers=1, n_ctx=1, n_heads=1, act_fn="gelu"
    )
    cfg.architecture, cfg.model_name = architecture, name
    parameter = next(module.parameters())
    cfg.device, cfg.dtype = str(parameter.device), parameter.dtype
    return adapter_class(cfg)
