"""Proposals: from what is known of the examples to the unnormalised probabilities drawn from.

A proposal is a value: its numbers may change between calls without recompiling. Five functions make it one:

- `init()` gives its state, a pytree (empty if it learns nothing);
- `observe(state, store, indices, norm, step)` learns from new gradient norms, while the store has the old scores;
- `basis(state, store, step)` gives what the v of one example needs to know of all: O(N), once a round;
- `v(basis, score, scored_at, step)` gives unnormalised probabilities, example by example: of all once a round, and in
  between of those that were written;
- `table(basis, store, step)` gives the sampling table of all.

Never-scored examples get the mean of the others' v, so that all have a chance from the first step.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from issgd_jax import sampling
from issgd_jax.store import NEVER, ScoreStore

# Least v of a scored example, relative to the largest: a stale score of zero must not shut an example out for ever, and
# float32 must tell it from zero beside any other (see `sampling.draw`).
MIN_RELATIVE_V = 2.0**-16
TINY = jnp.finfo(jnp.float32).tiny
# Norms beyond this multiple of the first mean count as this: their squares must not overflow.
MAX_RELATIVE_SCORE = 2.0**24


class _Proposal:
    """What proposals have in common."""

    def init(self) -> Any:
        return ()

    def observe(self, state, store: ScoreStore, indices, norm, step) -> Any:
        del store, indices, norm, step
        return state

    def table(self, basis, store: ScoreStore, step: jax.Array) -> sampling.Table:
        return sampling.build_table(self.v(basis, store.score, store.scored_at, step))


class Completion(NamedTuple):
    """Of the v of all scored examples. mean: 1 if none is scored. least: below it, v counts as this much. f32[]."""

    mean: jax.Array
    least: jax.Array


def _completion(v: jax.Array, scored_at: jax.Array) -> Completion:
    scored = scored_at != NEVER
    num_scored = jnp.sum(scored)
    total, largest = jnp.sum(jnp.where(scored, v, 0)), jnp.max(jnp.where(scored, v, 0))
    mean = jnp.where(num_scored > 0, total / jnp.maximum(num_scored, 1), 1)
    return Completion(jnp.maximum(mean, MIN_RELATIVE_V * largest), MIN_RELATIVE_V * largest)


def _complete(v: jax.Array, scored_at: jax.Array, completion: Completion) -> jax.Array:
    """Gives never-scored examples the mean v of the scored, and every example a chance."""
    return jnp.where(scored_at != NEVER, jnp.maximum(v, completion.least), completion.mean)


def _uniform_mass(v: jax.Array, uniform_fraction) -> jax.Array:
    """What is added to each v, so that this share of the draws is uniform."""
    return uniform_fraction / (1 - uniform_fraction) * jnp.mean(v)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Uniform(_Proposal):
    """Plain SGD: v = 1, and importance weights of exactly 1."""

    def basis(self, state, store: ScoreStore, step: jax.Array) -> tuple[()]:
        del state, store, step
        return ()

    def v(self, basis, score, scored_at, step) -> jax.Array:
        del basis, scored_at, step
        return jnp.ones(score.shape, jnp.float32)

    def table(self, basis, store: ScoreStore, step: jax.Array) -> sampling.Table:
        del basis, step
        return sampling.uniform_table(len(store))


class ProportionalBasis(NamedTuple):
    """smoothing: f32[], in units of the score. enough: bool[], whether enough scores are usable. population: f32[]."""

    smoothing: jax.Array
    completion: Completion
    enough: jax.Array
    population: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Proportional(_Proposal):
    """The paper's proposal: v = score + smoothing (section 4.2 and the authors' code).

    smoothing: the additive constant, >= 0. Too small, and one stale score gives a huge importance weight; too large,
      and the gain is washed out (the paper's figure 4). `Calibrated` needs none.
    relative: whether smoothing counts in units of the mean score, which changes during training, not of the score.
    max_staleness: learner steps; None = no limit. BIASED otherwise, as in the paper: examples whose score is
      older, or missing, are left out of the draw and out of the mean, so that the gradient is that of the usable
      examples only. While fewer than one in ten are usable, all are drawn uniformly.
    """

    smoothing: float | jax.Array
    relative: bool = dataclasses.field(default=False, metadata={"static": True})
    max_staleness: int | jax.Array | None = None

    def basis(self, state, store: ScoreStore, step: jax.Array) -> ProportionalBasis:
        del state
        smoothing = jnp.asarray(self.smoothing, jnp.float32)
        if self.relative:
            num_scored = jnp.maximum(jnp.sum(store.scored), 1)
            smoothing = smoothing * jnp.sum(jnp.where(store.scored, store.score, 0)) / num_scored
        num_usable = jnp.sum(self._usable(store.scored_at, step))
        enough = 10 * num_usable >= len(store)
        return ProportionalBasis(
            smoothing,
            _completion(store.score + smoothing, store.scored_at),
            enough,
            jnp.where(enough, num_usable, len(store)).astype(jnp.float32),
        )

    def v(self, basis: ProportionalBasis, score, scored_at, step) -> jax.Array:
        v = _complete(score + basis.smoothing, scored_at, basis.completion)
        if self.max_staleness is None:
            return v
        return jnp.where(basis.enough, jnp.where(self._usable(scored_at, step), v, 0), 1)

    def table(self, basis: ProportionalBasis, store: ScoreStore, step: jax.Array) -> sampling.Table:
        v = self.v(basis, store.score, store.scored_at, step)
        return sampling.build_table(v, None if self.max_staleness is None else basis.population)

    def _usable(self, scored_at, step):
        if self.max_staleness is None:
            return jnp.ones(scored_at.shape, bool)
        return (scored_at != NEVER) & (step - scored_at <= self.max_staleness)


class MixtureBasis(NamedTuple):
    """of_proposal: the mixed one's basis. uniform_mass: f32[], added to each of its v."""

    of_proposal: Any
    uniform_mass: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mixture(_Proposal):
    """A share of the draws is uniform, the rest follows another proposal.

    When the table is made, no importance weight exceeds `1 / uniform_fraction`; until the next one, at most by as much
    as the mean v grows. Examples that the other proposal leaves out are drawn uniformly.

    proposal: any. uniform_fraction: in [0, 1).
    """

    proposal: Any
    uniform_fraction: float | jax.Array = 0.2

    def init(self) -> Any:
        return self.proposal.init()

    def observe(self, state, store: ScoreStore, indices, norm, step) -> Any:
        return self.proposal.observe(state, store, indices, norm, step)

    def basis(self, state, store: ScoreStore, step: jax.Array) -> MixtureBasis:
        basis = self.proposal.basis(state, store, step)
        v = self.proposal.v(basis, store.score, store.scored_at, step)
        return MixtureBasis(basis, _uniform_mass(v, self.uniform_fraction))

    def v(self, basis: MixtureBasis, score, scored_at, step) -> jax.Array:
        return self.proposal.v(basis.of_proposal, score, scored_at, step) + basis.uniform_mass


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


class CalibratedBasis(NamedTuple):
    """log_rms: f32[40, 12], see `_log_root_mean_squares`. scale, uniform_mass: f32[]."""

    log_rms: jax.Array
    scale: jax.Array
    completion: Completion
    uniform_mass: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Calibrated(_Proposal):
    """Least variance for what is known of an example, its score and staleness: v = sqrt(E[norm^2 | score, staleness]).

    Among proposals that see only the score and its staleness, `mean(v) * mean(E[norm^2 | known] / v)` is least for this
    v (Cauchy-Schwarz, as in the paper's Theorem 1). It is Theorem 1 itself when scores are fresh, uniform when they
    tell nothing, and by Jensen never worse than uniform. The conditional mean is measured: every re-scoring gives a
    triple (old score, staleness, new norm), kept as averaged sums in a table of bins. A cell with little data leans on
    its row (all stalenesses), and a row with little data on its score. Between the centres of score bins, v is
    interpolated.

    uniform_fraction: share of draws that are uniform, in [0, 1); above 0 it bounds importance weights, see `Mixture`.
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
        self, state: Calibration, store: ScoreStore, indices: jax.Array, norm: jax.Array, step: jax.Array
    ) -> Calibration:
        """Adds the triples of new gradient norms f32[m], measured at `step`, for the examples `indices` i32[m].

        First norms of an example, bad ones (NaN, infinite, negative) and indices outside [0, N) teach nothing.
        """
        num_examples = len(store)
        inside = (indices >= 0) & (indices < num_examples)
        valid = inside & jnp.isfinite(norm) & (norm >= 0)
        first_mean = jnp.sum(jnp.where(valid, norm, 0)) / jnp.maximum(jnp.sum(valid), 1)
        scale = jnp.where(state.scale > 0, state.scale, first_mean)

        at = jnp.clip(indices, 0, num_examples - 1)
        old_score, staleness = store.score[at], step - store.scored_at[at]
        known = valid & store.scored[at] & (staleness > 0)
        row = jnp.clip(jnp.floor(_octave(old_score / jnp.maximum(scale, TINY))), 0, SCORE_BINS - 1).astype(jnp.int32)
        column = _staleness_bin(staleness)
        forget = 0.5 ** (jnp.sum(known) / (self.half_life * num_examples))
        relative = jnp.where(known, jnp.minimum(norm / jnp.maximum(scale, TINY), MAX_RELATIVE_SCORE), 0)
        # Sums over bins as a product of one-hot matrices: the same bits on every run, which a scatter on a GPU is not.
        rows, columns = jax.nn.one_hot(row, SCORE_BINS), jax.nn.one_hot(column, STALENESS_BINS)

        def binned(values):
            return jnp.matmul((rows * values[:, None]).T, columns, precision=jax.lax.Precision.HIGHEST)

        return Calibration(
            squares=forget * state.squares + binned(relative**2),
            counts=forget * state.counts + binned(known.astype(jnp.float32)),
            scale=scale,
        )

    def basis(self, state: Calibration, store: ScoreStore, step: jax.Array) -> CalibratedBasis:
        scale = jnp.where(state.scale > 0, state.scale, 1)
        basis = CalibratedBasis(_log_root_mean_squares(state), scale, Completion(*jnp.zeros(2)), jnp.float32(0))
        v = _calibrated(basis, store.score, step - store.scored_at)
        basis = basis._replace(completion=_completion(v, store.scored_at))
        v = _complete(v, store.scored_at, basis.completion)
        return basis._replace(uniform_mass=_uniform_mass(v, self.uniform_fraction))

    def v(self, basis: CalibratedBasis, score, scored_at, step) -> jax.Array:
        v = _calibrated(basis, score, step - scored_at)
        return _complete(v, scored_at, basis.completion) + basis.uniform_mass


def _log_root_mean_squares(state: Calibration) -> jax.Array:
    """log2 sqrt(E[norm^2]) of each bin, in units of the scale."""
    centres = 2.0 ** (jnp.arange(SCORE_BINS, dtype=jnp.float32) + 0.5 - OCTAVES_BELOW_SCALE)
    row_mean = _shrunk(jnp.sum(state.squares, axis=1), jnp.sum(state.counts, axis=1), centres**2)
    return 0.5 * jnp.log2(_shrunk(state.squares, state.counts, row_mean[:, None]))


def _calibrated(basis: CalibratedBasis, score, staleness) -> jax.Array:
    """sqrt(E[norm^2 | score, staleness]) in units of the scale, log-linear between centres of score bins."""
    relative = score / basis.scale
    place = jnp.clip(_octave(relative) - 0.5, 0, SCORE_BINS - 1)
    row = jnp.minimum(place.astype(jnp.int32), SCORE_BINS - 2)
    column = _staleness_bin(staleness)
    low, high = basis.log_rms[row, column], basis.log_rms[row + 1, column]
    # A score of this very step is the norm itself: nothing to be learned about.
    return jnp.where(staleness > 0, 2.0 ** (low + (place - row) * (high - low)), relative)


def _shrunk(total, count, prior):
    """total / count, pulled to prior, arithmetically: better to draw too often from a doubtful cell than too rarely."""
    return (total + SHRINKAGE * prior) / (count + SHRINKAGE)


def _octave(relative_score):
    """Place on the log-score axis, in bins from its lower end; a score of zero lies at that end."""
    return jnp.log2(jnp.maximum(relative_score, 2.0**-OCTAVES_BELOW_SCALE)) + OCTAVES_BELOW_SCALE


def _staleness_bin(staleness):
    octave = jnp.log2(jnp.maximum(staleness, 1).astype(jnp.float32))
    return jnp.clip(octave.astype(jnp.int32), 0, STALENESS_BINS - 1)
