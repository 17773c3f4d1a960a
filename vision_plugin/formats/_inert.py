"""What a pickle may build: tensors, plain containers, and records of everything else.

Work is bounded by the file: each read of the pickle and each copied element is a step, and a
`Budget` has a limit of steps. Nothing here hashes, compares or prints a value that the file built,
except for short texts and small whole numbers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from vision_plugin._shown import shown
from vision_plugin.formats._errors import CorruptCheckpointError, UnsafeCheckpointError

MAX_STEPS = 30_000
"""Steps that reading one file may take; an SAE's takes some hundreds, a large config thousands."""
MAX_NAME = 1_000
"""Characters of a name: of a class, of a key, of a storage."""
_MAX_KEY_BITS = 60  # Python's hashes of larger ones collide at will
_MAX_DIMENSIONS = 8
# A config may hold values of these. A call to anything else in the standard library (os.system,
# builtins.eval, ...) is an attack: the file is refused, although nothing would be called anyway.
_STANDARD_DATA_MODULES = frozenset(
    {
        "_codecs",
        "codecs",
        "collections",
        "copyreg",
        "datetime",
        "decimal",
        "enum",
        "fractions",
        "functools",
        "pathlib",
        "re",
        "types",
        "typing",
        "uuid",
    }
)
_BUILTIN_DATA = frozenset(
    {
        "bool",
        "bytearray",
        "bytes",
        "complex",
        "dict",
        "float",
        "int",
        "list",
        "object",
        "range",
        "slice",
        "str",
        "tuple",
    }
)
_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class Budget:
    """What reading one file may still take.

    Args:
        n_bytes: Size of the file: its storages cannot hold more.
    """

    def __init__(self, n_bytes: int) -> None:
        self.steps = MAX_STEPS
        self._bytes = n_bytes

    def step(self, n: int = 1) -> None:
        """Count reads, or copied elements.

        Raises:
            CorruptCheckpointError: There are more than any checkpoint needs.
        """
        self.steps -= n
        if self.steps < 0:
            raise CorruptCheckpointError(
                f"its pickle takes more than {MAX_STEPS:,} steps to read, which no SAE needs."
            )

    def take(self, n_bytes: int) -> None:
        """Count bytes of storages.

        Raises:
            CorruptCheckpointError: They are more than the file has.
        """
        self._bytes -= n_bytes
        if self._bytes < 0:
            raise CorruptCheckpointError("its storages hold more bytes than the file has.")


@dataclass(eq=False)
class InertObject:
    """What a pickle says about an object whose class is not built.

    Attributes:
        class_name: Dotted name of the class or function that the pickle named.
        arguments: The arguments of the call in the pickle.
        attributes: The object's `__dict__`, or the items of a mapping subclass, by name.
        items: The elements of a sequence subclass.
    """

    class_name: str
    arguments: tuple[Any, ...] = ()
    attributes: dict[str, Any] = field(default_factory=dict)
    items: list[Any] = field(default_factory=list)

    def set_state(self, state: object, budget: Budget) -> None:
        """Record the state that unpickling would have set."""
        parts = state if isinstance(state, tuple) and len(state) == 2 else (state,)
        for part in parts:
            if isinstance(part, dict):
                budget.step(len(part))
                self.attributes.update({k: v for k, v in part.items() if isinstance(k, str)})


@dataclass(frozen=True, eq=False)
class StorageType:
    """The element type that a pickle names for a storage."""

    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class Name:
    """A global that resolves to its own name only."""

    module: str
    dotted: str

    def call(self, reader: Reader, arguments: tuple[Any, ...]) -> InertObject:
        """Record the call.

        Raises:
            UnsafeCheckpointError: It would act, and not only make a value.
        """
        del reader
        if self._acts():
            raise UnsafeCheckpointError(
                f"the file asks for {self.dotted} to be called while it is being read. Nothing was "
                "called. Do not load this file with other tools; get the weights from a source "
                "you trust, as safetensors if they offer it."
            )
        return InertObject(self.dotted, arguments)

    def _acts(self) -> bool:
        package = self.module.partition(".")[0]
        if package in ("builtins", "__builtin__"):
            return self.dotted.removeprefix(f"{self.module}.") not in _BUILTIN_DATA
        is_standard = package in sys.stdlib_module_names
        return is_standard and package not in _STANDARD_DATA_MODULES


class Reader:
    """What a permitted function may ask of the reader that calls it.

    Args:
        budget: What reading the file may still take.
        embedded: Returns the flat tensor [numel] that the bytes of a nested torch file hold; None
            if there may be none.
    """

    def __init__(
        self, budget: Budget, embedded: Callable[[bytes, Budget], torch.Tensor] | None
    ) -> None:
        self.budget = budget
        self.embedded = embedded


@dataclass(frozen=True, eq=False)
class Permitted:
    """One of our own functions in place of a name that torch writes."""

    function: Callable[..., Any]

    def call(self, reader: Reader, arguments: tuple[Any, ...]) -> Any:
        """Call the function."""
        return self.function(reader, *arguments)


def resolve(module: str, name: str) -> object:
    """Return the stand-in for a global; never the thing itself.

    Raises:
        CorruptCheckpointError: The name is longer than any class's.
    """
    if len(module) + len(name) > MAX_NAME:
        raise CorruptCheckpointError(f"it names a class with {len(module) + len(name)} characters.")
    known = _PERMITTED.get((module, name))
    return Name(module, f"{module}.{name}") if known is None else known


