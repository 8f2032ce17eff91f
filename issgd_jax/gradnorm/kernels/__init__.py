"""Kernels for accelerators, each equal to the plain JAX beside it.

`gram_sums` has three forms: plain JAX in blocks of pairs (CPUs, other GPUs, float64), Pallas for TPUs, and Pallas on
Mosaic GPU for NVIDIA Hopper. Which one a program gets is decided when it is lowered for its platform;
ISSGD_JAX_GRAM=plain, tpu or hopper forces one. Pallas is imported only where a kernel is lowered.
"""

from issgd_jax.gradnorm.kernels.gram import gram_norm, gram_sums

__all__ = ["gram_norm", "gram_sums"]
