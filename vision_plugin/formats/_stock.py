"""The target of every translation: the tensors and settings of one stock SAELens SAE."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import sae_lens
import torch
from jaxtyping import Float
from torch import Tensor

from vision_plugin._shown import shown
from vision_plugin.formats._errors import CorruptCheckpointError, RefusedCheckpointError

Architecture = Literal["standard", "topk", "jumprelu", "gated"]
Normalization = Literal["none", "layer_norm", "constant_norm_rescale"]

_DTYPE_NAMES = {
    torch.float64: "float64",
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}


@dataclass(frozen=True)
class StockCheckpoint:
    """One SAE in SAELens's own terms.

    Attributes:
        architecture: SAELens's name of the architecture.
        tensors: SAELens's parameters: `W_enc` [d_in, d_sae], `W_dec` [d_sae, d_in], `b_dec` [d_in],
            and those of `b_enc`, `threshold`, `b_gate`, `b_mag`, `r_mag` [d_sae] that it has.
        apply_b_dec_to_input: Whether `b_dec` is subtracted from the (normalised) input.
        normalize_activations: How SAELens normalises the input and undoes that on the output.
        k: Latents kept per sample, for `topk`.
        threshold_is_inclusive: Whether a latent that equals its threshold is kept. SAELens drops
            it, so the threshold is stored as the next smaller number of the dtype, which makes both
            agree on every number of the dtype.
        metadata: Facts to record with the SAE, as plain JSON values.
    """

    architecture: Architecture
    tensors: Mapping[str, Tensor]
    apply_b_dec_to_input: bool
    normalize_activations: Normalization = "none"
    k: int | None = None
    threshold_is_inclusive: bool = False
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def d_in(self) -> int:
        """Return the width of the activations."""
        return int(self.tensors["W_enc"].shape[0])

    @property
    def d_sae(self) -> int:
        """Return the number of latents."""
        return int(self.tensors["W_enc"].shape[1])

    def checked(self) -> StockCheckpoint:
        """Return the checkpoint after checks of shapes, element types, finiteness and k.

        Raises:
            CorruptCheckpointError: It names the tensor, its shape and the shape expected.
        """
        encoder = self.tensors["W_enc"]
        if encoder.ndim != 2 or 0 in encoder.shape:
            raise CorruptCheckpointError(
                f"the encoder has shape {tuple(encoder.shape)}; expected [d_in, d_sae]."
            )
        for name, tensor in self.tensors.items():
            expected = self._expected_shape(name)
            if tuple(tensor.shape) != expected:
                raise CorruptCheckpointError(
                    f"{name} has shape {tuple(tensor.shape)}; with an encoder of d_in={self.d_in} "
                    f"and d_sae={self.d_sae} it must be {expected}."
                )
        require_floating(self.tensors)
        require_finite(self.tensors)
        if self.architecture == "topk" and not (
            isinstance(self.k, int) and 1 <= self.k <= self.d_sae
        ):
            raise CorruptCheckpointError(f"k is {shown(self.k)}; expected 1 to d_sae={self.d_sae}.")
        return self

    def _expected_shape(self, name: str) -> tuple[int, ...]:
        shapes = {"W_enc": (self.d_in, self.d_sae), "W_dec": (self.d_sae, self.d_in)}
        return shapes.get(name, (self.d_in,) if name == "b_dec" else (self.d_sae,))

    def standardized(self, mean: Float[Tensor, " d_in"], std: Tensor | float) -> StockCheckpoint:
        """Return the same function of raw activations, for an SAE that expects `(x - mean) / std`.

        The result is exact: latents stay, and the reconstruction is mapped back by `* std + mean`.

        Args:
            mean: Mean activation [d_in].
            std: One positive number, or one per dimension [d_in].

        Raises:
            ValueError: A shape is wrong, a value is not finite, or a std is not positive.
            RefusedCheckpointError: The SAE normalises each sample itself; the two do not commute.
        """
        if self.normalize_activations != "none":
            raise RefusedCheckpointError(
                f"it applies {self.normalize_activations} to every sample, so a data set's mean "
                "and std cannot be folded in first. Leave out input_mean= and input_std=."
            )
        mean = mean.to(torch.float64)
        scale = torch.as_tensor(std, dtype=torch.float64).expand(self.d_in)
        if mean.shape != (self.d_in,) or not bool(torch.isfinite(mean).all()):
            raise ValueError(f"input_mean= must be {self.d_in} finite numbers, got {mean.shape}.")
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            raise ValueError("input_std= must be positive and finite.")
        wide = {name: tensor.to(torch.float64) for name, tensor in self.tensors.items()}
        encoder = wide["W_enc"] / scale[:, None]
        folded = dict(wide)
        folded["W_enc"] = encoder
        folded["W_dec"] = wide["W_dec"] * scale
        folded["b_dec"] = wide["b_dec"] * scale + mean
        if not self.apply_b_dec_to_input:  # otherwise the new b_dec already subtracts the mean
            shift = mean @ encoder
            for name in ("b_enc", "b_gate"):
                if name in wide:
                    folded[name] = wide[name] - shift
            if "b_mag" in wide:
                folded["b_mag"] = wide["b_mag"] - shift * wide["r_mag"].exp()
        narrow = {name: value.to(self.tensors[name].dtype) for name, value in folded.items()}
        return replace(
            self,
            tensors=narrow,
            metadata={**self.metadata, "input_normalization": "standardize (folded)"},
        )

    def to_sae_lens(
        self, *, device: str = "cpu", dtype: str | None = None
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return SAELens's config dict and state dict.

        Args:
            device: Device of the tensors.
            dtype: `"float32"` and so on; None takes the widest in the file.
        """
        widest = max((tensor.dtype for tensor in self.tensors.values()), key=lambda d: d.itemsize)
        name = str(dtype).removeprefix("torch.") if dtype is not None else _DTYPE_NAMES[widest]
        matching = [known for known, known_name in _DTYPE_NAMES.items() if known_name == name]
        if not matching:
            raise ValueError(
                f"dtype is {dtype!r}; expected one of {sorted(_DTYPE_NAMES.values())}."
            )
        state = {
            key: tensor.detach().to(device=device, dtype=matching[0]).contiguous().clone()
            for key, tensor in self.tensors.items()
        }
        if self.threshold_is_inclusive:
            state["threshold"] = _next_below(state["threshold"])
        config: dict[str, Any] = {
            "architecture": self.architecture,
            "d_in": self.d_in,
            "d_sae": self.d_sae,
            "dtype": name,
            "device": device,
            "apply_b_dec_to_input": self.apply_b_dec_to_input,
            "normalize_activations": self.normalize_activations,
            "reshape_activations": "none",
            "metadata": {"sae_lens_version": sae_lens.__version__, **self.metadata},
        }
        if self.architecture == "topk":
            config |= {"k": self.k, "rescale_acts_by_decoder_norm": False}
        return config, state


