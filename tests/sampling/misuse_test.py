"""What strangers pass to the sampler: right, or one clear error; never a foreign index, a weight of NaN, or a crash.

Each test runs with and without kernels, as `make variants` runs this folder once more without them, and once under x64.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from issgd_jax.sampling import (
    Calibrated,
    Draw,
    Mixture,
    Proportional,
    Sampler,
    ScoreStore,
    Table,
    Uniform,
    build_table,
    draw,
    effective_sample_size,
    sum_tree,
    uniform,
    uniform_table,
)
from issgd_jax.sampling import store as store_lib
from issgd_jax.sampling.draws import STRIDE
from issgd_jax.sampling.table import METHODS
from tests.helpers import soak
from tests.sampling.helpers import draw_many

KEY = jax.random.key(0)
LARGEST, SMALLEST = 3.4e38, 1e-45
ODD = (0.0, SMALLEST, 1e-30, 1e-10, 1.0, 3.5, 1e20, LARGEST)
BAD = (np.nan, np.inf, -np.inf, -1.0)
N, B = 40, 8


def assert_sound(drawn, num_examples):
    indices, importance_weights = np.asarray(drawn.indices), np.asarray(drawn.importance_weights)
    assert indices.dtype == np.int32 and importance_weights.dtype == np.float32
    assert indices.min() >= 0 and indices.max() < num_examples
    assert np.isfinite(importance_weights).all() and (importance_weights >= 0).all()


@functools.partial(jax.jit, static_argnames="method")
def written_draw(key, v, indices, new_v, *, method):
    table = build_table(v).write(indices, new_v)
    return table, draw(key, table, B, method)


@settings(deadline=None, max_examples=soak(60, 1000))
@given(
    v=st.lists(st.sampled_from((*ODD, *BAD)), min_size=N, max_size=N),
    new_v=st.lists(st.sampled_from((*ODD, *BAD)), min_size=N, max_size=N),
    indices=st.lists(st.integers(-(2**31), 2**31 - 1) | st.integers(-3, N + 3), min_size=N, max_size=N),
    method=st.sampled_from(METHODS),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_v_gives_examples_that_are_there_and_finite_importance_weights(v, new_v, indices, method, seed):
    """Red if a sum overflows, a negative or NaN v enters, or a draw leaves the examples: under jit."""
    v, new_v, indices = np.float32(v), np.float32(new_v), np.int32(indices)
    table, drawn = written_draw(jax.random.key(seed), v, indices, new_v, method=method)
    assert_sound(drawn, N)
    stored = np.asarray(table.v())
    assert (stored >= 0).all() and np.isfinite(stored).all() and np.isfinite(float(table.total))
    inside = (indices >= 0) & (indices < N)
    assert int(table.rejected) == np.sum(inside & ~(np.isfinite(new_v) & (new_v >= 0)))


@pytest.mark.parametrize("num_examples", [1, 5000, 100_000])
@pytest.mark.parametrize("method", METHODS)
def test_when_every_v_was_written_to_zero_draws_are_uniform(method, num_examples):
    batch = min(B, num_examples)
    table = build_table(jnp.ones(num_examples)).write(np.arange(num_examples), np.zeros(num_examples))
    drawn = draw_many(table, batch, 500, method=method)
    assert_sound(drawn, num_examples)
    np.testing.assert_array_equal(drawn.importance_weights, 1)
    places = np.asarray(drawn.indices).ravel() / num_examples
    assert num_examples == 1 or abs(places.mean() - 0.5) < 4 * 0.29 / np.sqrt(len(places))
    assert float(effective_sample_size(table, batch)) == batch
    if method == "without_replacement":
        assert all(len(set(row)) == batch for row in np.asarray(drawn.indices).tolist())


@pytest.mark.parametrize("num_positive", [1, 2, 7, 8])
def test_without_replacement_never_draws_from_what_is_left_of_too_few(num_positive):
    """Red if all that can be drawn is set apart, and then a tree of zeros is drawn from."""
    positive = np.arange(num_positive) * 11 + 3
    v = np.zeros(100, np.float32)
    v[positive] = 1 + np.arange(num_positive)
    drawn = draw(KEY, build_table(v), 8, "without_replacement")
    certain = np.asarray(drawn.importance_weights) > 0
    assert set(np.asarray(drawn.indices)[certain].tolist()) == set(positive.tolist()) and sum(certain) == num_positive
    np.testing.assert_array_equal(np.asarray(drawn.importance_weights)[certain], np.float32(0.08))
    np.testing.assert_array_equal(np.asarray(drawn.indices)[~certain], 0)


def test_a_diverged_loop_leaves_the_table_as_it_was_and_is_counted():
    table = build_table(jnp.arange(1.0, 301.0))
    for step in range(4):
        table = table.write(np.arange(128) + step, np.full(128, np.nan))
    np.testing.assert_array_equal(table.v(), np.arange(1, 301))
    assert int(table.rejected) == 4 * 128
    assert_sound(draw(KEY, table, 64), 300)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.uint32, np.int64, np.uint64, np.int32])
def test_indices_of_any_integer_type_never_wrap_around(dtype):
    """Red if 2^32 becomes 0, or 300 of a uint8's 44."""
    outside = [value for value in (-1, 300, 2**32, 2**32 + 3) if np.iinfo(dtype).min <= value <= np.iinfo(dtype).max]
    indices = np.array([7, *outside], dtype)
    scores = np.arange(1.0, 1 + len(indices))
    store, rejected = ScoreStore.init(300).write(indices, scores, 2)
    assert int(rejected.count) == 0
    np.testing.assert_array_equal(np.flatnonzero(store.score), [7])
    np.testing.assert_array_equal(store.at(indices)[0], [1, *[0] * len(outside)])
    np.testing.assert_array_equal(store.at(indices)[1], [2, *[-1] * len(outside)])
    table = build_table(jnp.ones(300)).write(indices, scores + 1)
    np.testing.assert_array_equal(np.flatnonzero(table.v() != 1), [7])
    np.testing.assert_array_equal(table.v(indices), [2, *[0] * len(outside)])
    np.testing.assert_array_equal(uniform_table(300).v(indices), [1, *[0] * len(outside)])
    sampler = Sampler(300, 4, count_draws=True)
    state = sampler.ingest(sampler.init(0), indices, scores, 0)
    np.testing.assert_array_equal(np.flatnonzero(state.score), [7])
    state = sampler.update(state, Draw(indices, jnp.ones(len(indices))), jnp.asarray(scores))
    np.testing.assert_array_equal(np.flatnonzero(state.times_drawn), [7])


