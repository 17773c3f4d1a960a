"""Help for the fields of SAELens's training configurations, which have none that flags can show."""

from __future__ import annotations

SAE_FIELDS = {
    "d_in": "Width of the activations; 0 takes the width at the hook.",
    "d_sae": "Latents of the SAE; 0 takes 8 times the width of the activations.",
    "d_out": "Width of what a transcoder writes; 0 takes the width at hook_name_out.",
    "k": "Latents active per vector (of BatchTopK and Matryoshka on average); auto is the square "
    "root of the width of the activations.",
    "max_iterations": "Latents that matching pursuit picks for a vector at most; auto is the "
    "square root of the width of the activations.",
    "residual_threshold": "Squared error at which matching pursuit stops picking latents.",
    "stop_on_duplicate_support": "Stop matching pursuit once it picks no new latent.",
    "decoder_init_norm": "Norm of each decoder direction to begin with; auto is 1. The encoder "
    "begins as the decoder's transpose.",
    "apply_b_dec_to_input": "Subtract the decoder's bias from what the encoder reads.",
    "normalize_activations": "How activations are scaled in training: none, "
    "expected_average_only_in (to a mean norm of sqrt(d_in)), layer_norm or covariance_whitening. "
    "The finished SAE takes unscaled ones. auto is expected_average_only_in.",
    "aux_loss_coefficient": "Weight of the loss that trains dead latents on what the others leave "
    "over.",
    "rescale_acts_by_decoder_norm": "Choose latents by their contribution: activation times the "
    "norm of the decoder direction.",
    "use_sparse_activations": "SAELens's own sparse tensors, with --dense; the sparse kernel needs "
    "none.",
    "topk_threshold_lr": "Rate of the moving average that a BatchTopK SAE's threshold is while it "
    "trains; auto reaches the whole run's length.",
    "matryoshka_widths": "Nested widths, ascending; auto is 1/16, 1/4, 11/16 and all of the "
    "latents.",
    "use_matryoshka_aux_loss": "Train the dead latents of each nested width on what that width "
    "leaves over.",
    "l1_coefficient": "Weight of the penalty on the latents' sum. If it is set, target_l0 is off; "
    "auto moves the weight until target_l0 latents are active.",
    "l1_warm_up_steps": "Steps over which that weight rises from 0.",
    "lp_norm": "Exponent of the penalty: 1 is the sum.",
    "l0_coefficient": "Weight of the penalty on the number of active latents. If it is set, "
    "target_l0 is off; auto moves the weight until target_l0 latents are active.",
    "l0_warm_up_steps": "Steps over which that weight rises from 0.",
    "jumprelu_init_threshold": "Threshold of each latent to begin with; auto lets target_l0 "
    "latents fire on the first buffer.",
    "jumprelu_bandwidth": "Width around the threshold within which it has a gradient; auto is 1.",
    "jumprelu_sparsity_loss_mode": "Penalty of a JumpReLU SAE: step (the number of active "
    "latents), tanh, or quadratic around target_l0.",
    "pre_act_loss_coefficient": "Weight of the loss that pulls dead latents to their thresholds; "
    "auto is 0.01.",
    "jumprelu_tanh_scale": "Steepness of the tanh penalty.",
    "jumprelu_ste_to_input": "Let the penalty's gradient reach the encoder as well as the "
    "threshold; auto does.",
}
"""Help by the field's name."""

DECIDED_IN_SAE = frozenset(
    {
        *("d_sae", "k", "max_iterations", "decoder_init_norm", "normalize_activations"),
        *("topk_threshold_lr", "matryoshka_widths", "l1_coefficient", "l0_coefficient"),
        *("jumprelu_init_threshold", "jumprelu_bandwidth", "pre_act_loss_coefficient"),
        "jumprelu_ste_to_input",
    }
)
"""Fields of an SAE that follow from the data and the run where they are not set."""
