"""Fused operations: each a Triton kernel, a plain-torch twin and a registered operator."""

from typing import TYPE_CHECKING

from moe_sampler._lazy import lazy_names

if TYPE_CHECKING:
    from moe_sampler.kernels.attention import AttentionStatistics, attention_statistics, combine_statistics
    from moe_sampler.kernels.conversions import euler_step_, shift_sigmas, velocity_to_epsilon
    from moe_sampler.kernels.guidance import projected_guidance, zero_star_guidance
    from moe_sampler.kernels.loss_weights import MinSNR, min_snr_weight
    from moe_sampler.kernels.losses import weighted_mse
    from moe_sampler.kernels.modulation import rms_norm_modulate
    from moe_sampler.kernels.noise import philox_normal
    from moe_sampler.kernels.rotary import rope_qk
    from moe_sampler.kernels.rows import COLUMNS, ROW_WIDTH, make_row
    from moe_sampler.kernels.sampler_step import sampler_step_
    from moe_sampler.kernels.shift import shift_sigma
    from moe_sampler.kernels.training_pairs import TrainingPair, ddpm_training_pair, flow_training_pair

# `rows` and `shift` are plain Python, and who plans needs no more: torch takes a second to import.
_NAMES = {
    "attention": (
        "AttentionStatistics",
        "attention_statistics",
        "combine_statistics",
    ),
    "conversions": (
        "euler_step_",
        "shift_sigmas",
        "velocity_to_epsilon",
    ),
    "guidance": (
        "projected_guidance",
        "zero_star_guidance",
    ),
    "loss_weights": (
        "MinSNR",
        "min_snr_weight",
    ),
    "losses": ("weighted_mse",),
    "modulation": ("rms_norm_modulate",),
    "noise": ("philox_normal",),
    "rotary": ("rope_qk",),
    "rows": (
        "COLUMNS",
        "ROW_WIDTH",
        "make_row",
    ),
    "sampler_step": ("sampler_step_",),
    "shift": ("shift_sigma",),
    "training_pairs": (
        "TrainingPair",
        "ddpm_training_pair",
        "flow_training_pair",
    ),
}

__all__ = [
    "COLUMNS",
    "ROW_WIDTH",
    "AttentionStatistics",
    "MinSNR",
    "TrainingPair",
    "attention_statistics",
    "combine_statistics",
    "ddpm_training_pair",
    "euler_step_",
    "flow_training_pair",
    "make_row",
    "min_snr_weight",
    "philox_normal",
    "projected_guidance",
    "rms_norm_modulate",
    "rope_qk",
    "sampler_step_",
    "shift_sigma",
    "shift_sigmas",
    "velocity_to_epsilon",
    "weighted_mse",
    "zero_star_guidance",
]

__getattr__, __dir__ = lazy_names(globals(), _NAMES)