@pytest.mark.parametrize("draw", ["systematic", STRIDE])
def test_a_round_of_no_scores_changes_nothing(draw):
    """Red if an empty round divides by its size."""
    sampler = Sampler(20, 4, draw=draw)
    state, drawn = sampler.draw(sampler.init(0))
    state = sampler.update(state, drawn, jnp.arange(4.0))
    before = jax.tree.map(np.array, state.store)
    state = sampler.ingest(state, np.array([], np.int32), np.array([], np.float32), 0, rebuild=False)
    assert jax.tree.all(jax.tree.map(lambda x, y: bool(np.all(x == y)), before, state.store))
    assert int(state.rejected.count) == 0


def test_the_default_device_may_be_a_platform():
    with jax.default_device("cpu"):
        assert Sampler(20, 4).init(0).score.shape == (20,)


@pytest.mark.parametrize("shape", [(4,), (2, 2), (), (0,)])
def test_one_score_stands_for_all_and_shapes_are_free(shape):
    indices = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    store, _ = ScoreStore.init(20).write(indices, np.float32(2), 0)
    np.testing.assert_array_equal(store.score, np.where(np.arange(20) < indices.size, 2, 0))
    table = build_table(np.ones(20)).write(indices, 2)
    np.testing.assert_array_equal(table.v(), np.where(np.arange(20) < indices.size, 2, 1))


@pytest.mark.parametrize("dtype", [bool, np.int8, np.uint16, np.float16, jnp.bfloat16, np.float64, np.int64])
def test_v_of_any_real_type(dtype):
    v = jnp.ones(9, dtype) if dtype is jnp.bfloat16 else np.ones(9, dtype)
    drawn = draw(KEY, build_table(v).write(np.arange(2), v[:2]), 4)
    np.testing.assert_array_equal(drawn.importance_weights, 1)


@pytest.mark.parametrize("level", [SMALLEST, 1e-30, 1e30, LARGEST, 1e300])
def test_the_scale_of_v_does_not_matter_where_it_is_extreme(level):
    """Red if sums overflow or vanish although every v is finite; beyond 2^+-64 all v are the same."""
    drawn = draw(KEY, build_table(np.full(1000, level)), 8)
    assert_sound(drawn, 1000)
    np.testing.assert_array_equal(drawn.importance_weights, 1)


