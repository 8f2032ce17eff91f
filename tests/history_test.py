"""Statistics of rows of metrics."""

import math

import pytest

from issgd_jax.history import steps_to


def test_steps_to_a_loss_are_log_linear_between_measurements():
    assert steps_to(0.1, [0, 10, 20], [1.0, 1.0, 0.01]) == pytest.approx(15)
    assert steps_to(1.0, [0, 10, 20], [1.0, 1.0, 0.01]) == 0
    assert steps_to(0.001, [0, 10, 20], [1.0, 1.0, 0.01]) == math.inf
    assert steps_to(0.1, [0, 10, 20], [1.0, None, 0.01]) == 20
