"""Prefetch against `Sampler.draw` and plain indexing, under donation, errors, other states and its own end."""

import functools
import gc
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from issgd_jax.loading import prefetch as prefetch_lib
from issgd_jax.loading.prefetch import Prefetch
from issgd_jax.sampling import Proportional, Sampler, Uniform
from tests.sampling.helpers import lognormal

NUM_EXAMPLES, BATCH_SIZE = 50, 8
X = np.random.default_rng(0).normal(size=(NUM_EXAMPLES, 3)).astype(np.float32)
SAMPLER = Sampler(NUM_EXAMPLES, BATCH_SIZE, Proportional(1.0))


@jax.jit
def draw(sampler, state):
    return sampler.draw(state)


@functools.partial(jax.jit, donate_argnums=1)
def update(sampler, state, drawn):
    """Returns the state with scores that are a function of the draw."""
    norms = 1 + jnp.sin(drawn.indices + state.step.astype(jnp.float32)) ** 2 * 9
    return sampler.update(state, drawn, norms)


def scored(seed=0, sampler=SAMPLER):
    """Returns a state whose draws are far from uniform."""
    indices = np.arange(sampler.num_examples)
    state = sampler.ingest(sampler.init(seed), indices, lognormal(sampler.num_examples), jnp.int32(0))
    return jax.block_until_ready(state)


def copy(state):
    return jax.block_until_ready(jax.tree.map(jnp.copy, state))


def assert_same(actual, expected):
    (state, drawn, batch), (expected_state, expected_drawn) = actual, expected
    np.testing.assert_array_equal(drawn.indices, expected_drawn.indices)
    np.testing.assert_array_equal(drawn.importance_weights, expected_drawn.importance_weights)
    np.testing.assert_array_equal(batch, X[np.asarray(drawn.indices)])
    assert int(state.num_draws) == int(expected_state.num_draws)


@pytest.mark.parametrize("method", ["systematic", "without_replacement", "shuffled"])
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_draws_are_those_of_the_sampler_while_the_table_stays(depth, method):
    sampler = Sampler(NUM_EXAMPLES, BATCH_SIZE, Uniform() if method == "shuffled" else Proportional(1.0), draw=method)
    state = expected = scored(sampler=sampler)
    with Prefetch(sampler, X, depth) as prefetch:
        for _ in range(10):
            actual, correct = prefetch.draw(state), draw(sampler, expected)
            assert_same(actual, correct)
            state, expected = actual[0], correct[0]


@pytest.mark.parametrize("depth", [0, 2])
def test_a_draw_comes_from_the_table_of_depth_draws_before(depth):
    """Hundreds of steps whose states are donated; with depth 0 it is the loop without Prefetch."""
    state, plain, tables = scored(), scored(), []
    with Prefetch(SAMPLER, X, depth) as prefetch:
        for step in range(300):
            tables.append(copy(plain))
            state, drawn, batch = prefetch.draw(state)
            old = tables[max(step - depth, 0)]
            expected = jax.jit(Sampler.draw_number)(SAMPLER, old, jnp.int32(step))
            np.testing.assert_array_equal(drawn.indices, expected.indices)
            np.testing.assert_array_equal(drawn.importance_weights, expected.importance_weights)
            np.testing.assert_array_equal(batch, X[np.asarray(drawn.indices)])
            plain = update(SAMPLER, plain._replace(num_draws=plain.num_draws + 1), expected)
            state = update(SAMPLER, state, drawn)
    jax.tree.map(np.testing.assert_array_equal, state, plain)


def test_the_mean_over_prefetched_draws_is_unbiased():
    """Red if a draw of an old table gets the importance weights of another, or rows of another draw: 4 sigma."""
    f = X[:, 0] * 5 + 3
    state, means = scored(), []
    with Prefetch(SAMPLER, f) as prefetch:
        for _ in range(3000):
            state, drawn, batch = prefetch.draw(state)
            state = update(SAMPLER, state, drawn)
            means.append(jnp.mean(drawn.importance_weights * batch))
    means = np.array(means)
    error = means.std() / np.sqrt(len(means))
    assert error < 0.1 and abs(means.mean() - f.mean()) < 4 * error


@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize("other", ["earlier", "of another seed"])
def test_a_state_that_does_not_follow_never_passes_unseen(other, depth):
    """Red if a restored state, or that of another seed, gets what was drawn for the last one without a word."""
    prefetch, state = Prefetch(SAMPLER, X, depth), scored()
    saved = copy(state) if other == "earlier" else scored(seed=1)
    for _ in range(4):
        state, drawn, _ = prefetch.draw(state)
        state = update(SAMPLER, state, drawn)
    with pytest.raises(RuntimeError, match="was to follow, but the states given are those of draw .*: make a new"):
        for _ in range(depth + 1):
            saved, _, _ = prefetch.draw(saved)
    assert_same(prefetch.draw(saved), draw(SAMPLER, saved))  # it begins again from there
    assert_same(Prefetch(SAMPLER, X, depth).draw(saved), draw(SAMPLER, saved))


