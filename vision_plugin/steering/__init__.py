"""Steering: latents, or neurons, held at chosen values while the model runs."""

from vision_plugin.steering._effect import SteeringEffect, steering_effect
from vision_plugin.steering._steer import latent_change, steer, steer_neurons

__all__ = ["SteeringEffect", "latent_change", "steer", "steer_neurons", "steering_effect"]
