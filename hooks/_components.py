"""Bridge components that every vision family shares: block, attention, embeddings.

They add to TransformerLens's components what a vision transformer needs: stopping and starting at
any block whatever its native path, an attention pattern that hooks can write, and a position
embedding with its own hook.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.exceptions import StopAtLayerException
from transformer_lens.model_bridge.generalized_components import (
    AttentionBridge,
    BlockBridge,
    MLPBridge,
    NormalizationBridge,
)
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

from vision_plugin.models.heads import Gain


class VisionBlockBridge(BlockBridge):
    """A transformer block that a pass can skip, start at, or stop at.

    The bridge sets three fields during one forward pass:

    ``_injected``: a residual stream that replaces the block's input.
    ``_skipped``: the block returns its input and fires no hook.
    ``_stop``: ``"before"`` or ``"after"``: the pass ends there and returns the residual stream.
    """

    # The stock aliases without the split-input fork, which vision attention does not offer.
    hook_aliases: ClassVar[dict[str, str]] = {  # type: ignore[assignment]
        "hook_resid_pre": "hook_in",
        "hook_resid_mid": "ln2.hook_in",
        "hook_resid_post": "hook_out",
        "hook_attn_out": "attn.hook_out",
        "hook_mlp_out": "mlp.hook_out",
    }
    # A LayerScale is declared as ln1_post or ln2_post. BlockBridge then moves hook_attn_out and
    # hook_mlp_out behind it, to the tensor that is added to the residual stream.

    _injected: Tensor | None = None
    _skipped: bool = False
    _stop: str | None = None
    _taken: tuple[object, dict[tuple[object, ...], tuple[str, ...]]] = (None, {})

    def _filter_kwargs_for_forward(
        self, kwargs: dict[str, Any], num_positional_args: int = 0
    ) -> dict[str, Any]:
        """Keep the arguments that the native block takes, looked up once for each kind of call."""
        forward = self.original_component.forward  # type: ignore[union-attr]
        function = getattr(forward, "__func__", forward)
        if self._taken[0] is not function:  # another library may put its own in place
            self.__dict__["_taken"] = (function, {})
        call = (num_positional_args, *kwargs)
        if call not in self._taken[1]:
            taken = super()._filter_kwargs_for_forward(kwargs, num_positional_args)
            self._taken[1][call] = tuple(taken)
        return {name: kwargs[name] for name in self._taken[1][call]}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the native block between ``hook_in`` and ``hook_out``."""
        if self._injected is not None:
            args, kwargs = _replace_input(self._injected, args, kwargs)
        if self._skipped:
            return args[0] if args else kwargs["hidden_states"]
        if self._stop == "before":
            residual = args[0] if args else kwargs["hidden_states"]
            raise StopAtLayerException(self.hook_in(residual))
        output = self._run(args, kwargs)
        if self._stop == "after":
            raise StopAtLayerException(output[0] if isinstance(output, tuple) else output)
        return output

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._maybe_wire_capture_hooks()
        self._clear_attention_capture()
        args, kwargs = self._hook_input_hidden_states(args, kwargs)
        block = self.original_component
        assert block is not None
        try:
            output = block(*args, **self._filter_kwargs_for_forward(kwargs, len(args)))
        finally:
            self._clear_attention_capture()
        return self._apply_output_hook(output)


