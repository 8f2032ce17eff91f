"""Proposals: from what is known of the examples to the unnormalised probabilities drawn from.

A proposal is a value: its numbers may change between calls without recompiling. Three functions make it one:

- `init()` gives its state, a pytree (empty if it learns nothing);
- `observe(state, store, indices, score, step)` learns from new scores, before they enter the store;
- `table(state, store, step)` gives the sampling table.

Never-scored examples get the mean of the others' v, so that all have a chance from the first step.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from issgd_jax import sampling
from issgd_jax.store import ScoreStore

# Least v of a scored example, relative to the largest: a stale score of zero must not shut an example out for ever, and
# float32 must tell it from zero beside any other (see `sampling.draw`).
MIN_RELATIVE_V = 2.0**-16
TINY = jnp.finfo(jnp.float32).tiny
# Norms beyond this multiple of the first mean count as this: their squares must not overflow.
MAX_RELATIVE_SCORE = 2.0**24


class _Memoryless:
    """A proposal that learns nothing."""

    def init(self) -> tuple[()]:
        return ()

    def observe(self, state, store, indices, score, step):
        del store, indices, score, step
        return state


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Uniform(_Memoryless):
    """Plain SGD: v = 1, and importance weights of exactly 1."""

    def table(self, state, store: ScoreStore, step: jax.Array) -> sampling.Table:
        del state, step
        return sampling.uniform_table(store.score.shape[0])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Proportional(_Memoryless):
    """The paper's proposal: v = score + smoothing (section 4.2 and the authors' code).

    smoothing: the additive constant, >= 0, in units of the score. Too small, and one stale score gives a huge
      importance weight; too large, and the gain is washed out (the paper's figure 4). `Calibrated` needs none.
    max_staleness: learner steps; None = no limit. BIASED otherwise, as in the paper: examples whose score is
      older, or missing, are left out of the draw and out of the mean, so that the gradient is that of the usable
      examples only. While fewer than one in ten are usable, all are drawn uniformly.
    """

    smoothing: float | jax.Array
    max_staleness: int | jax.Array | None = None

    def table(self, state, store: ScoreStore, step: jax.Array) -> sampling.Table:
        del state
        v = _complete(store.score + self.smoothing, store.scored)
        if self.max_staleness is None:
            return sampling.build_table(v)
        usable = store.scored & (store.staleness(step) <= self.max_staleness)
        num_usable = jnp.sum(usable)
        enough = 10 * num_usable >= v.shape[0]
        population = jnp.where(enough, num_usable, v.shape[0])
        return sampling.build_table(jnp.where(enough, jnp.where(usable, v, 0), 1), population)


class Calibration(NamedTuple):
    """What re-scorings have shown: exponentially averaged sums over bins of old score (rows) and staleness (columns).

    squares: f32[40, 12], sums of the new norm squared, in units of scale^2.
    counts: f32[40, 12], how many.
    scale: f32[], the mean of the first scores seen: the unit of the score bins; 0 before.
    """

    squares: jax.Array
    counts: jax.Array
    scale: jax.Array


# Octaves of score, from 2^-28 to 2^12 of the first mean; octaves of staleness, from 1 to 2^11 steps and more.
SCORE_BINS, STALENESS_BINS = 40, 12
OCTAVES_BELOW_SCALE = 28
# Pseudo-counts: how many re-scorings a cell (or a row) needs to outweigh its row (or the belief in its score).
SHRINKAGE = 16.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Calibrated:
    """Least variance for what is known of an example, its score and staleness: v = sqrt(E[norm^2 | score, staleness]).

    Among proposals that see only the score and its staleness, `mean(v) * mean(E[norm^2 | known] / v)` is least for this
    v (Cauchy-Schwarz, as in the paper's Theorem 1). It is Theorem 1 itself when scores are fresh, uniform when they
    tell nothing, and by Jensen never worse than uniform. The conditional mean is measured: every re-scoring gives a
    triple (old score, staleness, new norm), kept as averaged sums in a table of bins. A cell with little data leans on
    its row (all stalenesses), and a row with little data on its score. Between the centres of score bins, v is
    interpolated.

    uniform_fraction: share of draws that are uniform, in [0, 1); with a share above 0 no importance weight exceeds
      `1 / uniform_fraction`.
    half_life: sweeps over the data after which an observation counts half.
    """

    uniform_fraction: float | jax.Array = 0.2
    half_life: float | jax.Array = 1.0

    def init(self) -> Calibration:
        bins = (SCORE_BINS, STALENESS_BINS)
        return Calibration(
            squares=jnp.zeros(bins, jnp.float32), counts=jnp.zeros(bins, jnp.float32), scale=jnp.float32(0)
        )

    def observe(
        self, state: Calibration, store: ScoreStore, indices: jax.Array, score: jax.Array, step: jax.Array
    ) -> Calibration:
        """Adds the triples of new scores f32[m], measured at `step`, for the examples `indices` i32[m].

        First scores of an example, rejected scores and indices outside [0, N) teach nothing.
        """
        num_examples = store.score.shape[0]
        inside = (indices >= 0) & (indices < num_examples)
        valid = inside & jnp.isfinite(score) & (score >= 0)
        first_mean = jnp.sum(jnp.where(valid, score, 0)) / jnp.maximum(jnp.sum(valid), 1)
        scale = jnp.where(state.scale > 0, state.scale, first_mean)

        at = jnp.clip(indices, 0, num_examples - 1)
        old_score, staleness = store.score[at], step - store.scored_at[at]
        known = valid & store.scored[at] & (staleness > 0)
        row = jnp.clip(jnp.floor(_octave(old_score / jnp.maximum(scale, TINY))), 0, SCORE_BINS - 1).astype(jnp.int32)
        column = _staleness_bin(staleness)
        forget = 0.5 ** (jnp.sum(known) / (self.half_life * num_examples))
        relative = jnp.where(known, jnp.minimum(score / jnp.maximum(scale, TINY), MAX_RELATIVE_SCORE), 0)
        # Sums over bins as a product of one-hot matrices: the same bits on every run, which a scatter on a GPU is not.
        rows, columns = jax.nn.one_hot(row, SCORE_BINS), jax.nn.one_hot(column, STALENESS_BINS)

        def binned(values):
            return jnp.matmul((rows * values[:, None]).T, columns, precision=jax.lax.Precision.HIGHEST)

        return Calibration(
            squares=forget * state.squares + binned(relative**2),
            counts=forget * state.counts + binned(known.astype(jnp.float32)),
            scale=scale,
        )

    def table(self, state: Calibration, store: ScoreStore, step: jax.Array) -> sampling.Table:
        staleness = store.staleness(step)
        relative = store.score / jnp.where(state.scale > 0, state.scale, 1)
        # A score of this very step is the norm itself: nothing to be learned about.
        v = jnp.where(staleness > 0, _root_mean_square(state, relative, staleness), relative)
        v = _complete(v, store.scored)
        share = self.uniform_fraction
        return sampling.build_table(v + share / (1 - share) * jnp.mean(v))


def _root_mean_square(state: Calibration, relative_score: jax.Array, staleness: jax.Array) -> jax.Array:
    """sqrt(E[norm^2 | score, staleness]) in units of the scale, log-linear between centres of score bins: f32[N]."""
    centres = 2.0 ** (jnp.arange(SCORE_BINS, dtype=jnp.float32) + 0.5 - OCTAVES_BELOW_SCALE)
    row_mean = _shrunk(jnp.sum(state.squares, axis=1), jnp.sum(state.counts, axis=1), centres**2)
    log_rms = 0.5 * jnp.log2(_shrunk(state.squares, state.counts, row_mean[:, None]))
    place = jnp.clip(_octave(relative_score) - 0.5, 0, SCORE_BINS - 1)
    row = jnp.minimum(place.astype(jnp.int32), SCORE_BINS - 2)
    column = _staleness_bin(staleness)
    low, high = log_rms[row, column], log_rms[row + 1, column]
    return 2.0 ** (low + (place - row) * (high - low))


def _shrunk(total, count, prior):
    """total / count, pulled to prior, arithmetically: better to draw too often from a doubtful cell than too rarely."""
    return (total + SHRINKAGE * prior) / (count + SHRINKAGE)


def _octave(relative_score):
    """Place on the log-score axis, in bins from its lower end; a score of zero lies at that end."""
    return jnp.log2(jnp.maximum(relative_score, 2.0**-OCTAVES_BELOW_SCALE)) + OCTAVES_BELOW_SCALE


def _staleness_bin(staleness):
    octave = jnp.log2(jnp.maximum(staleness, 1).astype(jnp.float32))
    return jnp.clip(octave.astype(jnp.int32), 0, STALENESS_BINS - 1)


def _complete(v: jax.Array, scored: jax.Array) -> jax.Array:
    """Gives never-scored examples the mean v of the scored (1 if none are), and every example a chance: f32[N]."""
    num_scored = jnp.sum(scored)
    mean = jnp.where(num_scored > 0, jnp.sum(jnp.where(scored, v, 0)) / jnp.maximum(num_scored, 1), 1)
    least = MIN_RELATIVE_V * jnp.max(jnp.where(scored, v, 0))
    return jnp.where(scored, jnp.maximum(v, least), mean)
