"""Add terms to the loss of SAELens's training classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from vision_plugin.sae._sparse_auxiliary import auxiliary_loss

Term = Callable[[Any, Any], Tensor | None]
"""Function of a training step's input and output that returns a loss to add, or None."""


def add_term(sae: Any, name: str, term: Term) -> None:
    """Add a term to every training step of an SAE from now on.

    Args:
        sae: SAE in training.
        name: Name of the term among the losses of a step.
        term: Function of SAELens's ``TrainStepInput`` and ``TrainStepOutput``.
    """
    plain = sae.training_forward_pass

    def with_term(step_input: Any) -> Any:
        output = plain(step_input)
        loss = term(step_input, output)
        if loss is not None:
            output.losses[name] = loss
            output.loss = output.loss + loss
        return output

    sae.training_forward_pass = with_term


def revive_dead(sae: Any) -> None:
    """Train the dead latents of an SAE without a k to reconstruct the error of the others.

    SAELens does this for TopK SAEs only (AuxK, Gao et al. 2024). A ReLU latent that never fires has
    no gradient either, and gets one here in the same way.

    Args:
        sae: Standard, gated or JumpReLU SAE or transcoder in training.
    """
    b_in = None if hasattr(sae.cfg, "d_out") else sae.b_dec

    def term(step_input: Any, output: Any) -> Tensor | None:
        dead = step_input.dead_neuron_mask
        if dead is None or not bool(dead.any()):
            return None
        chosen = dead.nonzero().squeeze(1)
        bias = sae.b_enc if hasattr(sae, "b_enc") else sae.b_gate
        d_in = sae.cfg.d_in
        return auxiliary_loss(
            step_input.sae_in[..., :d_in].reshape(-1, d_in),
            (output.sae_in - output.sae_out).detach(),
            wanted=d_in // 2,
            W_enc=sae.W_enc.index_select(1, chosen),
            b_enc=bias.index_select(0, chosen),
            W_dec=sae.W_dec.index_select(0, chosen),
            b_in=b_in,
            scale=None,
        )

    add_term(sae, "auxiliary_loss_of_dead", term)
