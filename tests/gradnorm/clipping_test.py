"""Clipped gradients against their definition: each example's gradient formed, clipped and added."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from issgd_jax.gradnorm import clipped_grad, sums, value_grad_and_norms
from issgd_jax.task import models
from tests.gradnorm.helpers import cast, jitted_grad, model_problem
from tests.gradnorm.norms_test import tied_problem

PARAMS = {"w": jnp.float32([[1.0, -2.0], [0.5, 1.0]]), "b": jnp.float32([0.1, 0.2])}
X = jnp.float32(np.random.default_rng(0).normal(size=(6, 2)))


def loss_fn(params, x):
    return jnp.sum(jnp.tanh(x @ params["w"] + params["b"]) ** 2)


def formed_gradients(loss_fn, params, *batch):
    """Returns a pytree of f64[B, ...], one gradient at a time."""
    gradients = [jitted_grad(loss_fn)(params, *(x[i] for x in batch)) for i in range(len(batch[0]))]
    return jax.tree.map(lambda *leaves: np.stack(leaves).astype(np.float64), *gradients)


def lengths(gradients):
    return jax.tree.map(lambda g: np.sqrt(np.sum(g**2, tuple(range(1, g.ndim)))), gradients)


def by_definition(gradients, max_norm, per_leaf=False, counts=None):
    """Returns the sum of the clipped gradients of the examples that count."""
    per_leaf_norms = lengths(gradients)
    whole = np.sqrt(sum(n**2 for n in jax.tree.leaves(per_leaf_norms)))
    counts = np.ones(len(whole)) if counts is None else counts

    def clipped_sum(gradient, norm):
        shrinkage = np.minimum(1, max_norm / (norm if per_leaf else whole))
        return np.tensordot(shrinkage * counts, gradient, 1)

    return jax.tree.map(clipped_sum, gradients, per_leaf_norms)


def assert_close(gradient, expected, rtol=2e-5):
    scale = max(np.max(np.abs(e)) for e in jax.tree.leaves(expected))
    jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, rtol, rtol * scale), gradient, expected)


@pytest.mark.parametrize("kept_bytes", [sums.KEPT_BYTES, 0], ids=["kept", "formed twice"])
@pytest.mark.parametrize("microbatch_size", [None, 3])
@pytest.mark.parametrize("name", [*models.MODELS, "tied"])
def test_equals_the_sum_of_gradients_that_are_formed_and_clipped(name, microbatch_size, kept_bytes, monkeypatch):
    """Red if a leaf, a rule or a microbatch is clipped by other norms than its own, or not clipped."""
    monkeypatch.setattr(sums, "KEPT_BYTES", kept_bytes)
    loss_fn, params, *batch = tied_problem(size=7) if name == "tied" else model_problem(name, 7)
    gradients = formed_gradients(loss_fn, params, *batch)
    expected_norms = lengths(gradients)
    whole = np.sqrt(sum(n**2 for n in jax.tree.leaves(expected_norms)))
    for per_leaf, max_norm in ((False, np.median(whole)), (True, np.median(jax.tree.leaves(expected_norms)))):
        options = {"per_leaf": per_leaf, "microbatch_size": microbatch_size}
        losses, gradient, got_norms = clipped_grad(loss_fn, max_norm, **options)(params, *batch)
        expected = by_definition(gradients, max_norm, per_leaf)
        assert_close(gradient, jax.tree.map(lambda g: g / 7, expected))
        if not per_leaf:
            np.testing.assert_allclose(got_norms, whole, rtol=1e-5)
            np.testing.assert_allclose(losses, [loss_fn(params, *(x[i] for x in batch)) for i in range(7)], rtol=1e-5)


def test_clipping_changes_nothing_where_no_norm_is_too_long():
    """Red if infinity, or a norm of exactly 0, makes 0 / 0, or the mean is over another number than the batch's."""
    x = X.at[2].set(0)
    params = {"w": PARAMS["w"], "b": jnp.zeros(2)}
    losses, gradient, norms = value_grad_and_norms(loss_fn)(params, jnp.ones(6), x)
    assert norms[2] == 0
    for max_norm in (jnp.inf, 1e6):
        ours = clipped_grad(loss_fn, max_norm)(params, x)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, (losses, gradient, norms))


