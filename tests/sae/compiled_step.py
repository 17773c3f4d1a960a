"""Compile training steps whole, in a process of its own, and print what each did as JSON.

A process of its own, because a compiler cannot trace the checks that the test session adds to
annotated functions.
"""

from __future__ import annotations

import json
import sys

import torch
from sae_lens.saes.sae import TrainStepInput  # first: importing SAELens imports what follows

from vision_plugin.sae._sparse_register import CLASSES

D_IN, D_SAE = 8, 64


def _step(architecture: int) -> str:
    sae_class, config_class = CLASSES[architecture]
    more = {"matryoshka_widths": [16, D_SAE]} if "matryoshka" in config_class.architecture() else {}
    saes = []
    for _ in range(2):
        torch.manual_seed(0)
        saes.append(sae_class(config_class(d_in=D_IN, d_sae=D_SAE, k=4, dtype="float64", **more)))
    eager, compiled = saes
    step = TrainStepInput(
        sae_in=torch.randn(32, D_IN, dtype=torch.float64), coefficients={}, dead_neuron_mask=None,
        n_training_steps=0, is_logging_step=True,
    )  # fmt: skip
    expected = eager.training_forward_pass(step)
    whole = torch.compile(compiled.training_forward_pass, fullgraph=True, backend="aot_eager")
    found = whole(step)
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(found.feature_acts, expected.feature_acts + 0)
    for output in (expected, found):
        output.loss.backward()
    for name, parameter in eager.named_parameters():
        torch.testing.assert_close(compiled.get_parameter(name).grad, parameter.grad)
    for name, buffer in eager.named_buffers():
        torch.testing.assert_close(compiled.get_buffer(name), buffer)
    return "ok"


if __name__ == "__main__":
    report = {}
    for architecture, (_, config) in enumerate(CLASSES):
        try:
            report[config.architecture()] = _step(architecture)
        except Exception as error:  # the other steps are wanted too
            report[config.architecture()] = f"{type(error).__name__}: {error}"
    sys.stdout.write(json.dumps(report))
