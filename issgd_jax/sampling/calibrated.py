"""`Calibrated`: the gradient norm expected from score and staleness, learned from every new score."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from issgd_jax.sampling.proposal import (
    TINY,
    Completion,
    Proposal,
    complete,
    make_completion,
    new_level,
    relative,
    thinned,
)
from issgd_jax.sampling.store import NEVER, ScoreStore


class Calibration(NamedTuple):
    """Exponentially averaged sums over bins of old score (rows) and staleness (columns).

    Attributes:
      squares: f32[40, 12], sums of the new norm squared, in units of the level^2 of their time.
      counts: f32[40, 12], numbers of new norms.
      level: f32[], see `new_level`: the unit of the score bins; 0 before.
    """

    squares: jax.Array
    counts: jax.Array
    level: jax.Array


# Octaves of score, from 2^-28 to 2^12 of the level; octaves of staleness, from 1 to 2^11 steps and more.
SCORE_BINS, STALENESS_BINS = 40, 12
OCTAVES_BELOW_SCALE = 28
# Pseudo-counts: new scores that a cell (or a row) needs to outweigh its row (or the prior of the row).
SHRINKAGE = 16.0
# Prior of a row: this share of its examples are as any other, the rest as their score says.
OUTLIER_FRACTION = 1 / 8


class CalibratedBasis(NamedTuple):
    """Basis of `Calibrated`.

    Attributes:
      log_rms: f32[40, 12], see `_log_root_mean_squares`.
      level: f32[].
      completion: of v.
    """

    log_rms: jax.Array
    level: jax.Array
    completion: Completion


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Calibrated(Proposal):
    """Least variance for what is known of an example, its score and staleness: v = sqrt(E[norm^2 | score, staleness]).

    Among proposals that see only the score and its staleness, `mean(v) * mean(E[norm^2 | known] / v)` is least for this
    v (Cauchy-Schwarz, as in the paper's Theorem 1). It is Theorem 1 itself when scores are fresh, uniform when they
    carry no information, and by Jensen never worse than uniform. The conditional mean is measured: every new score
    gives a triple (old score, staleness, new norm), kept as averaged sums in a table of bins. A cell with little data
    is shrunk to its row (all stalenesses), and a row with little data to its score. Between the centres of score bins,
    v is interpolated.

    Alone it does not bound the importance weights: draw from `Mixture(Calibrated())`.

    Attributes:
      half_life: sweeps over the data after which an observation counts half.

    Example:
      >>> proposal, store = Calibrated(), ScoreStore.init(2)
      >>> state = proposal.init()
      >>> basis = proposal.basis(state, store, jnp.int32(0))
      >>> store, _ = store.write(jnp.arange(2), jnp.array([1.0, 3.0]), jnp.int32(0))
      >>> proposal.v(basis, store.score, store.scored_at, jnp.int32(0)).tolist()  # fresh scores: the norms themselves
      [1.0, 3.0]
    """

    half_life: float | jax.Array = 1.0

    def init(self) -> Calibration:
        bins = (SCORE_BINS, STALENESS_BINS)
        return Calibration(
            squares=jnp.zeros(bins, jnp.float32), counts=jnp.zeros(bins, jnp.float32), level=jnp.float32(0)
        )

    def observe(
        self,
        state: Calibration,
        basis: CalibratedBasis,
        store: ScoreStore,
        indices: jax.Array,
        norm: jax.Array,
        step: jax.Array,
        importance_weights: jax.Array | float = 1.0,
    ) -> Calibration:
        """Adds triples of old score, staleness and new norm, see `Proposal.observe`.

        First norms of an example teach nothing. Inside a bin all examples have the same v, so that the draw does not
        bias its mean: the importance weights are needed for the level alone.
        """
        del basis
        num_examples = len(store)
        indices, norm, importance_weights, each = thinned(indices, norm, importance_weights)
        inside = (indices >= 0) & (indices < num_examples)
        valid = inside & jnp.isfinite(norm) & (norm >= 0)
        norm = jnp.where(valid, norm, 0)
        level = new_level(state.level, norm, jnp.where(valid, each * importance_weights, 0), num_examples)
        old_score, scored_at = store.at(jnp.clip(indices, 0, num_examples - 1))
        staleness = step - scored_at
        known = valid & (scored_at != NEVER) & (staleness > 0)
        row = jnp.clip(jnp.floor(_octave(relative(old_score, level))), 0, SCORE_BINS - 1).astype(jnp.int32)
        column = _staleness_bin(staleness)
        forget = 0.5 ** (each * jnp.sum(known) / (self.half_life * num_examples))
        square = relative(norm, level) ** 2
        # Sums over bins as a product of one-hot matrices: the same bits on every run, which a scatter on a GPU is not.
        rows, columns = jax.nn.one_hot(row, SCORE_BINS), jax.nn.one_hot(column, STALENESS_BINS)

        def binned(values):
            return jnp.matmul((rows * values[:, None]).T, columns, precision=jax.lax.Precision.HIGHEST)

        return Calibration(
            squares=forget * state.squares + binned(jnp.where(known, each * square, 0)),
            counts=forget * state.counts + binned(each * known.astype(jnp.float32)),
            level=level,
        )

    def basis(self, state: Calibration, store: ScoreStore, step: jax.Array) -> CalibratedBasis:
        level = jnp.where(state.level > 0, state.level, 1)
        basis = CalibratedBasis(_log_root_mean_squares(state), level, Completion(*jnp.zeros(2)))
        v = _calibrated(basis, store.score, step - store.scored_at)
        return basis._replace(completion=make_completion(v, store.scored_at))

    def v(self, basis: CalibratedBasis, score, scored_at, step) -> jax.Array:
        v = _calibrated(basis, score, step - scored_at)
        return complete(v, scored_at, basis.completion)


def _log_root_mean_squares(state: Calibration) -> jax.Array:
    """Returns log2 sqrt(E[norm^2]) of each bin, in units of the level."""
    centres = 2.0 ** (jnp.arange(SCORE_BINS, dtype=jnp.float32) + 0.5 - OCTAVES_BELOW_SCALE)
    total = jnp.sum(state.counts)
    overall = jnp.where(total > 0, jnp.sum(state.squares) / jnp.maximum(total, TINY), 1)
    prior = (1 - OUTLIER_FRACTION) * centres**2 + OUTLIER_FRACTION * overall
    row_mean = _shrunk(jnp.sum(state.squares, axis=1), jnp.sum(state.counts, axis=1), prior)
    return 0.5 * jnp.log2(_shrunk(state.squares, state.counts, row_mean[:, None]))


def _calibrated(basis: CalibratedBasis, score, staleness) -> jax.Array:
    """Returns sqrt(E[norm^2 | score, staleness]) in units of the level, log-linear between centres of score bins."""
    relative_score = score / basis.level
    place = jnp.clip(_octave(relative_score) - 0.5, 0, SCORE_BINS - 1)
    row = jnp.minimum(place.astype(jnp.int32), SCORE_BINS - 2)
    column = _staleness_bin(staleness)
    low, high = basis.log_rms[row, column], basis.log_rms[row + 1, column]
    # A score of this very step is the norm itself.
    return jnp.where(staleness > 0, 2.0 ** (low + (place - row) * (high - low)), relative_score)


def _shrunk(total, count, prior):
    """Returns total / count shrunk to prior, arithmetically: to draw a cell too often costs less than too rarely."""
    return (total + SHRINKAGE * prior) / (count + SHRINKAGE)


def _octave(relative_score):
    """Returns the place on the log-score axis, in bins from its lower end; a score of zero lies at that end."""
    return jnp.log2(jnp.maximum(relative_score, 2.0**-OCTAVES_BELOW_SCALE)) + OCTAVES_BELOW_SCALE


def _staleness_bin(staleness):
    octave = jnp.log2(jnp.maximum(staleness, 1).astype(jnp.float32))
    return jnp.clip(octave.astype(jnp.int32), 0, STALENESS_BINS - 1)
