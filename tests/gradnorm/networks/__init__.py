"""Networks whose norms are compared with a float64 loop: each module registers its own in `registry.ARCHITECTURES`."""

from tests.gradnorm.networks import attention, control_flow, convolution, dense, libraries  # noqa: F401, they register
