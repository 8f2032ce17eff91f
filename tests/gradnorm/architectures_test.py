"""Norms of many architectures against a float64 loop of `jax.grad`.

Red for an architecture if a primitive in it has a wrong rule, if a use of a parameter is missed or lacks its cross
terms with the other uses, or if a padding, stride, token or time step is out of place.
"""

import functools

import numpy as np
import pytest

from issgd_jax.gradnorm import per_example_grad_norms
from tests.gradnorm.helpers import assert_close, reference, transformed
from tests.gradnorm.networks.registry import ARCHITECTURES, B, problem
from tests.helpers import soak

# In float32, the kinds of rules, sums of unlike terms and control flow once; the others only in a soak.
IN_FLOAT32 = (
    "mlp", "bilinear", "a_layer_used_twice", "ensemble_by_vmap", "fft_mixing", "custom_vjp_layer", "linen_attention",
    "experts_mixed", "conv_everything", "conv_transpose", "conv_of_many_channels", "embedding_tied_with_the_head",
    "embedding_of_tokens_out_of_range", "linen_gru", "scan_in_scan", "scan_over_layers",
    "scan_with_embedding_and_convolution", "checkpoint", "cond_with_parameters_in_both", "fori_loop",
)  # fmt: skip


@functools.cache
def expected(name):
    return reference(*problem(name))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_equals_a_loop_in_float64(name):
    assert_close(transformed(*problem(name), np.float64), expected(name), 1e-10, 16 * np.finfo(np.float64).eps)


@pytest.mark.parametrize("name", soak(IN_FLOAT32, ARCHITECTURES))
def test_equals_a_loop_in_float32(name):
    assert_close(transformed(*problem(name), np.float32), expected(name), 1e-5, 16 * np.finfo(np.float32).eps)


def test_a_parameter_without_effect_has_norm_zero():
    loss_fn, params, _, batch = problem("parameters_used_in_part")
    per_leaf = per_example_grad_norms(loss_fn, per_leaf=True)(params, *batch)
    for name in "never", "multiplied_by_zero", "stopped":
        np.testing.assert_array_equal(per_leaf[name], np.zeros(B))
