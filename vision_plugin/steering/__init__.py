"""Steering: latents, or neurons, held at chosen values while the model runs."""

from vision_plugin.steering._steer import latent_change, steer, steer_neurons

__all__ = ["latent_change", "steer", "steer_neurons"]
