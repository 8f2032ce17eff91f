"""Compiled kernels, each equal to the plain JAX beside its caller.

`sampler.cc` does in one pass what XLA's CPU backend does in many small kernels, at a microsecond each; `convolution.cc`
sums squares of gradients that XLA would write to memory. They are compiled at first use with the machine's C++ compiler
and cached in the user's cache folder.

`gram_tpu` and `gram_hopper` sum over pairs of uses on TPUs and NVIDIA Hopper, by Pallas. They are imported only where a
program is lowered for such a device and ISSGD_JAX_GRAM=auto, tpu or hopper asks for them (see docs/performance.md).

Without a compiler, with ISSGD_JAX_KERNELS=0, and on other devices, plain JAX computes the same results.
"""

from issgd_jax.kernels.native import available, call, on_cpu, supports_key

__all__ = ["available", "call", "on_cpu", "supports_key"]