def test_a_subnormal_v_is_not_zero():
    """Red if it is compared by XLA's threads, for which it is: the example would never be drawn."""
    tiny = np.array([1.0, SMALLEST, 0.0], np.float32)
    for table in (build_table(tiny), build_table(np.ones(3)).write(np.arange(3), tiny), jax.jit(build_table)(tiny)):
        np.testing.assert_array_equal(table.v(), [1, 2.0**-64, 0])


def test_a_v_that_f32_cannot_hold_is_not_zero():
    """Red if it is rounded to 0: the example would never be drawn, and a negative one would be no error."""
    tiny = np.array([1.0, 1e-60, 0.0])
    for table in (build_table(tiny), build_table(np.ones(3)).write(np.arange(3), tiny)):
        np.testing.assert_array_equal(table.v(), [1, 2.0**-64, 0])
    with jax.enable_x64(True):
        np.testing.assert_array_equal(jax.jit(build_table)(jnp.asarray(tiny)).v(), [1, 2.0**-64, 0])
    with pytest.raises(ValueError, match="v must be finite and >= 0"):
        build_table(-tiny)


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_v_inside_jit_counts_as_the_mean_of_the_others(bad):
    """Red if a negative v biases the draw, which no error can prevent there."""
    table = jax.jit(build_table)(np.array([1.0, bad, 3.0, bad], np.float32))
    np.testing.assert_array_equal(table.v(), [1, 2, 3, 2])


PROPOSALS = (
    Uniform(),
    Proportional(0.0),
    Proportional(1.0, relative=True),
    Proportional(0.0, max_staleness=3),
    Mixture(Calibrated()),
    Mixture(Proportional(0.0), 0.5),
    Calibrated(),
)


@functools.partial(jax.jit, donate_argnums=1)
def sampler_step(sampler, state, norms, importance_weights):
    state, drawn = sampler.draw(state)
    mine = Draw(drawn.indices, importance_weights, sampler.num_examples)
    return sampler.update(state, mine, norms[drawn.indices]), drawn


@pytest.mark.parametrize("proposal", PROPOSALS, ids=repr)
def test_no_norm_and_no_importance_weight_corrupts_what_is_learned(proposal):
    """Zeros, the largest and the smallest, NaN; and draws of the caller's own with any importance weights."""
    sampler = Sampler(N, B, proposal, rebuild_every=2)
    norms = [np.full(N, x) for x in (0.0, SMALLEST, 1e-30, LARGEST, np.nan)]
    norms.append(np.resize(np.float32((*ODD, *BAD)), N))
    for norm, importance_weight in itertools.product(norms, (1.0, 0.0, LARGEST, *BAD)):
        state = sampler.ingest(sampler.init(0), np.arange(N - 5), norm[: N - 5], 0)
        for _ in range(3):
            state, drawn = sampler_step(sampler, state, np.float32(norm), np.full(B, importance_weight, np.float32))
            assert_sound(drawn, N)
        for leaf in jax.tree.leaves(state):
            assert np.isfinite(np.asarray(leaf)).all()
        assert np.isfinite(list(sampler.metrics(state).values())).all()


def refused(error, message, call):
    with pytest.raises(error, match=message):
        call()


