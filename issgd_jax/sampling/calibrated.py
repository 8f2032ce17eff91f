"""`Calibrated`: expected gradient norms given score and staleness, learned from every new norm."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from issgd_jax.sampling.checks import check_number
from issgd_jax.sampling.fallback import Fallback, apply_fallback, make_fallback
from issgd_jax.sampling.level import TINY, normalize, subsample, update_level
from issgd_jax.sampling.store import NEVER, ScoreStore
from issgd_jax.sampling.table import Table, build_table


class CalibratedState(NamedTuple):
    """State of `Calibrated`: running sums over bins of old score (rows) and staleness (columns).

    Attributes:
      squares: f32[40, 12], sums of the squared new norms, in units of the squared level of their time.
      counts: f32[40, 12], number of norms.
      level: f32[], unit of the score bins, see `update_level`; 0 before the first norm.
    """

    squares: jax.Array
    counts: jax.Array
    level: jax.Array


# Octaves of score, from 2^-28 to 2^12 of the level; octaves of staleness, from 1 to 2^11 steps and more.
SCORE_BINS, STALENESS_BINS = 40, 12
OCTAVES_BELOW_LEVEL = 28
# Observations that a bin needs to outweigh the mean of its row, and a row to outweigh its prior.
PRIOR_COUNT = 16.0
# Prior of a row: this fraction of its norms is as that of any example, the others equal their score.
OUTLIER_FRACTION = 1 / 8


class CalibratedBasis(NamedTuple):
    """Basis of `Calibrated`.

    Attributes:
      log_rms: f32[40, 12], log2 of the root mean square norm of each bin, in units of the level.
      level: f32[].
      fallback: for never-scored examples.
    """

    log_rms: jax.Array
    level: jax.Array
    fallback: Fallback


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Calibrated:
    """Proposal of least variance given score and staleness: v = sqrt(E[norm^2 | score, staleness]).

    Among proposals that use only score and staleness, `mean(v) * mean(E[norm^2 | score, staleness] / v)` is least for
    this v (Cauchy-Schwarz, as in the paper's Theorem 1). If scores are fresh, it is Theorem 1 itself; if they carry no
    information, it is uniform; by Jensen's inequality it is never worse than uniform.

    The conditional mean is measured: every new norm gives a triple (old score, staleness, new norm), and running sums
    are kept in a table of bins. A bin with few observations is shrunk to its row (all stalenesses), and a row with few
    to a prior (mostly its score). Between the centres of score bins, v is interpolated.

    Alone it does not bound the importance weights: draw from `Mixture(Calibrated())`.

    Args:
      half_life: sweeps over the data after which an observation counts half.

    Example:
      >>> store, _ = ScoreStore.init(3).write(jnp.arange(2), jnp.array([1.0, 4.0]), jnp.int32(5))
      >>> proposal, step = Calibrated(), jnp.int32(5)
      >>> basis = proposal.basis(proposal.init(), store, step)
      >>> proposal.table(basis, store, step).v().tolist()  # scores of this step are the norms; the mean where unscored
      [1.0, 4.0, 2.5]
    """

    half_life: float | jax.Array = 1.0

    def __post_init__(self):
        check_number("half_life", self.half_life, lambda x: x > 0, "> 0")

    def init(self) -> CalibratedState:
        bins = (SCORE_BINS, STALENESS_BINS)
        return CalibratedState(
            squares=jnp.zeros(bins, jnp.float32), counts=jnp.zeros(bins, jnp.float32), level=jnp.float32(0)
        )

    def observe(
        self,
        state: CalibratedState,
        basis: CalibratedBasis,
        store: ScoreStore,
        indices: jax.Array,
        norms: jax.Array,
        step: jax.Array,
        importance_weights: jax.Array | float = 1.0,
    ) -> CalibratedState:
        """Adds new gradient norms to their bins, see `Proposal.observe`.

        First norms of an example set the level only. All examples of a bin have the same v, so that the draw does not
        bias its mean: importance weights are used for the level alone.
        """
        del basis
        num_examples = len(store)
        indices, norms, importance_weights, stride = subsample(indices, norms, importance_weights)
        inside = (indices >= 0) & (indices < num_examples)
        valid = inside & jnp.isfinite(norms) & (norms >= 0)
        norms = jnp.where(valid, norms, 0)
        level = update_level(state.level, norms, jnp.where(valid, stride * importance_weights, 0), num_examples)
        old_score, scored_at = store.at(jnp.clip(indices, 0, num_examples - 1))
        staleness = step - scored_at
        known = valid & (scored_at != NEVER) & (staleness > 0)
        row = jnp.clip(jnp.floor(_octave(normalize(old_score, level))), 0, SCORE_BINS - 1).astype(jnp.int32)
        column = _staleness_bin(staleness)
        decay = 0.5 ** (jnp.float32(stride * jnp.sum(known)) / (self.half_life * num_examples))
        square = normalize(norms, level) ** 2
        values = jnp.where(known, jnp.stack([square, jnp.ones_like(square)]), 0).astype(jnp.float32) * stride
        squares, counts = jax.lax.platform_dependent(row, column, values, cpu=_scatter, default=_sum_by_bin)
        return CalibratedState(
            squares=decay * state.squares + squares,
            counts=decay * state.counts + counts,
            level=level,
        )

    def basis(self, state: CalibratedState, store: ScoreStore, step: jax.Array) -> CalibratedBasis:
        level = jnp.where(state.level > TINY, state.level, 1)
        basis = CalibratedBasis(_log_root_mean_squares(state), level, Fallback(*jnp.zeros(2, jnp.float32)))
        v = _expected_norms(basis, store.score, step - store.scored_at)
        return basis._replace(fallback=make_fallback(v, store.scored_at))

    def v(self, basis: CalibratedBasis, score, scored_at, step) -> jax.Array:
        v = _expected_norms(basis, score, step - scored_at)
        return apply_fallback(v, scored_at, basis.fallback)

    def table(self, basis: CalibratedBasis, store: ScoreStore, step: jax.Array) -> Table:
        return build_table(self.v(basis, store.score, store.scored_at, step))


def _scatter(row: jax.Array, column: jax.Array, values: jax.Array) -> jax.Array:
    """Returns sums f32[k, 40, 12] over bins of values f32[k, m]; on a CPU, where the order of additions is fixed."""
    sums = jnp.zeros((len(values), SCORE_BINS, STALENESS_BINS), jnp.float32)
    return sums.at[:, row, column].add(values, mode="drop")


def _sum_by_bin(row: jax.Array, column: jax.Array, values: jax.Array) -> jax.Array:
    """Returns what `_scatter` does, by a product of one-hot matrices: the same bits on every run also on a GPU."""
    rows = jax.nn.one_hot(row, SCORE_BINS, dtype=jnp.float32)
    # Not values times rows, for which JAX 0.10's compiler for GPUs finds no tiles.
    columns = values[:, :, None] * jax.nn.one_hot(column, STALENESS_BINS, dtype=jnp.float32)[None]
    return jnp.einsum("mr,kmc->krc", rows, columns, precision=jax.lax.Precision.HIGHEST)


def _log_root_mean_squares(state: CalibratedState) -> jax.Array:
    """Returns log2 sqrt(E[norm^2]) of each bin, in units of the level."""
    centres = 2.0 ** (jnp.arange(SCORE_BINS, dtype=jnp.float32) + 0.5 - OCTAVES_BELOW_LEVEL)
    total = jnp.sum(state.counts)
    overall_mean = jnp.where(total > 0, jnp.sum(state.squares) / jnp.maximum(total, TINY), 1)
    prior = (1 - OUTLIER_FRACTION) * centres**2 + OUTLIER_FRACTION * overall_mean
    row_mean = _shrunk_mean(jnp.sum(state.squares, axis=1), jnp.sum(state.counts, axis=1), prior)
    return 0.5 * jnp.log2(_shrunk_mean(state.squares, state.counts, row_mean[:, None]))


def _expected_norms(basis: CalibratedBasis, score, staleness) -> jax.Array:
    """Returns sqrt(E[norm^2 | score, staleness]) in units of the level, log-linear between centres of score bins."""
    relative_score = score / basis.level
    position = jnp.clip(_octave(relative_score) - 0.5, 0, SCORE_BINS - 1)
    row = jnp.minimum(position.astype(jnp.int32), SCORE_BINS - 2)
    column = _staleness_bin(staleness)
    low, high = basis.log_rms[row, column], basis.log_rms[row + 1, column]
    # A score of the present step is the norm itself.
    log_expected = low + (position - row.astype(jnp.float32)) * (high - low)
    return jnp.where(staleness > 0, jnp.exp2(log_expected), relative_score)


def _shrunk_mean(total, count, prior):
    """Returns the mean shrunk to the prior; arithmetic, as too large a v costs less variance than too small a one."""
    return (total + PRIOR_COUNT * prior) / (count + PRIOR_COUNT)


def _octave(relative_score):
    """Returns the position on the axis of score bins; that of a score of zero is its lower end."""
    return jnp.log2(jnp.maximum(relative_score, 2.0**-OCTAVES_BELOW_LEVEL)) + OCTAVES_BELOW_LEVEL


def _staleness_bin(staleness):
    octave = jnp.log2(jnp.maximum(staleness, 1).astype(jnp.float32))
    return jnp.clip(octave.astype(jnp.int32), 0, STALENESS_BINS - 1)
