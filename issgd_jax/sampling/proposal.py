"""Proposals: from scores to the unnormalised probabilities v that are drawn from.

A proposal is a frozen dataclass and a pytree: its numbers may change between calls without compiling again. `Proposal`
documents its methods and the order in which they are called. Examples that were never scored get the mean v of the
others, so that all have a chance from the first step.
"""

import dataclasses
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from issgd_jax.sampling.store import NEVER, ScoreStore
from issgd_jax.sampling.table import Table, build_table, uniform_table

# Least v of a scored example, relative to the largest: a stale score of zero must not shut an example out for ever, and
# float32 must tell it from zero beside any other (see `sampling.draw`).
MIN_RELATIVE_V = 2.0**-16
TINY = jnp.finfo(jnp.float32).tiny
# Norms beyond this multiple of their unit count as this: their squares must not overflow.
MAX_RELATIVE_SCORE = 2.0**24
# Norms of one round that a proposal learns from.
MAX_OBSERVED = 2**16
# Uniform shares that a mixture chooses from: half is close to plain SGD; the least costs scores that stay true 1 %.
# The largest comes first: it is taken until there is evidence.
FRACTIONS = (1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64)


class Proposal(Protocol):
    """Contract of a proposal. Inheriting from it gives one that learns nothing; `basis` and `v` are to be written.

    Order of calls, see `sampler.Sampler`. For scores that arrive:

    1. `observe`, while the store still has the old scores. Called later, the proposal would compare a score with itself
       and take every score for exact.
    2. `ScoreStore.write`.
    3. `v` of these examples with the basis of the last rebuild, and `Table.write`. A newer basis may have another unit
       than the rest of the table: these examples would be drawn too often or too rarely.

    For a rebuild: `basis`, then `table` with this basis. A table of another basis makes the next step 3 wrong in the
    same way. In every order the gradient stays unbiased, as the importance weights are of the very v in the table; what
    is lost is variance.
    """

    def init(self) -> Any:
        """Returns the first state, a pytree; empty if the proposal learns nothing."""
        return ()

    def observe(self, state, basis, store: ScoreStore, indices, norm, step, importance_weights=1.0) -> Any:
        """Returns the state that has learned from new gradient norms.

        Args:
          state: before.
          basis: of the last rebuild.
          store: with the old scores of the examples.
          indices: i32[m], of the examples; those outside [0, N) are padding.
          norm: f32[m], new gradient norms; those that are NaN, infinite or negative teach nothing.
          step: i32[], of the parameters that gave the norms.
          importance_weights: f32[m], of the draw that chose the examples; 1 where all were as likely.
        """
        del basis, store, indices, norm, step, importance_weights
        return state

    def basis(self, state, store: ScoreStore, step: jax.Array) -> Any:
        """Returns what the v of one example needs to know of all; O(N), once a rebuild."""
        ...

    def v(self, basis, score: jax.Array, scored_at: jax.Array, step: jax.Array) -> jax.Array:
        """Returns the unnormalised probabilities f32[m] of examples with these scores f32[m] and steps i32[m]."""
        ...

    def table(self, basis, store: ScoreStore, step: jax.Array) -> Table:
        """Returns the table of all examples; O(N)."""
        return build_table(self.v(basis, store.score, store.scored_at, step))


class Completion(NamedTuple):
    """Statistics of the v of all scored examples.

    Attributes:
      mean: f32[]; 1 if none is scored.
      least: f32[], below which v counts as this much.
    """

    mean: jax.Array
    least: jax.Array


def make_completion(v: jax.Array, scored_at: jax.Array) -> Completion:
    """Returns the statistics of v f32[N]."""
    scored = scored_at != NEVER
    num_scored = jnp.sum(scored)
    total, largest = jnp.sum(jnp.where(scored, v, 0)), jnp.max(jnp.where(scored, v, 0))
    mean = jnp.where(num_scored > 0, total / jnp.maximum(num_scored, 1), 1)
    return Completion(jnp.maximum(mean, MIN_RELATIVE_V * largest), MIN_RELATIVE_V * largest)


def complete(v: jax.Array, scored_at: jax.Array, completion: Completion) -> jax.Array:
    """Returns v with the mean for examples that were never scored, and at least the least for all."""
    return jnp.where(scored_at != NEVER, jnp.maximum(v, completion.least), completion.mean)