@pytest.mark.parametrize("per_leaf", [False, True])
def test_no_example_adds_more_than_max_norm(per_leaf):
    """Red if a huge, tiny or infinite gradient breaks the bound on which privacy rests."""
    for scale in (0.0, 1e-30, 1e-3, 1.0, 1e20, 1e30, jnp.inf, jnp.nan):
        grad_fn = clipped_grad(lambda p, x: x * loss_fn(p, X[0]), 0.1, per_leaf=per_leaf, normalize_by=1)
        _, gradient, _ = grad_fn(PARAMS, jnp.float32([scale]))
        lengths = [np.linalg.norm(np.asarray(g, np.float64)) for g in jax.tree.leaves(gradient)]
        bounded = lengths if per_leaf else [np.linalg.norm(lengths)]
        assert all(length <= 0.1 * (1 + 1e-6) for length in bounded), scale
        if np.isfinite(scale) and scale > 1:
            np.testing.assert_allclose(bounded, 0.1, rtol=1e-6)


@pytest.mark.parametrize("microbatch_size", [None, 4])
@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e38])
@pytest.mark.parametrize("name", ["mlp", "convnet", "transformer"])
def test_an_example_that_is_not_finite_adds_nothing_and_is_counted(name, bad, microbatch_size):
    """Red if 0 times nan reaches the sum, or the example's norm hides it."""
    loss_fn, params, images, labels = model_problem(name, 6)
    images = images.copy()
    images[3] = bad
    _, gradient, norms = clipped_grad(loss_fn, 0.5, microbatch_size=microbatch_size)(params, images, labels)
    others = np.arange(6) != 3
    assert np.sum(~np.isfinite(norms)) == (0 if bad == 1e38 and np.isfinite(norms[3]) else 1)
    if not np.isfinite(norms[3]):
        gradients = formed_gradients(loss_fn, params, images[others], labels[others])
        assert_close(gradient, jax.tree.map(lambda g: g / 6, by_definition(gradients, 0.5)))
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(gradient))


def test_an_example_that_is_not_finite_can_be_kept():
    """Red if the choice to see it is ignored: the gradient looks right then."""
    _, gradient, norms = clipped_grad(loss_fn, 0.5, nonfinite="keep")(PARAMS, X.at[1].set(jnp.nan))
    assert np.isnan(norms[1]) and all(np.all(np.isnan(g)) for g in jax.tree.leaves(gradient))


@pytest.mark.parametrize("nonfinite", ["zero", "keep"])
def test_padding_adds_nothing(nonfinite):
    """Red if an example that the mask leaves out adds to the sum, nan or not, or changes the divisor."""
    padded = X.at[4].set(jnp.nan).at[5].set(7)
    mask = [True] * 4 + [False] * 2
    grad_fn = clipped_grad(loss_fn, 0.5, nonfinite=nonfinite)
    _, gradient, norms = grad_fn(PARAMS, padded, mask=mask)
    _, expected, _ = clipped_grad(loss_fn, 0.5, normalize_by=6)(PARAMS, X[:4])
    assert_close(gradient, expected)
    assert norms.shape == (6,) and np.isnan(norms[4])
    _, nothing, _ = grad_fn(PARAMS, padded, mask=jnp.zeros(6, bool))
    jax.tree.map(lambda g: np.testing.assert_array_equal(g, 0), nothing)


