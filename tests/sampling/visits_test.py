"""Evenly spaced visits: the kernel, plain JAX and a scheduler of Python agree; times balance whatever the norms are."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from issgd_jax import kernels
from issgd_jax.loading.prefetch import Prefetch
from issgd_jax.sampling import Calibrated, Mixture, Proportional, Sampler, Uniform, min_tree
from issgd_jax.sampling import visits as visits_lib
from tests.helpers import soak
from tests.sampling.helpers import needs_kernels

SIZES = [(1, 1), (5, 5), (16, 3), (17, 4), (300, 7), (300, 300), (5000, 32), (70_000, 128)]


# As one program each: called in Python they compile every operation of their own.
build = jax.jit(min_tree.build)
draw = jax.jit(visits_lib.draw, static_argnames="batch_size")


@jax.jit
def visit(visits, indices, v):
    """Returns visits after one of these examples, whose v have arrived, and the new strides."""
    visits = visits_lib.write(visits_lib.visit(visits, indices), indices, v, arrived=True)
    return visits, visits_lib.stride(v, jnp.float32(1), visits.num_examples)


def minima(num_examples, now, strides, visited_at):
    """Visits of given strides and times of the last visit, i64."""
    visited_at = jnp.asarray(np.asarray(visited_at).astype(np.int64).astype(np.uint32).view(np.int32))
    now = jnp.asarray(np.uint32(now % 2**32).view(np.int32))
    deadlines = build(visited_at + jnp.asarray(strides, jnp.int32), now)
    return visits_lib.Visits(deadlines, visited_at, jnp.float32(1), now)


class Scheduler:
    """The same with a list of Python's integers, O(N log N) a minibatch."""

    def __init__(self, num_examples, now, strides, visited_at):
        self.now, self.num_examples = now, num_examples
        self.visited_at, self.deadlines = np.array(visited_at), np.array(visited_at) + strides

    def draw(self, salt, batch_size):
        order = sorted(range(self.num_examples), key=lambda n: (self.deadlines[n], n ^ (salt & (2**31 - 1))))
        indices = np.array(order[:batch_size])
        elapsed = self.now + np.arange(batch_size) - self.visited_at[indices]
        self.visited_at[indices] = self.now + np.arange(batch_size)
        self.now += batch_size
        return indices, elapsed

    def write(self, indices, strides):
        self.deadlines[indices] = self.visited_at[indices] + strides


@pytest.mark.parametrize(("num_examples", "batch_size"), SIZES[:-1])
@pytest.mark.parametrize("now", [0, 2**31 - 40, 2**29 * 128 + 17])
def test_the_examples_that_are_due_first_are_drawn(num_examples, batch_size, now):
    """Red if a descent misses an early leaf, ties are not broken by the salt, or a time that wraps is out of order.

    The last time is that of step 2^29 of minibatches of 128.
    """
    rng = np.random.default_rng(num_examples + batch_size)
    visited_at = now - 1 - rng.permutation(num_examples)
    strides = rng.integers(1, 3 * num_examples + 1, num_examples)
    visits = minima(num_examples, now, strides, visited_at)
    scheduler = Scheduler(num_examples, now, strides, visited_at)
    for _ in range(soak(60, 6)):
        salt = int(rng.integers(2**32))
        indices, importance_weights = draw(visits, jnp.uint32(salt), batch_size=batch_size)
        expected, elapsed = scheduler.draw(salt, batch_size)
        np.testing.assert_array_equal(indices, expected)
        np.testing.assert_allclose(importance_weights, elapsed / num_examples, rtol=1e-6)
        v = np.exp(rng.normal(size=batch_size) * 2).astype(np.float32)
        visits, strides = visit(visits, indices, v)
        exact = np.clip(num_examples / v.astype(np.float64), 1, visits_lib.longest(num_examples))
        np.testing.assert_allclose(strides, exact, atol=0.5, rtol=1e-6)
        scheduler.write(indices, np.asarray(strides))


