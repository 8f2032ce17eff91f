"""Each proposal's promise; a biased, unbounded or worse-than-uniform v turns these red."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from issgd_jax import sampling
from issgd_jax.proposal import Calibrated, Mixture, Proportional, Uniform
from issgd_jax.store import ScoreStore

PROPOSALS = [
    Uniform(),
    Proportional(1.0),
    Proportional(0.0),
    Proportional(1.0, max_staleness=5),
    Calibrated(),
    Calibrated(0.0),
]
PROPOSALS += [Proportional(1.0, relative=True), Mixture(Proportional(1.0), 0.1)]


def store_of(score, scored_at=0):
    score = jnp.asarray(score, jnp.float32)
    return ScoreStore(score, jnp.broadcast_to(jnp.int32(scored_at), score.shape))


def table_of(proposal, store, step, state=None):
    step = jnp.int32(step)
    return proposal.table(proposal.basis(proposal.init() if state is None else state, store, step), store, step)


def v_of(proposal, store, step, state=None):
    return np.asarray(table_of(proposal, store, step, state).v())


def second_moment(v, norms):
    return v.mean(dtype=float) * np.mean(norms.astype(float) ** 2 / v)


def learn(proposal, score, staleness, norms, sweeps=3):
    """State after re-scoring all examples some times, each time from `score`, `staleness` steps old, to `norms`."""
    state, indices = proposal.init(), jnp.arange(len(score))
    observe = jax.jit(proposal.observe)
    for _ in range(sweeps):
        state = observe(state, store_of(score, 0), indices, jnp.asarray(norms, jnp.float32), jnp.int32(staleness))
    return state


def lognormal(size, sigma=1.0, seed=0):
    return np.random.default_rng(seed).lognormal(0, sigma, size).astype(np.float32)


@pytest.mark.parametrize("proposal", PROPOSALS, ids=repr)
def test_before_any_score_all_are_equally_likely(proposal):
    v = v_of(proposal, ScoreStore.init(10), step=0)
    assert np.all(v == v[0]) and v[0] > 0


@pytest.mark.parametrize("proposal", PROPOSALS, ids=repr)
def test_changing_a_number_does_not_recompile(proposal):
    traces = []

    @jax.jit
    def table(proposal, store, step):
        traces.append(step)
        return proposal.table(proposal.basis(proposal.init(), store, step), store, step)

    changed = jax.tree.map(lambda leaf: leaf + leaf, jax.device_put(proposal))
    table(jax.device_put(proposal), ScoreStore.init(5), jnp.int32(0))
    table(changed, ScoreStore.init(5), jnp.int32(1))
    assert len(traces) == 1


@pytest.mark.parametrize("proposal", [Proportional(0.5), Calibrated()], ids=repr)
def test_never_scored_examples_get_the_mean_of_the_others(proposal):
    store = ScoreStore(jnp.array([1.0, 0.0, 3.0, 0.0]), jnp.array([4, -1, 4, -1]))
    v = v_of(proposal, store, step=4)
    np.testing.assert_allclose(v[[1, 3]], (v[0] + v[2]) / 2, rtol=1e-6)


def test_proportional_is_score_plus_smoothing():
    np.testing.assert_allclose(v_of(Proportional(10.0), store_of([0.0, 1.0, 30.0]), step=3), [10, 11, 40])


def test_proportional_without_smoothing_leaves_no_scored_example_out():
    v = v_of(Proportional(0.0), store_of([0.0, 1.0, 2.0]), step=100)
    assert np.all(v > 0) and v[0] < 1e-3


def test_max_staleness_leaves_old_scores_out_and_averages_over_the_rest():
    store = ScoreStore(jnp.array([1.0, 2.0, 3.0, 4.0]), jnp.array([10, 9, 2, -1]))
    table = table_of(Proportional(1.0, max_staleness=5), store, 12)
    np.testing.assert_array_equal(table.v(), [2, 3, 0, 0])
    # The paper's importance weight: (sum of v / number usable) / v_n.
    np.testing.assert_allclose(table.mean_v, (2 + 3) / 2)


def test_max_staleness_is_plain_sgd_while_fewer_than_a_tenth_are_usable():
    scored_at = np.full(21, -1)
    scored_at[:2] = 0
    store = ScoreStore(jnp.arange(21.0), jnp.asarray(scored_at, jnp.int32))
    table = table_of(Proportional(1.0, max_staleness=5), store, 1)
    np.testing.assert_array_equal(table.v(), np.ones(21))
    np.testing.assert_allclose(table.mean_v, 1)


def test_calibrated_with_scores_of_this_very_step_is_ideal():
    norms = lognormal(5000)
    v = v_of(Calibrated(uniform_fraction=0.0), store_of(norms, 7), step=7)
    np.testing.assert_allclose(v, norms, rtol=1e-6)


def test_calibrated_with_scores_that_stay_true_is_within_two_percent_of_ideal():
    norms = lognormal(20_000, 1.5)
    proposal = Calibrated(uniform_fraction=0.0)
    v = v_of(proposal, store_of(norms), 30, learn(proposal, norms, 30, norms))
    assert second_moment(v, norms) < 1.02 * norms.mean(dtype=float) ** 2


@pytest.mark.parametrize("kind", ["useless", "reversed", "noisy", "zero", "ancient", "adversarial"])
@pytest.mark.parametrize("fraction", [0.0, 0.2])
def test_calibrated_is_never_worse_than_uniform(kind, fraction):
    score = lognormal(20_000)
    norms = {
        "useless": lognormal(20_000, seed=1),
        "reversed": 1 / score,
        "noisy": score * lognormal(20_000, 0.7, seed=2),
        "zero": lognormal(20_000, seed=3),
        "ancient": lognormal(20_000, seed=4),
        # What seems hardest has lost its gradient, and some of what seems easiest has the largest.
        "adversarial": np.where(score > 2, 1e-3, np.where(score < 0.1, 30.0, 1.0)).astype(np.float32),
    }[kind]
    staleness = 10**6 if kind == "ancient" else 50
    if kind == "zero":
        score = np.zeros_like(score)
    proposal = Calibrated(uniform_fraction=fraction)
    v = v_of(proposal, store_of(score), staleness, learn(proposal, score, staleness, norms))
    uniform = second_moment(np.ones_like(norms), norms)
    assert second_moment(v, norms) < 1.01 * uniform
    if kind in ("reversed", "noisy"):  # here the score tells something, and it must be used
        assert second_moment(v, norms) < 0.8 * uniform


@pytest.mark.parametrize("spread", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("noise", [0.0, 0.3, 0.7, 1.5])
def test_calibrated_is_as_good_as_the_best_smoothing_in_hindsight(noise, spread):
    """Norms are scores times noise; against every additive constant. The default's larger uniform share costs more."""
    score = lognormal(20_000, spread)
    norms = score * lognormal(20_000, noise, seed=2) if noise else score
    proposal = Calibrated(uniform_fraction=0.05)
    v = v_of(proposal, store_of(score), 50, learn(proposal, score, 50, norms))
    constants = np.array([0, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 100]) * score.mean()
    best = min(second_moment(score + constant, norms) for constant in constants)
    assert second_moment(v, norms) < 1.05 * best


