"""Which metrics an evaluation runs, and why it leaves the others out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vision_plugin.evaluation._loop import Subject
from vision_plugin.evaluation._offer import OF_WEIGHTS, hint_for, offered_to
from vision_plugin.metrics import available, needs

USUAL_METRICS = ("fvu", "sparsity", "monosemanticity", "uniqueness", "steerability")
"""What is computed, as far as the inputs allow, where no metric is named.

Examples:
    >>> vp.evaluation.USUAL_METRICS
    ('fvu', 'sparsity', 'monosemanticity', 'uniqueness', 'steerability')
"""


def choose_metrics(
    wanted: Sequence[str],
    subject: Subject,
    *,
    options: Mapping[str, Mapping[str, Any]],
    compares_weights: bool,
) -> tuple[list[str], dict[str, str]]:
    """Return the metrics that are run, and the others with the reason why not.

    Args:
        wanted: Names of metrics; ``("all",)`` for every one that the inputs allow; none for the
            usual ones.
        subject: The SAE.
        options: Further constructor arguments by metric.
        compares_weights: Whether there are other dictionaries to compare with.

    Raises:
        ValueError: a metric that was named does not exist, or lacks something.
        ImportError: a metric that was named cannot be imported.
    """
    everything = tuple(wanted) == ("all",)
    left_out: dict[str, str] = {}
    names = list(wanted or USUAL_METRICS)
    if everything:
        listed = available()
        names = [name for name, info in listed.items() if info.usable]
        left_out = {name: str(info.error) for name, info in listed.items() if not info.usable}
    at_hand = offered_to(subject.place) | (set(OF_WEIGHTS) if compares_weights else set())
    known = subject.known()
    chosen = []
    for name in names:
        of_constructor, of_batch = needs(name)
        missing = [n for n in of_constructor if n not in known and n != "d_embed"]
        missing += [n for n in of_batch if n not in at_hand]
        missing = [n for n in missing if n not in options.get(name, {})]
        if not missing:
            chosen.append(name)
            continue
        hints = dict.fromkeys(hint_for(n) for n in missing)
        left_out[name] = f"needs {', '.join(missing)}: {'; '.join(hints)}"
        if wanted and not everything:
            raise ValueError(f"metrics={name} {left_out[name]}")
    return chosen, left_out
