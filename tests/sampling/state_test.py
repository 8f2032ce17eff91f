"""The sampler's state in a user's hands: compiled or not, saved and restored, more examples, wrong use."""

import re

import equinox
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint
import pytest

from issgd_jax.sampling import (
    Calibrated,
    Draw,
    Mixture,
    Proportional,
    Sampler,
    ScoreStore,
    Uniform,
    build_table,
    draw,
    moments,
    transitions,
)
from issgd_jax.sampling.draws import draw_number
from tests.sampling.helpers import lognormal

NUM_EXAMPLES, BATCH_SIZE = 200, 8
NORMS = jnp.asarray(lognormal(NUM_EXAMPLES))


def check_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def step(sampler, state):
    state, drawn = sampler.draw(state)
    return sampler.update(state, drawn, NORMS[drawn.indices]), drawn


def run(sampler, state, steps):
    for _ in range(steps):
        state, drawn = step(sampler, state)
    return state, drawn


@pytest.fixture
def used():
    sampler = Sampler(NUM_EXAMPLES, BATCH_SIZE)
    return sampler, run(sampler, sampler.init(1), 40)[0]


def test_called_by_themselves_draw_and_update_compile_once():
    """Red if an eager loop compiles at every step."""
    sampler = Sampler(NUM_EXAMPLES, BATCH_SIZE)
    state, _ = run(sampler, sampler.init(0), 2)
    sizes = [f._cache_size() for f in (draw_number, transitions.update, transitions.init)]
    run(Sampler(NUM_EXAMPLES, BATCH_SIZE), state, 3)
    sampler.init(7)
    assert sizes == [f._cache_size() for f in (draw_number, transitions.update, transitions.init)]


def test_compiled_in_the_callers_step_it_draws_the_same():
    """Red if `jit` around the calls changes a draw or a score."""
    sampler = Sampler(NUM_EXAMPLES, BATCH_SIZE, rebuild_every=4)
    compiled = jax.jit(step, donate_argnums=1)
    eager, inside = sampler.init(3), sampler.init(3)
    for _ in range(10):
        eager, drawn = step(sampler, eager)
        inside, also_drawn = compiled(sampler, inside)
        np.testing.assert_array_equal(drawn.indices, also_drawn.indices)
        np.testing.assert_allclose(drawn.importance_weights, also_drawn.importance_weights, rtol=1e-5)
    check_equal(eager.store, inside.store)


@pytest.mark.parametrize("proposal", [Proportional(1.0), Mixture(Calibrated())], ids=repr)
def test_an_update_copies_nothing_of_n(proposal):
    """Red if a step, or the branch of a rebuild that is not due, copies store or table."""
    num_examples = 573_000

    def compiled(rebuild_every):
        sampler = Sampler(num_examples, 128, proposal, rebuild_every=rebuild_every)
        program = jax.jit(lambda state: sampler.update(*sampler.draw(state), jnp.ones(128)), donate_argnums=0)
        return program.lower(sampler.init(0)).compile()

    assert compiled(0).memory_analysis().temp_size_in_bytes < num_examples
    large = re.findall(r"= \w+\[(\d+)\]\S* copy\(", compiled(32).as_text())
    assert not [size for size in large if int(size) >= num_examples]


def test_the_table_is_rebuilt_when_it_is_due():
    """Red if scores age without the table: v of examples that were not drawn must change every `rebuild_every`."""
    sampler = Sampler(NUM_EXAMPLES, BATCH_SIZE, rebuild_every=5)
    state, _ = run(sampler, sampler.init(0), 9)
    due, _ = step(sampler, jax.tree.map(jnp.copy, state))
    again = sampler.rebuild(jax.tree.map(jnp.copy, due)).basis  # another program, which may round otherwise
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), due.basis, again)
    never = Sampler(NUM_EXAMPLES, BATCH_SIZE, rebuild_every=0)
    other, _ = step(never, jax.tree.map(jnp.copy, state))
    assert not np.array_equal(due.basis.mean, other.basis.mean)
    np.testing.assert_allclose(never.rebuild(other).table.v(), due.table.v(), rtol=1e-5)


@pytest.mark.parametrize("unit", [1e-3, 1.0, 1e3])
def test_the_unit_of_the_norms_does_not_matter_from_the_first_update_on(unit):
    """Red if never-scored examples keep v = 1 for long: with large norms the first minibatches would be drawn again."""
    sampler = Sampler(2000, 32)
    state, norms = sampler.init(0), unit * jnp.asarray(lognormal(2000))
    for _ in range(31):
        state, drawn = sampler.draw(state)
        state = sampler.update(state, drawn, norms[drawn.indices])
    assert int(jnp.sum(state.store.scored)) > 650  # of 992 draws
    assert sampler.metrics(state)["gain"] > 0.8


