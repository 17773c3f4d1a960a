"""Command-line flags from dataclasses, with ``-`` and ``_`` alike."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import inspect
import io
import re
import textwrap
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, TypeVar, get_type_hints

import tyro

T = TypeVar("T")
U = TypeVar("U")

_parsed: list[type] = []
"""The configuration that was parsed last, that of the running command."""


def parse(cls: type[T], arguments: Sequence[str], *, command: str, description: str) -> T:
    """Return a frozen configuration from flags.

    Args:
        cls: A dataclass; the string below each field is its help.
        arguments: Arguments after the command's name.
        command: Name of the command, for the usage line.
        description: First text of ``--help``.

    Raises:
        ValueError: the line cannot be read, or the configuration refuses the values.
    """
    # The reader of flags would draw a box around what the configuration's own checks say.
    has_checks = hasattr(cls, "__post_init__")
    flags_class = flat_class(cls.__name__, [(cls, ())], {}) if has_checks else cls
    _parsed[:] = [cls]
    flags: Any = _read(flags_class, arguments, command, description)
    return pick(cls, flags) if has_checks else flags


def parse_two(
    cls: type[T], other: type[U], arguments: Sequence[str], *, command: str, description: str
) -> tuple[T, U]:
    """Return two frozen configurations from one line of flags.

    Raises:
        ValueError: as :func:`parse` raises it.
    """
    both = flat_class(cls.__name__, [(cls, ()), (other, ())], {})
    _parsed[:] = [both]
    flags = _read(both, arguments, command, description)
    return pick(cls, flags), pick(other, flags)


def _read(cls: type, arguments: Sequence[str], command: str, description: str) -> Any:
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(
                cls,
                args=list(arguments),
                prog=f"vision-plugin {command}",
                description=description,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ValueError(_sentence(box.getvalue(), command)) from None


def _sentence(box: str, command: str) -> str:
    """Return what the reader of flags says in a box, below a title and above help, as a line."""
    unframed = box.translate(dict.fromkeys(map(ord, "╭╮╰╯│"), " "))
    _, *parts = (" ".join(part.split()) for part in re.split(r"[─-]{8,}", unframed))
    said = next(filter(None, parts), "the line cannot be read").rstrip(".")
    return f"{said}: vision-plugin {command} --help lists the flags"


def as_flags(message: str, cls: type | None = None) -> str:
    """Return a message of the library with its arguments written as flags of a command.

    Args:
        message: Names arguments as ``name=``.
        cls: The command's configuration; None takes the one that was parsed last.

    Examples:
        >>> from vision_plugin._inputs import Inputs
        >>> from vision_plugin.cli._flags import as_flags
        >>> as_flags("two columns hold images: name one with image_column=", Inputs)
        'two columns hold images: name one with --image-column'
    """
    cls = cls or next(iter(_parsed), None)
    if cls is None:
        return message
    fields = [field.name for field in dataclasses.fields(cls)]
    names = "|".join(sorted(fields, key=len, reverse=True))
    return re.sub(rf"\b({names})=(?P<switch>True|False)?(?P<value>\S?)", _as_flag, message)


def _as_flag(match: re.Match[str]) -> str:
    flag = f"--{match.group(1).replace('_', '-')}"
    value = match.group("value")
    if match.group("switch"):  # a flag that is there or not, as --no-check-model
        return f"{flag if match.group('switch') == 'True' else flag.replace('--', '--no-')}{value}"
    return f"{flag} {value}" if value and value not in ",;.)" else f"{flag}{value}"


def flat_class(
    name: str,
    parts: Sequence[tuple[type, Sequence[str]]],
    defaults: dict[str, Any],
    *,
    docs: Mapping[str, str] | None = None,
    undecided: Collection[str] = (),
) -> type:
    """Return a dataclass with the fields of several; of fields with one name the first stays.

    Args:
        name: Name of the new class.
        parts: Dataclasses, each with the names of the fields to leave out.
        defaults: Values for fields that have no default of their own.
        docs: Help for fields that have none below them.
        undecided: Fields whose default is decided later; the help says ``auto`` for it.
    """
    fields: dict[str, tuple[str, Any, Any]] = {}
    for cls, left_out in parts:
        hints, helps = get_type_hints(cls, include_extras=True), {**(docs or {}), **field_docs(cls)}
        for field in dataclasses.fields(cls):
            if field.name in left_out or field.name in fields or not field.init:
                continue
            shown = "(default: auto)" if field.name in undecided else None
            help_text = tyro.conf.arg(help=helps.get(field.name, ""), help_behavior_hint=shown)
            explained: Any = Annotated[hints[field.name], help_text]
            fields[field.name] = (field.name, explained, _default(field, defaults))
    required = [f for f in fields.values() if f[2] is dataclasses.MISSING]
    optional = [f for f in fields.values() if f[2] is not dataclasses.MISSING]
    specs: list[Any] = [(n, t) for n, t, _ in required]
    specs += [(n, t, dataclasses.field(default_factory=partial(_same, d))) for n, t, d in optional]
    return dataclasses.make_dataclass(name, specs, frozen=True)


def pick(cls: type[T], flags: Any, **given: Any) -> T:
    """Return a dataclass made of the flags that are its fields, and of given values."""
    names = {f.name for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    values = {n: getattr(flags, n) for n in names if hasattr(flags, n)}
    return cls(**{**values, **given})


def field_docs(cls: type) -> dict[str, str]:
    """Return the string literal below each field of a dataclass and of its bases."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
        for statement, following in zip(body.body, body.body[1:], strict=False):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                doc = getattr(getattr(following, "value", None), "value", None)
                if isinstance(following, ast.Expr) and isinstance(doc, str):
                    docs[statement.target.id] = " ".join(doc.split())
    return docs


def _same(value: T) -> T:
    return value


def _default(field: dataclasses.Field[Any], defaults: dict[str, Any]) -> Any:
    if field.name in defaults:
        return defaults[field.name]
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default
