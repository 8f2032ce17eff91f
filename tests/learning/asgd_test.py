"""Gradients of old parameters: the right ones, in the right order, without bias, and never older than allowed."""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from issgd_jax import sampling
from issgd_jax.learning.asgd import AsynchronousLearners, next_to_apply
from issgd_jax.learning.learner import Learner, TrainState
from issgd_jax.sampling import Sampler
from issgd_jax.sampling.calibrated import Calibrated
from issgd_jax.sampling.proposal import Mixture, Uniform
from tests.learning.helpers import (
    BATCH_SIZE,
    NUM_EXAMPLES,
    drawing_from,
    full_gradient,
    per_example,
    problem,
    quadratic_loss,
)

SEED = 4


def make(number, *, optimizer, max_delay=None, devices=None, loss_fn=quadratic_loss, **options):
    """Learners, and the state and sampler that they begin with."""
    params, examples = problem()
    devices = devices or jax.devices()
    max_delay = number - 1 if max_delay is None else max_delay
    learners = AsynchronousLearners(
        Learner(loss_fn, optimizer, **options), examples, devices=devices, number=number, max_delay=max_delay
    )
    return learners, TrainState.init(params, optimizer), examples


def calibrated():
    """A sampler that learns, and its first state."""
    sampler = Sampler(NUM_EXAMPLES, BATCH_SIZE, Mixture(Calibrated()), rebuild_every=0)
    return sampler, sampler.init(SEED)


def uniform():
    """A sampler that draws uniformly, and its first state."""
    sampler = Sampler(NUM_EXAMPLES, BATCH_SIZE, Uniform())
    return sampler, sampler.init(SEED)


def run(learners, state, sampler, sampler_state, examples, steps):
    """The states before and after each step; nothing in them is donated to a later one."""
    state, sampler_state = learners.start(state, sampler_state, sampler)
    states = [jax.tree.map(np.array, state)]
    for _ in range(steps):
        state, sampler_state, _ = learners.train_step(state, sampler_state, sampler, examples)
        states.append(jax.tree.map(np.array, state))
    return states, sampler_state


def uneven_table():
    return sampling.build_table(jnp.asarray(np.random.default_rng(1).lognormal(0, 1.5, NUM_EXAMPLES), jnp.float32))


def drawn(table, number):
    return jax.tree.map(np.asarray, sampling.draw(jax.random.fold_in(jax.random.key(SEED), number), table, BATCH_SIZE))


@pytest.mark.parametrize("number", [1, 2, 4, 6])
def test_each_update_is_of_the_parameters_before_k_minus_1_others(number):
    """Against plain numpy: a delay, draw or importance weight of another step, or a momentum applied twice, is seen."""
    steps, rate, momentum = 12, 0.02, 0.9
    learners, state, (x, y) = make(number, optimizer=optax.sgd(rate, momentum, nesterov=True), refresh=False)
    states, _ = run(learners, state, *drawing_from(uneven_table(), seed=SEED), (x, y), steps)

    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    versions = [np.append(np.asarray(states[0].params["w"], np.float64), float(states[0].params["b"]))]
    velocity = np.zeros(4)
    for t in range(steps):
        old = versions[max(0, t - (number - 1))]
        indices, importance_weights = drawn(uneven_table(), t)
        features = np.append(x[indices], np.ones((BATCH_SIZE, 1)), axis=1)
        gradient = np.mean((importance_weights * (features @ old - y[indices]))[:, None] * features, axis=0)
        velocity = gradient + momentum * velocity
        versions.append(versions[-1] - rate * (gradient + momentum * velocity))
    for state, version in zip(states, versions, strict=True):
        np.testing.assert_allclose(np.append(state.params["w"], state.params["b"]), version, rtol=1e-4, atol=1e-5)
        assert len(state.in_flight) == number - 1
    assert int(states[-1].step) == steps and np.abs(versions[-1] - versions[0]).max() > 0.1


def test_one_learner_takes_the_ordinary_step():
    """But for the rounding of programs that are compiled apart."""
    optimizer = optax.sgd(0.02, 0.9, nesterov=True)
    learners, state, examples = make(1, optimizer=optimizer, moments=True)
    plain = Learner(quadratic_loss, optimizer, moments=True).compile()
    sampler, sampler_state = calibrated()
    actual, expected = (jax.tree.map(jnp.copy, (state, sampler_state)) for _ in "12")
    for i in range(6):
        is_uniform = i == 3
        *actual, metrics = learners.train_step(*actual, sampler, examples, uniform=is_uniform)
        *expected, expected_metrics = plain(*expected, sampler, examples, uniform=is_uniform)
        if is_uniform:
            expected_metrics = expected_metrics._replace(minibatch=metrics.minibatch)
        close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
        jax.tree.map(close, (actual, metrics), (expected, expected_metrics))


