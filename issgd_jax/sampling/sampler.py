"""The sampler: everything between a score and a draw, as a frozen value."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from issgd_jax.sampling import moments as moments_lib
from issgd_jax.sampling import table as table_lib
from issgd_jax.sampling import visits as visits_lib
from issgd_jax.sampling.calibrated import Calibrated
from issgd_jax.sampling.checks import NO_EXAMPLE, as_indices, as_numbers, as_step, as_whole
from issgd_jax.sampling.draws import STRIDE, check_draw, check_minibatch, draw_earliest, draw_number
from issgd_jax.sampling.proposal import Mixture, Proportional, Uniform, check_proposal
from issgd_jax.sampling.state import SamplerState
from issgd_jax.sampling.store import Rejected, ScoreStore
from issgd_jax.sampling.sum_tree import LARGEST
from issgd_jax.sampling.table import Draw
from issgd_jax.sampling.uniform import EPOCHS
from issgd_jax.vmapped import for_any

_DEFAULT_PROPOSAL = Mixture(Calibrated())
# Uniform share of a mixture with draw "stride": not learned, as other draws learn it from the noise of single
# minibatches, which is not what counts where minibatches balance each other.
STRIDE_FRACTION = 0.3
# Updates between rebuilds; more where N is large, so that a rebuild costs each update less than its draw.
REBUILD_EVERY, EXAMPLES_REBUILT_A_DRAW = 32, 16


@dataclasses.dataclass(frozen=True, init=False)
class Sampler:
    """Draws minibatches in proportion to scores, and learns from the scores of what was drawn.

    Its methods work inside `jit` and `vmap` (of several seeds), and outside, where each is compiled once.

    Args:
      num_examples: N, in [1, 2^30].
      batch_size: B, examples in a minibatch, >= 1.
      proposal: from scores to the unnormalised probabilities that are drawn from. A pytree: its numbers may change
        between calls without compiling again. `Uniform()` is plain SGD with the same code.
      draw: a method of `table.draw`; or "stride", evenly spaced visits, see `visits`; or, with `Uniform()` alone,
        "shuffled" (epochs in random order) or "random_subset" (epochs over a random third of the examples, see
        `uniform.shuffled`). Attribute `draw_method`. With "stride", a mixture whose uniform fraction is None has 0.3.
      rebuild_every: updates from one rebuild of the whole table to the next, O(N) each, as scores age whether or not
        new ones arrive, besides those after update 1, 2, 4, 8, ...; 0: only when the caller calls `rebuild`, which
        those early ones need too: until the first, v is in no unit. None: 32, or N / (16 B) where that is more.
      count_draws: whether the state counts how often each example was drawn; 4 bytes an example.

    Guarantees:
      - The mean of `importance_weights * f` over a draw is an unbiased estimate of the mean of f over all examples,
        whatever the scores are (paper, Corollary 1), but for a proposal whose docstring says that it is biased.
      - The draw of number k is a function of the seed, of k and of the table alone. `draw` may run ahead of `update`:
        a draw from an older table is as unbiased.
      - With draw "stride" both are replaced by these: a minibatch, given those before it, is NOT unbiased, as with
        shuffled epochs. But the importance weights of an example, from its second visit up to any other, add up to
        exactly the time since its first visit, in epochs, whatever the scores are; so that at fixed parameters the mean
        over t steps converges to that over all examples as 1 / t, where independent draws need 1 / sqrt(t). No example
        waits longer than its stride, one epoch and one minibatch, and no stride is longer than 64 epochs. What is drawn
        is in flight until its `update`; it is drawn again before only where nothing else is left, or after 64 epochs.
      - Bad scores (NaN, infinite, negative) and indices outside [0, N) change nothing; the scores are counted.

    Raises:
      TypeError: num_examples, batch_size or rebuild_every is no whole number, count_draws no bool, or proposal no
        proposal.
      ValueError: num_examples, batch_size, draw or rebuild_every is out of range, or draw does not go with the
        proposal.

    Example:
      >>> import jax.numpy as jnp
      >>> sampler = Sampler(num_examples=1000, batch_size=4)
      >>> state = sampler.init(seed=0)
      >>> state, drawn = sampler.draw(state)
      >>> drawn.indices.shape, drawn.importance_weights.tolist()
      ((4,), [1.0, 1.0, 1.0, 1.0])
      >>> state = sampler.update(state, drawn, norms=jnp.array([3.0, 1.0, 2.0, 5.0]))
      >>> int(state.step), int(jnp.sum(state.store.scored))
      (1, 4)
    """

    num_examples: int
    batch_size: int
    proposal: Any
    draw_method: str
    rebuild_every: int
    count_draws: bool

    def __init__(
        self,
        num_examples: int,
        batch_size: int,
        proposal: Any = _DEFAULT_PROPOSAL,
        draw: str = "systematic",
        *,
        rebuild_every: int | None = None,
        count_draws: bool = False,
    ):
        num_examples, batch_size = as_whole("num_examples", num_examples), as_whole("batch_size", batch_size)
        if not 1 <= num_examples <= table_lib.MAX_EXAMPLES:
            raise ValueError(f"num_examples must be between 1 and {table_lib.MAX_EXAMPLES}, got {num_examples}")
        check_draw(draw, num_examples, batch_size)
        if draw in EPOCHS and isinstance(proposal, Mixture | Calibrated | Proportional):
            raise ValueError(f"draw {draw!r} is uniform, but the proposal is {proposal}: use Uniform(), or systematic")
        if rebuild_every is None:
            rebuild_every = max(REBUILD_EVERY, num_examples // (EXAMPLES_REBUILT_A_DRAW * batch_size))
        rebuild_every = as_whole("rebuild_every", rebuild_every)
        if rebuild_every < 0:
            raise ValueError(f"rebuild_every must be >= 0, got {rebuild_every}: 0 leaves it to the caller")
        if not isinstance(count_draws, bool):
            raise TypeError(f"count_draws must be True or False, got {count_draws!r}")
        check_proposal(proposal)
        if draw == STRIDE and getattr(proposal, "max_staleness", None) is not None:
            raise ValueError(
                f"draw {draw!r} visits every example, but max_staleness = {proposal.max_staleness} excludes some: use "
                "None, or systematic draws"
            )
        if draw == STRIDE and isinstance(proposal, Mixture) and proposal.uniform_fraction is None:
            proposal = Mixture(proposal.proposal, STRIDE_FRACTION)
        _set(self, num_examples, batch_size, proposal, draw, rebuild_every, count_draws)

    def init(self, seed: int | jax.Array) -> SamplerState:
        """Returns the state before the first draw: nothing scored, every example equally likely.

        Args:
          seed: of all draws; an int or i32[].

        Raises:
          TypeError, ValueError: the seed is no whole number, or has more than 32 bits.
          InputError: the device has too little memory.
        """
        if not isinstance(seed, jax.Array) and not -(2**31) <= as_whole("seed", seed) < 2**32:
            raise ValueError(f"seed must be in [-2^31, 2^32), got {seed}: JAX drops the other bits")
        return _init(self, jax.random.key_data(jax.random.key(seed)))

    def draw(self, state: SamplerState, *, uniform_draw: bool = False) -> tuple[SamplerState, Draw]:
        """Draws the next minibatch; O(B log N).

        Args:
          state: not donated, but with draw "stride".
          uniform_draw: whether this draw ignores the scores; not with draw "stride".

        Returns:
          The state with one more draw counted, and the draw: indices i32[B], importance_weights f32[B].

        Raises:
          TypeError: state is not the state of a sampler.
          ValueError: state is of another number of examples, or uniform_draw does not go with the draw.
        """
        if self.draw_method == STRIDE:
            self._refuse_other_draws(uniform_draw)
            self.check_state(state)
            return _draw_earliest(state, self.batch_size)
        num_draws, drawn = self._draw(state, None, uniform_draw)
        return state._replace(num_draws=num_draws), drawn

    def draw_number(self, state: SamplerState, number: int | jax.Array, *, uniform_draw: bool = False) -> Draw:
        """Returns the draw of number `number`, an int or i32[] below 2^30, from the present table; counts nothing.

        Raises:
          ValueError: the draw is "stride", whose draws follow each other.
        """
        self._refuse_other_draws(True)
        return self._draw(state, number, uniform_draw)[1]

    def update(
        self,
        state: SamplerState,
        drawn: Draw,
        norms: jax.Array | None,
        *,
        scores: jax.Array | None = None,
        scored_at: int | jax.Array | None = None,
    ) -> SamplerState:
        """Ingests the gradient norms of a minibatch, from its own backward pass, and counts one step; O(B log N).

        The proposal learns from the norms, the store keeps the scores, and the table gets their probabilities at once.
        Every `rebuild_every` updates the whole table is rebuilt.

        Args:
          state: as returned by `draw`; donated.
          drawn: the minibatch, of this or an earlier draw; its importance weights undo its preference for large scores.
            Use `ingest` for examples that were not drawn here.
          norms: f[B], the gradient norms of its examples, without importance weights; None: nothing was measured, and
            only the step is counted; with draw "stride", its examples are in flight no longer.
          scores: f[B], where scores are not gradient norms; None: the norms.
          scored_at: i32[], step of the parameters of the norms; None: the present one.

        Raises:
          TypeError: state or drawn is something else.
          ValueError: norms or scores have another shape than the draw, the draw has no importance weights, or state or
            draw is of another number of examples.
        """
        self.check_state(state)
        drawn, norms, scores = check_minibatch(drawn, norms, scores, self.num_examples)
        scored_at = None if scored_at is None else _step_beside(state, scored_at)
        return _update(self, state, drawn, norms, scores, scored_at)

    def ingest(
        self,
        state: SamplerState,
        indices: jax.Array,
        scores: jax.Array,
        scored_at: int | jax.Array,
        *,
        are_norms: bool = True,
        rebuild: bool = True,
    ) -> SamplerState:
        """Ingests scores that were computed elsewhere, such as a round of the workers.

        Args:
          state: donated.
          indices: i[...], of examples; those outside [0, N) are padding.
          scores: f[...], of the same shape, or one for all.
          scored_at: i[], step of the parameters that gave them.
          are_norms: whether scores are gradient norms; the proposal learns from no others.
          rebuild: whether the whole table is rebuilt, O(N); else only these examples change, O(m log N).

        Raises:
          TypeError: state is not the state of a sampler, indices or scored_at are not whole numbers, or scores not
            real ones.
          ValueError: indices and scores differ in shape, scored_at is not one step below 2^30, or state is of another
            number of examples.
        """
        self.check_state(state)
        indices = as_indices(indices, self.num_examples)
        scores = as_numbers("a score", scores, indices.shape)
        return _ingest(self, state, indices, scores, _step_beside(state, scored_at), are_norms, rebuild)

    def rebuild(self, state: SamplerState) -> SamplerState:
        """Recomputes the probabilities of all examples from what is known now; O(N). The state is donated."""
        self.check_state(state)
        return _rebuild(self, state)

    def append(self, state: SamplerState, num_examples: int) -> tuple["Sampler", SamplerState]:
        """Returns sampler and state with more examples, never scored, after the present ones; the state is donated.

        Args:
          state: of this sampler, perhaps restored.
          num_examples: how many more, >= 0.

        Raises:
          TypeError, ValueError: as `update`; or num_examples < 0.

        Example:
          >>> sampler = Sampler(num_examples=100, batch_size=4)
          >>> sampler, state = sampler.append(sampler.init(seed=0), 20)
          >>> sampler.num_examples, len(state.store)
          (120, 120)
        """
        self.check_state(state)
        num_examples = as_whole("num_examples", num_examples)
        state = state.with_store(state.store.append(num_examples))._replace(sums=None)
        if state.visits is not None and num_examples:
            key = jax.random.fold_in(jax.random.wrap_key_data(state.key), self.num_examples)
            state = state._replace(visits=visits_lib.append(state.visits, key, num_examples))
        if state.times_drawn is not None:
            state = state._replace(times_drawn=jnp.pad(state.times_drawn, (0, num_examples)))
        sampler = self._resized(self.num_examples + num_examples)
        return sampler, _rebuild(sampler, state)

    def remove(self, state: SamplerState, indices) -> tuple["Sampler", SamplerState, np.ndarray]:
        """Returns sampler and state without some examples; on the host, O(N). The state is donated.

        Args:
          state: of this sampler, perhaps restored.
          indices: i[m], of the examples.

        Returns:
          Sampler, state, and i64[N']: the old index of each example that is left, in the old order. Draws made before
          have the old indices: `update` with them first.

        Raises:
          TypeError, ValueError: as `update`; or an index is outside [0, N), or fewer examples than a minibatch needs
            would be left.

        Example:
          >>> sampler = Sampler(num_examples=100, batch_size=4)
          >>> sampler, state, old_indices = sampler.remove(sampler.init(seed=0), [0, 2])
          >>> sampler.num_examples, old_indices[:3].tolist()
          (98, [1, 3, 4])
        """
        self.check_state(state)
        store, kept = state.store.remove(indices)
        sampler = self._resized(len(kept))
        state = state.with_store(store)._replace(sums=None)
        if state.visits is not None:
            state = state._replace(visits=visits_lib.select(state.visits, jnp.asarray(kept, jnp.int32)))
        if state.times_drawn is not None:
            state = state._replace(times_drawn=state.times_drawn[kept])
        return sampler, _rebuild(sampler, state), kept

    def _resized(self, num_examples: int) -> "Sampler":
        options = self.batch_size, self.proposal, self.draw_method
        return Sampler(num_examples, *options, rebuild_every=self.rebuild_every, count_draws=self.count_draws)

    def metrics(self, state: SamplerState) -> dict[str, float]:
        """Returns what the sampler knows of its own work; O(N).

        Returns:
          Numbers; inside `jit`, arrays f[]:
          - gain: mean square of an example's gradient with uniform draws over that with the draws made, from the norms
            of the last hundred or so minibatches; above 1, a lower bound of the gain in the gradient's variance.
          - equivalent_batch: gain * B, the size of a uniform minibatch of that second moment.
          - staleness_mean, staleness_max: age of the scores, in steps.
          - scored_fraction: share of the examples that have a score.
          - effective_sample_size: Kish's, of a minibatch; see `table.effective_sample_size`.
          - rejected: scores that were NaN, infinite or negative.

        Raises:
          TypeError, ValueError: as `draw`.

        Example:
          >>> sampler = Sampler(num_examples=100, batch_size=4)
          >>> sampler.metrics(sampler.init(seed=0))["effective_sample_size"]
          4.0
        """
        self.check_state(state)
        measured = _metrics(self, state)
        if any(isinstance(value, jax.core.Tracer) for value in measured.values()):
            return measured
        return {name: value.item() for name, value in jax.device_get(measured).items()}

    def _refuse_other_draws(self, is_other: bool) -> None:
        if self.draw_method == STRIDE and is_other:
            raise ValueError(
                'draw "stride" makes one draw after the other, and no uniform ones between: every visit is counted'
            )

    def _draw(self, state: SamplerState, number: int | jax.Array | None, uniform_draw: bool) -> tuple[jax.Array, Draw]:
        """Returns the number after this one (None: that of the state), and the draw of this one."""
        self.check_state(state)
        number = state.num_draws if number is None else as_step("number", number)
        table = table_lib.uniform_table(self.num_examples) if uniform_draw else state.table
        return draw_number(state.key, number, table, self.batch_size, self.draw_method)

    def _write(self, state: SamplerState, indices, scores, norms, importance_weights, scored_at) -> SamplerState:
        """Lets the proposal learn from gradient norms, if known, while the store has the old scores; then stores."""
        proposal_state, store = state.proposal_state, state.store
        if norms is not None and indices.size:
            proposal_state = self.proposal.observe(
                proposal_state, state.basis, store, indices, norms, scored_at, importance_weights
            )
            proposal_state = _with_types(proposal_state, state.proposal_state)
            indices = order_after(indices, proposal_state)
        store, rejected = store.write(indices, scores, scored_at)
        state = state.with_store(store)
        return state._replace(proposal_state=proposal_state, rejected=state.rejected.merge(rejected))

    def _rebuilt(self, state: SamplerState) -> SamplerState:
        basis = self.proposal.basis(state.proposal_state, state.store, state.step)
        state = state._replace(basis=_with_types(basis, state.basis))
        if state.visits is None:
            return state.with_table(self.proposal.table(basis, state.store, state.step))
        v = self.proposal.v(state.basis, state.score, state.scored_at, state.step)
        return state._replace(visits=visits_lib.rebuild(state.visits, v))

    def _write_v(self, state: SamplerState, indices: jax.Array, step: jax.Array, *, arrived: bool) -> SamplerState:
        """Draws some examples by their new scores from now on; those that arrived are in flight no longer."""
        v = self.proposal.v(state.basis, *state.store.at(indices), step)
        if state.visits is None:
            return state.with_table(state.table.write(indices, v))
        return state._replace(visits=visits_lib.write(state.visits, indices, v, arrived=arrived))

    @property
    def is_uniform(self) -> bool:
        """Whether draws depend on nothing but their number: uniform ones that no state describes."""
        return isinstance(self.proposal, Uniform) and self.draw_method != STRIDE

    def check_state(self, state: SamplerState) -> None:
        """Raises TypeError or ValueError if state is not one of this sampler."""
        if not isinstance(state, SamplerState):
            raise TypeError(
                f"state must be a SamplerState, got {type(state).__name__}: it comes from `init`, which is also the "
                "template to restore one by"
            )
        if len(state.store) != self.num_examples:
            raise ValueError(
                f"the state is of {len(state.store):,} examples, the sampler of {self.num_examples:,}: use the sampler "
                "that made it, or its `append` or `remove`"
            )
        if (state.visits is None) == (self.draw_method == STRIDE):
            raise ValueError(
                f"the state is that of another draw than {self.draw_method!r}: use the sampler that made it, or begin "
                "with init"
            )
        if (state.times_drawn is None) == self.count_draws:
            raise ValueError(
                f"the state {'does not count' if self.count_draws else 'counts'} how often examples are drawn, but "
                f"count_draws is {self.count_draws}: use the sampler that made it, or begin with init"
            )


def _step_beside(state: SamplerState, scored_at: int | jax.Array) -> jax.Array:
    """Returns a step as an array that is no part of a state, which is donated."""
    return jnp.copy(state.step) if scored_at is state.step else as_step("scored_at", scored_at)


def _with_types(new: Any, old: Any) -> Any:
    """Returns a pytree with the dtypes of another: a state keeps its own, also where a proposal computes in f64."""
    return jax.tree.map(lambda x, y: jnp.asarray(x, jnp.asarray(y).dtype), new, old)


# Not `register_dataclass`: the argument `draw` cannot also be a field, as the method has that name.
jax.tree_util.register_pytree_node(
    Sampler,
    lambda sampler: (
        (sampler.proposal,),
        (sampler.num_examples, sampler.batch_size, sampler.draw_method, sampler.rebuild_every, sampler.count_draws),
    ),
    lambda static, values: _set(object.__new__(Sampler), *static[:2], *values, *static[2:]),
)


def _set(sampler: Sampler, *values) -> Sampler:
    for field, value in zip(dataclasses.fields(Sampler), values):
        object.__setattr__(sampler, field.name, value)
    return sampler


def is_early(step: int | jax.Array) -> bool | jax.Array:
    """Returns whether a rebuild is due after update `step`, >= 1, of the first ones: 1, 2, 4, 8, ...

    Until the first, never-scored examples have v = 1, whatever the unit of the norms.
    """
    return step & (step - 1) == 0


def order_after(indices: jax.Array, read: Any) -> jax.Array:
    """Returns the indices of a write such that it needs, as data, what was read from the same arrays before.

    Without that, XLA does not know the order, and copies the arrays, O(N), instead of writing in place.
    """
    first = [x.reshape(-1)[0] for x in jax.tree.leaves(read) if x.size]  # each depends on the whole read
    num_nan = sum(jnp.isnan(x).astype(jnp.int32) for x in first)
    return jnp.where(num_nan > len(first), NO_EXAMPLE, indices)  # never more than all


# Inlined, these are part of the caller's program, as if they had not been compiled on their own.
@functools.partial(jax.jit, inline=True)
def _init(sampler: Sampler, key: jax.Array) -> SamplerState:
    store, proposal_state, step = ScoreStore.init(sampler.num_examples), sampler.proposal.init(), jnp.int32(0)
    basis = sampler.proposal.basis(proposal_state, store, step)
    visits, table = None, table_lib.uniform_table(sampler.num_examples)
    if sampler.draw_method == STRIDE:
        visits = visits_lib.init(jax.random.wrap_key_data(key), sampler.num_examples)
        visits = visits_lib.rebuild(visits, sampler.proposal.v(basis, store.score, store.scored_at, step))
    else:
        table = sampler.proposal.table(basis, store, step)
    times_drawn = jnp.zeros(sampler.num_examples, jnp.int32) if sampler.count_draws else None
    return SamplerState(
        store.score, store.scored_at, proposal_state, basis, table.sums, table.population, visits, times_drawn,
        rejected=Rejected.none(), moments=moments_lib.init(), key=key, num_draws=jnp.int32(0), step=step,
    )  # fmt: skip


@functools.partial(jax.jit, donate_argnames="state", inline=True, static_argnames="batch_size")
def _draw_earliest(state: SamplerState, batch_size: int) -> tuple[SamplerState, Draw]:
    """Returns the state after the next draw of evenly spaced visits, and that draw."""
    drawn = draw_earliest(state.visits, state.key, state.num_draws, batch_size)
    visits = visits_lib.visit(state.visits, order_after(drawn.indices, drawn.importance_weights))
    return state._replace(visits=visits, num_draws=state.num_draws + 1), drawn


@functools.partial(jax.jit, donate_argnames="state", inline=True)
def _update(sampler: Sampler, state: SamplerState, drawn: Draw, norms, scores, scored_at) -> SamplerState:
    step = state.step + 1
    if state.times_drawn is not None:
        state = state._replace(
            times_drawn=state.times_drawn.at[drawn.indices].add(1, mode="drop", wrap_negative_indices=False)
        )
    if norms is None:
        if state.visits is not None:
            state = sampler._write_v(state, drawn.indices, step, arrived=True)
        return state._replace(step=step)
    scored_at = state.step if scored_at is None else scored_at
    indices = order_after(drawn.indices, drawn.importance_weights)
    scores = norms if scores is None else scores
    # A draw of the caller's own may have any importance weights: nothing is learned from impossible ones.
    known = (drawn.importance_weights >= 0) & (drawn.importance_weights < LARGEST)
    norms, importance_weights = jnp.where(known, norms, jnp.nan), jnp.where(known, drawn.importance_weights, 0)
    state = sampler._write(state, indices, scores, norms, importance_weights, scored_at)
    moments = moments_lib.update(state.moments, norms, importance_weights)
    state = sampler._write_v(state, indices, step, arrived=True)._replace(step=step, moments=moments)
    if not sampler.rebuild_every:
        return state
    is_due = is_early(step) | (step % sampler.rebuild_every == 0)

    def rebuild(state):  # under `vmap`, of those that are due
        return jax.lax.cond(is_due, sampler._rebuilt, lambda state: state, state)

    return jax.lax.cond(for_any(is_due), rebuild, lambda state: state, state)


# The old table is not read, but stays an argument: the new one takes over its memory.
@functools.partial(jax.jit, donate_argnames="state", keep_unused=True, static_argnames=("are_norms", "rebuild"))
def _ingest(sampler: Sampler, state: SamplerState, indices, scores, scored_at, are_norms: bool, rebuild: bool):
    indices, scores = indices.reshape(-1), scores.reshape(-1)
    state = sampler._write(state, indices, scores, scores if are_norms else None, 1.0, scored_at)
    if rebuild:
        return sampler._rebuilt(state)
    return sampler._write_v(state, indices, state.step, arrived=False)


@functools.partial(jax.jit, donate_argnames="state", keep_unused=True)
def _rebuild(sampler: Sampler, state: SamplerState) -> SamplerState:
    return sampler._rebuilt(state)


@functools.partial(jax.jit, inline=True)
def _metrics(sampler: Sampler, state: SamplerState) -> dict[str, jax.Array]:
    store, gain = state.store, moments_lib.gain(state.moments)
    effective_sample_size = (table_lib if state.visits is None else visits_lib).effective_sample_size
    staleness = jnp.where(store.scored, store.staleness(state.step), 0)
    num_scored = jnp.sum(store.scored)
    return {
        "gain": gain,
        "equivalent_batch": gain * sampler.batch_size,
        "staleness_mean": jnp.sum(staleness) / jnp.maximum(num_scored, 1),
        "staleness_max": jnp.max(staleness),
        "scored_fraction": num_scored / len(store),
        "effective_sample_size": effective_sample_size(state.table, sampler.batch_size),
        "rejected": state.rejected.count,
    }