@pytest.mark.parametrize(("num_examples", "expected"), [(1000, 32), (10**7, 4882)])
def test_a_rebuild_is_rarer_where_it_costs_more(num_examples, expected):
    assert Sampler(num_examples, 128).rebuild_every == expected


def save_with_orbax(state, template, folder):
    checkpointer = orbax.checkpoint.StandardCheckpointer()
    checkpointer.save(folder / "state", state)
    checkpointer.wait_until_finished()
    restored = checkpointer.restore(folder / "state", template)
    checkpointer.close()
    return restored


def save_with_flax(state, template, folder):
    (folder / "state").write_bytes(flax.serialization.to_bytes(state))
    return flax.serialization.from_bytes(template, (folder / "state").read_bytes())


def save_with_equinox(state, template, folder):
    equinox.tree_serialise_leaves(folder / "state", state)
    return equinox.tree_deserialise_leaves(folder / "state", template)


@pytest.mark.parametrize("proposal", [Mixture(Calibrated()), Proportional(1.0), Uniform()], ids=repr)
@pytest.mark.parametrize("save", [save_with_orbax, save_with_flax, save_with_equinox])
def test_saved_and_restored_it_goes_on_as_if_it_had_not(save, proposal, tmp_path):
    """Red if a library loses a leaf of the state, or restores it as something the sampler does not take."""
    sampler = Sampler(NUM_EXAMPLES, BATCH_SIZE, proposal)
    state, _ = run(sampler, sampler.init(2), 40)
    restored = save(state, sampler.init(0), tmp_path)
    check_equal(run(sampler, restored, 3), run(sampler, state, 3))


def test_restored_into_a_sampler_with_more_examples(used, tmp_path):
    """Red if old scores move, or new examples are never drawn."""
    sampler, state = used
    old_store = jax.tree.map(np.array, state.store)
    restored = save_with_flax(state, sampler.init(0), tmp_path)
    larger, state = sampler.append(restored, 50)
    assert (larger.num_examples, larger.batch_size, len(state.store)) == (250, 8, 250)
    np.testing.assert_array_equal(state.score[:200], old_store.score)
    np.testing.assert_array_equal(state.scored_at, [*old_store.scored_at.tolist(), *[-1] * 50])
    seen = np.concatenate([larger.draw_number(state, n).indices for n in range(100)])
    assert seen.max() >= 200
    with pytest.raises(ValueError, match="num_examples must be >= 0, got -1"):
        larger.append(state, -1)


def test_metrics_say_how_much_is_gained(used):
    """Red if the gain is not the ratio of second moments, or a number is an array that JSON refuses."""
    sampler, state = used
    metrics = sampler.metrics(state)
    assert all(type(value) in (int, float) for value in metrics.values())
    assert 1 < metrics["gain"] < 6 and metrics["equivalent_batch"] == pytest.approx(8 * metrics["gain"])
    assert 0 < metrics["scored_fraction"] <= 1 and metrics["rejected"] == 0
    assert 0 < metrics["effective_sample_size"] < 8 and metrics["staleness_max"] <= 40
    ideal = Sampler(NUM_EXAMPLES, 64, Proportional(0.0))
    state = ideal.ingest(ideal.init(0), np.arange(NUM_EXAMPLES), NORMS, 0)
    state, _ = run(ideal, state, 50)
    norms = np.asarray(NORMS, np.float64)
    assert ideal.metrics(state)["gain"] == pytest.approx(np.mean(norms**2) / np.mean(norms) ** 2, rel=0.1)
    inside = jax.jit(ideal.metrics)(state)
    assert inside.keys() == metrics.keys() and float(inside["gain"]) == ideal.metrics(state)["gain"]


def test_metrics_of_many_old_scores_do_not_wrap_around():
    """Red if ages are added up in 32 bits."""
    sampler = Sampler(1000, 4)
    state = sampler.ingest(sampler.init(0), np.arange(1000), np.ones(1000), 0)._replace(step=jnp.int32(2**29))
    assert sampler.metrics(state)["staleness_mean"] == pytest.approx(2**29, rel=1e-6)


@pytest.mark.parametrize("batch_size", [2, 4096])
def test_one_diverged_minibatch_does_not_end_the_metrics(batch_size):
    """Red if the sum over a large minibatch is infinite where each square is not, and all later means are NaN."""
    means = moments.update(moments.init(), jnp.full(batch_size, 5e17), jnp.ones(batch_size))
    for _ in range(1000):
        means = moments.update(means, jnp.array([3.0, 1.0]), jnp.array([0.5, 1.5]))
    assert float(moments.gain(means)) == pytest.approx(4 / 3, rel=1e-3)