def test_noise_is_in_proportion_and_independent():
    """Red if the noise is scaled by another norm, is the same for two leaves or keys, or is divided twice or never."""
    params = {"a": jnp.zeros(40_000), "b": jnp.zeros(40_000), "unused": jnp.zeros(40_000)}

    def loss_fn(params, x):
        return jnp.sum(params["a"]) * 0 * x + params["b"][0] * x

    def noise(seed, per_leaf=False, normalize_by=None):
        options = {"per_leaf": per_leaf, "normalize_by": normalize_by, "microbatch_size": 2}
        args = params, jnp.ones(5)
        _, plain, _ = clipped_grad(loss_fn, 0.5, **options)(*args)
        private = clipped_grad(loss_fn, 0.5, noise_multiplier=3.0, **options)
        _, noisy, _ = private(*args, noise_key=jax.random.key(seed))
        return np.stack([noisy[name] - plain[name] for name in params])

    first = noise(0)
    np.testing.assert_allclose(np.std(first, axis=1), 3.0 * 0.5 / 5, rtol=0.02)
    np.testing.assert_allclose(np.std(noise(0, normalize_by=1), axis=1), 3.0 * 0.5, rtol=0.02)
    np.testing.assert_allclose(np.std(noise(0, per_leaf=True), axis=1), 3.0 * 0.5 * np.sqrt(3) / 5, rtol=0.02)
    correlation = np.corrcoef(np.concatenate([first, noise(1)]))
    assert np.max(np.abs(correlation - np.eye(6))) < 0.03
    np.testing.assert_array_equal(noise(0), first)
    assert abs(np.mean(first)) < 0.01


def test_a_key_of_the_loss_that_is_also_that_of_the_noise_does_no_harm():
    """Red if noise and dropout are drawn from the same bits."""

    def noisy_loss(params, x, key):
        return jnp.sum(params * jax.random.normal(key, params.shape)) * x

    params, key = jnp.zeros(10_000), jax.random.key(0)
    options = {"keyed": True, "normalize_by": 1}
    _, plain, _ = clipped_grad(noisy_loss, jnp.inf, **options)(params, jnp.ones(1), key=key)
    private = clipped_grad(noisy_loss, 1e3, noise_multiplier=1e-3, **options)
    _, noisy, _ = private(params, jnp.ones(1), key=key, noise_key=key)
    assert abs(np.corrcoef(plain, noisy - plain)[0, 1]) < 0.05


def test_one_forward_pass_serves_norms_and_sum():
    """Red if norms and sum each trace the loss: the program then counts more operations than one pass does."""
    params = {f"w{i}": jnp.ones((64, 64)) / 64 for i in range(4)}

    def loss_fn(params, x):
        for w in params.values():
            x = jnp.tanh(x @ w)
        return jnp.sum(x)

    x = jnp.ones((32, 64))

    def flops(function, *args):
        return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]

    forward = flops(jax.vmap(loss_fn, (None, 0)), params, x)
    one_pass = flops(value_grad_and_norms(loss_fn), params, jnp.ones(32), x)
    for per_leaf in (False, True):
        assert flops(clipped_grad(loss_fn, 1.0, per_leaf=per_leaf), params, x) < one_pass + 0.1 * forward


def test_another_max_norm_compiles_nothing(compilations):
    """Red if adaptive clipping compiles at every step."""
    x = X + 0
    expected = [clipped_grad(loss_fn, 0.1 * i)(PARAMS, x)[1]["w"] for i in (1, 2)]
    count = len(compilations)
    clipped_grad(loss_fn, 0.3)(PARAMS, x)
    assert len(compilations) == count

    @jax.jit
    def step(max_norm):
        return clipped_grad(loss_fn, max_norm)(PARAMS, x)[1]["w"]

    for i in (1, 2):
        np.testing.assert_allclose(step(0.1 * i), expected[i - 1], rtol=1e-6)
    assert np.all(np.isnan(step(0.0))) and np.all(np.isnan(step(-1.0)))


