"""A pickle reader that can build tensors and plain containers, and nothing else.

A pickle is a small program: it names callables, and calls them. Here no name ever resolves to the
thing it names. A handful of names (how torch writes a tensor) resolve to our own functions. Every
other name resolves to an inert marker; calling a marker, or setting state on its instance, only
records the request. So a config object of a project that is not installed reads as a set of
attributes, and an attack reads as a record of what it wanted to do.

The interpreter is the standard library's, in its Python form: the C form allocates its memo by the
largest index that a file mentions, so a file of nine bytes can ask it for gigabytes.
"""

from __future__ import annotations

import io
import pickle
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, cast

import torch

from vision_plugin.formats._errors import CorruptCheckpointError, UnsafeCheckpointError

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
_MAX_DIMENSIONS = 8


@dataclass
class InertObject:
    """What a pickle says about an object whose class is not built.

    Attributes:
        class_name: Dotted name of the class or function that the pickle named.
        arguments: The arguments of the call in the pickle.
        attributes: The object's `__dict__`, or the items of a mapping subclass.
        items: The elements of a sequence subclass.
    """

    class_name: str
    arguments: tuple[Any, ...] = ()
    attributes: dict[str, Any] = field(default_factory=dict)
    items: list[Any] = field(default_factory=list)

    def __setitem__(self, key: object, value: object) -> None:
        self.attributes[str(key)] = value

    def append(self, value: object) -> None:
        """Record an element of a sequence subclass."""
        self.items.append(value)

    def extend(self, values: Sequence[object]) -> None:
        """Record elements of a sequence subclass."""
        self.items.extend(values)

    def set_state(self, state: object) -> None:
        """Record the state that unpickling would have set."""
        parts = state if isinstance(state, tuple) and len(state) == 2 else (state,)
        for part in parts:
            if isinstance(part, Mapping):
                self.attributes.update({str(key): value for key, value in part.items()})


@dataclass(frozen=True)
class StorageType:
    """The element type that a pickle names for a storage."""

    dtype: torch.dtype


@dataclass(frozen=True)
class _Name:
    """A global that resolves to its own name only."""

    module: str
    name: str

    @property
    def dotted(self) -> str:
        return f"{self.module}.{self.name}"

    def _acts(self) -> bool:
        package = self.module.partition(".")[0]
        if package in ("builtins", "__builtin__"):
            return self.name not in _BUILTIN_DATA
        is_standard = package in sys.stdlib_module_names
        return is_standard and package not in _STANDARD_DATA_MODULES

    def call(self, arguments: tuple[Any, ...]) -> InertObject:
        if self._acts():
            raise UnsafeCheckpointError(
                f"the file asks for {self.dotted} to be called while it is being read. Nothing was "
                "called. Do not load this file with other tools; get the weights from a source "
                "you trust, as safetensors if they offer it."
            )
        return InertObject(self.dotted, arguments)


@dataclass(frozen=True)
class _Permitted:
    """One of our own functions in place of a name that torch writes."""

    function: Callable[..., Any]

    def call(self, arguments: tuple[Any, ...]) -> Any:
        return self.function(*arguments)


def _rebuild_tensor(
    storage: object, offset: object, size: object, stride: object, *_unused: object
) -> torch.Tensor:
    """Return a view of `storage` [numel], after a check that it lies inside."""
    if not isinstance(storage, torch.Tensor) or not _is_shape(size) or not _is_shape(stride):
        raise CorruptCheckpointError("a tensor's storage, size or stride is not what torch writes.")
    sizes, strides = cast(tuple[int, ...], size), cast(tuple[int, ...], stride)
    if len(sizes) != len(strides) or not isinstance(offset, int) or offset < 0:
        raise CorruptCheckpointError(
            f"a tensor has size {sizes}, stride {strides} and offset {offset!r}."
        )
    last = offset + sum((n - 1) * step for n, step in zip(sizes, strides, strict=True))
    if 0 not in sizes and last >= storage.numel():
        raise CorruptCheckpointError(
            f"a tensor of size {sizes} reaches element {last} of a storage that holds "
            f"{storage.numel()}."
        )
    return torch.as_strided(storage, sizes, strides, offset)


def _is_shape(value: object) -> bool:
    return (
        isinstance(value, tuple)
        and len(value) <= _MAX_DIMENSIONS
        and all(type(n) is int and n >= 0 for n in value)
    )


def _embedded_storage(blob: object) -> torch.Tensor:
    """Return a storage that plain `pickle` wrote as `torch.save` bytes, as a flat tensor."""
    if not isinstance(blob, bytes):
        raise CorruptCheckpointError("an embedded storage is not bytes.")
    loaded = torch.load(io.BytesIO(blob), weights_only=True, map_location="cpu")
    if not isinstance(loaded, torch.storage.TypedStorage):
        raise CorruptCheckpointError("an embedded storage holds something other than numbers.")
    return torch.tensor([], dtype=loaded.dtype).set_(loaded)


