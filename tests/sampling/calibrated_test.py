"""`Calibrated` alone and in the default mixture: red if it is worse than uniform draws or than any smoothing."""

import jax.numpy as jnp
import numpy as np
import pytest

from issgd_jax.sampling import calibrated
from issgd_jax.sampling.calibrated import Calibrated
from issgd_jax.sampling.proposal import FRACTIONS, Mixture
from issgd_jax.sampling.store import ScoreStore
from tests.sampling.helpers import compute_v, learn, lognormal, make_store, observe, second_moment

DEFAULT = Mixture(Calibrated())
BOTH = pytest.mark.parametrize("proposal", [Calibrated(), DEFAULT], ids=repr)


def uniform_second_moment(norms):
    return second_moment(np.ones_like(norms), norms)


def test_scores_of_this_very_step_are_ideal():
    norms = lognormal(5000)
    np.testing.assert_allclose(compute_v(Calibrated(), make_store(norms, 7), step=7), norms, rtol=1e-6)


@BOTH
@pytest.mark.parametrize("spread", [0.5, 1.0, 1.5, 2.0])
def test_scores_that_stay_true_are_within_two_percent_of_ideal(proposal, spread):
    norms = lognormal(20_000, spread)
    v = compute_v(proposal, make_store(norms), 30, learn(proposal, norms, 30, norms))
    assert second_moment(v, norms) < 1.02 * norms.mean(dtype=float) ** 2


@BOTH
@pytest.mark.parametrize("kind", ["useless", "reversed", "noisy", "zero", "ancient", "adversarial"])
def test_never_worse_than_uniform(kind, proposal):
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
    v = compute_v(proposal, make_store(score), staleness, learn(proposal, score, staleness, norms))
    uniform = uniform_second_moment(norms)
    assert second_moment(v, norms) < 1.01 * uniform
    if kind in ("reversed", "noisy"):  # here the score tells something, and it must be used
        assert second_moment(v, norms) < 0.8 * uniform


@BOTH
@pytest.mark.parametrize("spread", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("noise", [0.0, 0.3, 0.7, 1.5])
def test_as_good_as_the_best_smoothing_in_hindsight(noise, spread, proposal):
    """Norms are scores times noise; against every additive constant."""
    score = lognormal(20_000, spread)
    norms = score * lognormal(20_000, noise, seed=2) if noise else score
    v = compute_v(proposal, make_store(score), 50, learn(proposal, score, 50, norms))
    constants = np.array([0, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 100]) * score.mean()
    best = min(second_moment(score + constant, norms) for constant in constants)
    assert second_moment(v, norms) < 1.05 * best


def test_before_any_re_scoring_a_low_score_is_doubted():
    """First scores teach the unit only; an example that is far below it may have changed."""
    score, proposal = lognormal(1000, 3.0), DEFAULT
    empty = ScoreStore.init(len(score))
    state = observe(proposal, proposal.init(), empty, jnp.arange(len(score)), jnp.asarray(score), jnp.int32(0))
    v = compute_v(proposal, make_store(score), 10, state)
    assert np.max(v.mean() / v) < 1 / max(FRACTIONS)
    assert v[np.argmax(score)] > 10 * np.median(v)


def test_young_scores_are_trusted_more_than_old_ones():
    score, proposal = lognormal(20_000), Calibrated()
    state, indices = proposal.init(), jnp.arange(len(score))
    unrelated = lognormal(20_000, seed=1)
    for staleness, norms in ((2, score), (500, unrelated)) * 3:
        state = observe(proposal, state, make_store(score), indices, jnp.asarray(norms), jnp.int32(staleness))
    young, old = (compute_v(proposal, make_store(score), step, state) for step in (2, 500))
    ideal = score.mean(dtype=float) ** 2
    assert second_moment(young, score) < 1.05 * ideal < 0.5 * uniform_second_moment(score)
    assert second_moment(old, unrelated) < 1.01 * uniform_second_moment(unrelated)


def test_what_is_old_is_forgotten():
    score, proposal = lognormal(5000), Calibrated(half_life=1.0)
    state = learn(proposal, score, 20, 100 * score, sweeps=2)
    for _ in range(20):
        state = observe(proposal, state, make_store(score), jnp.arange(5000), jnp.asarray(score), jnp.int32(20))
    np.testing.assert_allclose(np.sum(state.counts), 5000 * 2, rtol=0.02)  # 1 + 1/2 + 1/4 + ...
    middle = (score > 0.5) & (score < 2)
    v = state.level * compute_v(proposal, make_store(score), 20, state)  # v is in units of the level
    np.testing.assert_allclose(v[middle], score[middle], rtol=0.35)


def test_padding_bad_and_first_scores_teach_nothing():
    proposal = Calibrated()
    store = ScoreStore(jnp.array([1.0, 1.0, 0.0]), jnp.array([0, 0, -1]))
    norm = jnp.array([jnp.nan, jnp.inf, 5.0, 7.0, 7.0])
    state = proposal.observe(proposal.init(), (), store, jnp.array([0, 1, 2, 3, -1]), norm, jnp.int32(9))
    assert np.all(np.asarray(state.counts) == 0) and np.all(np.isfinite(state.squares))
    assert state.level == 5  # the unit comes from the first good score


@BOTH
def test_the_unit_of_the_scores_does_not_matter(proposal):
    score, norms = lognormal(3000), lognormal(3000, seed=1)
    small, large = (
        compute_v(proposal, make_store(unit * score), 30, learn(proposal, unit * score, 30, unit * norms))
        for unit in (1e-17, 1e17)
    )
    np.testing.assert_allclose(small / small.mean(), large / large.mean(), rtol=1e-3)


def test_accelerators_sum_the_same_in_each_bin():
    """Red if the product of one-hot matrices, which no other test computes on a CPU, adds to another bin."""
    rng = np.random.default_rng(0)
    row, column = rng.integers(0, calibrated.SCORE_BINS, 50), rng.integers(0, calibrated.STALENESS_BINS, 50)
    row[:5] = calibrated.SCORE_BINS  # no bin
    values = jnp.asarray(rng.normal(size=(2, 50)), jnp.float32)
    expected = calibrated._scatter(row, column, values)
    np.testing.assert_allclose(calibrated._sum_by_bin(row, column, values), expected, rtol=1e-5, atol=1e-6)
