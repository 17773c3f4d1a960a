"""Rules that fill in the settings that nobody made, before the first step.

Training on real activations chose each rule among others: ``benchmarks/results/defaults.md`` has
the trial runs, and ``benchmarks/quality.py`` compares the results with other packages. The rules
ensure three things. An SAE's weights begin at the scale of the activations, which training scales
to a mean norm of ``sqrt(d_in)``. Warm-up, decay and the time after which a latent counts as dead
are shares of the run, so that a short run has them too. And the run sets the number of active
latents, instead of a penalty that leads to an unknown number.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping
from typing import Any, TypeVar, cast

from vision_plugin.sae._auto import AUTO, D_IN_OF_MODEL, D_SAE_AUTO
from vision_plugin.sae._prefix import architecture_of

_Config = TypeVar("_Config")

SAELENS: dict[str, Any] = {
    "lr": 3e-4,
    "encoder_lr_ratio": 1.0,
    "lr_warm_up_steps": 0,
    "lr_decay_steps": 0,
    "b_dec_init_method": "zeros",
    "decoder_init_method": "random",
    "dead_feature_window": 1000,
    "target_l0": None,
    "fit_threshold": False,
    "revive_dead": False,
}
"""SAELens's own defaults."""

WARM_UP, DECAY, DEAD = 0.1, 0.2, 0.05
"""Linear warm-up, linear decay, and how long a dead latent has not fired, as shares of the run."""
EXPANSION = 8
"""Latents per dimension of the activations, for an SAE whose width is not set."""
MATRYOSHKA = (1 / 16, 1 / 4, 11 / 16, 1)
"""Nested widths, as shares of the whole width."""
DECODER_NORM = 1.0
MAX_NORM, MAX_WIDTH = 1e6, 10_000_000
"""Largest initial norm of a decoder direction, and largest number of latents."""
ENCODER_LR_RATIO = 0.3
"""A slower encoder leaves more latents alive, at a cost in explained variance below 0.002."""
AT_TARGET = -1.0
"""Value of ``jumprelu_init_threshold`` that stands for a threshold from the data: the one at which
``target_l0`` latents fire on the first buffer."""
_PENALTIES = {
    "standard": "l1_coefficient",
    "gated": "l1_coefficient",
    "jumprelu": "l0_coefficient",
    "transcoder": "l1_coefficient",
    "skip_transcoder": "l1_coefficient",
}
"""Field with the weight of the sparsity penalty, by architecture, for SAEs without a k."""
_REVIVED = ("standard", "gated", "jumprelu", "transcoder", "skip_transcoder")
_SCALE = "expected_average_only_in"
_LEARNING_RATES = (6e-4, 2**14)
"""A learning rate and the width it is for; it falls with 1/sqrt(width) (Gao et al. 2024)."""
_LARGEST_RATE, _TOO_FAST = 4e-3, 50


def k_for(d_in: int) -> int:
    """Return the number of active latents for vectors of a width: its square root."""
    return max(1, round(math.sqrt(d_in)))


def learning_rate_for(d_sae: int) -> float:
    """Return the learning rate for an SAE's width."""
    rate, width = _LEARNING_RATES
    return float(f"{min(_LARGEST_RATE, rate / (d_sae / width) ** 0.5):.2g}")


def matryoshka_widths(d_sae: int) -> list[int]:
    """Return the nested widths of an SAE, ascending and without repetitions."""
    return sorted({max(1, round(d_sae * share)) for share in MATRYOSHKA})


def resolve(cfg: _Config) -> _Config:
    """Return the configuration with a value for every field that was not set.

    Resolving the result again changes nothing. ``metadata.auto`` of its SAE holds the values that
    this function chose, by the field's name.

    Args:
        cfg: A VisionSAERunnerConfig whose SAE has its ``d_in``.

    Raises:
        ValueError: a value does not fit the run; the message names one that does.
    """
    return cast(_Config, _resolved(cfg))


def _resolved(cfg: Any) -> Any:
    steps = cfg.total_training_steps
    is_set = cfg.sae.d_sae != D_SAE_AUTO
    width = cfg.sae.d_sae if is_set else EXPANSION * cfg.sae.d_in
    inside: dict[str, Any] = {} if is_set else {"d_sae": width}
    if cfg.defaults == "saelens":
        run = dict(SAELENS)
    else:
        inside |= _inside_sae(cfg, width, steps)
        run = _of_run(cfg, width, steps)
    run["train_batch_size_tokens"] = cfg.batch_size
    run = {name: value for name, value in run.items() if getattr(cfg, name) == AUTO}
    # A copy, so that a configuration that was passed in stays as it is.
    sae = dataclasses.replace(cfg.sae, metadata=copy.deepcopy(cfg.sae.metadata), **inside)
    if cfg.defaults == "auto" and (inside or run):
        sae.metadata["auto"] = {**inside, **run}
    explicit = tuple(sorted({*cfg.explicit, *inside}))
    found = dataclasses.replace(cfg, sae=sae, explicit=explicit, **run)
    check_fits(found, fitting_rate=learning_rate_for(width))
    return found


