"""Proposals: a biased or unbounded v, or a method that breaks the contract, turns these red."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from issgd_jax import sampling
from issgd_jax.sampling.calibrated import Calibrated
from issgd_jax.sampling.proposal import FRACTIONS, Mixture, Proportional, Proposal, Uniform
from issgd_jax.sampling.store import ScoreStore
from tests.sampling.helpers import compute_v, draw_many, learn, lognormal, make_store, make_table, observe, rebuild

PROPOSALS = [
    Uniform(),
    Proportional(1.0),
    Proportional(0.0),
    Proportional(1.0, max_staleness=5),
    Calibrated(),
    Mixture(Calibrated()),
]
PROPOSALS += [Proportional(1.0, relative=True), Mixture(Proportional(1.0), 0.1)]


@pytest.mark.parametrize("proposal", PROPOSALS, ids=repr)
def test_before_any_score_all_are_equally_likely(proposal):
    v = compute_v(proposal, ScoreStore.init(10), step=0)
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
    v = compute_v(proposal, store, step=4)
    np.testing.assert_allclose(v[[1, 3]], (v[0] + v[2]) / 2, rtol=1e-6)


def test_proportional_is_score_plus_smoothing():
    np.testing.assert_allclose(compute_v(Proportional(10.0), make_store([0.0, 1.0, 30.0]), step=3), [10, 11, 40])


def test_proportional_without_smoothing_leaves_no_scored_example_out():
    v = compute_v(Proportional(0.0), make_store([0.0, 1.0, 2.0]), step=100)
    assert np.all(v > 0) and v[0] < 1e-3


def test_max_staleness_leaves_old_scores_out_and_averages_over_the_rest():
    store = ScoreStore(jnp.array([1.0, 2.0, 3.0, 4.0]), jnp.array([10, 9, 2, -1]))
    table = make_table(Proportional(1.0, max_staleness=5), store, 12)
    np.testing.assert_array_equal(table.v(), [2, 3, 0, 0])
    # The paper's importance weight: (sum of v / number usable) / v_n.
    np.testing.assert_allclose(table.mean_v, (2 + 3) / 2)


def test_max_staleness_is_plain_sgd_while_fewer_than_a_tenth_are_usable():
    scored_at = np.full(21, -1)
    scored_at[:2] = 0
    store = ScoreStore(jnp.arange(21.0), jnp.asarray(scored_at, jnp.int32))
    table = make_table(Proportional(1.0, max_staleness=5), store, 1)
    np.testing.assert_array_equal(table.v(), np.ones(21))
    np.testing.assert_allclose(table.mean_v, 1)


def test_a_mixture_draws_its_share_uniformly():
    score = lognormal(1000, 2.0)
    v, alone = (compute_v(p, make_store(score), 3) for p in (Mixture(Proportional(0.5), 0.3), Proportional(0.5)))
    np.testing.assert_allclose(v / v.sum(), 0.3 / 1000 + 0.7 * alone / alone.sum(), rtol=1e-5)


def test_relative_smoothing_follows_the_mean_score():
    store = ScoreStore(jnp.array([2.0, 4.0, 0.0]), jnp.array([1, 1, -1]))
    np.testing.assert_allclose(compute_v(Proportional(0.5, relative=True), store, 3), [3.5, 5.5, 4.5])


@pytest.mark.parametrize("proposal", PROPOSALS, ids=repr)
def test_v_of_one_example_is_that_of_the_table(proposal):
    """Between rounds what is written gets its v alone: it must not be of another unit than the table's."""
    store = ScoreStore(jnp.asarray(lognormal(50)), jnp.arange(50, dtype=jnp.int32) % 9 - 1)
    step, some = jnp.int32(9), jnp.array([3, 0, 49, 18])
    basis = proposal.basis(proposal.init(), store, step)
    alone = proposal.v(basis, store.score[some], store.scored_at[some], step)
    np.testing.assert_allclose(alone, compute_v(proposal, store, 9)[some], rtol=1e-5)