def test_aux_argnums_and_keys_pass_through():
    """Red if an option of the other functions is lost here."""

    def with_aux(x, params, key):
        return loss_fn(params, x + jax.random.normal(key, x.shape)), {"x": x}

    grad_fn = clipped_grad(with_aux, 0.5, argnums=1, has_aux=True, keyed=True)
    (losses, aux), gradient, norms = grad_fn(X, PARAMS, key=jax.random.key(1))
    keys = jax.random.split(jax.random.key(1), 6)
    noisy = X + jax.vmap(lambda key: jax.random.normal(key, (2,)))(keys)
    expected = clipped_grad(loss_fn, 0.5)(PARAMS, noisy)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), (losses, gradient, norms), expected)
    np.testing.assert_array_equal(aux["x"], X)


def test_types_are_those_of_the_parameters():
    """Red if a sum is kept in bfloat16, or float64 is lost."""
    _, gradient, norms = clipped_grad(loss_fn, 0.5)(cast(PARAMS, jnp.bfloat16), X.astype(jnp.bfloat16))
    assert norms.dtype == jnp.float32 and gradient["w"].dtype == jnp.bfloat16
    expected = by_definition(formed_gradients(loss_fn, PARAMS, X), 0.5)
    assert_close(cast(gradient, jnp.float32), jax.tree.map(lambda g: g / 6, expected), rtol=0.05)
    with jax.enable_x64(True):
        params, x = cast((PARAMS, X), np.float64)
        private = clipped_grad(loss_fn, np.float64(0.5), noise_multiplier=0.0)
        _, gradient, norms = private(params, x, noise_key=jax.random.key(0))
        assert {g.dtype for g in jax.tree.leaves((gradient, norms))} == {np.dtype(np.float64)}
        expected = by_definition(formed_gradients(loss_fn, params, x), 0.5)
    assert_close(gradient, jax.tree.map(lambda g: g / 6, expected), rtol=1e-12)


def test_stands_inside_vmap():
    """Red if a Python number of the batch is taken for one of the mapped axis."""
    mapped = jax.vmap(clipped_grad(loss_fn, 0.5), (None, 0))(PARAMS, X.reshape(2, 3, 2))
    for i in range(2):
        ours = clipped_grad(loss_fn, 0.5)(PARAMS, X.reshape(2, 3, 2)[i])
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-5), mapped, ours)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of jax-privacy, by newer optax
@pytest.mark.parametrize("per_leaf", [False, True])
@pytest.mark.parametrize("name", models.MODELS)
def test_equals_jax_privacy(name, per_leaf):
    """Red if another library clips, leaves out or divides differently."""
    pytest.importorskip("optax", minversion="0.2.8", reason="jax-privacy needs it")
    clipping = pytest.importorskip("jax_privacy.clipping", reason="jax-privacy is no dependency of the tests")
    loss_fn, params, images, labels = model_problem(name, 6)
    images = np.concatenate([images[:5], np.full_like(images[:1], np.nan)])
    mask = np.array([True, True, False, True, True, True])
    *_, norms = clipped_grad(loss_fn, 1.0)(params, images, labels)
    max_norm = float(np.nanmedian(norms)) / (3 if per_leaf else 1)
    common = {"batch_argnums": (1, 2), "keep_batch_dim": False, "return_values": True, "return_grad_norms": True}

    def theirs(loss_fn, params):
        private = clipping.clipped_grad(loss_fn, l2_clip_norm=max_norm, normalize_by=6, **common)
        return private(params, images, labels, is_padding_example=~mask)

    losses, gradient, norms = clipped_grad(loss_fn, max_norm, per_leaf=per_leaf)(params, images, labels, mask=mask)
    if not per_leaf:
        expected, aux = theirs(loss_fn, params)
        np.testing.assert_allclose(losses[mask], aux.values[mask], rtol=1e-5)
        np.testing.assert_allclose(norms[mask], aux.grad_norms[mask], rtol=1e-5)
    else:  # theirs clips one leaf if it is the only parameter; an example is left out as a whole by ours
        leaves, tree = jax.tree.flatten(params)

        def with_leaf(i):
            return lambda leaf, *example: loss_fn(
                jax.tree.unflatten(tree, [*leaves[:i], leaf, *leaves[i + 1 :]]), *example
            )

        expected = jax.tree.unflatten(tree, [theirs(with_leaf(i), leaf)[0] for i, leaf in enumerate(leaves)])
    assert_close(gradient, expected)


