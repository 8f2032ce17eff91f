"""Statistics of rows of metrics."""

import math

import pytest

from issgd_jax.history import seconds_per_step, steps_to


def test_seconds_of_a_step_are_known_from_the_third_row_on():
    """Red if the interval in which the step is compiled counts, as half or all of what there is."""
    rows = [{"step": 10 * i, "step_seconds": seconds} for i, seconds in enumerate((0.0, 9.0, 9.5))]
    assert math.isnan(seconds_per_step([rows[:2]])) and math.isnan(seconds_per_step([rows[:1], []]))
    assert seconds_per_step([rows]) == pytest.approx(0.05)


def test_steps_to_a_loss_are_log_linear_between_measurements():
    assert steps_to(0.1, [0, 10, 20], [1.0, 1.0, 0.01]) == pytest.approx(15)
    assert steps_to(1.0, [0, 10, 20], [1.0, 1.0, 0.01]) == 0
    assert steps_to(0.001, [0, 10, 20], [1.0, 1.0, 0.01]) == math.inf
    assert steps_to(0.1, [0, 10, 20], [1.0, None, 0.01]) == 20