def new_level(level: jax.Array, norm: jax.Array, importance_weights: jax.Array, num_examples: int) -> jax.Array:
    """Returns the root mean square f32[] of all norms so far, those of one sweep ago counting half; 0: none.

    Norms fall by orders of magnitude while training: what is learned of them in units of the level of their time stays
    true, and early ones do not dominate.

    Args:
      level: before.
      norm: f32[m], new norms.
      importance_weights: f32[m], 0 for those that do not count.
      num_examples: N.
    """
    count, known = jnp.sum(importance_weights), level > TINY
    unit = jnp.where(known, level, jnp.max(jnp.where(importance_weights > 0, norm, 0)))
    kept = jnp.where(known, 0.5 ** (count / num_examples), 0)
    square = kept + (1 - kept) * jnp.sum(importance_weights * relative(norm, unit) ** 2) / jnp.maximum(count, TINY)
    return jnp.where(count > 0, unit * jnp.sqrt(square), level)


def thinned(indices: jax.Array, norm: jax.Array, importance_weights) -> tuple[jax.Array, jax.Array, Any, int]:
    """Returns at most MAX_OBSERVED of the norms f32[m], evenly spaced, and how many each of them stands for."""
    each = -(-indices.size // MAX_OBSERVED)
    some = [x if jnp.ndim(x) == 0 else x[::each] for x in (indices, norm, importance_weights)]
    return *some, each


def relative(norm: jax.Array, level: jax.Array) -> jax.Array:
    """Returns norms in units of the level."""
    return jnp.minimum(norm / jnp.maximum(level, TINY), MAX_RELATIVE_SCORE)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Uniform(Proposal):
    """Plain SGD: v = 1, and importance weights of exactly 1.

    Example:
      >>> store = ScoreStore.init(3)
      >>> Uniform().table((), store, jnp.int32(0)).v().tolist()
      [1.0, 1.0, 1.0]
    """

    def basis(self, state, store: ScoreStore, step: jax.Array) -> tuple[()]:
        del state, store, step
        return ()

    def v(self, basis, score, scored_at, step) -> jax.Array:
        del basis, scored_at, step
        return jnp.ones(score.shape, jnp.float32)

    def table(self, basis, store: ScoreStore, step: jax.Array) -> Table:
        del basis, step
        return uniform_table(len(store))


class ProportionalBasis(NamedTuple):
    """Basis of `Proportional`.

    Attributes:
      smoothing: f32[], in units of the score.
      completion: of v.
      enough: bool[], whether enough scores are usable.
      population: f32[], examples that can be drawn.
    """

    smoothing: jax.Array
    completion: Completion
    enough: jax.Array
    population: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Proportional(Proposal):
    """The paper's proposal: v = score + smoothing (section 4.2 and the authors' code).

    Attributes:
      smoothing: the additive constant, >= 0. Too small, and one stale score gives a huge importance weight; too large,
        and the gain is lost (the paper's figure 4). `Calibrated` needs none.
      relative: whether smoothing counts in units of the mean score, which changes during training, not of the score.
      max_staleness: learner steps; None: no limit. BIASED otherwise, as in the paper: examples whose score is older, or
        missing, are left out of the draw and of the mean, so that the gradient is that of the usable examples only.
        While fewer than one in ten are usable, all are drawn uniformly.

    Example:
      >>> store, _ = ScoreStore.init(3).write(jnp.arange(2), jnp.array([1.0, 3.0]), jnp.int32(0))
      >>> proposal = Proportional(smoothing=1.0)
      >>> proposal.table(proposal.basis((), store, jnp.int32(1)), store, jnp.int32(1)).v().tolist()
      [2.0, 4.0, 3.0]
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
            make_completion(store.score + smoothing, store.scored_at),
            enough,
            jnp.where(enough, num_usable, len(store)).astype(jnp.float32),
        )

    def v(self, basis: ProportionalBasis, score, scored_at, step) -> jax.Array:
        v = complete(score + basis.smoothing, scored_at, basis.completion)
        if self.max_staleness is None:
            return v
        return jnp.where(basis.enough, jnp.where(self._usable(scored_at, step), v, 0), 1)

    def table(self, basis: ProportionalBasis, store: ScoreStore, step: jax.Array) -> Table:
        v = self.v(basis, store.score, store.scored_at, step)
        return build_table(v, None if self.max_staleness is None else basis.population)

    def _usable(self, scored_at, step):
        if self.max_staleness is None:
            return jnp.ones(scored_at.shape, bool)
        return (scored_at != NEVER) & (step - scored_at <= self.max_staleness)


class MixtureState(NamedTuple):
    """State of `Mixture`.

    Attributes:
      inner: state of the mixed proposal.
      second_moments: f32[6], averaged sums for each of FRACTIONS, in units of the level^2 of their time.
      level: f32[], root mean square of the norms of the last sweep; 0 before.
    """

    inner: Any
    second_moments: jax.Array
    level: jax.Array


class MixtureBasis(NamedTuple):
    """Basis of `Mixture`.

    Attributes:
      inner: basis of the mixed proposal.
      mean: f32[], of its v.
      uniform_fraction: f32[].
    """

    inner: Any
    mean: jax.Array
    uniform_fraction: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mixture(Proposal):
    """Mixture of uniform draws with another proposal.

    Attributes:
      proposal: any.
      uniform_fraction: share of uniform draws, in [0, 1). None: learned; that of FRACTIONS with which the norms of the
        last sweep over the data would have given the least second moment of the gradient, `mean(v) * mean(norm^2 / v)`,
        each v being the one before its norm was known.

    Guarantees:
      At a rebuild no importance weight exceeds `1 / uniform_fraction`; until the next one, at most by as much as the
      mean v grows. Examples that the other proposal leaves out are drawn uniformly.

    Example:
      >>> store, _ = ScoreStore.init(2).write(jnp.arange(2), jnp.array([1.0, 3.0]), jnp.int32(0))
      >>> proposal = Mixture(Proportional(smoothing=0.0), uniform_fraction=0.5)
      >>> proposal.table(proposal.basis(proposal.init(), store, jnp.int32(1)), store, jnp.int32(1)).v().tolist()
      [3.0, 5.0]
    """

    proposal: Any
    uniform_fraction: float | jax.Array | None = None

    def init(self) -> MixtureState:
        return MixtureState(self.proposal.init(), jnp.zeros(len(FRACTIONS), jnp.float32), jnp.float32(0))

    def observe(
        self,
        state: MixtureState,
        basis: MixtureBasis,
        store: ScoreStore,
        indices: jax.Array,
        norm: jax.Array,
        step: jax.Array,
        importance_weights: jax.Array | float = 1.0,
    ) -> MixtureState:
        inner = self.proposal.observe(state.inner, basis.inner, store, indices, norm, step, importance_weights)
        state = state._replace(inner=inner)
        if self.uniform_fraction is not None:
            return state
        num_examples = len(store)
        indices, norm, importance_weights, each = thinned(indices, norm, importance_weights)
        at = jnp.clip(indices, 0, num_examples - 1)
        score, scored_at = store.at(at)
        valid = (indices == at) & jnp.isfinite(norm) & (norm >= 0) & (scored_at < step)
        importance_weights = jnp.where(valid, each * importance_weights, 0)
        norm = jnp.where(valid, norm, 0)
        level = new_level(state.level, norm, importance_weights, num_examples)
        v = self.proposal.v(basis.inner, score, scored_at, step)
        ratio = [_mixed(basis.mean, basis.mean, f) / _mixed(v, basis.mean, f) for f in FRACTIONS]
        new = jnp.sum(importance_weights * relative(norm, level) ** 2 * jnp.stack(ratio), axis=1)
        forget = 0.5 ** (jnp.sum(importance_weights) / num_examples)
        return MixtureState(inner, forget * state.second_moments + new, level)

    def basis(self, state: MixtureState, store: ScoreStore, step: jax.Array) -> MixtureBasis:
        basis = self.proposal.basis(state.inner, store, step)
        fraction = self.uniform_fraction
        if fraction is None:
            fraction = jnp.asarray(FRACTIONS, jnp.float32)[jnp.argmin(state.second_moments)]
        mean = jnp.mean(self.proposal.v(basis, store.score, store.scored_at, step))
        return MixtureBasis(basis, mean, jnp.asarray(fraction, jnp.float32))

    def v(self, basis: MixtureBasis, score, scored_at, step) -> jax.Array:
        return _mixed(self.proposal.v(basis.inner, score, scored_at, step), basis.mean, basis.uniform_fraction)


def _mixed(v, mean, uniform_fraction):
    """Returns v plus the constant with which this share of the draws is uniform."""
    return v + uniform_fraction / (1 - uniform_fraction) * mean