def test_the_number_of_devices_changes_no_bit():
    """Red if what one learner does depends on when another was done, or the round robin loses one."""
    results = []
    for devices in (jax.devices(), jax.devices()[:1], jax.devices()[:3]):
        learners, state, examples = make(6, optimizer=optax.sgd(0.02, 0.9), devices=devices)
        states, sampler_state = run(learners, state, *calibrated(), examples, 15)
        results.append((states, jax.tree.map(np.array, sampler_state)))
    for result in results[1:]:
        jax.tree.map(np.testing.assert_array_equal, results[0], result)


def test_all_that_is_in_flight_lies_with_its_owner():
    """Else a checkpoint, or the update, would mix devices."""
    learners, state, examples = make(4, optimizer=optax.sgd(0.02))
    sampler, sampler_state = uniform()
    state, sampler_state = learners.start(state, sampler_state, sampler)
    for _ in range(3):
        state, sampler_state, _ = learners.train_step(state, sampler_state, sampler, examples)
        assert all(leaf.devices() == {jax.devices()[0]} for leaf in jax.tree.leaves((state, sampler_state)))


def test_scores_are_those_of_the_parameters_they_were_measured_at():
    """Red if peers' norms enter as of the step that applies them: they would count as fresher than they are."""
    number, steps, seen, versions = 3, 7, {}, []
    learners, state, examples = make(number, optimizer=optax.sgd(0.02, 0.9))
    sampler, sampler_state = calibrated()
    state, sampler_state = learners.start(state, sampler_state, sampler)
    for t in range(steps):
        versions.append(jax.tree.map(np.array, state.params))
        state, sampler_state, metrics = learners.train_step(state, sampler_state, sampler, examples)
        seen |= dict.fromkeys(np.asarray(metrics.minibatch.indices).tolist(), max(0, t - (number - 1)))
    expected = np.full(NUM_EXAMPLES, -1)
    expected[list(seen)] = list(seen.values())
    np.testing.assert_array_equal(sampler_state.store.scored_at, expected)
    assert max(seen.values()) == steps - number
    for n, step in seen.items():
        gradients = per_example(versions[step], jax.tree.map(lambda x, n=n: x[n : n + 1], examples))
        norm = np.sqrt(sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(gradients)))
        np.testing.assert_allclose(sampler_state.store.score[n], norm, rtol=1e-5)


def there_and_back(here, there):
    """An optimiser that goes to and fro between two places, whatever the gradient, and adds the gradients up: those
    applied after an even number of updates, and those after an odd one."""

    def init(params):
        sums, squares = (jax.tree.map(lambda p: jnp.zeros((2, *jnp.shape(p))), params) for _ in "12")
        return jnp.int32(0), sums, squares

    def update(gradient, state, params):
        count, sums, squares = state
        sums = jax.tree.map(lambda s, g: s.at[count % 2].add(g), sums, gradient)
        squares = jax.tree.map(lambda s, g: s.at[count % 2].add(g**2), squares, gradient)
        target = jax.tree.map(lambda a, b: jnp.where(count % 2 == 0, a, b), there, here)
        return jax.tree.map(lambda a, b: a - b, target, params), (count + 1, sums, squares)

    return optax.GradientTransformation(init, update)


def test_applied_gradients_are_unbiased_at_the_parameters_they_are_of():
    """Refreshes change the table between draw and application: an importance weight of the newer v is biased, and so
    is a gradient of the newer parameters, which with a delay of three are the other ones."""
    here, _ = problem()
    there = {"w": jnp.array([-1.0, 2.0, 0.0]), "b": jnp.float32(-2)}
    learners, state, examples = make(4, optimizer=there_and_back(here, there))
    steps, (sampler, sampler_state) = 1500, calibrated()
    state, sampler_state = learners.start(state, sampler_state, sampler)
    for i in range(steps):
        state, sampler_state, metrics = learners.train_step(state, sampler_state, sampler, examples)
        if i % 10 == 9:
            sampler_state = sampler.rebuild(sampler_state)
    assert np.ptp(metrics.minibatch.importance_weights) > 0.1
    _, sums, squares = state.opt_state
    # Updates 0 and 2 are of the first parameters too, as all begin with them.
    for parity, place, other in ((0, there, here), (1, here, there)):
        for name in here:
            mean = np.asarray(sums[name][parity], np.float64) / (steps / 2)
            std = np.sqrt(np.asarray(squares[name][parity], np.float64) / (steps / 2) - mean**2)
            error = std / np.sqrt(steps / 2) + 1e-6
            first_two = 2 / (steps / 2) * np.abs(full_gradient(other, examples)[name] - mean)
            assert np.all(np.abs(mean - full_gradient(place, examples)[name]) < 4 * error + first_two)
            assert np.any(np.abs(mean - full_gradient(other, examples)[name]) > 20 * error)


