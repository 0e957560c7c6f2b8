"""Fused operations: each a Triton kernel, a plain-torch twin and a registered operator."""

from moe_sampler.kernels.conversions import euler_step_, shift_sigma, shift_sigmas, velocity_to_epsilon
from moe_sampler.kernels.noise import philox_normal
from moe_sampler.kernels.rows import COLUMNS, ROW_WIDTH, make_row
from moe_sampler.kernels.sampler_step import sampler_step_

__all__ = [
    "COLUMNS",
    "ROW_WIDTH",
    "euler_step_",
    "make_row",
    "philox_normal",
    "sampler_step_",
    "shift_sigma",
    "shift_sigmas",
    "velocity_to_epsilon",
]