def described(decided: Mapping[str, Any]) -> str:
    """Return settings as one line: ``lr 0.0016, k 20, ...``."""
    return ", ".join(f"{name} {_short(value)}" for name, value in decided.items())


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def check_latents(cfg: Any) -> None:
    """Raise where the numbers of an SAE's latents, or their norm at first, do not fit.

    Args:
        cfg: A VisionSAERunnerConfig. An SAE whose width is still open has room for everything.

    Raises:
        ValueError: naming the setting, and a value that would fit.
    """
    sae, width = cfg.sae, cfg.sae.d_sae
    if width < 0 or (width == D_SAE_AUTO and "d_sae" in cfg.explicit):
        raise ValueError(
            f"d_sae={width}: it has to be above 0. Leave it out for {EXPANSION} times the width "
            "at the hook"
        )
    if width > MAX_WIDTH:
        raise ValueError(f"d_sae={width}: use at most {MAX_WIDTH:,} latents")
    norm = getattr(sae, "decoder_init_norm", None)
    if norm is not None and not 0 < norm <= MAX_NORM:
        raise ValueError(f"decoder_init_norm={norm}: use a number above 0, up to {MAX_NORM:g}")
    active = {"target_l0": _number(cfg.target_l0)}
    if hasattr(sae, "k") and not (cfg.defaults == "auto" and _unset(cfg, "k")):
        active["k"] = sae.k
    if _aims_itself(sae):
        active["target_l0"] = sae.target_l0
    for name, value in active.items():
        if value is None:
            continue
        if value <= 0:
            raise ValueError(f"{name}={value}: it has to be above 0")
        if width != D_SAE_AUTO and value > width:
            raise ValueError(
                f"{name}={value} does not fit d_sae={width}: no more latents can be active than "
                f"there are. Use {min(k_for(sae.d_in or width), width)}, or a larger d_sae"
            )
    nested = list(getattr(sae, "matryoshka_widths", []))
    if nested and (min(nested) <= 0 or nested != sorted(set(nested))):
        raise ValueError(f"matryoshka_widths={nested}: widths have to be above 0 and to increase")
    if nested and width != D_SAE_AUTO and nested[-1] > width:
        raise ValueError(
            f"matryoshka_widths={nested} do not fit d_sae={width}, which is the last of them: use "
            f"{matryoshka_widths(width)}"
        )


def check_fits(cfg: Any, *, fitting_rate: float) -> None:
    """Raise if a setting does not fit the length of the run or the width of the SAE.

    Args:
        cfg: A VisionSAERunnerConfig with a value in every field.
        fitting_rate: Learning rate that the rules give the SAE.

    Raises:
        ValueError: a setting does not fit; the message names it and a value that does.
    """
    check_latents(cfg)
    steps = cfg.total_training_steps
    warm_up, decay = int(cfg.lr_warm_up_steps), int(cfg.lr_decay_steps)
    between = steps - warm_up - decay
    if cfg.lr_scheduler_name != "constant" and 0 <= between < cfg.n_restart_cycles:
        raise ValueError(
            f"lr_scheduler_name={cfg.lr_scheduler_name!r} has {between} steps between warm-up and "
            f"decay for n_restart_cycles={cfg.n_restart_cycles}, in a run of {steps} steps: use "
            f"{round(steps * WARM_UP)} for lr_warm_up_steps and {round(steps * DECAY)} for "
            "lr_decay_steps, or a larger training_tokens"
        )
    if warm_up + decay > steps:
        raise ValueError(
            f"lr_warm_up_steps={warm_up} and lr_decay_steps={decay} do not fit into a run of "
            f"{steps} steps: use {round(steps * WARM_UP)} and {round(steps * DECAY)}, or a larger "
            "training_tokens"
        )
    for name in ("l1_warm_up_steps", "l0_warm_up_steps"):
        rising = getattr(cfg.sae, name, 0)
        if rising > steps:
            raise ValueError(
                f"{name}={rising} does not fit into a run of {steps} steps, because the penalty "
                f"would never reach its weight: use {round(steps * WARM_UP)}"
            )
    if cfg.archetypal_points and architecture_of(cfg.sae) == "matching_pursuit":
        raise ValueError(
            f"archetypal_points={cfg.archetypal_points}: a matching_pursuit SAE encodes with its "
            "decoder, which has to have unit rows. Use another architecture, or 0"
        )
    if cfg.defaults == "saelens":
        return
    window = int(cfg.dead_feature_window)
    if window >= steps > 1:
        raise ValueError(
            f"dead_feature_window={window} does not fit into a run of {steps} steps: no latent "
            f"could count as dead. Use {_window(steps)}"
        )
    if float(cfg.lr) > _TOO_FAST * fitting_rate:
        raise ValueError(
            f"lr={cfg.lr:g} is too high for {cfg.sae.d_sae} latents: weights that begin with norm "
            f"{DECODER_NORM:g} would be overwritten in a few steps. Use {fitting_rate:g}"
        )


