"""A weights file with its config, and the options for reading it."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from vision_plugin._shown import listed, shown
from vision_plugin.formats._errors import CorruptCheckpointError, RefusedCheckpointError
from vision_plugin.formats._files import damage_is_named, read_config, read_weights
from vision_plugin.formats._inert import InertObject

Activation = Literal["relu", "topk", "batchtopk", "jumprelu"]
RowNormalization = Literal["l2", "max_l2", "l1", "max_l1", "identity"]
NegativeLatents = Literal["refuse", "clip"]

_CONFIG_NAMES = ("config.json", "config.yaml", "config.yml")
_MAX_METADATA_TEXT = 500
_MAX_WHOLE_NUMBER = 2**63
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_WHOLE_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


@dataclass(frozen=True)
class ReadOptions:
    """Facts about an SAE that its file may leave out.

    Attributes:
        activation: The sparsifier, for formats that do not record it.
        k: Latents kept per sample, for formats that do not record it.
        threshold: The scalar threshold of a BatchTopK SAE, if its file does not hold it.
        row_normalization: How overcomplete's dictionary normalises its rows; None means l2.
        negative_latents: What to do with an SAE whose top-k keeps negative latents, which no stock
            architecture does: refuse it, or clip them to zero (which changes what it computes).
        input_mean: Mean [d_in] that the SAE expects its input to be centred by; it is folded in.
        input_std: Std, one or [d_in], that the SAE expects its input to be divided by; folded in.

    Examples:
        >>> vp.formats.ReadOptions(activation="topk", k=32).k
        32
    """

    activation: Activation | None = None
    k: int | None = None
    threshold: float | None = None
    row_normalization: RowNormalization | None = None
    negative_latents: NegativeLatents = "refuse"
    input_mean: Tensor | None = None
    input_std: Tensor | float | None = None

    def __post_init__(self) -> None:
        choices: tuple[tuple[str, object, tuple[Any, ...]], ...] = (
            ("activation", self.activation, (None, *get_args(Activation))),
            ("row_normalization", self.row_normalization, (None, *get_args(RowNormalization))),
            ("negative_latents", self.negative_latents, get_args(NegativeLatents)),
        )
        for name, value, allowed in choices:
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}; expected one of {allowed}.")
        if (self.input_mean is None) != (self.input_std is None):
            raise ValueError("input_mean= and input_std= belong together; give both or neither.")


@dataclass(frozen=True)
class RawCheckpoint:
    """A checkpoint in its own project's layout.

    Attributes:
        path: The weights file.
        tensors: The state dict.
        settings: The config pickled with the tensors, else the one in a file beside them, else
            empty.
        settings_class: Name of the pickled config's class, where there is one.
        header: saev's header, or None.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    settings: Mapping[str, Any] = field(default_factory=dict)
    settings_class: str | None = None
    header: Mapping[str, Any] | None = None

    def take(self, *required: str, optional: Collection[str] = ()) -> dict[str, Tensor]:
        """Return the tensors if they are exactly these.

        Raises:
            CorruptCheckpointError: One of `required` is missing.
            RefusedCheckpointError: There are others that the format's reader does not know.
        """
        missing = [name for name in required if name not in self.tensors]
        if missing:
            raise CorruptCheckpointError(
                f"the tensors {missing} are missing; it holds {listed(self.tensors)}."
            )
        unknown = sorted(set(self.tensors) - set(required) - set(optional))
        if unknown:
            raise RefusedCheckpointError(
                f"it also holds {listed(unknown)}, which this format's reader does not know."
            )
        for name, tensor in self.tensors.items():
            if tensor.dtype not in (*_DTYPES, *_WHOLE_DTYPES):
                raise CorruptCheckpointError(f"{name} holds {tensor.dtype}, not floating point.")
        return dict(self.tensors)

    def setting(self, name: str, kind: type | tuple[type, ...], default: Any = ...) -> Any:
        """Return one value of the config, after a check of its type.

        Raises:
            CorruptCheckpointError: It is missing and has no default, or has another type.
        """
        value = self.settings.get(name, default)
        if value is ...:
            raise CorruptCheckpointError(f"its config has no {name!r}.")
        if value is default:
            return value
        kinds = kind if isinstance(kind, tuple) else (kind,)
        # True is an int to Python, and an int has no limit.
        matches = isinstance(value, kinds) and (type(value) is not bool or bool in kinds)
        if not matches or (type(value) is int and abs(value) >= _MAX_WHOLE_NUMBER):
            raise CorruptCheckpointError(f"its config has {name!r} = {shown(value)}.")
        return value

    def announced_shape(self) -> tuple[int | None, int | None]:
        """Return `d_in` and `d_sae` as the config states them, None where it does not."""
        nested = self.settings.get("trainer")
        stated = nested if isinstance(nested, dict) else self.settings
        sizes: list[int | None] = []
        for names in (
            ("d_in", "input_dim", "d_model", "activation_dim"),
            ("d_sae", "hidden_dim", "dict_size"),
        ):
            found = [stated[name] for name in names if isinstance(stated.get(name), int)]
            sizes.append(found[0] if found else None)
        return sizes[0], sizes[1]

    def text(self, name: str) -> str | None:
        """Return a setting if it is a short text, else None."""
        value = self.settings.get(name)
        return value if isinstance(value, str) and 0 < len(value) <= _MAX_METADATA_TEXT else None


