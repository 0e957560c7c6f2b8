"""Fused operations: each a Triton kernel, a plain-torch twin and a registered operator."""