class VisionAttentionBridge(AttentionBridge):
    """Self-attention whose pattern hooks can read and write.

    The native module runs untouched unless a hook on the scores, the pattern or the per-head
    result is live. Then this class computes queries, keys and values, and

    * if no hook edits anything and no gradient is needed, the output still comes from the native
      kernel, so that reading the pattern changes no bit of it;
    * otherwise the output is ``pattern @ v``, so that edits and gradients go through the pattern.

    A family whose attention differs (rotary embedding, normalised queries, fused projections)
    overrides :meth:`project` and :meth:`native_kernel`.

    ``_asking`` names the only tokens whose output is wanted during one pass, where
    :attr:`can_ask` says that it is followed.
    """

    supports_split_qkv_fork = False
    supports_attn_result = True

    _asking: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the native attention, or the explicit one if a hook needs it."""
        if not self.explicit_needed():
            return self.native_forward(*args, **kwargs)
        if len(args) > 1:
            kwargs["attention_mask"] = args[1]
        hidden = kwargs.pop("hidden_states") if "hidden_states" in kwargs else args[0]
        output = self.hook_out(self.attend(self.hook_in(hidden), **kwargs))
        return self.pack(output)

    def native_forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the native module between ``hook_in`` and ``hook_out``."""
        return super().forward(*args, **kwargs)

    def explicit_needed(self) -> bool:
        """Return whether a live hook needs a tensor that the native module does not show."""
        if self._asking is not None or getattr(self.config, "use_attn_result", False):
            return True
        return any(hook.fwd_hooks or hook.bwd_hooks for hook in self.watched_hooks())

    @property
    def can_ask(self) -> bool:
        """Whether ``_asking`` is followed, which it is in the attention of this class alone."""
        own, here = type(self), VisionAttentionBridge
        return own.project is here.project and own.attend is here.attend

    def watched_hooks(self) -> list[HookPoint]:
        """Return the hook points that only the explicit attention fires."""
        names = ("hook_attn_scores", "hook_pattern", "hook_rot_q", "hook_rot_k")
        return [hook for name in names if (hook := self._modules.get(name)) is not None]  # type: ignore[misc]

    def pack(self, output: Tensor) -> Any:
        """Return the output as the native module's caller expects it: ``(output, weights)``."""
        return output, None

    @property
    def scaling(self) -> float:
        """Return the factor on the scores: ``d_head ** -0.5`` unless the module has its own."""
        native = self.original_component
        for name in ("scaling", "scale"):
            value = getattr(native, name, None)
            if isinstance(value, float):
                return value
        return float(self.config.d_head) ** -0.5

    def project(self, hidden: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, each [batch, n_heads, tokens, d_head]."""
        del kwargs
        asking = hidden if self._asking is None else hidden[:, self._asking]
        return (
            self.split_heads(self.q(asking)),
            self.split_heads(self.k(hidden)),
            self.split_heads(self.v(hidden)),
        )

    def split_heads(self, x: Tensor) -> Tensor:
        """Reshape [batch, tokens, n_heads * d_head] to [batch, n_heads, tokens, d_head]."""
        return x.view(*x.shape[:-1], -1, self.config.d_head).transpose(1, 2)

    def rotate(
        self, q: Tensor, k: Tensor, rotation: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Apply a rotary embedding and hook its results, [batch, tokens, n_heads, d_head]."""
        rotated_q = self.hook_rot_q(rotation(q).transpose(1, 2)).transpose(1, 2)
        rotated_k = self.hook_rot_k(rotation(k).transpose(1, 2)).transpose(1, 2)
        return rotated_q, rotated_k

    def native_kernel(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Run the kernel that the native module would call; [batch, n_heads, tokens, d_head]."""
        if _attention_implementation(self.original_component) == "eager":
            scores = _masked(q @ k.transpose(-1, -2) * self.scaling, mask)
            return torch.matmul(_softmax(scores, q.dtype), v)
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=self.scaling
        )

    def attend(
        self, hidden: Tensor, *, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """Run explicit attention, [batch, tokens, d_model] to [batch, tokens, d_model]."""
        q, k, v = self.project(hidden, **kwargs)
        scores = _masked(torch.matmul(q, k.transpose(-1, -2)) * self.scaling, attention_mask)
        scores_seen, scores_edited = _fire(self.hook_attn_scores, scores)
        exact = torch.promote_types(q.dtype, torch.float32)
        pattern = _softmax(scores_seen, q.dtype, exact)
        pattern_seen, pattern_edited = _fire(self.hook_pattern, pattern)
        if scores_edited or pattern_edited or (torch.is_grad_enabled() and pattern.requires_grad):
            z = torch.matmul(pattern_seen.to(v.dtype), v)
        else:
            z = self.native_kernel(q, k, v, attention_mask)
        z = self.combine(z, hidden)
        if getattr(self.config, "use_attn_result", False):
            return self._output_by_head(z)
        return self.output_projection(z)

    def combine(self, z: Tensor, hidden: Tensor) -> Tensor:
        """Join the heads, [batch, n_heads, tokens, d_head] to [batch, tokens, n_heads * d_head].

        Args:
            z: Output of each head.
            hidden: Input of the attention, with which some families gate the output.
        """
        del hidden
        return z.transpose(1, 2).flatten(2)

    @property
    def inner_norm(self) -> Any:
        """Normalisation of the joined heads before the output projection, or None."""
        return None

    def gain(self, seen: Tensor | None, hidden: Tensor) -> Gain | None:
        """Return what :meth:`combine` does to the joined heads, with its statistics held.

        Args:
            seen: Input of :attr:`inner_norm`, [batch, tokens, n_heads * d_head], if there is one.
            hidden: Input of the attention, [batch, tokens, d_model].
        """
        del seen, hidden
        return None

    def output_projection(self, z: Tensor) -> Tensor:
        """Apply the output projection after the heads, [batch, tokens, d_model]."""
        output: Tensor = self.o(z)
        return output

    def _output_by_head(self, z: Tensor) -> Tensor:
        z = self.o.hook_in(z)
        n_heads, d_head = self.config.n_heads, self.config.d_head
        per_head = self._compute_per_head_result(
            z.unflatten(-1, (n_heads, d_head)), n_heads, d_head
        )
        output: Tensor = self.o.hook_out(per_head)
        return output


class EmbeddingBridge(GeneralizedComponent):
    """The patch embedding with everything that the native module adds to it.

    ``_bypass`` replaces the output in a pass that starts at a later block; no hook fires then.
    """

    _bypass: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the native embedding, or return its replacement."""
        if self._bypass is not None:
            return self.pack(self._bypass)
        return super().forward(*args, **kwargs)

    def pack(self, residual: Tensor) -> Any:
        """Return the replacement as the native module's caller expects it."""
        return residual


class VisionNormBridge(NormalizationBridge):
    """A normalisation with the native arithmetic; it recognises any library's RMSNorm."""

    @property
    def uses_rms_norm(self) -> bool:
        """Whether the native module does not subtract the mean."""
        return "rms" in type(self.original_component).__name__.lower()

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """Normalise; compute the statistics that hooks see only where one looks at them."""
        native = self.original_component
        watched = is_live(self.hook_scale) or is_live(self.hook_normalized)
        if watched or native is None or isinstance(native, torch.nn.Identity):
            output: Tensor = super().forward(hidden_states, **kwargs)
            return output
        output = native(self.hook_in(hidden_states)).to(hidden_states.dtype)
        hooked: Tensor = self.hook_out(output)
        return hooked


class EmbeddingNormBridge(VisionNormBridge):
    """A LayerNorm between the embedding and the first block (CLIP's ``pre_layrnorm``)."""

    _bypass: Tensor | None = None

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """Normalise, or return the replacement of the embedding."""
        if self._bypass is not None:
            return self._bypass
        output: Tensor = super().forward(hidden_states, **kwargs)
        return output


class PositionEmbeddingBridge(GeneralizedComponent):
    """A position-embedding table whose hook has one row per image: [batch, tokens, d_model]."""

    _current_batch_size: int = 1

    def forward(self, *args: Any, spread: bool = True, **kwargs: Any) -> Tensor:
        """Read the table and repeat it for each image of the batch.

        Where the native module resamples the table to the image's size afterwards, ``spread`` is
        False and the hook has the table itself, [1, positions, d_model].
        """
        table = self.original_component
        assert table is not None
        output: Tensor = table(*args, **kwargs)
        if output.ndim == 2:
            output = output.unsqueeze(0)
        if spread:
            output = output.expand(self._current_batch_size, -1, -1)
        if self.hook_out.fwd_hooks:
            # A hook may write in place, but not into the weights or one row for all images.
            output = output.clone()
        hooked: Tensor = self.hook_out(output)
        return hooked


class LayerScaleBridge(GeneralizedComponent):
    """A LayerScale, whose output is added to the residual stream."""


class GatedMLPBridge(MLPBridge):
    """An MLP with a gate: ``hook_pre`` is the gate's input to the activation function."""

    hook_aliases: ClassVar[dict[str, str]] = {  # type: ignore[assignment]
        "hook_pre": "gate.hook_out",
        "hook_pre_linear": "in.hook_out",
        "hook_post": "out.hook_in",
    }


def is_live(hook: HookPoint) -> bool:
    """Return whether anything is hooked there."""
    return bool(
        hook._forward_hooks
        or hook._forward_pre_hooks
        or hook._backward_hooks
        or hook._backward_pre_hooks
    )


def _replace_input(
    residual: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        return (residual, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": residual}


def _fire(hook: HookPoint, tensor: Tensor) -> tuple[Tensor, bool]:
    """Fire a hook; return its result and whether the hook changed the tensor."""
    version = _version(tensor)
    hooked: Tensor = hook(tensor)
    return hooked, hooked is not tensor or _version(hooked) != version


def _version(tensor: Tensor) -> object:
    """Return a number that changes with each write in place.

    Inference mode keeps no such number: there, any hook at all counts as a write.
    """
    return object() if tensor.is_inference() else tensor._version


def _masked(scores: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return scores
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, float("-inf"))
    return scores + mask


def _softmax(scores: Tensor, dtype: torch.dtype, inner: torch.dtype = torch.float32) -> Tensor:
    return torch.nn.functional.softmax(scores, dim=-1, dtype=inner).to(dtype)


def _attention_implementation(module: Any) -> str:
    return getattr(getattr(module, "config", None), "_attn_implementation", None) or "sdpa"