def test_wrong_arguments_are_refused_in_words():
    """Red if one is read as something else: a mask as indices, a cut-off seed as another, many steps as the first."""
    store, table, sampler = ScoreStore.init(20), build_table(np.ones(20)), Sampler(20, 4)
    four, mask = np.arange(4), np.ones(20, bool)
    ingest = functools.partial(sampler.ingest, sampler.init(0))
    for call in (store.write, lambda indices, v, _: table.write(indices, v), ingest):
        refused(ValueError, r"need a .* for each index, or one for all, got shapes \(4,\) and \(3,\)",
                functools.partial(call, four, np.ones(3), 0))  # fmt: skip
        refused(TypeError, "whole numbers, got bool: use np.flatnonzero", functools.partial(call, mask, np.ones(20), 0))
        refused(TypeError, "whole numbers, got float64", functools.partial(call, four / 1.0, np.ones(4), 0))
        refused(TypeError, "must be a real number, got complex", functools.partial(call, four, np.ones(4) * 1j, 0))
        refused(TypeError, "must be a real number, got <U1", functools.partial(call, four, ["a"] * 4, 0))
    refused(ValueError, r"step must be one number, got shape \(4,\)", lambda: store.write(four, np.ones(4), four))
    refused(ValueError, "step must be in .0, 1073741824., got -1", lambda: store.write(four, np.ones(4), -1))
    refused(ValueError, "step must be in", lambda: store.write(four, np.ones(4), 2**40))
    refused(TypeError, "step must be a whole number, got float64", lambda: store.write(four, np.ones(4), 1.5))
    refused(TypeError, "whole numbers, got bool", lambda: store.remove(mask))
    refused(TypeError, "whole numbers, got float64", lambda: store.check([1.5], [1.0]))
    refused(TypeError, "num_examples must be a whole number", lambda: ScoreStore.init(2.5))
    refused(ValueError, "num_examples must be <= 1073741824", lambda: ScoreStore.init(2**31))
    refused(TypeError, "key must be a random key", lambda: draw(0, table, 4))
    refused(TypeError, "batch_size must be a whole number", lambda: draw(KEY, table, 4.0))
    refused(TypeError, "known outside jit", lambda: jax.jit(lambda size: draw(KEY, table, size))(4))
    refused(ValueError, "batch_size must be <= 1073741824", lambda: draw(KEY, table, 2**31))
    for call in (lambda t: draw(KEY, t, 4), lambda t: t.write(four, np.ones(4))):
        for sums in (jnp.ones(5), jnp.ones(48, jnp.int32)):
            refused(ValueError, r"sums of 20 examples must be float32\(48,\)",
                    functools.partial(call, Table(sums, jnp.float32(20), 20)))  # fmt: skip
    for population in (0, 21, np.nan, np.ones(2)):
        refused(ValueError, "population must be one number", functools.partial(build_table, np.ones(20), population))
    for proposal in ("uniform", Uniform, None):
        refused(TypeError, "proposal must have the methods", functools.partial(Sampler, 20, 4, proposal))
    refused(TypeError, "proposal must have the methods", lambda: Mixture(Calibrated))
    for make, message in (
        (lambda: Proportional(-1.0), "smoothing must be finite and >= 0"),
        (lambda: Proportional(np.nan), "smoothing must be finite and >= 0"),
        (lambda: Proportional(1.0, max_staleness=-1), "max_staleness must be >= 0"),
        (lambda: Mixture(Calibrated(), 1.0), "uniform_fraction must be in"),
        (lambda: Calibrated(half_life=0), "half_life must be > 0"),
        (lambda: Proportional(1.0, max_staleness=10**10), "max_staleness must be >= 0 and <= 1073741824"),
        (lambda: Sampler(20, 4, rebuild_every=10**10), "rebuild_every must be between 0 and 1073741824"),
        (lambda: sampler.init(2**40), "seed must be in"),
        (lambda: sampler.draw_number(sampler.init(0), 2**31), "number must be in"),
    ):
        refused(ValueError, message, make)
    for name, arguments in (("num_examples", (20.0, 4)), ("batch_size", (20, 4.5))):
        refused(TypeError, f"{name} must be a whole number", functools.partial(Sampler, *arguments))
    refused(TypeError, "seed must be a whole number", lambda: sampler.init(1.5))
    refused(TypeError, "uniform_fraction must be .* got '0.3': pass a number", lambda: Mixture(Calibrated(), "0.3"))
    drawn = Draw(jnp.arange(4), jnp.ones(4), 20)
    halves = Draw(jnp.arange(4).reshape(2, 2), jnp.ones((2, 2)), 20)
    refused(ValueError, r"indices of shape .B., got \(2, 2\): reshape the batch",
            lambda: sampler.update(sampler.init(0), halves, jnp.ones((2, 2))))  # fmt: skip
    for other in (Sampler(20, 4, Uniform()), Sampler(20, 4, Calibrated())):
        refused(ValueError, "the state is that of another proposal than", lambda: other.draw(sampler.init(0)))  # noqa: B023
    seeds = jax.vmap(sampler.init)(jnp.arange(3))
    refused(ValueError, "the state is of 3 samplers: call this inside the `vmap`", lambda: sampler.metrics(seeds))
    refused(ValueError, "scores without norms: use ingest",
            lambda: sampler.update(sampler.init(0), drawn, None, scores=jnp.ones(4)))  # fmt: skip
    refused(ValueError, "scored_at must be in",
            lambda: sampler.update(sampler.init(0), drawn, jnp.ones(4), scored_at=-1))  # fmt: skip


