"""Names of devices: whether one can be meant, and whether this machine has it."""

from __future__ import annotations

import re
from typing import Any

_DEVICE = re.compile(r"(cpu|cuda|mps|xpu|hpu|mtia|xla|privateuseone)(:[0-9]{1,4})?")


def check_device(device: str | None) -> None:
    """Raise unless a text names a kind of device; whether this machine has it is another question.

    Raises:
        ValueError: it names none.
    """
    if device is not None and _DEVICE.fullmatch(device) is None:
        raise ValueError(
            f"device={device[:40]!r} is no device: use cpu, cuda, cuda:1 for the second GPU, mps "
            "or xpu"
        )


def usable_device(device: Any) -> Any:
    """Return a device, a name or a ``torch.device``, once something was computed on it.

    Raises:
        ValueError: this machine has no such device, or PyTorch was built without it.
    """
    if str(device) in ("cpu", "None"):
        return device
    import torch

    try:
        if torch.zeros(1, device=device).add(1).item() == 1:
            return device
        reason = "it computes 0 + 1 wrongly"
    except Exception as error:  # the kind of error is the backend's own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    n_gpus = torch.cuda.device_count()
    here = ["cpu", *(f"cuda:{number}" for number in range(n_gpus))]
    raise ValueError(
        f"device={str(device)!r} cannot be used here ({reason}): this machine has {', '.join(here)}"
    )