def _ordered_dict(items: object = ()) -> dict[Any, Any]:
    return dict(cast(Any, items))


def _permitted_names() -> dict[tuple[str, str], object]:
    names: dict[tuple[str, str], object] = {
        ("collections", "OrderedDict"): _Permitted(_ordered_dict),
        ("torch._utils", "_rebuild_tensor_v2"): _Permitted(_rebuild_tensor),
        ("torch._utils", "_rebuild_tensor"): _Permitted(_rebuild_tensor),
        ("torch._utils", "_rebuild_parameter"): _Permitted(lambda data, *_unused: data),
        ("torch.storage", "_load_from_bytes"): _Permitted(_embedded_storage),
        ("torch", "device"): _Permitted(lambda *parts: ":".join(map(str, parts))),
        ("torch", "Size"): _Permitted(lambda sizes=(): tuple(sizes)),
        ("builtins", "set"): _Permitted(lambda items=(): list(items)),
        ("__builtin__", "set"): _Permitted(lambda items=(): list(items)),
        ("builtins", "frozenset"): _Permitted(lambda items=(): list(items)),
    }
    for name, dtype in _DTYPES.items():
        names["torch", name] = StorageType(dtype)
        names["torch", str(dtype).removeprefix("torch.")] = str(dtype).removeprefix("torch.")
    return names


_PERMITTED = _permitted_names()


class InertUnpickler(pickle._Unpickler):
    """Reader of one pickle; the module's docstring says what it may build.

    Args:
        file: The pickle.
        storages: Returns the flat tensor [numel] of a storage, given its key in the archive,
            element type and number of elements; None if no storage may lie outside the pickle.
    """

    def __init__(
        self,
        file: io.BytesIO,
        storages: Callable[[str, torch.dtype, int], torch.Tensor] | None = None,
    ) -> None:
        super().__init__(file)
        self._storages = storages

    def find_class(self, module: str, name: str) -> Any:
        """Resolve a global to one of our stand-ins, never to the thing itself."""
        return _PERMITTED.get((module, name), _Name(module, name))

    def persistent_load(self, pid: Any) -> torch.Tensor:
        """Return the storage that torch's persistent id names."""
        if self._storages is None:
            raise CorruptCheckpointError("the pickle refers to a storage that is not in the file.")
        match pid:
            case ("storage", StorageType(dtype), str(key), _, int(n_elements), *_):
                return self._storages(key, dtype, n_elements)
        raise CorruptCheckpointError(f"the pickle names a storage in an unknown way: {pid!r}.")


def _called(callee: object, arguments: object) -> Any:
    if isinstance(callee, _Name | _Permitted) and isinstance(arguments, tuple):
        return callee.call(arguments)
    raise CorruptCheckpointError(f"the pickle calls {type(callee).__name__!r}, not a name.")


def _reduce(reader: Any) -> None:
    arguments = reader.stack.pop()
    reader.stack[-1] = _called(reader.stack[-1], arguments)


def _new_object(reader: Any) -> None:
    arguments = reader.stack.pop()
    reader.append(_called(reader.stack.pop(), arguments))


def _new_object_with_keywords(reader: Any) -> None:
    keywords = reader.stack.pop()
    arguments = reader.stack.pop()
    made = _called(reader.stack.pop(), arguments)
    if isinstance(made, InertObject):
        made.set_state(keywords)
    reader.append(made)


def _build(reader: Any) -> None:
    state = reader.stack.pop()
    if isinstance(reader.stack[-1], InertObject):
        reader.stack[-1].set_state(state)
    elif not isinstance(reader.stack[-1], dict):  # torch sets `_metadata` on a state dict
        raise CorruptCheckpointError(
            f"the pickle sets state on a {type(reader.stack[-1]).__name__}, which torch never does."
        )


def _not_in_checkpoints(_reader: Any) -> NoReturn:
    raise CorruptCheckpointError("the pickle uses an instruction that no checkpoint needs.")


InertUnpickler.dispatch = {
    **pickle._Unpickler.dispatch,
    pickle.REDUCE[0]: _reduce,
    pickle.NEWOBJ[0]: _new_object,
    pickle.NEWOBJ_EX[0]: _new_object_with_keywords,
    pickle.BUILD[0]: _build,
    **{
        opcode[0]: _not_in_checkpoints
        for opcode in (
            pickle.INST,
            pickle.OBJ,
            pickle.EXT1,
            pickle.EXT2,
            pickle.EXT4,
            pickle.BYTEARRAY8,  # allocates what it announces before it reads
            pickle.NEXT_BUFFER,
            pickle.READONLY_BUFFER,
        )
    },
}
