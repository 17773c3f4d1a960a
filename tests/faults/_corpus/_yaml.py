"""Hostile YAML: aliases that multiply, tags that call, numbers that never end."""

from __future__ import annotations

import random

from tests.faults._corpus._mutate import CANARY


def yaml_bomb(valid: bytes, rng: random.Random) -> bytes:
    """A YAML text that is no configuration, or one that no reader wants."""
    return rng.choice(
        (aliases, aliases, deep, numbers, tags, keys, lambda r: odd(valid, r), scalars)
    )(rng)


def aliases(rng: random.Random) -> bytes:
    """Each line refers several times to the line before it."""
    depth, width = rng.choice(((9, 9), (24, 2), (40, 2), (200, 2), (12, 40)))
    form = rng.choice(("list", "object", "merge", "key"))
    lines = ["a0: &a0 [lol]" if form == "list" else "a0: &a0 {x: 1}"]
    for i in range(1, depth):
        before = f"*a{i - 1}"
        if form == "list":
            inner = f"[{', '.join([before] * width)}]"
        elif form == "merge":
            inner = f"{{<<: [{', '.join([before] * width)}], y{i}: 1}}"
        elif form == "object":
            inner = "{" + ", ".join(f"k{j}: {before}" for j in range(width)) + "}"
        else:
            inner = f"{{? [{', '.join([before] * width)}] : 1}}"
        lines.append(f"a{i}: &a{i} {inner}")
    lines.append(f"{rng.choice(('activation', 'k', 'input_dim', 'x'))}: *a{depth - 1}")
    return "\n".join(lines).encode()


def deep(rng: random.Random) -> bytes:
    """Flows and blocks in each other."""
    depth = rng.choice((300, 3_000, 100_000))
    return rng.choice(
        (
            b"[" * depth,
            b"a: " + b"[" * depth + b"]" * depth,
            b"{a: " * depth + b"}" * depth,
            b"- " * depth + b"x",
            b"? " * depth + b"x",
            b"\n".join(b" " * i + b"a:" for i in range(min(depth, 3_000))),
            b"!!seq " * min(depth, 3_000) + b"[]",
        )
    )


def numbers(rng: random.Random) -> bytes:
    """Numbers of YAML 1.1 that take long to read."""
    long = rng.choice((5_000, 300_000))
    number = rng.choice(
        (
            "9" * long,
            ":".join(["59"] * (long // 3)),
            "1" + ":59" * (long // 3) + ".5",
            "0b" + "1" * long,
            "0x" + "f" * long,
            "0" + "7" * long,
            "1_" * (long // 2) + "0",
            "1." + "0" * long + "e+99999",
            "2001-99-99",
            "2001-01-01 99:99:99",
            ".nan",
            "-.inf",
            "0o9",
        )
    )
    return f"{rng.choice(('k', 'input_dim', 'threshold', 'activation'))}: {number}\n".encode()


def tags(rng: random.Random) -> bytes:
    """Tags that would call something, or turn text into something else."""
    return rng.choice(
        (
            f"!!python/object/apply:os.system ['touch {CANARY}/touched']",
            f"k: !!python/object/apply:subprocess.call [[touch, {CANARY}/touched]]",
            f"k: !!python/object/new:os.mkdir ['{CANARY}/touched']",
            "k: !!python/name:os.system",
            "k: !!python/module:os",
            "k: !!binary '####'",
            "k: !!binary [1]",
            "k: !!int x",
            "k: !!int [1]",
            "k: !!float ''",
            "k: !!timestamp x",
            "k: !!set {a, b}",
            "k: !!omap [a]",
            "k: !!pairs [[a]]",
            "k: !!bool maybe",
            "k: !<tag:yaml.org,2002:int> x",
            "k: !unknown x",
            "%YAML 9.9\n---\nk: 1",
            "%TAG ! tag:x,2000:\n---\nk: !a b",
        )
    ).encode()


def keys(rng: random.Random) -> bytes:
    """Keys that are no text, stand there twice, or contain themselves."""
    return rng.choice(
        (
            "? [a, b]\n: 1",
            "? {a: 1}\n: 1",
            "&a [*a]: 1",
            "a: &a [*a]",
            "&a a: *a",
            "a: *nosuch",
            "k: 1\nk: 2",
            "<<: 1",
            "<<: [1, 2]",
            "<<: &a {<<: *a}",
            "null: 1\ntrue: 2\n1.5: 3\n2001-01-01: 4",
            "k: 1\n---\nk: 2",
            "--- |\n text",
            "- a\n- b",
            "just text",
            "",
            "~",
        )
    ).encode()


def odd(valid: bytes, rng: random.Random) -> bytes:
    """The valid text in another encoding, cut, or with something in it."""
    place = rng.randrange(len(valid))
    return rng.choice(
        (
            valid.decode().encode("utf-16"),
            valid[:place] + b"\xff" + valid[place:],
            valid[:place] + b"\0" + valid[place:],
            valid[:place] + b"\t" + valid[place:],
            valid[:place]
            + rng.choice((b"[", b"{", b'"', b"&", b"*", b"!", b"|", b"%", b"@", b"`")),
            valid + b"#" * 900_000,
            valid * 400,
        )
    )


def scalars(rng: random.Random) -> bytes:
    """One long text, quoted in one of the ways that there are."""
    long = rng.choice((10_000, 900_000))
    return rng.choice(
        (
            b'k: "' + b"\\x41" * (long // 4) + b'"',
            b"k: '" + b"''" * (long // 2) + b"'",
            b"k: >\n" + b"  a\n" * (long // 4),
            b"k: " + b"a " * (long // 2),
            b'k: "' + b"a\n" * (long // 2),
            b"k: &" + b"a" * long + b" 1",
        )
    )
