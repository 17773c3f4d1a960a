"""Help texts for the fields of SAELens's training configurations, which have none below them."""

from __future__ import annotations

SAE_FIELDS = {
    "d_in": "Width of the activations; 0 takes the width at the hook.",
    "d_sae": "Number of latents; 0 takes 8 times the width of the activations.",
    "d_out": "Width of the activations that a transcoder predicts; 0 takes the width at "
    "hook_name_out.",
    "k": "Active latents per vector, for BatchTopK and Matryoshka on average; auto is the square "
    "root of the width of the activations.",
    "max_iterations": "Largest number of latents that matching pursuit picks for a vector; auto is "
    "the square root of the width of the activations.",
    "residual_threshold": "Squared error at which matching pursuit stops picking latents.",
    "stop_on_duplicate_support": "Stop matching pursuit once it picks no new latent.",
    "decoder_init_norm": "Initial norm of each decoder direction; auto is 1. The encoder begins as "
    "the transpose of the decoder.",
    "apply_b_dec_to_input": "Subtract the decoder bias from the activations before encoding.",
    "normalize_activations": "How training scales the activations: none, expected_average_only_in "
    "(to a mean norm of sqrt(d_in)), layer_norm or covariance_whitening. The saved SAE takes "
    "unscaled activations. auto is expected_average_only_in.",
    "aux_loss_coefficient": "Weight of the loss that trains dead latents to reconstruct the error "
    "of the others.",
    "rescale_acts_by_decoder_norm": "Choose the active latents by activation times norm of the "
    "decoder direction.",
    "use_sparse_activations": "Use SAELens's own sparse tensors; it has an effect with dense only.",
    "topk_threshold_lr": "Rate of the moving average that sets a BatchTopK SAE's threshold during "
    "training; auto is 20 divided by the number of steps, from 0.01 to 0.5.",
    "matryoshka_widths": "Nested widths in latents, ascending; auto is 1/16, 1/4, 11/16 and all of "
    "d_sae.",
    "use_matryoshka_aux_loss": "Train the dead latents of each nested width to reconstruct the "
    "error of that width.",
    "l1_coefficient": "Weight of the penalty on the sum of the latents. Setting it turns target_l0 "
    "off; auto moves the weight until target_l0 latents are active.",
    "l1_warm_up_steps": "Steps over which l1_coefficient rises from 0.",
    "lp_norm": "Exponent of the latents in the penalty; 1 penalises their sum.",
    "l0_coefficient": "Weight of the penalty on the number of active latents. Setting it turns "
    "target_l0 off; auto moves the weight until target_l0 latents are active.",
    "l0_warm_up_steps": "Steps over which l0_coefficient rises from 0.",
    "jumprelu_init_threshold": "Initial threshold of each latent; auto lets target_l0 latents fire "
    "on the first buffer.",
    "jumprelu_bandwidth": "Width of the window around the threshold that has a gradient; auto is "
    "1.",
    "jumprelu_sparsity_loss_mode": "Penalty of a JumpReLU SAE: step (the number of active "
    "latents), tanh, or quadratic around target_l0.",
    "pre_act_loss_coefficient": "Weight of the loss that pulls dead latents to their thresholds; "
    "auto is 0.01.",
    "jumprelu_tanh_scale": "Steepness of the tanh penalty.",
    "jumprelu_ste_to_input": "Pass the penalty's gradient to the encoder as well as to the "
    "threshold; auto does.",
}
"""Help text by the field's name.

Examples:
    >>> print(vp.sae.SAE_FIELDS["d_sae"])
    Number of latents; 0 takes 8 times the width of the activations.
"""

DECIDED_IN_SAE = frozenset(
    {
        *("d_sae", "k", "max_iterations", "decoder_init_norm", "normalize_activations"),
        *("topk_threshold_lr", "matryoshka_widths", "l1_coefficient", "l0_coefficient"),
        *("jumprelu_init_threshold", "jumprelu_bandwidth", "pre_act_loss_coefficient"),
        "jumprelu_ste_to_input",
    }
)
"""Fields of an SAE that the rules of ``_defaults.py`` fill in if they are not set.

Examples:
    >>> "k" in vp.sae.DECIDED_IN_SAE
    True
"""