@needs_kernels
@pytest.mark.parametrize(("num_examples", "batch_size"), SIZES)
def test_the_kernel_equals_plain_jax(num_examples, batch_size, monkeypatch):
    """Red if the kernel and plain JAX differ in one example or one time, with v that are NaN, zero, huge or foreign."""

    def step(visits, salt, v, indices, others):
        drawn, importance_weights = visits_lib.draw(visits, salt, batch_size)
        visits = visits_lib.write(visits_lib.visit(visits, drawn), indices, others, arrived=False)
        return visits_lib.write(visits, drawn, v, arrived=True), drawn, importance_weights

    def plain(function, in_plain_jax, results, *args, aliases=None, **attributes):
        return in_plain_jax(*args, **attributes)

    compiled = []
    for call in (kernels.on_cpu, plain):
        monkeypatch.setattr(kernels, "on_cpu", call)
        f32 = jnp.float32
        arguments = jnp.zeros(batch_size, f32), jnp.zeros(7, jnp.int32), jnp.zeros(7, f32)
        visits = visits_lib.init(jax.random.key(1), num_examples)
        # A function of its own, or the program traced first would be compiled twice.
        compiled.append(jax.jit(functools.partial(step)).lower(visits, jnp.uint32(0), *arguments).compile())
    rng = np.random.default_rng(num_examples)
    states = [visits, visits]
    values = np.array([0, np.nan, np.inf, -1, 1e-30, 1e30, 1, 3, 0.1], np.float32)
    for _ in range(soak(100, 10)):
        v = jnp.asarray(rng.choice(values, batch_size))
        indices = rng.choice(num_examples + 4, min(7, num_examples + 4), replace=False) - 2
        indices = jnp.asarray(np.resize(indices, 7) if num_examples < 3 else indices, jnp.int32)
        others = jnp.full(7, rng.choice(values), jnp.float32)
        arguments = jnp.uint32(rng.integers(2**32)), v, indices, others
        results = [run(state, *arguments) for run, state in zip(compiled, states)]
        jax.tree.map(np.testing.assert_array_equal, *results)
        states = [result[0] for result in results]


NORMS = st.one_of(
    st.floats(0, 2.0**100, width=32), st.sampled_from([0.0, 1.0, float("nan"), float("inf"), -1.0, 1e-38, 3e38])
)


@hypothesis.settings(max_examples=soak(200, 15), deadline=None)
@hypothesis.given(
    norms=st.lists(NORMS, min_size=37, max_size=37),
    proposal=st.sampled_from(
        [Uniform(), Mixture(Calibrated()), Mixture(Calibrated(), 0.05), Proportional(0.0), Calibrated()]
    ),
    seed=st.integers(0, 2**20),
    first=st.sampled_from([0, 2**29 - 20]),
)
def test_importance_weights_add_up_to_the_time_that_has_passed(norms, proposal, seed, first):
    """Red if any norm makes an example count for more or less than its time, wait too long, or come twice at once."""
    num_examples, batch_size = 37, 4
    sampler = Sampler(num_examples, batch_size, proposal, draw="stride", rebuild_every=3)
    step, state = _compiled(sampler), sampler.init(seed)
    now = int(np.int64(first) * batch_size)
    visited_at, strides = np.asarray(state.visits.visited_at, np.int64) + now, state.visits.strides()
    visits = minima(num_examples, now, strides, visited_at)._replace(mean_v=state.visits.mean_v)
    state = state._replace(visits=visits, num_draws=jnp.int32(first), step=jnp.int32(first))
    norms, rng = np.asarray(norms, np.float32), np.random.default_rng(seed)
    last_visit, weights, first_visit = {}, dict.fromkeys(range(num_examples), 0.0), {}
    bound = visits_lib.longest(num_examples) + num_examples + batch_size
    for number in range(60):
        state, drawn = step(sampler, state, jnp.asarray(rng.permutation(norms)))
        indices, importance_weights = np.asarray(drawn.indices), np.asarray(drawn.importance_weights, np.float64)
        assert len(set(indices.tolist())) == batch_size and np.all((indices >= 0) & (indices < num_examples))
        for place, (n, weight) in enumerate(zip(indices.tolist(), importance_weights)):
            time = number * batch_size + place
            assert weight * num_examples <= bound
            if n in last_visit:
                weights[n] += round(weight * num_examples)
                assert weights[n] == time - first_visit[n]
            else:
                first_visit[n] = time
            last_visit[n] = time