@pytest.mark.parametrize("depth", [0, 2])
def test_errors_of_the_source_raise_in_their_draw_and_the_next_tries_again(depth):
    failures = []

    def collate(examples):
        if len(failures) == 1:
            failures.append("raised")
            raise OSError("disk is gone")
        failures.append("passed") if not failures else None
        return np.stack(examples)

    state = scored()
    with Prefetch(SAMPLER, list(X), depth, collate) as prefetch:
        actual, expected = prefetch.draw(state), draw(SAMPLER, state)
        assert_same(actual, expected)
        state = actual[0]
        with pytest.raises(OSError, match="disk is gone"):
            prefetch.draw(state)
        assert_same(prefetch.draw(state), draw(SAMPLER, state))


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_an_interrupted_draw_leaves_nothing_behind(failing, monkeypatch):
    """Red if a draw that was dispatched before an interrupt is handed to a run that begins again from another state."""
    calls = []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == failing:
            raise KeyboardInterrupt
        return draw_ahead(*args, **kwargs)

    draw_ahead = prefetch_lib._draw_ahead
    monkeypatch.setattr(prefetch_lib, "_draw_ahead", interrupted)
    with Prefetch(SAMPLER, X, 2) as prefetch:
        with pytest.raises(KeyboardInterrupt):
            prefetch.draw(scored())
        other = scored(seed=1)
        assert_same(prefetch.draw(other), draw(SAMPLER, other))


def test_ragged_rows_raise_where_they_are_drawn():
    with (
        Prefetch(SAMPLER, [np.ones(1 + n % 2) for n in range(NUM_EXAMPLES)]) as prefetch,
        pytest.raises(ValueError, match="examples of different shapes.*pass collate="),
    ):
        prefetch.draw(scored())


@pytest.mark.parametrize("size", [NUM_EXAMPLES - 1, NUM_EXAMPLES + 1])
def test_the_source_must_have_the_examples_of_the_sampler(size):
    with pytest.raises(ValueError, match=rf"source has {size} examples, but sampler.num_examples is {NUM_EXAMPLES}"):
        Prefetch(SAMPLER, np.ones(size))


def test_misuse():
    with pytest.raises(ValueError, match="depth must be >= 0, got -1"):
        Prefetch(SAMPLER, X, depth=-1)
    with pytest.raises(TypeError, match="cannot be compiled: call it outside jit"):
        jax.jit(lambda state: Prefetch(SAMPLER, X).draw(state))(scored())
    prefetch = Prefetch(SAMPLER, X)
    prefetch.close()
    prefetch.close()
    with pytest.raises(RuntimeError, match="Prefetch is closed"):
        prefetch.draw(scored())


@pytest.mark.parametrize("sharded", [False, True])
def test_batches_are_put_where_they_are_wanted(sharded):
    mesh = Mesh(np.asarray(jax.devices()[:2]), ("data",))
    device = NamedSharding(mesh, PartitionSpec("data")) if sharded else jax.devices()[3]
    with Prefetch(SAMPLER, {"x": X}, device=device) as prefetch:
        _, drawn, batch = prefetch.draw(scored())
    np.testing.assert_array_equal(batch["x"], X[np.asarray(drawn.indices)])
    assert batch["x"].sharding == (device if sharded else jax.sharding.SingleDeviceSharding(device))


def test_nothing_passes_through_the_host_unseen():
    """Red if a draw copies an array, or a Python number, by the way."""
    state, sampler = scored(), jax.device_put(SAMPLER)
    with Prefetch(SAMPLER, X) as prefetch, jax.transfer_guard("disallow"):
        for _ in range(3):
            state, drawn, _ = prefetch.draw(state)
            state = update(sampler, state, drawn)


@pytest.mark.parametrize("end", ["close", "with", "garbage"])
def test_its_thread_ends(end):
    """Red if a thread holds the object, or waits for more."""
    before = set(threading.enumerate())
    prefetch = Prefetch(SAMPLER, X)
    prefetch.draw(scored())
    (thread,) = set(threading.enumerate()) - before
    if end == "close":
        prefetch.close()
    elif end == "with":
        with prefetch:
            pass
    else:
        del prefetch
        gc.collect()
    thread.join(60)
    assert not thread.is_alive()


def test_a_program_ends_that_does_not_close_it():
    code = (
        "import numpy as np, issgd_jax; sampler = issgd_jax.Sampler(10, 2);"
        "prefetch = issgd_jax.Prefetch(sampler, np.ones(10)); print(len(prefetch.draw(sampler.init(0))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "3\n"