@given(data=st.data(), number=st.integers(1, 9), slack=st.integers(0, 9))
def test_no_gradient_is_ever_too_late_whoever_is_slow(data, number, slack):
    """Of any order in which gradients become ready; and none is left behind or waited for without need."""
    max_delay, begun = number - 1 + slack, [0] * (number - 1)
    for step in range(40):
        begun.append(step)
        first = data.draw(st.integers(0, number))  # those before it are slow
        ready = [i >= first for i in range(number)]
        chosen = next_to_apply(begun, ready, step=step, max_delay=max_delay)
        assert chosen is not None or not any(ready)
        chosen = data.draw(st.integers(0, number - 1)) if chosen is None else chosen  # one becomes ready at last
        delay = step - begun.pop(chosen)
        assert 0 <= delay <= max_delay
        if slack == 0:
            assert chosen == 0 and delay == min(step, number - 1)
        assert begun == sorted(begun) and len(begun) == number - 1


def test_a_slow_learner_is_overtaken_but_never_by_more_than_the_bound():
    number, max_delay, slow = 3, 5, jax.devices()[1]
    learners, state, examples = make(number, optimizer=optax.sgd(0.0), max_delay=max_delay)
    sampler, sampler_state = uniform()
    gradient_, update = learners._gradient, learners._update
    applied, begun = [], []

    @jax.jit
    def later(x):  # large enough that its caller does not wait for it
        return x & jnp.all(jax.lax.fori_loop(0, 50, lambda _, a: jnp.tanh(a @ a), jnp.ones((300, 300))) < 2)

    def slowly(params, step, *given):
        begun.append(int(step))
        gradient = gradient_(params, step, *given)
        return gradient._replace(finite=later(gradient.finite)) if step.devices() == {slow} else gradient

    def noted(params, opt_state, step, sampler_state, sampler, gradient):
        applied.append(gradient.step)
        return update(params, opt_state, step, sampler_state, sampler, gradient)

    learners._gradient, learners._update = slowly, noted
    state, sampler_state = learners.start(state, sampler_state, sampler)
    for _ in range(30):
        state, sampler_state, _ = learners.train_step(state, sampler_state, sampler, examples)
        time.sleep(0.002)
    applied = [int(step) for step in applied]
    delays = [t - step for t, step in enumerate(applied)]
    assert min(delays) >= 0 and max(delays) == max_delay
    assert min(delays[number:]) < number - 1  # the others go on at their own pace
    # None is lost, none applied twice.
    assert sorted(applied + [int(gradient.step) for gradient in state.in_flight]) == sorted(begun)


def test_a_gradient_that_is_not_finite_is_told_of_with_its_own_minibatch():
    """Not by the loss of a later one: that is of other examples."""

    def bad_for_some(params, x, y):
        return quadratic_loss(params, x, y) + jnp.sqrt(params["w"][0] * jnp.where(y > 3, 0.0, 1.0))  # d sqrt(0) = NaN

    learners, state, examples = make(
        2, optimizer=optax.sgd(0.0), loss_fn=bad_for_some, refresh=False, check_gradient=True
    )
    y, found = np.asarray(examples[1]), []
    sampler, sampler_state = uniform()
    state, sampler_state = learners.start(state, sampler_state, sampler)
    for _ in range(8):
        state, sampler_state, metrics = learners.train_step(
            state._replace(params=problem()[0]), sampler_state, sampler, examples, uniform=True
        )
        indices, _, losses = metrics.minibatch
        assert np.all(np.isfinite(losses))
        assert np.isnan(metrics.loss) == np.any(y[indices] > 3)
        found.append(bool(np.isnan(metrics.loss)))
    assert {True, False} == set(found)


@pytest.mark.parametrize(("number", "max_delay"), [(0, 3), (3, 1)])
def test_numbers_that_cannot_be_are_refused(number, max_delay):
    with pytest.raises(ValueError, match="number >= 1 and max_delay >= number - 1"):
        make(number, optimizer=optax.sgd(0.1), max_delay=max_delay)
