"""Quick compilation: these tests compile large programs and run them for few steps."""

import jax
import pytest

from tests.helpers import soak


@pytest.fixture(scope="package", autouse=True)
def quick_compilation():
    """Compiles without optimization, in a third of the time; with ISSGD_SOAK=1 as users do."""
    option, unoptimized = "jax_disable_most_optimizations", soak(True, False)
    jax.config.update(option, unoptimized)
    yield
    jax.config.update(option, False)
    if unoptimized:
        jax.clear_caches()  # other tests compare runs bit for bit with those of other processes
