"""Biased draws, importance weights of another v than was drawn from, or a drawn zero turn these red."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from issgd_jax import sampling
from issgd_jax.sampling import table as table_lib
from tests.helpers import soak
from tests.sampling import helpers

NUM_KEYS = 10_000
SIZES = st.sampled_from(soak([1, 16, 17, 257, 5000], [1, 15, 16, 17, 256, 257, 700, 5000]))  # each is compiled
write = jax.jit(sampling.Table.write)


def draw_many(table, batch_size, count=NUM_KEYS, method="systematic"):
    return helpers.draw_many(table, batch_size, count, method=method)


def estimates(drawn, values):
    return np.mean(np.asarray(drawn.importance_weights) * values[np.asarray(drawn.indices)], axis=1)


def inclusion_probabilities(v, batch_size):
    """min(1, c v), of sum batch_size."""
    v, certain = v.astype(float), np.zeros(len(v), bool)
    while True:
        c = (batch_size - certain.sum()) / v[~certain].sum() if not certain.all() else 0
        more = ~certain & (c * v >= 1 - 1e-9)
        if not more.any():
            return np.where(certain, 1, c * v)
        certain |= more


def lognormal(size, sigma=2.0, seed=0):
    return np.random.default_rng(seed).lognormal(0, sigma, size).astype(np.float32)


def adversarial(name, size):
    v = {
        "all equal": np.ones(size),
        "one huge": np.full(size, 1e-6),
        "30 orders of magnitude": np.logspace(-15, 15, size),
        "all but one zero": np.zeros(size),
        "half zero": np.tile([0.0, 1.0], size)[:size],
    }[name]
    if name == "one huge":
        v[size // 3] = 1e6
    if name == "all but one zero":
        v[size // 2] = 3.0
    return v.astype(np.float32)


CASES = ("all equal", "one huge", "30 orders of magnitude", "all but one zero", "half zero")


def chi_square_p(counts, expected):
    """p value of counts against expectations, rare cells pooled so that each expects at least 5."""
    order = np.argsort(expected)
    pooled_counts, pooled_expected, c, e = [], [], 0.0, 0.0
    for i in order:
        c, e = c + counts[i], e + expected[i]
        if e >= 5:
            pooled_counts.append(c)
            pooled_expected.append(e)
            c, e = 0.0, 0.0
    pooled_counts[-1] += c
    pooled_expected[-1] += e
    if len(pooled_counts) == 1:
        return float(np.isclose(pooled_counts[0], pooled_expected[0]))
    pooled_expected = np.array(pooled_expected) * sum(pooled_counts) / sum(pooled_expected)
    return stats.chisquare(pooled_counts, pooled_expected).pvalue


@pytest.mark.parametrize("num_examples", [1, 7, 16, 17, 257, 1437])
def test_chi_square_of_single_draws(num_examples):
    v = lognormal(num_examples)
    indices = np.asarray(draw_many(sampling.build_table(v), 1).indices).ravel()
    counts = np.bincount(indices, minlength=num_examples)
    assert chi_square_p(counts, NUM_KEYS * v.astype(float) / v.sum(dtype=float)) > 1e-3


@pytest.mark.parametrize("case", CASES)
def test_chi_square_of_adversarial_probabilities(case):
    v = adversarial(case, 500)
    indices = np.asarray(draw_many(sampling.build_table(v), 1).indices).ravel()
    assert np.all(v[indices] > 0)
    assert chi_square_p(np.bincount(indices, minlength=500), NUM_KEYS * v.astype(float) / v.sum(dtype=float)) > 1e-3


@settings(deadline=None, max_examples=soak(15, 40))
@given(num_examples=SIZES, batch_size=st.sampled_from([1, 5, 64]), seed=st.integers(0, 10**6), sigma=st.floats(0, 8))
def test_unbiased_summed_over_all_examples(num_examples, batch_size, seed, sigma):
    """sum_n q_n * importance_weight_n * f_n = mean(f), whatever f: q_n * importance_weight_n = 1 / N for each n."""
    v = lognormal(num_examples, sigma, seed)
    table = sampling.build_table(v)
    drawn = sampling.draw(jax.random.key(seed), table, batch_size)
    indices, importance_weights = np.asarray(drawn.indices), np.asarray(drawn.importance_weights, np.float64)
    q = v.astype(np.float64) / v.sum(dtype=np.float64)
    assert indices.min() >= 0 and indices.max() < num_examples
    all_importance_weights = np.asarray(table.mean_v / table.v(), np.float64)
    np.testing.assert_allclose(all_importance_weights * q, 1 / num_examples, rtol=2e-6)
    np.testing.assert_array_equal(drawn.importance_weights, (table.mean_v / table.v())[drawn.indices])
    np.testing.assert_allclose(importance_weights * q[indices], 1 / num_examples, rtol=2e-6)


@pytest.mark.parametrize("method", table_lib.METHODS)
@pytest.mark.parametrize("batch_size", soak([1, 32], [1, 5, 32]))
@pytest.mark.parametrize("case", ["lognormal", "all equal", "uniform table", "one huge"])
def test_unbiased_over_ten_thousand_draws(case, batch_size, method):
    values = np.random.default_rng(3).normal(1, 1, 101)
    v = {"lognormal": lognormal(101, 1.0), "one huge": np.r_[np.full(100, 0.1), 50.0].astype(np.float32)}
    table = sampling.uniform_table(101) if case == "uniform table" else sampling.build_table(v.get(case, np.ones(101)))
    means = estimates(draw_many(table, batch_size, method=method), values)
    assert abs(means.mean() - values.mean()) < 3.5 * means.std() / np.sqrt(NUM_KEYS)


@settings(deadline=None, max_examples=soak(15, 40))
@given(num_examples=SIZES, batch_size=st.sampled_from([1, 5, 64]), seed=st.integers(0, 10**6), sigma=st.floats(0, 4))
def test_systematic_rounds_each_expected_count_up_or_down(num_examples, batch_size, seed, sigma):
    """Positions that lose their equal spacing on the way down draw an example once too often."""
    v = lognormal(num_examples, sigma, seed)
    indices = sampling.draw(jax.random.key(seed), sampling.build_table(v), batch_size).indices
    counts = np.bincount(np.asarray(indices), minlength=num_examples)
    expected = batch_size * v.astype(float) / v.sum(dtype=float)
    assert np.all(counts >= np.floor(expected - 1e-5)) and np.all(counts <= np.ceil(expected + 1e-5))


def test_examples_meet_in_new_company_each_time():
    """In a fixed order, systematic draws of a constant table would give 16 minibatches and no others."""
    indices = np.sort(
        np.asarray(draw_many(sampling.build_table(np.ones(64, np.float32)), 4, count=1000).indices), axis=1
    )
    assert len(np.unique(indices, axis=0)) > 500  # of 1,000


@pytest.mark.parametrize("num_examples", [5, 77, 1000])
@pytest.mark.parametrize("kind", ["lognormal", "uniform table", "one huge", "half zero"])
def test_without_replacement_all_differ_and_each_has_its_inclusion_probability(kind, num_examples):
    batch_size = 5
    v = lognormal(num_examples, 1.5) if kind == "lognormal" else np.ones(num_examples, np.float32)
    v = v if kind in ("lognormal", "uniform table") else adversarial(kind, num_examples)
    table = sampling.uniform_table(num_examples) if kind == "uniform table" else sampling.build_table(v)
    drawn = draw_many(table, batch_size, method="without_replacement")
    indices, importance_weights = np.asarray(drawn.indices), np.asarray(drawn.importance_weights)
    real = np.where(importance_weights > 0, indices, num_examples + np.arange(batch_size))
    assert np.all(np.diff(np.sort(real, axis=1), axis=1) > 0)
    num_positive = np.sum(v > 0)
    assert np.all(np.sum(importance_weights > 0, axis=1) == min(batch_size, num_positive))
    expected = inclusion_probabilities(v, batch_size) if num_positive > batch_size else (v > 0).astype(float)
    counts = np.bincount(indices[importance_weights > 0], minlength=num_examples)
    tolerance = 4.5 * np.sqrt(expected * (1 - expected) / NUM_KEYS) + 1e-5
    assert np.all(np.abs(counts / NUM_KEYS - expected) < np.maximum(tolerance, 4.5 * np.sqrt(1e-4 / NUM_KEYS)))
    correct = batch_size / num_examples / np.where(expected > 0, expected, 1)
    np.testing.assert_allclose(importance_weights, np.where(importance_weights > 0, correct[indices], 0), rtol=1e-5)


def test_without_replacement_all_of_them():
    drawn = sampling.draw(jax.random.key(0), sampling.build_table(lognormal(30)), 30, "without_replacement")
    assert sorted(np.asarray(drawn.indices)) == list(range(30))
    np.testing.assert_array_equal(drawn.importance_weights, 1)


@pytest.mark.parametrize("kind", ["lognormal", "uniform table"])
def test_without_replacement_more_than_there_are(kind):
    table = sampling.build_table(lognormal(7)) if kind == "lognormal" else sampling.uniform_table(7)
    with pytest.raises(ValueError, match="batch_size is 8, but there are 7 examples"):
        sampling.draw(jax.random.key(0), table, 8, "without_replacement")


def test_unknown_method():
    with pytest.raises(ValueError, match="method must be one of systematic, independent.*got 'random'"):
        sampling.draw(jax.random.key(0), sampling.uniform_table(7), 1, "random")


@settings(deadline=None, max_examples=soak(15, 40))
@given(num_examples=SIZES, num_written=st.sampled_from([1, 7, 50]), seed=st.integers(0, 10**6))
def test_a_written_table_equals_the_table_built_from_the_new_values(num_examples, num_written, seed):
    """Red if a level is not recomputed, an index outside lands in padding, or duplicates add up."""
    rng = np.random.default_rng(seed)
    v, new = lognormal(num_examples, 3, seed), lognormal(num_examples, 3, seed + 1)
    new[rng.random(num_examples) < 0.2] = 0
    indices = rng.integers(-3, num_examples + 20, num_written)
    inside = indices[(indices >= 0) & (indices < num_examples)]
    written = write(sampling.build_table(v), jnp.asarray(indices), new[np.clip(indices, 0, num_examples - 1)])
    v[inside] = new[inside]
    if v.any():
        expected = sampling.build_table(v)
        np.testing.assert_array_equal(written.sums, expected.sums)


def test_sums_do_not_drift_with_writes():
    """A sum that is changed by differences keeps what 10^6 rounded away: afterwards small values would not add up."""
    v = lognormal(512, 1.0)
    table = sampling.build_table(v)
    for value in (1e12, 1e-12, 3e20, v[7]):
        table = write(table, jnp.array([7]), jnp.float32([value]))
    np.testing.assert_array_equal(table.sums, sampling.build_table(v).sums)


def test_excluded_examples_stay_excluded_until_a_rebuild():
    """A score written for one would enter it into the sum but not into the population: biased importance weights."""
    table = sampling.build_table(jnp.array([0.0, 2.0, 4.0]), population=2)
    written = table.write(jnp.array([0, 1]), jnp.array([5.0, 6.0]))
    np.testing.assert_array_equal(written.v(), [0, 6, 4])
    assert written.mean_v == 5


def test_a_uniform_table_stays_uniform():
    assert sampling.uniform_table(9).write(jnp.array([1]), jnp.array([2.0])).sums is None


@pytest.mark.parametrize("kind", ["lognormal", "uniform table"])
def test_every_place_of_a_minibatch_together_draws_in_proportion(kind):
    # A batch is not independent, so the counts are compared with their own spread over keys.
    v = lognormal(77, 1.0) if kind == "lognormal" else np.ones(77, np.float32)
    table = sampling.build_table(v) if kind == "lognormal" else sampling.uniform_table(77)
    indices = np.asarray(draw_many(table, 10).indices)
    counts = np.stack([np.bincount(row, minlength=77) for row in indices])
    expected = 10 * v.astype(float) / v.sum(dtype=float)
    standard_error = np.sqrt(counts.var(0) + 1e-4) / np.sqrt(NUM_KEYS)
    assert np.max(np.abs(counts.mean(0) - expected) / standard_error) < 4.5  # the largest of 77: p about 5e-4


def test_systematic_draws_spread_better_than_independent_ones():
    """As much as the variance of rounding an expected count up or down is below that of a Poisson count.

    For values of random signs, so that only the variance of each count enters, none between two.
    """
    v = lognormal(400, 1.0)
    expected = 40 * v.astype(float) / v.sum(dtype=float)
    values = v[:, None] * np.random.default_rng(0).choice([-1, 1], (400, 50))

    def variance(method):
        drawn = draw_many(sampling.build_table(v), 40, method=method)
        counts = np.stack([np.bincount(row, minlength=400) for row in np.asarray(drawn.indices)])
        return np.mean((counts / expected @ values).var(0))

    def expected_variance(variances):
        return np.sum(variances * np.mean(values**2, axis=1) / expected**2)

    independent, systematic = variance("independent"), variance("systematic")
    np.testing.assert_allclose(independent, expected_variance(expected * (1 - expected / 40)), rtol=0.05)
    np.testing.assert_allclose(systematic, expected_variance(expected % 1 * (1 - expected % 1)), rtol=0.05)
    assert systematic < 0.8 * independent


def test_an_example_that_deserves_k_draws_gets_them():
    """Systematic: one with a share of exactly 3 / 8 in a minibatch of 8 is drawn 3 times, every time."""
    v = np.array([3, 1, 1, 1, 1, 1], np.float32)
    indices = np.asarray(draw_many(sampling.build_table(v), 8).indices)
    assert np.all(np.sum(indices == 0, axis=1) == 3)


def test_uniform_table_gives_importance_weights_of_exactly_one():
    drawn = draw_many(sampling.uniform_table(1437), 64, count=50)
    assert np.all(np.asarray(drawn.importance_weights) == 1)
    counts = np.bincount(np.asarray(drawn.indices).ravel(), minlength=1437)
    assert len(counts) == 1437


@pytest.mark.parametrize(("num_examples", "batch_size"), [(3, 8), (1000, 7), (2**24 + 1, 128), (10**9, 256)])
def test_uniform_draws_reach_every_part_at_any_size(num_examples, batch_size):
    # float32 positions would miss most of 10^9 examples; int32 products would overflow.
    indices = np.asarray(draw_many(sampling.uniform_table(num_examples), batch_size, count=2000).indices, np.int64)
    assert indices.min() >= 0 and indices.max() < num_examples
    part = np.arange(batch_size) * num_examples
    assert np.all((indices + 1) * batch_size > part) and np.all(indices * batch_size < part + num_examples)
    assert chi_square_p(np.bincount(indices.ravel() % 3, minlength=3), np.full(3, indices.size / 3)) > 1e-4


def test_uniform_draws_are_uniform_when_parts_divide_an_example():
    counts = np.bincount(np.asarray(draw_many(sampling.uniform_table(10), 4).indices).ravel(), minlength=10)
    assert np.max(np.abs(counts / NUM_KEYS - 0.4)) < 4.5 * np.sqrt(0.4 / NUM_KEYS)


def test_all_zero_is_uniform():
    drawn = sampling.draw(jax.random.key(0), sampling.build_table(jnp.zeros(9)), 9)
    np.testing.assert_allclose(drawn.importance_weights, 1)


def test_all_zero_with_examples_left_out_is_uniform_over_all():
    table = sampling.build_table(jnp.zeros(20), population=5)
    np.testing.assert_allclose(table.mean_v, 1)


def test_ten_million_examples_in_float32():
    """A running float32 sum over so many is wrong; half are zero and must not be drawn, blocks have equal shares."""
    v = np.tile(np.array([0.0, 1.0], np.float32), 5_000_000)
    table = jax.jit(sampling.build_table)(v)
    np.testing.assert_allclose(float(table.mean_v), 0.5, rtol=1e-6)
    indices = np.asarray(draw_many(table, 64, count=500).indices).ravel()
    assert np.all(indices % 2 == 1)
    blocks = np.bincount(indices // 100_000, minlength=100)
    assert chi_square_p(blocks, np.full(100, indices.size / 100)) > 1e-4


def test_table_gives_back_the_v_it_draws_from():
    v = lognormal(21)
    table = sampling.build_table(v)
    np.testing.assert_array_equal(table.v(), v)
    np.testing.assert_array_equal(table.v(jnp.array([20, 3])), v[[20, 3]])
    np.testing.assert_allclose(float(table.mean_v), v.mean(dtype=float), rtol=1e-6)


def test_effective_sample_size_is_kish():
    v = lognormal(50, 0.5)
    q, importance_weights = v / v.sum(), v.mean() / v
    expected = 16 * np.sum(q * importance_weights) ** 2 / np.sum(q * importance_weights**2)
    np.testing.assert_allclose(sampling.effective_sample_size(sampling.build_table(v), 16), expected, rtol=1e-5)
    assert sampling.effective_sample_size(sampling.uniform_table(50), 16) == 16


@pytest.mark.parametrize("batch_size", [0, -3])
def test_batch_size_must_be_positive(batch_size):
    with pytest.raises(ValueError, match=f"batch_size must be >= 1, got {batch_size}"):
        sampling.draw(jax.random.key(0), sampling.uniform_table(3), batch_size)


def test_same_key_same_draw():
    table = sampling.build_table(lognormal(100))
    a, b = (sampling.draw(jax.random.key(5), table, 20) for _ in range(2))
    np.testing.assert_array_equal(a.indices, b.indices)
