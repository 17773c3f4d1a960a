"""Bridge components that every vision family shares: block, attention, embeddings.

They add to TransformerLens's own components what a vision transformer needs and the stock ones do
not give: stopping and starting at any block whatever the native module path is called, an
attention pattern that can be written, and a position embedding with a hook of its own.
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
    # LayerScale, where a family has it, is declared as ln1_post and ln2_post: BlockBridge then
    # moves hook_attn_out and hook_mlp_out behind it, to what is added to the residual stream.

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
        if not self.explicit_needed():
            return self.native_forward(*args, **kwargs)
        if len(args) > 1:
            kwargs["attention_mask"] = args[1]
        hidden = kwargs.pop("hidden_states") if "hidden_states" in kwargs else args[0]
        output = self.hook_out(self.attend(self.hook_in(hidden), **kwargs))
        return self.pack(output)

    def native_forward(self, *args: Any, **kwargs: Any) -> Any:
        """The native module between ``hook_in`` and ``hook_out``."""
        return super().forward(*args, **kwargs)

    def explicit_needed(self) -> bool:
        """Whether something is to be seen, or edited, that the native module does not show."""
        if getattr(self.config, "use_attn_result", False):
            return True
        return any(hook.fwd_hooks or hook.bwd_hooks for hook in self.watched_hooks())

    def watched_hooks(self) -> list[HookPoint]:
        """Hook points that only the explicit attention fires."""
        names = ("hook_attn_scores", "hook_pattern", "hook_rot_q", "hook_rot_k")
        return [hook for name in names if (hook := self._modules.get(name)) is not None]  # type: ignore[misc]

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

    def rotate(
        self, q: Tensor, k: Tensor, rotation: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Apply a rotary embedding and show its results, [batch, tokens, n_heads, d_head]."""
        rotated_q = self.hook_rot_q(rotation(q).transpose(1, 2)).transpose(1, 2)
        rotated_k = self.hook_rot_k(rotation(k).transpose(1, 2)).transpose(1, 2)
        return rotated_q, rotated_k

    def native_kernel(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """The kernel the native module would call; [batch, n_heads, tokens, d_head]."""
        if _attention_implementation(self.original_component) == "eager":
            scores = _masked(q @ k.transpose(-1, -2) * self.scaling, mask)
            return torch.matmul(_softmax(scores, q.dtype), v)
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=self.scaling
        )

    def attend(
        self, hidden: Tensor, *, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """Explicit attention, [batch, tokens, d_model] to [batch, tokens, d_model]."""
        q, k, v = self.project(hidden, **kwargs)
        scores = _masked(torch.matmul(q, k.transpose(-1, -2)) * self.scaling, attention_mask)
        scores_seen, scores_edited = _fire(self.hook_attn_scores, scores)
        pattern = _softmax(scores_seen, q.dtype)
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
            z: What each head gathered.
            hidden: The attention's input, which some families gate the result with.
        """
        del hidden
        return z.transpose(1, 2).flatten(2)

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
            return self.pack(self._bypass)
        return super().forward(*args, **kwargs)

    def pack(self, residual: Tensor) -> Any:
        """Shape the replacement as the native module's caller expects it."""
        return residual


class VisionNormBridge(NormalizationBridge):
    """A normalisation with the native arithmetic, RMSNorm under any library's spelling."""

    @property
    def uses_rms_norm(self) -> bool:
        """Whether the native module leaves the mean in."""
        return "rms" in type(self.original_component).__name__.lower()


class EmbeddingNormBridge(VisionNormBridge):
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

    def forward(self, *args: Any, spread: bool = True, **kwargs: Any) -> Tensor:
        """Look the table up and spread it over the batch.

        Where the native module resamples the table to the image's size afterwards, ``spread`` is
        off and the hook shows the table itself, [1, positions, d_model].
        """
        table = self.original_component
        assert table is not None
        output: Tensor = table(*args, **kwargs)
        if output.ndim == 2:
            output = output.unsqueeze(0)
        if spread:
            output = output.expand(self._current_batch_size, -1, -1)
        if self.hook_out.fwd_hooks:
            # A hook may write in place: not into the weights, nor into one row for all images.
            output = output.clone()
        hooked: Tensor = self.hook_out(output)
        return hooked


class LayerScaleBridge(GeneralizedComponent):
    """A LayerScale: what comes out of it is what is added to the residual stream."""


class GatedMLPBridge(MLPBridge):
    """An MLP with a gate: ``hook_pre`` is the gate's input to the activation function."""

    hook_aliases: ClassVar[dict[str, str]] = {  # type: ignore[assignment]
        "hook_pre": "gate.hook_out",
        "hook_pre_linear": "in.hook_out",
        "hook_post": "out.hook_in",
    }


def _replace_input(
    residual: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        return (residual, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": residual}


def _fire(hook: HookPoint, tensor: Tensor) -> tuple[Tensor, bool]:
    """Fire a hook; say whether it returned, or wrote, something else than it was given."""
    version = _version(tensor)
    hooked: Tensor = hook(tensor)
    return hooked, hooked is not tensor or _version(hooked) != version


def _version(tensor: Tensor) -> object:
    """A number that changes with each write in place; inference mode keeps none.

    Without one a hook that is there at all counts as having written.
    """
    return object() if tensor.is_inference() else tensor._version


def _masked(scores: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return scores
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, float("-inf"))
    return scores + mask


def _softmax(scores: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(dtype)


def _attention_implementation(module: Any) -> str:
    return getattr(getattr(module, "config", None), "_attn_implementation", None) or "sdpa"