def _window(steps: int) -> int:
    return max(1, round(steps * DEAD))


def _of_run(cfg: Any, width: int, steps: int) -> dict[str, Any]:
    """Return a value for each field of the run that can be ``auto``."""
    kind = architecture_of(cfg.sae)
    is_tied = kind == "matching_pursuit"
    warm_up, decay = round(steps * WARM_UP), round(steps * DECAY)
    if cfg.lr_warm_up_steps != AUTO:
        decay = max(0, min(decay, steps - cfg.lr_warm_up_steps))
    if cfg.lr_decay_steps != AUTO:
        warm_up = max(0, min(warm_up, steps - cfg.lr_decay_steps))
    return {
        "lr": learning_rate_for(width),
        "encoder_lr_ratio": ENCODER_LR_RATIO,
        "lr_warm_up_steps": warm_up,
        "lr_decay_steps": decay,
        "b_dec_init_method": "mean",
        "decoder_init_method": "data" if is_tied else "random",
        "dead_feature_window": min(_window(steps), max(1, steps - 1)),
        "target_l0": _target(cfg, kind),
        "fit_threshold": hasattr(cfg.sae, "topk_threshold_lr"),
        "revive_dead": kind in _REVIVED,
    }


def _target(cfg: Any, kind: str) -> float | None:
    """Return the number of active latents to aim at, or None.

    It is None if the SAE has no penalty, or if the user or the penalty itself sets the strength.
    """
    name = _PENALTIES.get(kind)
    if name is None or not _unset(cfg, name) or _aims_itself(cfg.sae):
        return None
    return float(k_for(cfg.sae.d_in))


def _aims_itself(sae: Any) -> bool:
    """Return whether the penalty aims at a number of latents itself, as a quadratic one does."""
    return bool(getattr(sae, "jumprelu_sparsity_loss_mode", "") == "quadratic")


def _inside_sae(cfg: Any, width: int, steps: int) -> dict[str, Any]:
    """Return values for the fields of the SAE that nobody set."""
    kind, sae = architecture_of(cfg.sae), cfg.sae
    assert sae.d_in != D_IN_OF_MODEL
    is_transcoder = hasattr(sae, "d_out")
    wanted: dict[str, Any] = {"decoder_init_norm": DECODER_NORM}
    if not is_transcoder:
        wanted["normalize_activations"] = _SCALE
    if hasattr(sae, "k"):
        wanted["k"] = min(k_for(sae.d_in), width)
    if hasattr(sae, "topk_threshold_lr"):
        wanted["topk_threshold_lr"] = min(0.5, max(0.01, 20 / steps))
    if hasattr(sae, "max_iterations"):
        wanted["max_iterations"] = min(k_for(sae.d_in), width)
    if getattr(sae, "matryoshka_widths", None) == []:
        wanted["matryoshka_widths"] = matryoshka_widths(width)
    if kind == "jumprelu":
        wanted |= {
            "jumprelu_init_threshold": AT_TARGET,
            "jumprelu_bandwidth": 1.0,
            "jumprelu_ste_to_input": True,
            "pre_act_loss_coefficient": 0.01,
            "l0_coefficient": 0.1,
        }
        target = _target(cfg, kind) if cfg.target_l0 == AUTO else cfg.target_l0
        if target is None:
            del wanted["jumprelu_init_threshold"]
        if _aims_itself(sae):
            wanted["target_l0"] = float(k_for(sae.d_in))
    return {name: value for name, value in wanted.items() if _unset(cfg, name)}


def _number(value: Any) -> float | None:
    return None if value is None or value == AUTO else float(value)


def _unset(cfg: Any, name: str) -> bool:
    """Return whether a field of the SAE has SAELens's default without being in ``explicit``."""
    if name in cfg.explicit:
        return False
    (field,) = (f for f in dataclasses.fields(cfg.sae) if f.name == name)
    made = field.default_factory
    default = field.default if made is dataclasses.MISSING else made()
    return bool(getattr(cfg.sae, name) == default)