def test_uniform_is_the_same_code_and_gains_nothing():
    sampler = Sampler(NUM_EXAMPLES, BATCH_SIZE, Uniform())
    state, drawn = run(sampler, sampler.init(0), 5)
    np.testing.assert_array_equal(drawn.importance_weights, 1)
    assert sampler.metrics(state)["gain"] == pytest.approx(1)


def test_norms_that_are_no_numbers_leave_the_metrics_whole():
    sampler = Sampler(NUM_EXAMPLES, BATCH_SIZE)
    state, drawn = sampler.draw(sampler.init(0))
    state = sampler.update(state, drawn, jnp.full(BATCH_SIZE, jnp.nan).at[0].set(jnp.inf).at[1].set(1e30))
    metrics = sampler.metrics(run(sampler, state, 3)[0])
    assert np.isfinite(list(metrics.values())).all() and metrics["rejected"] == BATCH_SIZE - 1


@pytest.mark.parametrize("dtype", [np.float64, np.float16, jnp.bfloat16, np.int32])
def test_norms_of_other_types_enter(dtype, used):
    sampler, state = used
    state, drawn = sampler.draw(state)
    state = sampler.update(state, drawn, np.arange(1, 9).astype(dtype))
    assert state.score.dtype == jnp.float32 and float(state.score[drawn.indices[7]]) == 8


def test_indices_beyond_32_bits_are_padding():
    """Red if an index of 64 bits wraps around to an example."""
    sampler = Sampler(NUM_EXAMPLES, BATCH_SIZE)
    state = sampler.ingest(sampler.init(0), np.array([2**32 + 3, -(2**40), 5]), [1.0, 2.0, 3.0], scored_at=0)
    np.testing.assert_array_equal(np.flatnonzero(state.store.scored), [5])


def refused(error, message, call):
    with pytest.raises(error, match=message):
        call()


def test_wrong_use_is_refused(used):
    """Red if one of these is silent."""
    sampler, state = used
    state, drawn = sampler.draw(state)
    indices, weights = drawn
    ones = jnp.ones(BATCH_SIZE)
    refused(ValueError, r"norms must have the shape of the draw, \(8,\).*got \(7,\)",
            lambda: sampler.update(state, drawn, jnp.ones(7)))  # fmt: skip
    refused(ValueError, r"scores must have the shape", lambda: sampler.update(state, drawn, ones, scores=jnp.ones(3)))
    refused(ValueError, "the draw is of 300 examples, the sampler of 200",
            lambda: sampler.update(state, Sampler(300, 8).draw(Sampler(300, 8).init(0))[1], ones))  # fmt: skip
    refused(ValueError, "no importance weights: .*use ingest", lambda: sampler.update(state, Draw(indices, None), ones))
    refused(TypeError, "drawn must be a Draw, got tuple", lambda: sampler.update(state, (indices, weights), ones))
    refused(ValueError, "the state is of 200 examples, the sampler of 300", lambda: Sampler(300, 8).draw(state))
    for wrong in ({"score": 1}, state.store, state.table, None):
        refused(TypeError, "state must be a SamplerState, got", lambda wrong=wrong: sampler.draw(wrong))
        refused(TypeError, "state must be", lambda wrong=wrong: sampler.metrics(wrong))
    refused(TypeError, "indices must be whole numbers", lambda: sampler.ingest(state, [0.5], [1.0], 0))
    refused(ValueError, "need a score for each index", lambda: sampler.ingest(state, [0, 1], [1.0], 0))
    refused(TypeError, "table must be a Table, got ScoreStore", lambda: draw(jax.random.key(0), state.store, 4))
    refused(ValueError, "rebuild_every must be between 0 and .*, got -1", lambda: Sampler(10, 2, rebuild_every=-1))
    assert isinstance(sampler.update(state, drawn, ones).store, ScoreStore)  # none of it has harmed the state


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_a_table_of_bad_numbers_is_refused(bad):
    """Red if such a table draws as if nothing were wrong."""
    with pytest.raises(ValueError, match=r"v must be finite and >= 0, got .* of example 1 and 1 more"):
        build_table(np.array([1.0, bad, 2.0, bad], np.float32))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_a_bad_number_never_enters_a_table(bad):
    table = build_table(jnp.array([1.0, 2.0, 3.0])).write(jnp.array([0, 1]), jnp.array([bad, 5.0]))
    np.testing.assert_array_equal(table.v(), [1, 5, 3])