def test_calibrated_trusts_young_scores_more_than_old_ones():
    score = lognormal(20_000)
    proposal = Calibrated(uniform_fraction=0.0)
    state, indices = proposal.init(), jnp.arange(len(score))
    unrelated = lognormal(20_000, seed=1)
    for staleness, norms in ((2, score), (500, unrelated)) * 3:
        state = proposal.observe(state, store_of(score, 0), indices, jnp.asarray(norms), jnp.int32(staleness))
    young, old = (v_of(proposal, store_of(score), step, state) for step in (2, 500))
    ideal = score.mean(dtype=float) ** 2
    assert second_moment(young, score) < 1.05 * ideal < 0.5 * second_moment(np.ones_like(score), score)
    assert second_moment(old, unrelated) < 1.01 * second_moment(np.ones_like(score), unrelated)


def test_calibrated_forgets():
    score, proposal = lognormal(5000), Calibrated(uniform_fraction=0.0, half_life=1.0)
    state = learn(proposal, score, 20, 100 * score, sweeps=2)
    for _ in range(20):
        state = proposal.observe(state, store_of(score), jnp.arange(5000), jnp.asarray(score), jnp.int32(20))
    np.testing.assert_allclose(np.sum(state.counts), 5000 * 2, rtol=0.02)  # 1 + 1/2 + 1/4 + ...
    middle = (score > 0.5) & (score < 2)
    v = state.scale * v_of(proposal, store_of(score), 20, state)  # v is in units of the scale
    np.testing.assert_allclose(v[middle], score[middle], rtol=0.35)


