"""Quick compilation: these tests compile whole runs and do few steps of each."""

import os

import jax
import pytest

from tests.helpers import soak


@pytest.fixture(scope="package", autouse=True)
def quick_compilation():
    """Compiles without most optimizations, also in processes that tests start; with ISSGD_SOAK=1 as users do."""
    option = "jax_disable_most_optimizations"
    if not soak(True, False):
        yield
        return
    # Programs compiled before, and those left to later tests, would differ in rounding from those of other processes.
    jax.clear_caches()
    jax.config.update(option, True)
    os.environ[option.upper()] = "1"
    yield
    del os.environ[option.upper()]
    jax.config.update(option, False)
    jax.clear_caches()