@pytest.mark.parametrize("max_norm", [0, -1.0, float("nan"), None, "1", np.ones(2), [1.0]])
def test_a_max_norm_that_is_no_limit_is_refused(max_norm):
    with pytest.raises(ValueError, match=r"max_norm must be one number > 0, got .*: clip to"):
        clipped_grad(loss_fn, max_norm)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normalize_by": 0}, "normalize_by must be one number > 0, got 0: None divides by the batch size"),
        ({"normalize_by": np.inf}, "normalize_by must be one number > 0"),
        ({"nonfinite": "error"}, 'nonfinite must be "zero" or "keep", got \'error\''),
        ({"noise_multiplier": -1}, "noise_multiplier must be one number >= 0, got -1"),
        ({"noise_multiplier": 1.0, "nonfinite": "keep"}, 'noise_multiplier needs nonfinite="zero"'),
        ({"noise_multiplier": 1.0, "max_norm": np.inf}, "noise_multiplier needs a finite max_norm"),
        ({"microbatch_size": 0}, "microbatch_size must be >= 1"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        clipped_grad(loss_fn, **{"max_norm": 1.0} | options)


@pytest.mark.parametrize(
    ("error", "message", "options", "arguments"),
    [
        (TypeError, "noise_key= is missing: pass one random key", {"noise_multiplier": 1.0}, {}),
        (TypeError, "noise_key= is given, but noise_multiplier is None", {}, {"noise_key": jax.random.key(0)}),
        (
            ValueError,
            r"noise_key must be one random key, such as jax.random.key\(0\), got \(2,\)",
            {"noise_multiplier": 1.0},
            {"noise_key": jax.random.split(jax.random.key(0))},
        ),
        (ValueError, r"mask must have shape \(6,\)", {}, {"mask": jnp.ones(5, bool)}),
        (TypeError, "mask must be boolean.*float32: pass mask > 0", {}, {"mask": jnp.ones(6)}),
        (TypeError, "key= is given: pass keyed=True", {}, {"key": jax.random.key(0)}),
    ],
)
def test_wrong_arguments_of_a_call_are_named(error, message, options, arguments):
    with pytest.raises(error, match=message):
        clipped_grad(loss_fn, 1.0, **options)(PARAMS, X, **arguments)


@pytest.mark.parametrize("max_norm", [0.1, 1, np.float32(0.1)])
def test_without_jit_the_same_is_clipped(max_norm):
    """Red if numbers need to be traced: without jit is how people look for an error."""
    expected = clipped_grad(loss_fn, max_norm)(PARAMS, X)
    with jax.disable_jit():
        result = clipped_grad(loss_fn, max_norm)(PARAMS, X)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), result, expected)


def test_what_the_other_functions_refuse_is_refused():
    """Red if a bad batch or parameter reaches the compiler."""
    with pytest.raises(ValueError, match="at least one example"):
        clipped_grad(loss_fn, 1.0)(PARAMS, X[:0])
    with pytest.raises(TypeError, match="has dtype int32"):
        clipped_grad(loss_fn, 1.0)({"w": jnp.ones((2, 2), jnp.int32), "b": jnp.ones(2)}, X)
    with pytest.raises(ValueError, match="got shape"):
        clipped_grad(lambda p, x: x @ p["w"], 1.0)(PARAMS, X)