def put(made: dict[Any, Any], key: object, value: object) -> None:
    """Set an item, if the key is a short text, a small whole number, or another plain value.

    Raises:
        CorruptCheckpointError: It is anything else. Hashing a tuple may take for ever.
    """
    is_plain = key is None or isinstance(key, float)
    is_short = isinstance(key, (str, bytes)) and len(key) <= MAX_NAME
    is_small = isinstance(key, int) and key.bit_length() <= _MAX_KEY_BITS
    if not (is_plain or is_short or is_small):
        raise CorruptCheckpointError(
            f"one of its dicts has {shown(key)} for a key; only short names and numbers belong "
            "there."
        )
    made[key] = value


def _elements(reader: Reader, items: object) -> list[Any]:
    """Return a copy of a plain container's elements (a dict's pairs)."""
    if not isinstance(items, (list, tuple, dict)):
        raise CorruptCheckpointError(f"it makes a container of {shown(items)}.")
    reader.budget.step(len(items))
    return list(items.items() if isinstance(items, dict) else items)


def _list(reader: Reader, items: object = ()) -> list[Any]:
    return _elements(reader, items)


def _size(reader: Reader, sizes: object = ()) -> tuple[Any, ...]:
    return tuple(_elements(reader, sizes))


def _ordered_dict(reader: Reader, items: object = ()) -> dict[Any, Any]:
    made: dict[Any, Any] = {}
    for pair in _elements(reader, items):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise CorruptCheckpointError("it makes a dict of something other than pairs.")
        put(made, pair[0], pair[1])
    return made


def _device(reader: Reader, kind: object = "cpu", index: object = None) -> str:
    del reader
    return kind if isinstance(kind, str) and index is None else "a device"


def _parameter(reader: Reader, data: object, *_unused: object) -> object:
    del reader
    return data


def _rebuild_tensor(
    reader: Reader, storage: object, offset: object, size: object, stride: object, *_unused: object
) -> torch.Tensor:
    """Return a view of `storage` [numel], after a check that it lies inside and is no larger."""
    del reader
    if not isinstance(storage, torch.Tensor) or not _is_shape(size) or not _is_shape(stride):
        raise CorruptCheckpointError("a tensor's storage, size or stride is not what torch writes.")
    sizes, strides = cast(tuple[int, ...], size), cast(tuple[int, ...], stride)
    if len(sizes) != len(strides) or not isinstance(offset, int) or offset < 0:
        raise CorruptCheckpointError(
            f"a tensor has {len(sizes)} sizes, {len(strides)} strides and offset {shown(offset)}."
        )
    n_elements = 1
    for n in sizes:
        n_elements *= n
    if n_elements > storage.numel():
        raise CorruptCheckpointError(
            f"a tensor announces {shown(n_elements)} elements, but its storage holds "
            f"{storage.numel()}. If it was saved expanded, save its `.contiguous()`."
        )
    last = offset + sum((n - 1) * step for n, step in zip(sizes, strides, strict=True))
    if n_elements and last >= storage.numel():
        raise CorruptCheckpointError(
            f"a tensor reaches element {shown(last)} of a storage that holds {storage.numel()}."
        )
    return torch.as_strided(storage, sizes, strides, offset)


def _is_shape(value: object) -> bool:
    return (
        isinstance(value, tuple)
        and len(value) <= _MAX_DIMENSIONS
        and all(type(n) is int and 0 <= n < 1 << 62 for n in value)
    )


def _embedded_storage(reader: Reader, blob: object) -> torch.Tensor:
    """Return a storage that plain `pickle` wrote as `torch.save` bytes, as a flat tensor."""
    if not isinstance(blob, bytes) or reader.embedded is None:
        raise CorruptCheckpointError("an embedded storage is not bytes, or is inside another.")
    reader.budget.take(len(blob))
    return reader.embedded(blob, reader.budget)


def _permitted_names() -> Mapping[tuple[str, str], object]:
    names: dict[tuple[str, str], object] = {
        ("collections", "OrderedDict"): Permitted(_ordered_dict),
        ("torch._utils", "_rebuild_tensor_v2"): Permitted(_rebuild_tensor),
        ("torch._utils", "_rebuild_tensor"): Permitted(_rebuild_tensor),
        ("torch._utils", "_rebuild_parameter"): Permitted(_parameter),
        ("torch.storage", "_load_from_bytes"): Permitted(_embedded_storage),
        ("torch", "device"): Permitted(_device),
        ("torch", "Size"): Permitted(_size),
        ("builtins", "set"): Permitted(_list),
        ("__builtin__", "set"): Permitted(_list),
        ("builtins", "frozenset"): Permitted(_list),
        ("__builtin__", "frozenset"): Permitted(_list),
    }
    for name, dtype in _DTYPES.items():
        names["torch", name] = StorageType(dtype)
        names["torch", str(dtype).removeprefix("torch.")] = str(dtype).removeprefix("torch.")
    return names


_PERMITTED = _permitted_names()


def extend(target: object, values: Sequence[object]) -> None:
    """Append to a list, or to the record of a sequence.

    Raises:
        CorruptCheckpointError: The target is neither.
    """
    items = target.items if isinstance(target, InertObject) else target
    if not isinstance(items, list):
        raise CorruptCheckpointError(f"the pickle appends to {shown(target)}.")
    items.extend(values)
