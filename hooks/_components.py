"""Bridge components that every vision family shares: block, attention, embeddings.

They add to TransformerLens's own components what a vision transformer needs and the stock ones do
not give: stopping and starting at any block whatever the native module path is called, an
attention pattern that can be written, and a position embedding with a hook of its own.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.exceptions import StopAtLayerException
from transformer_lens.model_bridge.generalized_components import (
    AttentionBridge,
    BlockBridge,
    NormalizationBridge,
)
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent


class VisionBlockBridge(BlockBridge):
    """A transformer block that can be skipped, fed, or stopped at.

    The bridge sets three fields for the length of one forward pass:

    ``_injected``: a residual stream that replaces what the block receives.
    ``_skipped``: the block hands its input on and fires no hook.
    ``_stop``: ``"before"`` or ``"after"``, where the pass ends with the residual stream as result.
    """

    # The stock aliases less those of the split-input fork, which vision attention does not offer.
    hook_aliases: ClassVar[dict[str, str]] = {  # type: ignore[assignment]
        "hook_resid_pre": "hook_in",
        "hook_resid_mid": "ln2.hook_in",
        "hook_resid_post": "hook_out",
        "hook_attn_out": "attn.hook_out",
        "hook_mlp_out": "mlp.hook_out",
    }

    _injected: Tensor | None = None
    _skipped: bool = False
    _stop: str | None = None

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
    """Self-attention whose pattern can be read and written.

    The native module runs untouched unless a hook on the scores, the pattern or the per-head
    result is live. Then queries, keys and values are formed here, and

    * if nothing was edited and no gradient is asked for, the output still comes from the native
      kernel, so that looking changes no bit of it;
    * otherwise it is ``pattern @ v``, so that an edit, or a gradient, goes through the pattern.

    A family whose attention differs (rotary embedding, normalised queries, fused projections)
    overrides :meth:`project` and :meth:`native_kernel`.
    """

    supports_split_qkv_fork = False
    supports_attn_result = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the native attention, or the explicit one where a hook needs it."""
        if not self._explicit_needed():
            return super().forward(*args, **kwargs)
        hidden = kwargs.pop("hidden_states") if "hidden_states" in kwargs else args[0]
        output = self.hook_out(self.attend(self.hook_in(hidden), **kwargs))
        return self.pack(output)

    def _explicit_needed(self) -> bool:
        watched = (self.hook_attn_scores, self.hook_pattern)
        return bool(getattr(self.config, "use_attn_result", False)) or any(
            hook.fwd_hooks or hook.bwd_hooks for hook in watched
        )

    def pack(self, output: Tensor) -> Any:
        """Shape the output as the native module's caller expects it: ``(output, weights)``."""
        return output, None

    @property
    def scaling(self) -> float:
        """What the scores are multiplied by: ``d_head ** -0.5`` unless the module has its own."""
        native = self.original_component
        for name in ("scaling", "scale"):
            value = getattr(native, name, None)
            if isinstance(value, float):
                return value
        return float(self.config.d_head) ** -0.5

    def project(self, hidden: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each [batch, n_heads, tokens, d_head]."""
        del kwargs
        return (
            self.split_heads(self.q(hidden)),
            self.split_heads(self.k(hidden)),
            self.split_heads(self.v(hidden)),
        )

    def split_heads(self, x: Tensor) -> Tensor:
        """[batch, tokens, n_heads * d_head] to [batch, n_heads, tokens, d_head]."""
        return x.view(*x.shape[:-1], -1, self.config.d_head).transpose(1, 2)

    def native_kernel(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The kernel the native module would call; [batch, n_heads, tokens, d_head]."""
        if _attention_implementation(self.original_component) == "eager":
            return torch.matmul(_softmax(q @ k.transpose(-1, -2) * self.scaling, q.dtype), v)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=self.scaling)

    def attend(self, hidden: Tensor, **kwargs: Any) -> Tensor:
        """Explicit attention, [batch, tokens, d_model] to [batch, tokens, d_model]."""
        q, k, v = self.project(hidden, **kwargs)
        scores = torch.matmul(q, k.transpose(-1, -2)) * self.scaling
        scores_seen, scores_edited = _fire(self.hook_attn_scores, scores)
        pattern = _softmax(scores_seen, q.dtype)
        pattern_seen, pattern_edited = _fire(self.hook_pattern, pattern)
        if scores_edited or pattern_edited or (torch.is_grad_enabled() and pattern.requires_grad):
            z = torch.matmul(pattern_seen.to(v.dtype), v)
        else:
            z = self.native_kernel(q, k, v)
        z = z.transpose(1, 2).flatten(2)
        if getattr(self.config, "use_attn_result", False):
            return self._output_by_head(z)
        return self.output_projection(z)

    def output_projection(self, z: Tensor) -> Tensor:
        """What follows the heads: the output projection, [batch, tokens, d_model]."""
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
    """The patch embedding with all that the native module adds to it.

    ``_bypass`` replaces the output for one pass that starts further up; no hook fires then.
    """

    _bypass: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the native embedding, or hand on what replaces it."""
        if self._bypass is not None:
            return self._bypass
        return super().forward(*args, **kwargs)


class EmbeddingNormBridge(NormalizationBridge):
    """A LayerNorm between the embedding and the first block (CLIP's ``pre_layrnorm``)."""

    _bypass: Tensor | None = None

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """Normalise, or hand on what replaces the embedding."""
        if self._bypass is not None:
            return self._bypass
        output: Tensor = super().forward(hidden_states, **kwargs)
        return output


class PositionEmbeddingBridge(GeneralizedComponent):
    """A position-embedding table, hooked with one row per image: [batch, tokens, d_model]."""

    _current_batch_size: int = 1

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Look the table up and spread it over the batch."""
        table = self.original_component
        assert table is not None
        output: Tensor = table(*args, **kwargs)
        if output.ndim == 2:
            output = output.unsqueeze(0)
        output = output.expand(self._current_batch_size, -1, -1)
        if (
            self.hook_out.fwd_hooks
        ):  # a hook may write in place, which a view over the batch forbids
            output = output.clone()
        hooked: Tensor = self.hook_out(output)
        return hooked


def _replace_input(
    residual: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        return (residual, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": residual}


def _fire(hook: HookPoint, tensor: Tensor) -> tuple[Tensor, bool]:
    """Fire a hook; say whether it returned, or wrote, something else than it was given."""
    version = tensor._version
    hooked: Tensor = hook(tensor)
    return hooked, hooked is not tensor or hooked._version != version


def _softmax(scores: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(dtype)


def _attention_implementation(module: Any) -> str:
    return getattr(getattr(module, "config", None), "_attn_implementation", None) or "sdpa"
