"""diffusers' schedulers over the fused step: each drops into a pipeline in place of the original.

Same config fields, signatures and numbers (to float32's rounding). What the original does in a dozen passes
over the sample is one kernel launch here, from a table of coefficients compiled in float64, and nothing in
`step` waits for the device. The state is float32 inside whatever the sample's dtype, and comes back in
diffusers' dtype. A config this package doesn't implement is an error that says so when the scheduler is made.
"""

from diffusers import SchedulerMixin  # noqa: F401 - a loading pipeline looks for its base class beside ours

from .ddim import FusedDDIMScheduler
from .ddpm import FusedDDPMScheduler
from .flow_match_euler import FusedFlowMatchEulerScheduler

__all__ = ["FusedDDIMScheduler", "FusedDDPMScheduler", "FusedFlowMatchEulerScheduler"]

for _scheduler in (FusedDDIMScheduler, FusedDDPMScheduler, FusedFlowMatchEulerScheduler):
    # A saved pipeline's model_index.json names the module: this one, whatever file the class lives in.
    _scheduler.__module__ = __name__
