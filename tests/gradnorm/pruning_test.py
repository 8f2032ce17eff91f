"""GraNd and EL2N by their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from issgd_jax.gradnorm import el2n, grand, per_example_grad_norms
from tests.gradnorm.helpers import loop_norms, model_problem

RNG = np.random.default_rng(0)
LOGITS, LABELS = jnp.float32(RNG.normal(size=(7, 5))), jnp.int32(RNG.integers(0, 5, 7))


def test_el2n_is_the_norm_of_the_gradient_at_the_logits():
    """Red if labels and probabilities are subtracted otherwise than the loss does it."""
    loss_fn = optax.softmax_cross_entropy_with_integer_labels
    expected = [loop_norms(loss_fn, LOGITS[i], LABELS[i : i + 1])[0] for i in range(7)]
    np.testing.assert_allclose(el2n(LOGITS, LABELS), expected, rtol=1e-5)
    np.testing.assert_allclose(el2n(LOGITS, jax.nn.one_hot(LABELS, 5)), expected, rtol=1e-5)
    np.testing.assert_allclose(el2n(LOGITS[0], LABELS[0]), expected[0], rtol=1e-5)
    np.testing.assert_allclose(el2n(LOGITS[None], LABELS[None])[0], expected, rtol=1e-5)


def test_el2n_of_bfloat16_and_of_unknown_classes():
    """Red if probabilities are rounded to bfloat16, or a class that does not exist scores as if it did."""
    assert el2n(LOGITS.astype(jnp.bfloat16), LABELS).dtype == jnp.float32
    scores = el2n(LOGITS[:3], jnp.array([-1, 5, 0]))
    assert np.isnan(scores[:2]).all() and np.isfinite(scores[2])
    assert float(el2n(jnp.array([1e4, -1e4]), jnp.array(1))) == pytest.approx(2**0.5)


def test_grand_is_the_mean_of_the_norms_over_networks():
    """Red if it is the norm of the mean, or of one network."""
    loss_fn, params, *batch = model_problem("mlp", 4)
    networks = [params, jax.tree.map(lambda x: 0.5 * x, params), jax.tree.map(lambda x: -x, params)]
    expected = np.mean([loop_norms(loss_fn, network, *batch) for network in networks], axis=0)
    for scores in (grand(loss_fn, microbatch_size=3), jax.jit(grand(loss_fn))):
        np.testing.assert_allclose(scores(networks, *batch), expected, rtol=1e-5)
    assert grand(loss_fn) is grand(loss_fn)


def test_grand_of_a_loss_with_keys():
    """Red if the key is lost."""

    def noisy(params, x, key):
        return jnp.sum(params * jax.random.normal(key, x.shape))

    key = jax.random.key(0)
    scores = grand(noisy, keyed=True)((jnp.ones(3), jnp.zeros(3)), jnp.ones((4, 3)), key=key)
    np.testing.assert_allclose(
        scores, per_example_grad_norms(noisy, keyed=True)(jnp.ones(3), jnp.ones((4, 3)), key=key), rtol=1e-6
    )


@pytest.mark.parametrize(
    ("error", "message", "logits", "labels"),
    [
        (ValueError, r"labels must have the shape.* got labels \(3,\) int32 and logits \(7, 5\)", LOGITS, LABELS[:3]),
        (ValueError, "labels must have the shape", LOGITS, LABELS[:, None]),
        (ValueError, r"got labels \(7,\) float32", LOGITS, LABELS.astype(jnp.float32)),
        (ValueError, r"logits \(\)", jnp.float32(1), LABELS),
        (TypeError, "logits must be floating-point, got int32", LABELS, LABELS),
        (TypeError, "labels must be integers, .* got bool", LOGITS, LABELS > 0),
    ],
)
def test_wrong_logits_and_labels_are_named(error, message, logits, labels):
    with pytest.raises(error, match=message):
        el2n(logits, labels)


@pytest.mark.parametrize("networks", [{"w": jnp.ones(3)}, jnp.ones(3), [], None])
def test_networks_must_be_a_list(networks):
    """Red if the parameters of one network are taken for a list of networks."""
    with pytest.raises(ValueError, match=r"networks must be a list or tuple of parameters.* got .*: pass \[params\]"):
        grand(lambda p, x: p @ x)(networks, jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="microbatch_size must be >= 1"):
        grand(lambda p, x: p @ x, microbatch_size=0)