def whole_number(value: object, name: str) -> int:
    """Return `value` if it is an int.

    Raises:
        CorruptCheckpointError: It is something else.
    """
    if type(value) is not int or abs(value) >= _MAX_WHOLE_NUMBER:
        raise CorruptCheckpointError(f"{name} is {shown(value)}; expected a whole number.")
    return value


def matrix_shape(tensors: Mapping[str, Tensor], name: str) -> tuple[int, int]:
    """Return the rows and columns of a matrix.

    Raises:
        CorruptCheckpointError: It is no matrix, or an empty one.
    """
    shape = tuple(tensors[name].shape)
    if len(shape) != 2 or 0 in shape:
        raise CorruptCheckpointError(f"{name} has shape {shape}; it must be a matrix.")
    return shape


def check_shapes(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise if tensors that are there have other shapes than these.

    Readers call it before they compute: tensors of wrong shapes may broadcast to any size.

    Raises:
        CorruptCheckpointError: It names the tensor, its shape and the shape expected.
    """
    for name, shape in expected.items():
        if name in tensors and tuple(tensors[name].shape) != shape:
            raise CorruptCheckpointError(
                f"{name} has shape {tuple(tensors[name].shape)}; it must be {shape}."
            )


def read_checkpoint(path: Path) -> RawCheckpoint:
    """Read a weights file and the config beside it.

    Args:
        path: The weights file. Its `config.json` or `.yaml` is searched in its folder, and in the
            parent of a folder called `checkpoints`.
    """
    weights = read_weights(path)
    with damage_is_named(path):
        return _assembled(path, weights.content, weights.header)


def _assembled(path: Path, content: Any, header: dict[str, Any] | None) -> RawCheckpoint:
    if isinstance(content, InertObject):
        raise RefusedCheckpointError(
            f"the file is nothing but a pickled {shown(content.class_name)}, which can only be "
            "read by running code. Re-save its tensors where that class can be imported: "
            "`torch.save(sae.state_dict(), 'state_dict.pth')`. Then give what the state dict "
            "leaves out (k, BatchTopK's running_threshold) as options: "
            "load_sae('state_dict.pth', activation='batchtopk', "
            "threshold=float(sae.running_threshold)) or activation='topk', k=sae.top_k."
        )
    if isinstance(content, Tensor):
        raise RefusedCheckpointError(
            "the file is a single tensor (a feature-sparsity log, perhaps), not an SAE."
        )
    if not isinstance(content, dict):
        raise CorruptCheckpointError(f"the file holds a {type(content).__name__}, not a dict.")
    settings: Mapping[str, Any] = {}
    settings_class = None
    if "state_dict" in content:
        embedded = content.get("cfg", content.get("config"))
        if isinstance(embedded, InertObject):
            settings, settings_class = embedded.attributes, embedded.class_name
        elif isinstance(embedded, dict):
            settings = embedded
        content = content["state_dict"]
    if not settings:
        config = _config_beside(path)
        settings = read_config(config) if config is not None else {}
    return RawCheckpoint(path, _state_dict(content), settings, settings_class, header)


def _state_dict(content: object) -> dict[str, Tensor]:
    if not isinstance(content, dict) or not content:
        raise CorruptCheckpointError("its state dict is empty or not a dict.")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise CorruptCheckpointError(
                f"its state dict maps {shown(key)} to {shown(value)}; "
                "only names and tensors belong there."
            )
    return content


def _config_beside(path: Path) -> Path | None:
    folders = [path.parent]
    if path.parent.name == "checkpoints":
        folders.append(path.parent.parent)
    for folder in folders:
        for name in _CONFIG_NAMES:
            if os.path.lexists(folder / name):
                return folder / name
    return None
