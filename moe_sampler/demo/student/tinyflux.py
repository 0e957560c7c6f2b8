"""The class of this folder's model, for diffusers' AutoModel. It is in the package moe-sampler."""

from moe_sampler.tinyflux import TinyFlux

__all__ = ["TinyFlux"]
