"""A pickle reader that can build tensors and plain containers, and nothing else.

A pickle is a small program: it names callables, and calls them. Here no name ever resolves to the
thing it names. A handful of names (how torch writes a tensor) resolve to our own functions. Every
other name resolves to an inert marker; calling a marker, or setting state on its instance, only
records the request. So a config object of a project that is not installed reads as a set of
attributes, and an attack reads as a record of what it wanted to do.

The interpreter is the standard library's, in its Python form: the C form allocates its memo by the
largest index that a file mentions, so a file of nine bytes can ask it for gigabytes. Every read is
counted, and the instructions that could do more work than their bytes are our own.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any, BinaryIO

import torch

from vision_plugin._shown import shown
from vision_plugin.formats._errors import CorruptCheckpointError
from vision_plugin.formats._inert import (
    MAX_NAME,
    Budget,
    InertObject,
    Name,
    Permitted,
    Reader,
    StorageType,
    extend,
    put,
    resolve,
)

Stream = BinaryIO | io.BytesIO  # the second is the first to mypy, and not to beartype
_MAX_LINE = 4096  # of the instructions of protocol 0, which end with a line


class PickleBytes:
    """A stream of known size: no read is longer than what is left, no line longer than a name.

    Args:
        file: The file, at the first byte.
        size: Number of bytes.
        budget: What reading them may still take; each read is a step.
    """

    def __init__(self, file: Stream, size: int, budget: Budget) -> None:
        self.budget = budget
        self._file = file
        self._left = size

    def read(self, n: int) -> bytes:
        """Return exactly so many bytes.

        Raises:
            EOFError: There are fewer.
            CorruptCheckpointError: It takes too many steps.
        """
        self.budget.steps -= 1  # for each instruction: a call of step() would cost as much again
        if self.budget.steps < 0:
            self.budget.step(0)
        if not 0 <= n <= self._left:
            raise EOFError("it ends too early")
        self._left -= n
        content = self._file.read(n)
        if len(content) < n:
            raise EOFError("it ends too early")
        return content

    def readline(self) -> bytes:
        """Return the next line.

        Raises:
            CorruptCheckpointError: It is longer than any that a checkpoint needs.
        """
        line = self._file.readline(_MAX_LINE)
        self._left -= len(line)
        if not line.endswith(b"\n"):
            raise CorruptCheckpointError("a line of its pickle has no end.")
        return line


class InertUnpickler(pickle._Unpickler, Reader):
    """Reader of one pickle; the module's docstring says what it may build.

    Args:
        content: The stream that the pickle stands in; it is left at the pickle's end.
        storages: Returns the flat tensor [numel] of a storage, given its key in the archive,
            element type and number of elements; None if no storage may lie outside the pickle.
        embedded: See `Reader`.
    """

    def __init__(
        self,
        content: PickleBytes,
        storages: Callable[[str, torch.dtype, int], torch.Tensor] | None = None,
        embedded: Callable[[bytes, Budget], torch.Tensor] | None = None,
    ) -> None:
        pickle._Unpickler.__init__(self, content)
        Reader.__init__(self, content.budget, embedded)
        self._storages = storages

    def find_class(self, module: str, name: str) -> Any:
        """Resolve a global to one of our stand-ins, never to the thing itself."""
        return resolve(module, name)

    def persistent_load(self, pid: Any) -> torch.Tensor:
        """Return the storage that torch's persistent id names."""
        if self._storages is None:
            raise CorruptCheckpointError("the pickle refers to a storage that is not in the file.")
        match pid:
            case (str(kind), StorageType(dtype), str(key), _, int(n_elements), *rest) if (
                kind == "storage" and len(key) <= MAX_NAME and rest in ([], [None])
            ):
                return self._storages(key, dtype, n_elements)
        raise CorruptCheckpointError(f"the pickle names a storage in an unknown way: {shown(pid)}.")


def _called(reader: Any, callee: object, arguments: object) -> Any:
    if isinstance(callee, Name | Permitted) and isinstance(arguments, tuple):
        return callee.call(reader, arguments)
    raise CorruptCheckpointError(f"the pickle calls {shown(callee)}, not a name.")


def _reduce(reader: Any) -> None:
    arguments = reader.stack.pop()
    reader.stack[-1] = _called(reader, reader.stack[-1], arguments)


def _new_object(reader: Any) -> None:
    arguments = reader.stack.pop()
    reader.append(_called(reader, reader.stack.pop(), arguments))


def _new_object_with_keywords(reader: Any) -> None:
    keywords = reader.stack.pop()
    arguments = reader.stack.pop()
    made = _called(reader, reader.stack.pop(), arguments)
    if isinstance(made, InertObject):
        made.set_state(keywords, reader.budget)
    reader.append(made)


