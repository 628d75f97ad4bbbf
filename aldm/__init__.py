"""Adaptive Latent Diffusion Model for 3D medical image-to-image translation."""

__version__ = "0.1.0"