@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.5])
def test_the_uniform_fraction_bounds_importance_weights(fraction):
    score = np.concatenate([np.full(999, 1e-12), [1e6]]).astype(np.float32)
    for proposal in (Calibrated(uniform_fraction=fraction), Mixture(Proportional(0.0), fraction)):
        table = table_of(proposal, store_of(score), 0)
        assert np.max(table.mean_v / np.asarray(table.v())) <= (1 + 1e-5) / fraction


def test_a_mixture_draws_its_share_uniformly():
    score = lognormal(1000, 2.0)
    v, alone = (v_of(p, store_of(score), 3) for p in (Mixture(Proportional(0.5), 0.3), Proportional(0.5)))
    np.testing.assert_allclose(v / v.sum(), 0.3 / 1000 + 0.7 * alone / alone.sum(), rtol=1e-5)


def test_a_mixture_learns_what_the_other_learns():
    score, norms = lognormal(3000), lognormal(3000, seed=1)
    mixture, alone = Mixture(Calibrated(0.0), 0.2), Calibrated(0.2)
    found = v_of(mixture, store_of(score), 30, learn(mixture, score, 30, norms))
    np.testing.assert_allclose(found, v_of(alone, store_of(score), 30, learn(alone, score, 30, norms)), rtol=1e-5)


def test_relative_smoothing_follows_the_mean_score():
    store = ScoreStore(jnp.array([2.0, 4.0, 0.0]), jnp.array([1, 1, -1]))
    np.testing.assert_allclose(v_of(Proportional(0.5, relative=True), store, 3), [3.5, 5.5, 4.5])


@pytest.mark.parametrize("proposal", PROPOSALS, ids=repr)
def test_v_of_one_example_is_that_of_the_table(proposal):
    """Between rounds what is written gets its v alone: it must not be of another unit than the table's."""
    store = ScoreStore(jnp.asarray(lognormal(50)), jnp.arange(50, dtype=jnp.int32) % 9 - 1)
    step, some = jnp.int32(9), jnp.array([3, 0, 49, 18])
    basis = proposal.basis(proposal.init(), store, step)
    alone = proposal.v(basis, store.score[some], store.scored_at[some], step)
    np.testing.assert_allclose(alone, v_of(proposal, store, 9)[some], rtol=1e-5)


def test_calibrated_learns_nothing_from_padding_bad_or_first_scores():
    proposal = Calibrated()
    store = ScoreStore(jnp.array([1.0, 1.0, 0.0]), jnp.array([0, 0, -1]))
    indices = jnp.array([0, 1, 2, 3, -1])
    score = jnp.array([jnp.nan, jnp.inf, 5.0, 7.0, 7.0])
    state = proposal.observe(proposal.init(), store, indices, score, jnp.int32(9))
    assert np.all(np.asarray(state.counts) == 0) and np.all(np.isfinite(state.squares))
    assert state.scale == 5  # the unit comes from the first good score


@pytest.mark.parametrize("place", range(8))
def test_a_scored_example_of_score_zero_is_drawn_beside_the_largest(place):
    """float32 absorbs too small a v beside a large one, and the example is never drawn again: a bias."""
    score = np.zeros(8, np.float32)
    score[place] = 1e6
    table = table_of(Proportional(0.0), store_of(score), 9)
    keys = jax.random.split(jax.random.key(place), 4_000)
    indices = np.asarray(jax.vmap(lambda key: sampling.draw(key, table, 512).indices)(keys)).ravel()
    counts = np.bincount(indices, minlength=8)
    expected = len(indices) * np.asarray(table.v(), np.float64) / np.sum(np.asarray(table.v(), np.float64))
    rare = np.arange(8) != place
    assert np.all(np.abs(counts - expected)[rare] < 5 * np.sqrt(expected[rare]))


def test_calibrated_is_free_of_scale():
    score, norms = lognormal(3000), lognormal(3000, seed=1)
    proposal = Calibrated()
    small, large = (
        v_of(proposal, store_of(unit * score), 30, learn(proposal, unit * score, 30, unit * norms))
        for unit in (1e-17, 1e17)
    )
    np.testing.assert_allclose(small / small.mean(), large / large.mean(), rtol=1e-3)