def require_floating(tensors: Mapping[str, Tensor]) -> None:
    """Raise if a tensor holds whole or complex numbers, or numbers that cannot be computed with.

    Raises:
        CorruptCheckpointError: It names the tensor and its element type.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPE_NAMES:
            raise CorruptCheckpointError(
                f"{shown(name)} holds {tensor.dtype}, not floating point of 16 bits or more."
            )


def require_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise if a value is NaN or infinite.

    Raises:
        CorruptCheckpointError: It names the tensor and the number of such values.
    """
    for name, tensor in tensors.items():
        n_bad = int((~torch.isfinite(tensor)).sum())
        if n_bad:
            raise CorruptCheckpointError(
                f"{name} holds {n_bad} values that are NaN or infinite. Its training diverged or "
                "the file is damaged; take an earlier checkpoint."
            )


def _next_below(threshold: Float[Tensor, " d_sae"]) -> Float[Tensor, " d_sae"]:
    """Return the next smaller number of each threshold, in its own dtype."""
    if threshold.dtype in (torch.float32, torch.float64):
        return torch.nextafter(threshold, torch.full_like(threshold, -torch.inf))
    bits = threshold.view(torch.int16)
    below = torch.where(threshold > 0, bits - 1, bits + 1)  # sign and magnitude
    smallest_negative = torch.full_like(bits, -0x7FFF)  # 0x8001
    return torch.where(threshold == 0, smallest_negative, below).view(threshold.dtype)