def _build(reader: Any) -> None:
    state = reader.stack.pop()
    if isinstance(reader.stack[-1], InertObject):
        reader.stack[-1].set_state(state, reader.budget)
    elif not isinstance(reader.stack[-1], dict):  # torch sets `_metadata` on a state dict
        raise CorruptCheckpointError(
            f"the pickle sets state on {shown(reader.stack[-1])}, which torch never does."
        )


def _set_items(reader: Any, target: object, items: list[Any]) -> None:
    if len(items) % 2:
        raise CorruptCheckpointError("the pickle sets a key without a value.")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if isinstance(target, InertObject):
            target.set_state({key: value} if isinstance(key, str) else None, reader.budget)
        elif isinstance(target, dict):
            put(target, key, value)
        else:
            raise CorruptCheckpointError(f"the pickle sets an item of {shown(target)}.")


def _set_item(reader: Any) -> None:
    value, key = reader.stack.pop(), reader.stack.pop()
    _set_items(reader, reader.stack[-1], [key, value])


def _set_marked_items(reader: Any) -> None:
    items = reader.pop_mark()
    _set_items(reader, reader.stack[-1], items)


def _dict_of_marked(reader: Any) -> None:
    items = reader.pop_mark()
    made: dict[Any, Any] = {}
    _set_items(reader, made, items)
    reader.append(made)


def _append(reader: Any) -> None:
    value = reader.stack.pop()
    extend(reader.stack[-1], [value])


def _append_marked(reader: Any) -> None:
    items = reader.pop_mark()
    extend(reader.stack[-1], items)


def _empty_list(reader: Any) -> None:
    reader.append([])


def _list_of_marked(reader: Any) -> None:
    items = reader.pop_mark()
    reader.append(items)


def _memoize_text(reader: Any) -> None:
    index = int(reader.readline()[:-1])
    if not 0 <= index < 1 << 32:  # Python's hashes of larger numbers collide at will
        raise CorruptCheckpointError("the pickle remembers more than fits in any memory.")
    reader.memo[index] = reader.stack[-1]


def _frame(reader: Any) -> None:
    """Skip a frame's length; a frame is a hint for reading ahead, which would not be counted."""
    reader.read(8)


def _not_in_checkpoints(_reader: Any) -> None:
    raise CorruptCheckpointError("the pickle uses an instruction that no checkpoint needs.")


# A set's elements would be hashed; it reads as a list.
_OURS: dict[bytes, Callable[[Any], None]] = {
    pickle.REDUCE: _reduce,
    pickle.NEWOBJ: _new_object,
    pickle.NEWOBJ_EX: _new_object_with_keywords,
    pickle.BUILD: _build,
    pickle.SETITEM: _set_item,
    pickle.SETITEMS: _set_marked_items,
    pickle.DICT: _dict_of_marked,
    pickle.APPEND: _append,
    pickle.APPENDS: _append_marked,
    pickle.EMPTY_SET: _empty_list,
    pickle.ADDITEMS: _append_marked,
    pickle.FROZENSET: _list_of_marked,
    pickle.PUT: _memoize_text,
    pickle.FRAME: _frame,
}
# Each of these does work in proportion to its bytes in the file.
_STOCK = (
    *(pickle.PROTO, pickle.STOP, pickle.MARK, pickle.POP, pickle.POP_MARK),
    *(pickle.DUP, pickle.MEMOIZE, pickle.GET, pickle.BINGET, pickle.LONG_BINGET),
    *(pickle.BINPUT, pickle.LONG_BINPUT, pickle.PERSID, pickle.BINPERSID),
    *(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.INT, pickle.BININT, pickle.BININT1),
    *(pickle.BININT2, pickle.LONG, pickle.LONG1, pickle.FLOAT, pickle.BINFLOAT, pickle.STRING),
    *(pickle.BINSTRING, pickle.SHORT_BINSTRING, pickle.UNICODE, pickle.BINUNICODE),
    *(pickle.SHORT_BINUNICODE, pickle.BINUNICODE8, pickle.BINBYTES, pickle.SHORT_BINBYTES),
    *(pickle.BINBYTES8, pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.EMPTY_LIST, pickle.LIST),
    *(pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3),
    pickle.EMPTY_DICT,
)
InertUnpickler.dispatch = {
    **dict.fromkeys(pickle._Unpickler.dispatch, _not_in_checkpoints),
    **{code[0]: pickle._Unpickler.dispatch[code[0]] for code in _STOCK},
    **{code[0]: run for code, run in _OURS.items()},
}
