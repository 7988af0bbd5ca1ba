"""Llip (Latent Language Image Pretraining) in JAX."""
