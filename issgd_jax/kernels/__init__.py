"""Compiled CPU kernels, each equal to the plain JAX beside its caller.

`sampler.cc` does in one pass what XLA's CPU backend does in many small kernels, at a microsecond each; `convolution.cc`
sums squares of gradients that XLA would write to memory. They are compiled at first use with the machine's C++ compiler
and cached in the user's cache folder. Without a compiler, with ISSGD_JAX_KERNELS=0, and on other devices, plain JAX
computes the same results.
"""

from issgd_jax.kernels.native import available, call, on_cpu, supports_key

__all__ = ["available", "call", "on_cpu", "supports_key"]
