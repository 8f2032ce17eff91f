"""Compiled kernels, each beside the plain JAX that it must equal.

sampler.cc, for the CPU, does in one pass what XLA's own backend does kernel by kernel, at a microsecond each. It is
made when first needed, with the machine's C++ compiler, and kept in the user's cache. Without a compiler, or with
ISSGD_JAX_KERNELS=0, and on other devices, plain JAX does the same.
"""

from issgd_jax.sampling.kernels.native import available, has_words_of, on_cpu

__all__ = ["available", "has_words_of", "on_cpu"]