@pytest.mark.parametrize("place", range(8))
def test_a_scored_example_of_score_zero_is_drawn_beside_the_largest(place):
    """float32 absorbs too small a v beside a large one, and the example is never drawn again: a bias."""
    score = np.zeros(8, np.float32)
    score[place] = 1e6
    table = make_table(Proportional(0.0), make_store(score), 9)
    indices = np.asarray(draw_many(table, 512, 4_000, seed=place).indices).ravel()
    counts = np.bincount(indices, minlength=8)
    expected = len(indices) * np.asarray(table.v(), np.float64) / np.sum(np.asarray(table.v(), np.float64))
    rare = np.arange(8) != place
    assert np.all(np.abs(counts - expected)[rare] < 5 * np.sqrt(expected[rare]))


@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.5, None])
@pytest.mark.parametrize("proposal", [Proportional(0.0), Calibrated()], ids=repr)
def test_the_uniform_fraction_bounds_importance_weights(proposal, fraction):
    score = np.concatenate([np.full(999, 1e-12), [1e6]]).astype(np.float32)
    mixture = Mixture(proposal, fraction)
    for state in (mixture.init(), learn(mixture, score, 9, score)):
        table = make_table(mixture, make_store(score), 9, state)
        assert np.max(table.mean_v / np.asarray(table.v())) <= (1 + 1e-5) / (fraction or min(FRACTIONS))


def fraction_of(mixture, state, score, staleness):
    return float(mixture.basis(state, make_store(score), jnp.int32(staleness)).uniform_fraction)


@pytest.mark.parametrize("proposal", [Proportional(0.0), Calibrated()], ids=repr)
def test_a_mixture_draws_few_uniformly_where_scores_stay_true_and_many_where_norms_jump(proposal):
    score, mixture = lognormal(5000), Mixture(proposal)
    assert fraction_of(mixture, mixture.init(), score, 9) == max(FRACTIONS)  # no evidence yet
    assert fraction_of(mixture, learn(mixture, score, 9, score), score, 9) == min(FRACTIONS)
    # The lowest scores turn into the largest norms at once.
    state = learn(mixture, score, 9, score)
    basis = mixture.basis(state, make_store(score), jnp.int32(9))
    jumped = jnp.where(score < 0.2, 10 * jnp.max(score), score)
    state = mixture.observe(state, basis, make_store(score), jnp.arange(5000), jumped, jnp.int32(9))
    assert fraction_of(mixture, state, score, 9) >= 1 / 4


def test_a_mixture_derives_the_same_fraction_from_draws_as_from_all():
    """The learner's minibatches prefer high v; their importance weights undo that."""
    score = lognormal(1000)
    norms, mixture = jnp.asarray(score * lognormal(1000, 0.7, seed=2)), Mixture(Proportional(0.01))
    store, step = make_store(score), jnp.int32(9)
    basis = mixture.basis(mixture.init(), store, step)
    indices, weights = sampling.draw(jax.random.key(0), mixture.table(basis, store, step), 100_000, "independent")
    full_state = mixture.observe(mixture.init(), basis, store, jnp.arange(1000), norms, step)
    drawn_state = mixture.observe(mixture.init(), basis, store, indices, norms[indices], step, weights)
    unweighted = mixture.observe(mixture.init(), basis, store, indices, norms[indices], step)
    actual, expected, biased = (x.second_moments / x.second_moments[0] for x in (drawn_state, full_state, unweighted))
    np.testing.assert_allclose(actual, expected, rtol=0.02)
    assert np.max(np.abs(biased / expected - 1)) > 0.05
    np.testing.assert_allclose(drawn_state.second_moments / 100, full_state.second_moments, rtol=0.05)


def test_a_mixture_learns_nothing_from_padding_bad_scores_or_what_came_late():
    mixture = Mixture(Proportional(1.0))
    store, step = ScoreStore(jnp.array([1.0, 2.0, 3.0]), jnp.array([0, 0, 9])), jnp.int32(9)
    basis = mixture.basis(mixture.init(), store, step)
    norm = jnp.array([jnp.nan, jnp.inf, 5.0, 7.0, 7.0])
    state = mixture.observe(mixture.init(), basis, store, jnp.array([0, 1, 2, 3, -1]), norm, step)
    assert np.all(state.second_moments == 0) and state.level == 0


