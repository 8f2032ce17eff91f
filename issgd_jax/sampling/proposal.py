"""Proposals: from scores to the unnormalised probabilities v that examples are drawn by."""

import dataclasses
import math
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from issgd_jax.sampling.checks import MAX_STEP, check_number
from issgd_jax.sampling.fallback import Fallback, apply_fallback, make_fallback
from issgd_jax.sampling.level import normalize, subsample, update_level
from issgd_jax.sampling.store import NEVER, ScoreStore
from issgd_jax.sampling.sum_tree import LARGEST
from issgd_jax.sampling.table import Table, build_table, uniform_table

# Uniform fractions that a mixture chooses from: 1/2 is close to plain SGD; 1/64 costs scores that stay true 1 %.
# The largest comes first: it is chosen until there is evidence.
FRACTIONS = (1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64)


class Proposal(Protocol):
    """Interface of a proposal.

    A proposal is a frozen dataclass registered as a pytree: its numbers may change between calls without compiling
    again. What it learns is in a state outside it. All methods are pure and run under `jit`. `Stateless` has the first
    two for proposals that learn nothing.

    Order of calls, as `Sampler` makes them. When new scores of some examples arrive, O(m log N):

      1. `state = proposal.observe(state, basis, store, indices, norms, step, importance_weights)`
      2. `store, rejected = store.write(indices, scores, step)`
      3. `v = proposal.v(basis, *store.at(indices), current_step)`
      4. `table = table.write(indices, v)`

    From time to time, such as once a round, a rebuild, O(N), always of both:

      5. `basis = proposal.basis(state, store, current_step)`
      6. `table = proposal.table(basis, store, current_step)`

    In another order:

      - 2 before 1: the old scores are lost, and the proposal learns nothing from these norms.
      - 3 before 2: the table gets the probabilities of the old scores.
      - 5 without 6, or a v of another basis than the table's: v of examples written since is in another unit than the
        rest of the table, and they are drawn too often or too rarely. Draws stay unbiased, as importance weights are
        computed from the table; their variance rises.
      - never 5 and 6: what was learned is never used, and v of examples that are not drawn does not age.

    Example:
      A proposal by the square root of the score, from its five methods:

      >>> @jax.tree_util.register_dataclass
      ... @dataclasses.dataclass(frozen=True)
      ... class SquareRoot(Stateless):
      ...     def basis(self, state, store, step):
      ...         return ()
      ...     def v(self, basis, score, scored_at, step):
      ...         return jnp.where(scored_at >= 0, jnp.sqrt(score) + 0.1, 1.0)
      ...     def table(self, basis, store, step):
      ...         return build_table(self.v(basis, store.score, store.scored_at, step))
      >>> from issgd_jax.sampling.sampler import Sampler
      >>> sampler = Sampler(num_examples=3, batch_size=2, proposal=SquareRoot())
      >>> state = sampler.ingest(sampler.init(seed=0), jnp.array([0, 1]), jnp.array([4.0, 9.0]), jnp.int32(0))
      >>> [round(v, 2) for v in state.table.v().tolist()]
      [2.1, 3.1, 1.0]
    """

    def init(self) -> Any:
        """Returns the state before any observation: a pytree of arrays, `()` if the proposal learns nothing."""

    def observe(
        self, state: Any, basis: Any, store: ScoreStore, indices: jax.Array, norms: jax.Array, step: jax.Array,
        importance_weights: jax.Array | float = 1.0,
    ) -> Any:  # fmt: skip
        """Learns from new gradient norms, while the store has the old scores.

        Args:
          state: as returned by `init` or `observe`.
          basis: the one by which the present table was built.
          store: with the scores before these norms are written.
          indices: i32[m]; those outside [0, N) are padding and must teach nothing.
          norms: f32[m]; those that are NaN, infinite or negative must teach nothing.
          step: i32[], learner step of the parameters that gave the norms.
          importance_weights: f32[m] or 1, of the draw of these examples: they undo its preference for large v.

        Returns:
          The new state.
        """

    def basis(self, state: Any, store: ScoreStore, step: jax.Array) -> Any:
        """Returns what v of one example depends on besides its own score and age, such as means over all; O(N)."""

    def v(self, basis: Any, score: jax.Array, scored_at: jax.Array, step: jax.Array) -> jax.Array:
        """Returns unnormalised probabilities f32[m], example by example.

        Args:
          basis: as returned by `basis`.
          score: f32[m].
          scored_at: i32[m]; -1 where never scored.
          step: i32[], the present learner step.

        Guarantees:
          v is finite and >= 0. Every example has v > 0, or the draw is biased; those never scored too.
        """

    def table(self, basis: Any, store: ScoreStore, step: jax.Array) -> Table:
        """Returns the table of v of all examples; O(N)."""


