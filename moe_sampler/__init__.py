"""Mixture-of-experts diffusion sampling."""