def test_a_mixture_lets_the_other_learn():
    score, norms = lognormal(3000), lognormal(3000, seed=1)
    mixed, alone = (learn(p, score, 30, norms) for p in (Mixture(Calibrated(), 0.2), Calibrated()))
    jax.tree.map(np.testing.assert_array_equal, mixed.inner, alone)


METHODS = ("init", "observe", "basis", "v", "table")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("proposal", [Uniform, Proportional, Mixture, Calibrated])
def test_every_proposal_has_the_methods_of_the_contract(proposal, method):
    """Red if a caller that follows `Proposal` cannot call a proposal: another name, order or default of an argument."""
    arguments, expected = (
        [
            (parameter.name, parameter.default)
            for parameter in inspect.signature(getattr(cls, method)).parameters.values()
        ]
        for cls in (proposal, Proposal)
    )
    assert arguments == expected


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Power:
    """A proposal from outside, of the five methods and no base: v = (score + 1)^exponent."""

    exponent: float

    def init(self):
        return jnp.int32(0)

    def observe(self, state, basis, store, indices, norms, step, importance_weights=1.0):
        return state + jnp.sum(jnp.isfinite(norms))

    def basis(self, state, store, step):
        return state

    def v(self, basis, score, scored_at, step):
        return (score + 1) ** self.exponent

    def table(self, basis, store, step):
        return sampling.build_table(self.v(basis, store.score, store.scored_at, step))


def test_a_proposal_from_outside_needs_the_five_methods_alone():
    """Red if the sampler or a mixture needs anything that the contract does not name."""
    sampler = sampling.Sampler(8, 4, Mixture(Power(2.0), 0.5))
    state, drawn = sampler.draw(sampler.init(0))
    state = sampler.update(state, drawn, jnp.full(4, 2.0))
    state = sampler.rebuild(sampler.ingest(state, jnp.arange(8), jnp.arange(8.0), jnp.int32(1)))
    v = (np.arange(8.0) + 1) ** 2
    np.testing.assert_allclose(state.table.v(), v + v.mean(), rtol=1e-6)
    assert state.proposal_state.inner == 12


@pytest.mark.parametrize(("proposal", "sums"), [(Calibrated(), "counts"), (Mixture(Uniform()), "second_moments")])
def test_a_proposal_that_observes_after_the_write_learns_nothing(proposal, sums):
    """The order of the contract: red if a norm that is compared with itself counts as evidence for its score."""
    store, indices, norms, step = (
        make_store(lognormal(50)),
        jnp.arange(50),
        jnp.asarray(lognormal(50, seed=1)),
        jnp.int32(9),
    )
    after, _ = store.write(indices, norms, step)
    in_order, too_late = (observe(proposal, proposal.init(), s, indices, norms, step) for s in (store, after))
    assert np.sum(getattr(in_order, sums)) > 0 and np.sum(getattr(too_late, sums)) == 0


@pytest.mark.parametrize("proposal", [Proportional(0.1), Mixture(Calibrated())], ids=repr)
def test_v_of_another_basis_than_the_tables_stays_unbiased(proposal):
    """The order of the contract: red if importance weights came from elsewhere than the table itself."""
    scores, step = lognormal(40), jnp.int32(9)
    store, values = make_store(scores), np.random.default_rng(2).normal(size=40)
    table = make_table(proposal, store, step)
    louder = make_store(1000 * scores)
    other, _ = rebuild(proposal, learn(proposal, 1000 * scores, 9, 1000 * scores), louder, step)
    written = jnp.arange(5)
    drawn = draw_many(table.write(written, proposal.v(other, *louder.at(written), step)), 8, 4_000)
    estimates = np.mean(np.asarray(drawn.importance_weights, float) * values[np.asarray(drawn.indices)], axis=1)
    assert abs(estimates.mean() - values.mean()) < 4 * estimates.std() / np.sqrt(4_000)