class Stateless:
    """Base of proposals that learn nothing."""

    def init(self) -> tuple[()]:
        return ()

    def observe(self, state, basis, store: ScoreStore, indices, norms, step, importance_weights=1.0) -> tuple[()]:
        del basis, store, indices, norms, step, importance_weights
        return state


def check_proposal(proposal: Any) -> None:
    """Raises TypeError unless it is an object with the methods of `Proposal`."""
    methods = ("init", "observe", "basis", "v", "table")
    if isinstance(proposal, type) or not all(hasattr(proposal, method) for method in methods):
        raise TypeError(f"proposal must have the methods of Proposal, such as Mixture(Calibrated()), got {proposal!r}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Uniform(Stateless):
    """Plain SGD: v = 1, and importance weights of exactly 1.

    Example:
      >>> store, step = ScoreStore.init(4), jnp.int32(0)
      >>> Uniform().table((), store, step).v().tolist()
      [1.0, 1.0, 1.0, 1.0]
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
      fallback: for never-scored examples.
      enough: bool[], whether one in ten scores is young enough to be used.
      population: f32[], the number of examples that are drawn from.
    """

    smoothing: jax.Array
    fallback: Fallback
    enough: jax.Array
    population: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Proportional(Stateless):
    """The paper's proposal: v = score + smoothing (section 4.2 and the authors' code).

    Args:
      smoothing: additive constant, >= 0. If too small, one stale score gives a huge importance weight; if too large,
        nothing is gained over uniform draws (paper, figure 4). `Calibrated` needs none.
      relative: whether smoothing is in units of the mean score, which changes in training, instead of the score.
      max_staleness: in learner steps; None: no limit. BIASED otherwise, as in the paper: examples whose score is older
        or missing are excluded from the draw and from the mean, so that the gradient is that of the others only. While
        fewer than one in ten have a usable score, draws are uniform over all.

    Example:
      >>> store, _ = ScoreStore.init(3).write(jnp.arange(2), jnp.array([1.0, 3.0]), jnp.int32(0))
      >>> proposal, step = Proportional(smoothing=0.5), jnp.int32(1)
      >>> basis = proposal.basis(proposal.init(), store, step)
      >>> proposal.table(basis, store, step).v().tolist()  # the third, never scored, has the mean
      [1.5, 3.5, 2.5]
    """

    smoothing: float | jax.Array
    relative: bool = dataclasses.field(default=False, metadata={"static": True})
    max_staleness: int | jax.Array | None = None

    def __post_init__(self):
        check_number("smoothing", self.smoothing, lambda x: 0 <= x < math.inf, "finite and >= 0")
        check_number(
            "max_staleness", self.max_staleness, lambda x: 0 <= x <= MAX_STEP, f">= 0 and <= {MAX_STEP}, or None"
        )

    def basis(self, state, store: ScoreStore, step: jax.Array) -> ProportionalBasis:
        del state
        smoothing = jnp.asarray(self.smoothing, jnp.float32)
        if self.relative:
            num_scored = jnp.maximum(jnp.sum(store.scored), 1).astype(jnp.float32)
            scores = jnp.where(store.scored, jnp.minimum(store.score, LARGEST), 0)
            smoothing = smoothing * jnp.sum(scores) / num_scored
        num_usable = jnp.sum(self._usable(store.scored_at, step))
        enough = num_usable >= -(-len(store) // 10)
        return ProportionalBasis(
            smoothing,
            make_fallback(store.score + smoothing, store.scored_at),
            enough,
            jnp.where(enough, num_usable, len(store)).astype(jnp.float32),
        )

    def v(self, basis: ProportionalBasis, score, scored_at, step) -> jax.Array:
        v = apply_fallback(score + basis.smoothing, scored_at, basis.fallback)
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
      second_moments: f32[6], running sums for each of FRACTIONS, in units of the squared level of their time.
      level: f32[], see `update_level`.
    """

    inner: Any
    second_moments: jax.Array
    level: jax.Array


class MixtureBasis(NamedTuple):
    """Basis of `Mixture`.

    Attributes:
      inner: basis of the mixed proposal.
      mean: f32[], mean of its v over all examples.
      uniform_fraction: f32[].
    """

    inner: Any
    mean: jax.Array
    uniform_fraction: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mixture:
    """Mixture of uniform draws and another proposal.

    Args:
      proposal: the other proposal.
      uniform_fraction: fraction of uniform draws, in [0, 1), and above 0 where the other proposal excludes examples.
        None: learned; the one of FRACTIONS with which the norms
        of the last sweep over the data would have had the least second moment of the gradient,
        `mean(v) * mean(norm^2 / v)`, where each v is the one before its norm was known.

    Guarantees:
      - When the table is built, no importance weight exceeds `1 / uniform_fraction`; until the next rebuild, it
        exceeds that at most by the factor by which the mean of v grows.
      - Examples that the other proposal excludes are drawn uniformly.

    Example:
      >>> store, _ = ScoreStore.init(2).write(jnp.arange(2), jnp.array([1.0, 3.0]), jnp.int32(0))
      >>> mixture, step = Mixture(Proportional(0.0), uniform_fraction=0.5), jnp.int32(1)
      >>> basis = mixture.basis(mixture.init(), store, step)
      >>> mixture.table(basis, store, step).v().tolist()  # each has the mean, 2, more
      [3.0, 5.0]
    """

    proposal: Any
    uniform_fraction: float | jax.Array | None = None

    def __post_init__(self):
        check_proposal(self.proposal)
        check_number("uniform_fraction", self.uniform_fraction, lambda x: 0 <= x < 1, "in [0, 1), or None: learned")
        if getattr(self.proposal, "max_staleness", None) is not None:
            check_number(
                "uniform_fraction", self.uniform_fraction, lambda x: x > 0, "above 0 with max_staleness, which excludes"
            )

    def init(self) -> MixtureState:
        return MixtureState(self.proposal.init(), jnp.zeros(len(FRACTIONS), jnp.float32), jnp.float32(0))

    def observe(
        self,
        state: MixtureState,
        basis: MixtureBasis,
        store: ScoreStore,
        indices: jax.Array,
        norms: jax.Array,
        step: jax.Array,
        importance_weights: jax.Array | float = 1.0,
    ) -> MixtureState:
        """Lets the other proposal learn, and adds to the second moments, see `Proposal.observe`."""
        inner = self.proposal.observe(state.inner, basis.inner, store, indices, norms, step, importance_weights)
        state = state._replace(inner=inner)
        if self.uniform_fraction is not None:
            return state
        num_examples = len(store)
        indices, norms, importance_weights, stride = subsample(indices, norms, importance_weights)
        inside = jnp.clip(indices, 0, num_examples - 1)
        score, scored_at = store.at(inside)
        valid = (indices == inside) & jnp.isfinite(norms) & (norms >= 0) & (scored_at < step)
        importance_weights = jnp.where(valid, stride * importance_weights, 0)
        norms = jnp.where(valid, norms, 0)
        level = update_level(state.level, norms, importance_weights, num_examples)
        v = self.proposal.v(basis.inner, score, scored_at, step)
        fractions = jnp.asarray(FRACTIONS, jnp.float32)[:, None]
        ratios = _ratio(_mix(basis.mean, basis.mean, fractions), _mix(v[None], basis.mean, fractions))
        new = jnp.sum((importance_weights * normalize(norms, level) ** 2)[None] * ratios, axis=1)
        decay = 0.5 ** (jnp.sum(importance_weights) / num_examples)
        return MixtureState(inner, decay * state.second_moments + new, level)

    def basis(self, state: MixtureState, store: ScoreStore, step: jax.Array) -> MixtureBasis:
        inner = self.proposal.basis(state.inner, store, step)
        fraction = self.uniform_fraction
        if fraction is None:
            fraction = jnp.asarray(FRACTIONS, jnp.float32)[jnp.argmin(state.second_moments)]
        mean = jnp.mean(self.proposal.v(inner, store.score, store.scored_at, step))
        return MixtureBasis(inner, mean, jnp.asarray(fraction, jnp.float32))

    def v(self, basis: MixtureBasis, score, scored_at, step) -> jax.Array:
        return _mix(self.proposal.v(basis.inner, score, scored_at, step), basis.mean, basis.uniform_fraction)

    def table(self, basis: MixtureBasis, store: ScoreStore, step: jax.Array) -> Table:
        return build_table(self.v(basis, store.score, store.scored_at, step))


def _ratio(x, y):
    """Returns x / y; 1 where y is 0, as all scores are then."""
    return jnp.where(y > 0, x / jnp.where(y > 0, y, 1), 1)


def _mix(v, mean, uniform_fraction):
    """Returns v plus a constant, such that this fraction of the draws is uniform."""
    return v + uniform_fraction / (1 - uniform_fraction) * mean
