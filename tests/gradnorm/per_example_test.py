"""Losses of a batch, keyed losses, and the words for a loss that got a batch for an example or the reverse."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from issgd_jax.gradnorm import explain, per_example, per_example_grad_norms, value_grad_and_norms

RNG = np.random.default_rng(0)
PARAMS = {"w": jnp.float32(RNG.normal(size=(5, 7))), "out": jnp.float32(RNG.normal(size=(7, 3)))}
X, Y = jnp.float32(RNG.normal(size=(6, 5))), jnp.int32(RNG.integers(0, 3, 6))
IMPORTANCE_WEIGHTS = jnp.float32(RNG.uniform(0.5, 2, 6))


def losses_of_batch(params, x, y):
    logits = jnp.tanh(x @ params["w"]) @ params["out"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y)


def mean_loss(params, x, y):
    return jnp.mean(losses_of_batch(params, x, y))


def example_loss(params, x, y):
    return losses_of_batch(params, x, y)


def dropout_loss(params, x, y, key):
    keep = jax.random.bernoulli(key, 0.5, x.shape)
    return example_loss(params, jnp.where(keep, 2 * x, 0), y)


@pytest.mark.parametrize("batch_loss", [losses_of_batch, mean_loss])
def test_the_loss_of_a_batch_has_the_norms_of_the_loss_of_an_example(batch_loss):
    """Red if the axis of one, or the mean over it, changes a loss, a gradient or a norm."""
    ours = value_grad_and_norms(per_example(batch_loss))(PARAMS, IMPORTANCE_WEIGHTS, X, Y)
    expected = value_grad_and_norms(example_loss)(PARAMS, IMPORTANCE_WEIGHTS, X, Y)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5), ours, expected)


def test_the_loss_of_a_batch_costs_as_much_as_that_of_an_example():
    """Red if the axis of one hides the rule of a dense layer."""
    rules = [[row.rule for row in explain(f, PARAMS, X, Y).rows] for f in (per_example(mean_loss), example_loss)]
    assert rules[0] == rules[1] == ["outer", "outer"]


def test_aux_and_dict_batches_and_keys_pass_through():
    def batch_loss(params, batch, key):
        noise = jax.random.normal(key, batch["x"].shape)
        loss = mean_loss(params, batch["x"] + noise, batch["y"])
        return loss, {"noise": noise}

    grad_fn = value_grad_and_norms(per_example(batch_loss), has_aux=True, keyed=True)
    (losses, aux), _, norms = grad_fn(PARAMS, IMPORTANCE_WEIGHTS, {"x": X, "y": Y}, key=jax.random.key(1))
    assert losses.shape == norms.shape == (6,) and aux["noise"].shape == (6, 1, 5)
    keys = jax.random.split(jax.random.key(1), 6)
    expected = [mean_loss(PARAMS, x + jax.random.normal(k, x.shape), y) for x, y, k in zip(X, Y, keys)]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


@pytest.mark.parametrize("key", [jax.random.key(3), jax.random.PRNGKey(3)], ids=["typed", "raw"])
@pytest.mark.parametrize("negative", [False, True])
def test_each_example_has_a_key_of_its_own(key, negative):
    """Red if two examples share a mask, or norms and gradient are of other masks than the losses."""
    args = (X, Y, PARAMS) if negative else (PARAMS, X, Y)
    loss_fn = (lambda x, y, params, key: dropout_loss(params, x, y, key)) if negative else dropout_loss
    argnums = -1 if negative else 0
    keys = jax.random.split(key, 6)
    expected = jnp.stack([optax.tree.norm(jax.grad(dropout_loss)(PARAMS, X[i], Y[i], keys[i])) for i in range(6)])
    norms = per_example_grad_norms(loss_fn, keyed=True, argnums=argnums)(*args, key=key)
    np.testing.assert_allclose(norms, expected, rtol=2e-5)
    if not negative:
        _, gradient, norms = value_grad_and_norms(loss_fn, keyed=True)(PARAMS, IMPORTANCE_WEIGHTS, X, Y, key=key)
        np.testing.assert_allclose(norms, expected, rtol=2e-5)

        def weighted(params):
            each = jax.vmap(dropout_loss, (None, 0, 0, 0))(params, X, Y, keys)
            return jnp.mean(IMPORTANCE_WEIGHTS * each)

        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), gradient, jax.grad(weighted)(PARAMS)
        )
    assert [row.rule for row in explain(dropout_loss, PARAMS, X, Y, keyed=True).rows] == ["outer", "outer"]


def test_a_batch_for_an_example_says_so():
    def needs_a_batch(params, x, y):
        return jnp.mean(losses_of_batch(params, x, y)[jnp.arange(len(y))])

    with pytest.raises(TypeError) as raised:
        per_example_grad_norms(needs_a_batch)(PARAMS, X, Y)
    assert "loss_fn was called with ONE example, (5,), (): if it takes a batch, wrap it" in raised.value.__notes__[0]
    with pytest.raises(ValueError, match=r"got shape \(5,\) .*; if it takes a batch, wrap it: issgd_jax.per_example"):
        per_example_grad_norms(lambda params, x: params["w"][:, 0] * x)(PARAMS, X)


def test_an_example_for_a_batch_says_so():
    def one_row(params, x, y):
        first, _, _, _, _ = x
        return first * params["w"][0, 0]

    with pytest.raises(ValueError, match="not enough values") as raised:
        per_example_grad_norms(per_example(one_row))(PARAMS, X, Y)
    (note,) = (note for note in raised.value.__notes__ if "issgd_jax" in note)
    assert "batch_loss was called with a batch of one example, ((1, 5), (1,))" in note
    with pytest.raises(ValueError, match=r"got shape \(1, 5\) for a batch of one"):
        per_example_grad_norms(per_example(lambda params, x, y: x))(PARAMS, X, Y)


@pytest.mark.parametrize(
    ("keyed", "key", "error", "message"),
    [
        (True, None, TypeError, "key= is missing: pass one random key"),
        (False, jax.random.key(0), TypeError, "key= is given: pass keyed=True"),
        (True, jax.random.split(jax.random.key(0), 6), ValueError, r"key must be one random key.*got \(6,\)"),
        (True, jax.random.split(jax.random.PRNGKey(0), 6), ValueError, r"key must be one random key.*got \(6, 2\)"),
    ],
)
def test_keys_that_do_not_fit_are_refused(keyed, key, error, message):
    loss_fn = dropout_loss if keyed else example_loss
    with pytest.raises(error, match=message):
        value_grad_and_norms(loss_fn, keyed=keyed)(PARAMS, IMPORTANCE_WEIGHTS, X, Y, key=key)