def test_an_impossible_step_inside_jit_is_rejected_and_counted():
    write = jax.jit(lambda step: ScoreStore.init(5).write(jnp.arange(3), jnp.ones(3), step))
    for step in (-1, -7, 2**30, 2**31 - 1):
        store, rejected = write(jnp.int32(step))
        assert int(rejected.count) == 3 and not np.any(store.score) and np.all(store.scored_at == -1)
    assert int(write(jnp.int32(2**30 - 1))[1].count) == 0


def use_everything(sampler, norms, indices, seed):
    """Calls all that a sampler has."""
    state, drawn = sampler.draw(sampler.init(seed))
    state = sampler.update(state, drawn, norms)
    state = sampler.update(state, drawn, norms, scores=norms, scored_at=0)
    state = sampler.ingest(state, indices, norms, 0)
    state = sampler.rebuild(sampler.ingest(state, indices, norms, 0, are_norms=False, rebuild=False))
    if sampler.draw_method == STRIDE:
        return state, sampler.metrics(state), sampler.draw(sampler.update(state, drawn, None)), sampler.append(state, 5)
    return state, sampler.metrics(state), sampler.draw(state, uniform_draw=True), sampler.draw_number(state, 3)


@pytest.mark.parametrize("proposal", PROPOSALS, ids=repr)
def test_callers_may_forbid_implicit_promotion(proposal):
    """Red if integers and floats, two integer types, or ranks meet inside: on every platform's path."""
    indices, norms = jnp.arange(B, dtype=jnp.int32), jnp.ones(B, jnp.float32)
    draws = ("shuffled", "independent") if isinstance(proposal, Uniform) else METHODS
    excludes = getattr(proposal, "max_staleness", None) is not None
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        for method in draws if excludes else (*draws, STRIDE):
            jax.eval_shape(functools.partial(use_everything, Sampler(N, B, proposal, method), norms, indices), 0)
        table = build_table(jnp.ones(N, jnp.float32))
        jax.eval_shape(lambda: (effective_sample_size(table, B), table.write(indices, norms).v(indices)))
        jax.eval_shape(lambda: sum_tree.plain_write(table.sums, indices, norms, jnp.bool_(False), num_leaves=N))
        jax.eval_shape(lambda: store_lib.plain_write(norms, indices, indices, norms, jnp.int32(0)))
        for spaced in (True, False):
            key = {"impl": jax.random.key_impl(KEY), "batch_size": B}
            words = jax.random.key_data(KEY)
            tree = {"num_leaves": N, "equally_spaced": spaced}
            jax.eval_shape(lambda: sum_tree.plain_draw(words, table.sums, jnp.int32(B), **tree, **key))  # noqa: B023
            jax.eval_shape(lambda: uniform.plain_draw(words, num_examples=N, in_parts=spaced, **key))  # noqa: B023


@pytest.mark.parametrize("draw", ["systematic", STRIDE])
def test_a_step_of_the_future_counts_as_the_present(draw):
    """Red if scores of another count of steps stay for thousands of updates, as newer than every own one."""
    sampler = Sampler(N, N, draw=draw)
    state = sampler.ingest(sampler.init(0), jnp.arange(N), jnp.ones(N), 1000)
    state, drawn = sampler.draw(state)
    state = sampler.update(state, drawn, jnp.full(N, 2.0), scored_at=10**6)
    assert set(state.store.scored_at.tolist()) == {0} and sampler.metrics(state)["staleness_max"] == 1
    state, drawn = sampler.draw(state)
    state = sampler.update(state, drawn, jnp.full(N, 3.0))
    assert np.all(state.store.score[drawn.indices] == 3)


def test_the_step_of_a_state_may_be_given_with_it():
    """Red if it is donated with the state, which JAX refuses with an error about buffers."""
    sampler = Sampler(N, B)
    state, drawn = sampler.draw(sampler.init(0))
    state = sampler.ingest(state, jnp.arange(3), jnp.ones(3), state.step)
    state = sampler.update(state, drawn, jnp.ones(B), scored_at=state.step)
    assert state.store.scored_at[:3].tolist() == [0, 0, 0] and int(state.step) == 1
