"""Hostile inputs by rule and seed: more than ten thousand files, and command lines.

Each module makes the inputs of some kinds. A rule takes something valid, or nothing, and makes any
number of hostile inputs, each from its number alone; so every input can be made again by name.
"""

from __future__ import annotations

import random
from functools import cache

from tests.faults._corpus import (
    _archives,
    _checkpoints,
    _images,
    _lines,
    _parquets,
    _special,
    _stores,
    _tables,
)
from tests.faults._corpus._case import Case, Rule

__all__ = ["RULES", "Case", "Rule", "case_of", "every_rule", "fixed_cases"]

RULES: tuple[Rule, ...] = (
    *_checkpoints.RULES,
    *_tables.RULES,
    *_images.RULES,
    *_parquets.RULES,
    *_archives.RULES,
    *_stores.RULES,
    *_special.RULES,
)


@cache
def every_rule() -> tuple[Rule, ...]:
    """Return the rules of files, and those of command lines."""
    return (*RULES, *_lines.rules())


def fixed_cases() -> list[Case]:
    """Return the part that the ordinary tests run.

    It is the first two inputs of each rule, and some of the rules that make a single input.
    """
    several = [rule for rule in RULES if rule.count > 1]
    special = [rule for rule in RULES if rule.count == 1]
    dice = random.Random(1)
    chosen = dice.sample(special, 70) + dice.sample(_lines.rules(), 30)
    return [case for rule in (*several, *chosen) for case in rule.cases(2)]


def case_of(name: str) -> Case:
    """Return an input by its name, kind/rule/number."""
    kind, _, rest = name.partition("/")
    rule, _, number = rest.rpartition("/")
    (found,) = [one for one in every_rule() if (one.kind, one.name) == (kind, rule)]
    return list(found.cases(int(number) + 1))[-1]
