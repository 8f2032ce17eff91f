"""Several seeds or models in one program, by `vmap`: numbers as alone, and no condition that computes both sides."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from issgd_jax import Sampler, per_example_grad_norms, value_grad_and_norms
from issgd_jax.vmapped import for_all, for_any

SEEDS = 3


def loss_fn(params, tokens, target):
    """Returns a loss with uses that share a sum over tokens, whose norms come from pairs, and a plain layer."""
    hidden = jnp.tanh(tokens @ params["in"])
    return jnp.sum((jnp.mean(hidden, axis=0) @ params["out"] - target) ** 2)


def make_models(scales):
    """Returns parameters of as many models as there are scales, and a batch that they share."""
    rng = np.random.default_rng(0)
    params = {"in": rng.normal(size=(8, 64)), "out": rng.normal(size=(64, 3))}
    params = {name: jnp.asarray(np.stack([x * scale for scale in scales]), jnp.float32) for name, x in params.items()}
    batch = rng.normal(size=(4, 6, 8)), rng.normal(size=(4, 3))
    return params, tuple(jnp.asarray(x, jnp.float32) for x in batch)


def num_conditions(function, *args):
    """Returns how many `lax.cond` the traced function has; one whose predicate is vmapped has become a select."""
    return str(jax.make_jaxpr(function)(*args)).count(" cond[")


@pytest.mark.parametrize("scales", [(1.0, 0.5, 2.0), (1.0, 1e-22, 1e18)], ids=["usual", "one too small, one too large"])
def test_norms_of_vmapped_models_are_those_of_each(scales):
    """Red if the fallback of one model changes another, or is not taken where only one model needs it."""
    params, batch = make_models(scales)
    norms_fn, all_fn = per_example_grad_norms(loss_fn), value_grad_and_norms(loss_fn)
    norms = jax.jit(jax.vmap(norms_fn, (0, None, None)))(params, *batch)
    _, _, same_norms = jax.jit(jax.vmap(lambda p: all_fn(p, jnp.ones(4), *batch)))(params)
    for i, _ in enumerate(scales):
        alone = norms_fn({name: x[i] for name, x in params.items()}, *batch)
        assert np.all(np.isfinite(alone)) and np.all(alone > 0)
        np.testing.assert_allclose(norms[i], alone, rtol=1e-5)
        np.testing.assert_allclose(same_norms[i], alone, rtol=1e-5)


def test_norms_of_vmapped_models_do_not_compute_their_fallback():
    """Red if both passes over the gradients, or forming beside pairs, run for every vmapped batch."""
    params, batch = make_models((1.0, 0.5, 2.0))
    norms_fn = per_example_grad_norms(loss_fn)
    together = jax.vmap(norms_fn, (0, None, None))
    twice = jax.vmap(together, (0, None, None))
    expected = num_conditions(norms_fn, jax.tree.map(lambda x: x[0], params), *batch)
    assert expected == 3  # of the factors of one leaf, and two of the pairs of the other
    assert num_conditions(together, params, *batch) == expected
    assert num_conditions(twice, jax.tree.map(lambda x: x[None], params), *batch) == expected


@pytest.mark.parametrize("draw", ["systematic", "stride", "independent"])
def test_vmapped_samplers_draw_what_each_draws_alone(draw):
    """Red if seeds share a state, or one that is not due is rebuilt with the others."""
    sampler = Sampler(40, 4, draw=draw, rebuild_every=3)

    def step(state):
        state, drawn = sampler.draw(state)
        return sampler.update(state, drawn, 1.0 + jnp.sin(drawn.indices) ** 2), drawn.indices

    def delayed(seed):  # each seed is at another step: rebuilds are due at different times
        state = sampler.init(seed)
        return state._replace(step=state.step + seed)

    together = jax.vmap(delayed)(jnp.arange(SEEDS))
    alone = [delayed(seed) for seed in range(SEEDS)]
    for _ in range(12):
        together, indices = jax.vmap(step)(together)
        for seed in range(SEEDS):
            alone[seed], expected = step(alone[seed])
            np.testing.assert_array_equal(indices[seed], expected)
    for seed in range(SEEDS):
        got, expected = jax.tree.leaves(together), jax.tree.leaves(alone[seed])
        for x, y in zip(got, expected, strict=True):
            np.testing.assert_allclose(x[seed], y, rtol=1e-5)


@pytest.mark.parametrize("draw", ["systematic", "stride"])
def test_vmapped_samplers_rebuild_only_when_one_is_due(draw):
    """Red if every update of several seeds rebuilds all of their tables, O(N)."""

    def conditions(rebuild_every):
        sampler = Sampler(40, 4, draw=draw, rebuild_every=rebuild_every)

        def update(state):
            state, drawn = sampler.draw(state)
            return sampler.update(state, drawn, jnp.ones(4))

        return num_conditions(jax.vmap(update), jax.vmap(sampler.init)(jnp.arange(SEEDS)))

    assert conditions(32) == conditions(0) + 1


def test_conditions_are_reduced_over_all_axes():
    conditions = jnp.array([[True, False], [True, True]])
    assert jax.vmap(for_all)(conditions).tolist() == [False, False]
    assert jax.vmap(jax.vmap(for_any))(conditions).tolist() == [[True, True], [True, True]]
    assert jax.vmap(for_all, in_axes=1)(conditions[1:]).tolist() == [True, True]