@functools.cache
def _compiled(sampler):
    @jax.jit
    def step(sampler, state, norms):
        state, drawn = sampler.draw(state)
        return sampler.update(state, drawn, norms[drawn.indices]), drawn

    return step


def test_no_visit_is_later_than_the_bound():
    """Red if an example with a small share is not visited within stride + N + B: its importance weight has no limit."""
    num_examples, batch_size, fraction = 500, 16, 0.1
    sampler = Sampler(num_examples, batch_size, Mixture(Calibrated(), fraction), draw="stride", rebuild_every=0)
    state = sampler.init(0)
    norms = jnp.exp(3 * jax.random.normal(jax.random.key(1), (num_examples,)))
    state = sampler.ingest(state, jnp.arange(num_examples), norms, 0)
    largest = []
    for _ in range(12 * num_examples // batch_size):
        state, drawn = sampler.draw(state)
        state = sampler.update(state, drawn, norms[drawn.indices])
        largest.append(float(jnp.max(drawn.importance_weights)))
    assert 1 < max(largest) <= 1 / fraction + 1 + batch_size / num_examples


@pytest.mark.parametrize(("num_examples", "batch_size"), [(60, 12), (61, 12), (7, 7)])
@pytest.mark.parametrize("updated", [True, False])
def test_uniform_visits_are_shuffled_epochs_with_even_gaps(num_examples, batch_size, updated):
    """Red if a uniform run repeats an example before all others, or an importance weight is not exactly 1."""
    sampler = Sampler(num_examples, batch_size, Uniform(), draw="stride")
    state, order = sampler.init(3), []
    for _ in range(5 * num_examples // batch_size):
        state, drawn = sampler.draw(state)
        if updated:
            state = sampler.update(state, drawn, None)
        assert drawn.importance_weights.tolist() == [1.0] * batch_size
        order += drawn.indices.tolist()
    assert sorted(order[:num_examples]) == list(range(num_examples))
    assert order[num_examples:] == order[: len(order) - num_examples]


def mean_of_visits(draw, values, num_steps, proposal):
    """The means of importance_weight * value over the first 1, 2, ... minibatches."""
    sampler = Sampler(len(values), 8, proposal, draw=draw)

    @jax.jit
    def run(state):
        def step(state, _):
            state, drawn = sampler.draw(state)
            state = sampler.update(state, drawn, 1 + jnp.abs(values[drawn.indices]))
            return state, jnp.mean(drawn.importance_weights * values[drawn.indices])

        return jax.lax.scan(step, state, length=num_steps)[1]

    return np.cumsum(np.asarray(run(sampler.init(5)), np.float64)) / np.arange(1, num_steps + 1)


@pytest.mark.parametrize("proposal", [Uniform(), Mixture(Calibrated(), 0.2)], ids=["uniform", "calibrated"])
def test_the_mean_over_time_converges_as_one_over_t(proposal):
    """Red if minibatches do not balance each other: the error of the mean then falls as 1 / sqrt(t)."""
    values = jnp.exp(jax.random.normal(jax.random.key(0), (512,)))
    exact, steps = float(np.mean(np.asarray(values, np.float64))), np.array([400, 800, 1600, 3200, 6400])

    errors = np.abs(mean_of_visits("stride", values, steps[-1], proposal) - exact)
    errors = np.array([np.sqrt(np.mean(errors[t // 2 : t] ** 2)) for t in steps])
    assert np.all(errors * steps < 2 * errors[0] * steps[0])  # the error times t is bounded
    assert errors[-1] < errors[0] / 8  # 1 / sqrt(t) would be a quarter


def test_an_example_in_flight_is_not_drawn_again_before_its_update():
    """Red if draws ahead of their updates repeat examples, or a score from elsewhere ends a flight."""
    sampler = Sampler(100, 10, draw="stride")
    state, seen = sampler.init(0), []
    for _ in range(9):
        state, drawn = sampler.draw(state)
        seen += drawn.indices.tolist()
        state = sampler.ingest(state, drawn.indices, jnp.full(10, 1e6), 0, rebuild=False)
    state = sampler.rebuild(state)
    state, drawn = sampler.draw(state)
    assert len({*seen, *drawn.indices.tolist()}) == 100


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_prefetched_visits_balance(depth):
    """Red if a draw ahead of the learner repeats an example that is in flight, or counts its time wrongly."""
    norms = np.exp(np.random.default_rng(0).normal(size=200) * 2).astype(np.float32)
    sampler, last_visit = Sampler(200, 8, draw="stride"), {}
    state = sampler.init(3)
    with Prefetch(sampler, (norms,), depth=depth) as prefetch:
        for number in range(150):
            state, drawn, (rows,) = prefetch.draw(state)
            np.testing.assert_array_equal(rows, norms[drawn.indices])
            for place, (n, weight) in enumerate(zip(drawn.indices.tolist(), drawn.importance_weights.tolist())):
                time = 8 * number + place
                assert n not in last_visit or round(weight * 200) == time - last_visit[n] > depth * 8 - 8
                last_visit[n] = time
            state = sampler.update(state, drawn, rows)


def test_a_prefetch_of_more_than_all_examples_is_refused():
    """Red if minibatches in flight that need more examples than there are repeat some in silence."""
    with pytest.raises(ValueError, match="depth 3, batch_size 8 and 30 examples: lower the depth"):
        Prefetch(Sampler(30, 8, draw="stride"), np.zeros(30), depth=3)


def test_a_score_from_elsewhere_moves_the_deadline():
    """Red if a worker's score does not bring an example forward, or changes when it was visited."""
    sampler = Sampler(1000, 10, Proportional(1.0), draw="stride")
    state = sampler.ingest(sampler.init(0), jnp.arange(1000), jnp.ones(1000), 0)
    late = jnp.argsort(state.visits.strides() + state.visits.visited_at)[-5:]
    state = sampler.ingest(state, late, jnp.full(5, 1e6), 0, rebuild=False)
    state, drawn = sampler.draw(state)
    assert set(late.tolist()) <= set(drawn.indices.tolist())


@pytest.mark.parametrize("num_more", [1, 30, 1000])
def test_new_and_removed_examples(num_more):
    """Red if new examples wait longer than others or come all at once, or a removed one leaves a place behind."""
    sampler = Sampler(50, 5, draw="stride")
    step, state = _compiled(sampler), sampler.init(1)
    for _ in range(20):
        state, _ = step(sampler, state, jnp.ones(50))
    sampler, state = sampler.append(state, num_more)
    step, seen, num_epoch = _compiled(sampler), [], -(-(50 + num_more) // 5)
    for _ in range(num_epoch):
        state, drawn = step(sampler, state, jnp.ones(50 + num_more))
        seen.append(drawn.indices.tolist())
    new = {n for batch in seen for n in batch if n >= 50}
    assert len(new) >= num_more * 0.9 - 1
    sampler, state, old_indices = sampler.remove(state, [0, 49])
    assert old_indices.tolist() == [*range(1, 49), *range(50, 50 + num_more)]
    step = _compiled(sampler)
    for _ in range(3):
        state, drawn = step(sampler, state, jnp.ones(48 + num_more))
        assert np.max(drawn.indices) < 48 + num_more
    assert state.visits.num_examples == 48 + num_more


def test_a_run_is_a_function_of_its_seed():
    """Red if ties are broken by chance or by the index, or the order of the first epoch does not depend on the seed."""

    def draws(seed, number):
        sampler = Sampler(64, 8, Uniform(), draw="stride")
        state, drawn = sampler.init(seed), []
        state = state._replace(visits=minima(64, 0, np.full(64, 64), np.full(64, -64)), num_draws=jnp.int32(number))
        for _ in range(8):
            state, minibatch = sampler.draw(state)
            drawn += minibatch.indices.tolist()
        return drawn

    assert draws(1, 0) == draws(1, 0) != draws(2, 0)
    assert sorted(draws(1, 0)) == list(range(64)) != draws(1, 0)
    first = [Sampler(64, 8, draw="stride").init(seed).visits.deadlines[:64].tolist() for seed in (1, 1, 2)]
    assert first[0] == first[1] != first[2]


@pytest.mark.parametrize(
    "call",
    [
        lambda sampler, state: sampler.draw(state, uniform_draw=True),
        lambda sampler, state: sampler.draw_number(state, 3),
        lambda sampler, state: sampler.draw_number(state, 3, uniform_draw=True),
    ],
)
def test_draws_that_no_visit_follows_are_refused(call):
    """Red if a draw that is not counted leaves the times of its examples as they were, in silence."""
    sampler = Sampler(20, 4, draw="stride")
    with pytest.raises(ValueError, match="one draw after the other"):
        call(sampler, sampler.init(0))


def test_a_proposal_that_excludes_examples_is_refused():
    """Red if examples without a usable score are never visited, and nothing says so."""
    with pytest.raises(ValueError, match="max_staleness = 5 excludes some"):
        Sampler(20, 4, Proportional(1.0, max_staleness=5), draw="stride")


@pytest.mark.parametrize("draws", [("stride", "systematic"), ("systematic", "stride")])
def test_a_state_of_another_kind_of_draw_is_refused(draws):
    """Red if a state without visits, or with nothing else, ends in an error of a missing attribute."""
    first, second = (Sampler(20, 4, draw=draw) for draw in draws)
    with pytest.raises(ValueError, match=f"the state is that of another draw than '{draws[1]}'"):
        second.draw(first.init(0))


def test_minibatches_larger_than_the_data_are_refused():
    """Red if a minibatch has no different examples to hold."""
    with pytest.raises(ValueError, match="batch_size must be between 1 and 20"):
        Sampler(20, 21, draw="stride")


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_unit_of_the_norms_does_not_matter(scale):
    """Red if the first norms are compared with v = 1: large ones would be visited again at once, small ones never."""
    sampler = Sampler(400, 8, draw="stride")
    step, state, norms = _compiled(sampler), sampler.init(0), scale * (1 + jnp.arange(400) % 3)
    seen = []
    for _ in range(40):
        state, drawn = step(sampler, state, norms)
        seen += drawn.indices.tolist()
    assert len(set(seen)) > 200


def test_v_is_read_back_from_strides():
    """Red if the monitor sees another v than the one by which deadlines are set."""
    v = jnp.exp(jax.random.normal(jax.random.key(0), (5000,)))
    visits = visits_lib.rebuild(visits_lib.init(jax.random.key(1), 5000), v)
    np.testing.assert_allclose(visits.v(), np.maximum(v, np.mean(v) / visits_lib.MAX_EPOCHS), rtol=2e-3)
    np.testing.assert_allclose(visits.mean_v, jnp.mean(v), rtol=1e-5)
    np.testing.assert_allclose(visits.v(jnp.array([3, -1, 5000])), [v[3], *[jnp.mean(v)] * 2], rtol=2e-3)
