"""Hostile pickles: opcodes that multiply, nest, announce, call, and views that reach too far."""

from __future__ import annotations

import gzip
import io
import pickle
import pickletools
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

from tests.faults._corpus._mutate import BYTES, CANARY

PROTOCOL = b"\x80\x02"
TOUCH = f"touch {CANARY}/touched".encode()


def text(value: bytes) -> bytes:
    """The opcode of a string."""
    return b"X" + struct.pack("<I", len(value)) + value


def name(module: str, attribute: str) -> bytes:
    """The opcode of a global."""
    return f"c{module}\n{attribute}\n".encode()


def checkpoint(state: bytes, config: bytes = b"}") -> bytes:
    """A pickle of the object that some projects write, from the opcodes of its two parts."""
    return PROTOCOL + b"}(" + text(b"cfg") + config + text(b"state_dict") + state + b"u."


def archive(data: bytes, storages: dict[str, bytes] | None = None, *, squeeze: int = 0) -> bytes:
    """A zip as torch writes it, around a pickle."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED if squeeze else 0) as made:
        made.writestr("sae/data.pkl", data)
        made.writestr("sae/byteorder", b"little")
        for key, content in (storages or {"0": bytes(96)}).items():
            made.writestr(f"sae/data/{key}", content)
        made.writestr("sae/version", b"3\n")
    return stream.getvalue()


def written(data: bytes, folder: Path, rng: random.Random) -> Path:
    """Write a pickle in one of the containers that checkpoints come in."""
    how = rng.choice(("zip", "zip", "squeezed", "plain", "gzip", "saev"))
    if how == "gzip":
        path, content = folder / "sae.pkl.gz", gzip.compress(data, mtime=0)
    elif how == "plain":
        path, content = folder / "sae.pt", data
    elif how == "saev":
        path, content = folder / "sae.pt", b'{"d_vit": 4, "exp_factor": 2}\n' + archive(data)
    else:
        path, content = folder / "sae.pt", archive(data, squeeze=how == "squeezed")
    path.write_bytes(content)
    return path


def shared(folder: Path, rng: random.Random) -> Path:
    """A structure of references to one below, each level twice as large as the last."""
    depth = rng.choice((24, 30, 40, 60, 200))
    level, leaf = rng.choice(
        (
            (b"q\x00h\x00\x86", b")"),  # a tuple of two references to one tuple
            (b"q\x00h\x00\x86", text(b"x" * 50)),
            (b"q\x00h\x00h\x00\x87", b"N"),
            (b"q\x000](h\x00h\x00e", b"]"),  # lists
            (b"q\x000}(K\x00h\x00K\x01h\x00u", b"}"),  # dictionaries
            (b"q\x000(h\x00h\x00t\x85", b"K\x01"),
        )
    )
    bomb = leaf + level * depth
    where = rng.randrange(7)
    if where == 0:
        data = PROTOCOL + bomb + b"."
    elif where == 1:
        data = checkpoint(bomb)
    elif where == 2:
        data = checkpoint(b"}", config=bomb)
    elif where == 3:  # as a key
        data = PROTOCOL + b"}(" + bomb + b"K\x01u."
    elif where == 4:  # in a setting
        data = checkpoint(b"}", config=b"}(" + text(b"lr") + bomb + b"u")
    elif where == 5:  # as an argument of a class that is not built
        data = checkpoint(b"}", config=name("vit_prisma.sae", "Config") + bomb + b"\x85R")
    else:  # as a tensor's size
        call = name("torch._utils", "_rebuild_tensor_v2") + b"(" + storage() + b"K\x00" + bomb
        data = checkpoint(b"}(" + text(b"W_enc") + call + b"K\x01\x85\x89NtRu")
    return written(data, folder, rng)


def storage(key: bytes = b"0", kind: str = "FloatStorage", count: bytes = b"K\x18") -> bytes:
    """Opcodes of a reference to a storage."""
    where = text(key) + text(b"cpu") + count
    return b"(" + text(b"storage") + name("torch", kind) + where + b"tQ"


def integer(value: int) -> bytes:
    """The opcode of a whole number of any size."""
    return pickle.dumps(value, 2)[2:-1]


def views(folder: Path, rng: random.Random) -> Path:
    """A tensor of a size, stride or offset that its storage does not have."""
    sizes = rng.choice(
        (
            *((4, 6), (60_000, 60_000), (2**31, 2**31), (2**62, 4), (0, 2**62), (1,) * 9),
            *((10**30,), (-1, 4), (2**40,), (4, 2**33), (1,) * 65, (300_000, 300_000, 300_000)),
        )
    )
    steps = rng.choice(
        (tuple(0 for _ in sizes), tuple(range(len(sizes))), (2**62,) * len(sizes), (1,), (-1, -1))
    )
    offset = rng.choice((0, 0, 0, -1, 23, 24, 2**62, 10**25))

    def pack(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(map(integer, values)) + b"t"

    kind = rng.choice(("FloatStorage", "HalfStorage", "ByteStorage", "BoolStorage", "LongStorage"))
    call = name("torch._utils", "_rebuild_tensor_v2")
    call += b"(" + storage(kind=kind) + integer(offset) + pack(sizes) + pack(steps) + b"\x89NtR"
    names = rng.sample(("W_enc", "W_dec", "b_enc", "b_dec"), rng.randrange(1, 5))
    tensors = b"".join(text(one.encode()) + call for one in names)
    path = folder / "sae.pt"
    path.write_bytes(archive(checkpoint(b"}(" + tensors + b"u", b"}"), {"0": bytes(96)}))
    return path


def announced(folder: Path, rng: random.Random) -> Path:
    """A storage, a string or a number that announces more than there is."""
    huge = rng.choice((2**20, 2**31 - 1, 2**32 - 1, 2**40, 2**62))
    small, large = struct.pack("<I", min(huge, 2**32 - 1)), struct.pack("<Q", huge)
    data = rng.choice(
        (
            PROTOCOL + b"X" + small + b"abc.",
            b"\x80\x04\x8d" + large + b"abc.",
            b"\x80\x04\x8e" + large + b"abc.",
            b"\x80\x05\x96" + large + b"abc.",
            b"\x80\x04\x95" + large + b"}.",
            PROTOCOL + b"\x8b" + small + b"\x01.",
            PROTOCOL + b"K\x01r" + small + b".",
            PROTOCOL + b"j" + small + b".",
            PROTOCOL + b"B" + small + b"abc.",
            PROTOCOL + b"T" + small + b"abc.",
            checkpoint(storage(count=integer(huge))),
            checkpoint(storage(count=integer(10**40))),
            checkpoint(storage(count=integer(-huge))),
            checkpoint(storage(key=b"../" * 50 + b"etc/passwd")),
            checkpoint(storage(kind="UntypedStorage")),
            checkpoint(storage(kind="ComplexDoubleStorage")),
        )
    )
    return written(data, folder, rng)


def repeated(folder: Path, rng: random.Random) -> Path:
    """Millions of one opcode, plain or in a small gzip."""
    opcodes = rng.choice(
        (b"(", b"N0", b"]", b"}", b")", b"\x85", b"2", b"(t", b"h\x00", b"q\x00", b"K\x01", b"(l")
    )
    count = rng.choice((100_000, 1_000_000, 15_000_000)) // len(opcodes)
    start, end = rng.choice(((b"N", b""), (b")", b"t" * 1000), (b"]q\x00", b"")))
    data = PROTOCOL + start + opcodes * count + end + b"."
    if rng.random() < 0.5:
        path = folder / "sae.pkl.gz"
        path.write_bytes(gzip.compress(data, 1, mtime=0))
    else:
        path = folder / "sae.pt"
        path.write_bytes(archive(data, squeeze=rng.randrange(2)))
    return path


def deep(folder: Path, rng: random.Random) -> Path:
    """Containers in containers, as a value, a key, a setting or an argument."""
    depth = rng.choice((900, 5_000, 200_000, 3_000_000))
    bomb = rng.choice(
        (
            b")" + b"\x85" * depth,
            b"]" * depth + b"a" * (depth - 1),
            b"(" * depth + b"t" * depth,
            b"(" * depth + b"d" * depth,
            (b"}K\x01" * depth) + b"N" + b"s" * depth,
        )
    )
    data = rng.choice(
        (
            PROTOCOL + bomb + b".",
            checkpoint(bomb),
            checkpoint(b"}", config=b"}(" + text(b"hook_point") + bomb + b"u"),
            PROTOCOL + b"}(" + bomb + b"K\x01u.",
            checkpoint(b"}", config=name("a", "B") + bomb + b"\x85R"),
        )
    )
    return written(data, folder, rng)


def numbers(folder: Path, rng: random.Random) -> Path:
    """Numbers as long texts, and huge ones in every field."""
    digits = b"9" * rng.choice((4_000, 10_000, 3_000_000))
    size = rng.choice((1_000, 100_000, 4_000_000))
    number = rng.choice(
        (
            b"L" + digits + b"L\n",
            b"I" + digits + b"\n",
            b"F" + digits + b"\n",
            b"F1e" + digits + b"\n",
            b"\x8b" + struct.pack("<I", size) + b"\x7f" * size,
            b"G" + struct.pack(">d", rng.choice((1e308, float("nan"), float("inf")))),
            integer(10 ** rng.choice((20, 400, 5000))),
        )
    )
    field = rng.choice((b"d_in", b"k", b"lr", b"d_sae", b"hook_point_layer", b"block_layer"))
    data = rng.choice(
        (
            PROTOCOL + number + b".",
            checkpoint(b"}", config=b"}(" + text(field) + number + b"u"),
            checkpoint(b"}(" + text(b"W_enc") + number + b"u"),
            checkpoint(b"}(" + number + text(b"W_enc") + b"u"),
            PROTOCOL + number + b"\x85Q.",
        )
    )
    return written(data, folder, rng)


CALLS = (
    *(("os", "system"), ("posix", "system"), ("subprocess", "call"), ("subprocess", "getoutput")),
    *(("builtins", "eval"), ("builtins", "exec"), ("builtins", "open"), ("os", "mkdir")),
    *(("builtins", "__import__"), ("importlib", "import_module"), ("shutil", "rmtree")),
    *(("pathlib", "Path"), ("functools", "partial"), ("operator", "methodcaller")),
    *(("types", "CodeType"), ("types", "FunctionType"), ("codecs", "open"), ("_codecs", "encode")),
    *(("torch", "load"), ("torch.serialization", "load"), ("torch.hub", "load"), ("torch", "ones")),
    *(("numpy", "memmap"), ("numpy.core.multiarray", "_reconstruct"), ("numpy", "load")),
    *(("torch.storage", "_load_from_bytes"), ("torch._utils", "_rebuild_tensor_v2")),
    *(("torch._utils", "_rebuild_parameter"), ("collections", "OrderedDict"), ("torch", "Size")),
    *(("copyreg", "_reconstructor"), ("vit_prisma.sae.config", "VisionModelSAERunnerConfig")),
    *(("torch._utils", "_rebuild_sparse_tensor"), ("torch.jit", "load"), ("webbrowser", "open")),
)


def calls(folder: Path, rng: random.Random) -> Path:
    """A call of anything with arguments that would do harm."""
    module, attribute = rng.choice(CALLS)
    argument = rng.choice(
        (
            *(text(TOUCH), text(f"{CANARY}/touched".encode()), text(CANARY.encode()), b"N", b"]"),
            *(b"C\x04evil", text(f"open('{CANARY}/touched', 'w')".encode()), integer(2**40), b"}"),
            *(storage(), text(b"x" * 100_000), name("os", "system")),
        )
    )
    how = rng.randrange(5)
    callee = name(module, attribute)
    if how == 0:
        made = callee + argument + b"\x85R"
    elif how == 1:
        made = callee + argument + argument + b"\x86R" + argument + b"b"
    elif how == 2:
        made = callee + argument + b"\x85\x81}b"
    elif how == 3:
        made = callee + b"(" + argument * rng.randrange(6) + b"tR"
    else:
        made = b"(" + argument + f"i{module}\n{attribute}\n".encode()
    data = rng.choice(
        (
            PROTOCOL + made + b".",
            checkpoint(made),
            checkpoint(b"}", config=made),
            checkpoint(b"}(" + text(b"W_enc") + made + b"u"),
            PROTOCOL + b"}(" + made + b"Nu.",
        )
    )
    return written(data, folder, rng)


def any_opcodes(folder: Path, rng: random.Random) -> Path:
    """Opcodes at random, most of them with arguments of the right form."""
    parts = [PROTOCOL if rng.random() < 0.8 else b"\x80\x04"]
    for _ in range(rng.randrange(3, 60)):
        opcode = rng.choice(pickletools.opcodes)
        code = opcode.code.encode("latin-1")
        size = 0 if opcode.arg is None else opcode.arg.n
        if opcode.name in ("STOP", "PROTO", "FRAME"):
            continue
        if size >= 0:
            parts.append(code + rng.randbytes(size) if rng.random() < 0.2 else code + bytes(size))
        elif size == -1:  # a line, or two
            parts.append(
                code + rng.choice((b"1\n", b"'a'\n", b"os\nsystem\n", b"torch\nfloat32\n"))
            )
        else:
            width = {-2: 1, -3: 4, -4: 4, -5: 8}.get(size, 4)
            parts.append(code + (3).to_bytes(width, "little") + b"abc")
        if rng.random() < 0.4:
            parts.append(rng.choice((b"N", b"]", b"}", b"(", b")", text(b"cfg"), b"K\x01")))
    return written(b"".join(parts) + b".", folder, rng)


def inside(files: dict[str, bytes], folder: Path, rng: random.Random) -> Path:
    """A real checkpoint whose pickle is damaged within an archive whose checksums are right."""
    (name_of_file,) = [one for one in files if not one.startswith("config") and "log" not in one]
    content = files[name_of_file]
    start = content.index(b"\n") + 1 if content.startswith(b"{") else 0
    damage = rng.choice(tuple(BYTES.values()))
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content[start:])) as old, zipfile.ZipFile(made, "w") as new:
        for entry in old.infolist():
            data = old.read(entry)
            hit = entry.filename.endswith("data.pkl")
            new.writestr(entry.filename, damage(data, rng) if hit else data)
    for other in files:
        (folder / other).write_bytes(files[other])
    path = folder / name_of_file
    path.write_bytes(content[:start] + made.getvalue())
    return path


def entries(folder: Path, rng: random.Random) -> Path:
    """Archives whose entries lie about themselves."""
    data = checkpoint(b"}")
    stream = io.BytesIO()
    how = rng.randrange(9)
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as made:
        if how == 0:
            made.writestr("sae/data/0", bytes(rng.choice((1, 30, 200)) << 20))
        if how == 1:
            for i in range(rng.choice((1_000, 60_000))):
                made.writestr(f"sae/data/{i}", b"")
        if how == 2:
            made.writestr(f"../{CANARY}/touched", b"x")
        if how == 3:
            made.writestr("other/data.pkl", data)
        if how == 4:
            made.writestr("sae/byteorder", rng.choice((b"big", b"\xff", b"little" * 100_000)))
        made.writestr("sae/data.pkl", b"N0" * 30_000_000 if how == 5 else data)
        if how == 6:
            made.comment = b"x" * 65_535
    content = bytearray(stream.getvalue())
    if how == 7:  # an encrypted entry
        content[6] |= 1
        content[content.index(b"PK\x01\x02") + 8] |= 1
    if how == 8:  # an unknown compression, or a size of four gigabytes
        start = content.index(b"PK\x01\x02")
        field = rng.choice((10, 20, 24, 42))
        content[start + field : start + field + 2] = rng.choice((b"\xff\xff", b"\x63\x00"))
    path = folder / "sae.pt"
    path.write_bytes(content)
    return path


MADE: dict[str, tuple[int, Callable[[Path, random.Random], Path]]] = {
    "shared references": (150, shared),
    "views out of a storage": (200, views),
    "sizes announced": (150, announced),
    "an opcode millions of times": (40, repeated),
    "deep containers": (80, deep),
    "huge numbers": (120, numbers),
    "calls": (400, calls),
    "opcodes at random": (800, any_opcodes),
    "archives": (90, entries),
}
"""Rules of this module: how many inputs, and what writes one."""
