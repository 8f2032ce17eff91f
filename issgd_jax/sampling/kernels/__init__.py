"""Compiled kernels, each beside the plain JAX that it must equal.

sampler.cc, for the CPU, does in one pass what XLA's own backend does operation by operation, at a microsecond each. The
machine's C++ compiler compiles it when it is first needed, into the user's cache. Without a compiler, or with
ISSGD_JAX_KERNELS=0, and on other devices, plain JAX computes the same.
"""

from issgd_jax.sampling.kernels.native import available, on_cpu, supports_key

__all__ = ["available", "on_cpu", "supports_key"]
