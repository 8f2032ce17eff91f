"""The sampler: everything between a score and a draw, as a frozen value and one pytree of state."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from issgd_jax.sampling import table as table_lib
from issgd_jax.sampling import uniform
from issgd_jax.sampling.calibrated import Calibrated
from issgd_jax.sampling.proposal import Mixture, Proportional
from issgd_jax.sampling.store import NO_EXAMPLE, Rejected, ScoreStore
from issgd_jax.sampling.table import Draw, Table

DRAWS = (*table_lib.METHODS, *uniform.EPOCHS)
_DEFAULT_PROPOSAL = Mixture(Calibrated())


class SamplerState(NamedTuple):
    """State of a `Sampler`: one pytree of arrays, to be saved and restored with the caller's own.

    Attributes:
      store: the last score of every example and the step of the parameters that gave it.
      proposal_state: what the proposal has learned from scores.
      basis: what the proposal knows of all examples together, as of the last rebuild.
      table: what is drawn from.
      rejected: scores that were NaN, infinite or negative.
      key: u32[...], random key data of this run's draws.
      num_draws: i32[], draws made; the number of the next one.
      step: i32[], updates done.
    """

    store: ScoreStore
    proposal_state: Any
    basis: Any
    table: Table
    rejected: Rejected
    key: jax.Array
    num_draws: jax.Array
    step: jax.Array


@dataclasses.dataclass(frozen=True, init=False)
class Sampler:
    """Draws minibatches in proportion to scores, and learns from the scores of what was drawn.

    Args:
      num_examples: N, in [1, 2^30].
      batch_size: B, examples in a minibatch, >= 1.
      proposal: from scores to the unnormalised probabilities that are drawn from. A pytree: its numbers may change
        between calls without compiling again.
      draw: a method of `table.draw`; or, with `Uniform()` alone, "shuffled" (epochs in random order) or
        "random_subset" (epochs over a random third of the examples, see `uniform.shuffled`). Attribute `draw_method`.

    Guarantees:
      - The mean of `importance_weights * f` over a draw is an unbiased estimate of the mean of f over all examples,
        whatever the scores are (paper, Corollary 1), but for a proposal whose docstring says that it is biased.
      - The draw of number k is a function of the seed, of k and of the table alone. `draw` may run ahead of `update`:
        a draw from an older table is as unbiased.
      - Bad scores (NaN, infinite, negative) and indices outside [0, N) change nothing and are counted.

    Raises:
      ValueError: num_examples, batch_size or draw is out of range, or draw does not go with the proposal.

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

    def __init__(self, num_examples: int, batch_size: int, proposal: Any = _DEFAULT_PROPOSAL, draw: str = "systematic"):
        if not 1 <= num_examples <= table_lib.MAX_EXAMPLES:
            raise ValueError(f"num_examples must be between 1 and {table_lib.MAX_EXAMPLES}, got {num_examples}")
        if draw not in DRAWS:
            raise ValueError(f"draw must be one of {', '.join(DRAWS)}, got {draw!r}")
        if draw in uniform.EPOCHS and isinstance(proposal, Mixture | Calibrated | Proportional):
            raise ValueError(f"draw {draw!r} is uniform, but the proposal is {proposal}: use Uniform(), or systematic")
        most = uniform.largest_minibatch(num_examples, draw)
        if batch_size < 1 or batch_size > most:
            raise ValueError(f"batch_size must be between 1 and {most:,} with draw {draw!r}, got {batch_size}")
        values = {"num_examples": num_examples, "batch_size": batch_size, "proposal": proposal, "draw_method": draw}
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def init(self, seed: int | jax.Array) -> SamplerState:
        """Returns the state before the first draw: nothing scored, every example equally likely.

        Args:
          seed: of all draws; an int or i32[].
        """
        store, proposal_state, step = ScoreStore.init(self.num_examples), self.proposal.init(), jnp.int32(0)
        basis = self.proposal.basis(proposal_state, store, step)
        table = self.proposal.table(basis, store, step)
        key = jax.random.key_data(jax.random.key(seed))
        # Not `step` twice: a buffer cannot be donated twice.
        return SamplerState(store, proposal_state, basis, table, Rejected.none(), key, jnp.int32(0), step)

    def draw(self, state: SamplerState, *, uniform_draw: bool = False) -> tuple[SamplerState, Draw]:
        """Draws the next minibatch.

        Args:
          state: not donated.
          uniform_draw: whether this draw ignores the scores.

        Returns:
          The state with one more draw counted, and the draw: indices i32[B], importance_weights f32[B].
        """
        drawn = self.draw_number(state, state.num_draws, uniform_draw=uniform_draw)
        return state._replace(num_draws=state.num_draws + 1), drawn

    def draw_number(self, state: SamplerState, number: jax.Array, *, uniform_draw: bool = False) -> Draw:
        """Returns the draw of number `number` i32[] from the present table; counts nothing."""
        key = jax.random.wrap_key_data(state.key)
        if self.draw_method in uniform.EPOCHS:
            subset = self.draw_method == "random_subset"
            indices = uniform.shuffled(key, number, self.num_examples, self.batch_size, subset=subset)
            return Draw(indices, jnp.ones(self.batch_size, jnp.float32))
        table = table_lib.uniform_table(self.num_examples) if uniform_draw else state.table
        return table_lib.draw(jax.random.fold_in(key, number), table, self.batch_size, self.draw_method)

    def update(
        self,
        state: SamplerState,
        drawn: Draw,
        norms: jax.Array | None,
        *,
        scores: jax.Array | None = None,
        scored_at: jax.Array | None = None,
    ) -> SamplerState:
        """Ingests the gradient norms of a minibatch, from its own backward pass, and counts one step; O(B log N).

        The proposal learns from the norms, the store keeps the scores, and the table gets their probabilities at once.

        Args:
          state: as returned by `draw`.
          drawn: the minibatch; its importance weights undo its preference for large scores.
          norms: f32[B], the gradient norms of its examples; None: nothing was measured, and only the step is counted.
          scores: f32[B], where scores are not gradient norms; None: the norms.
          scored_at: i32[], step of the parameters of the norms; None: the present one.
        """
        step = state.step + 1
        if norms is None:
            return state._replace(step=step)
        scored_at = state.step if scored_at is None else scored_at
        indices = order_after(drawn.indices, drawn.importance_weights)
        scores = norms if scores is None else scores
        state = self._write(state, indices, scores, norms, drawn.importance_weights, scored_at)
        v = self.proposal.v(state.basis, *state.store.at(indices), step)
        return state._replace(table=state.table.write(indices, v), step=step)

    def ingest(
        self,
        state: SamplerState,
        indices: jax.Array,
        scores: jax.Array,
        scored_at: jax.Array,
        *,
        are_norms: bool = True,
        rebuild: bool = True,
    ) -> SamplerState:
        """Ingests scores that were computed elsewhere, such as a round of the workers; compiled.

        Args:
          state: donated.
          indices: i32[...], of examples; those outside [0, N) are padding.
          scores: f32[...], of the same shape.
          scored_at: i32[], step of the parameters that gave them.
          are_norms: whether scores are gradient norms; the proposal learns from no others.
          rebuild: whether the whole table is rebuilt, O(N); else only these examples change, O(m log N).
        """
        return _ingest(self, state, indices, scores, scored_at, are_norms, rebuild)

    def rebuild(self, state: SamplerState) -> SamplerState:
        """Recomputes the probabilities of all examples from what is known now; O(N), compiled. The state is donated.

        Scores age whether or not new ones arrive: call it about as often as once in a sweep of 1 % of the steps.
        """
        return _rebuild(self, state)

    def _write(self, state: SamplerState, indices, scores, norms, importance_weights, scored_at) -> SamplerState:
        """Lets the proposal learn from gradient norms, if known, while the store has the old scores; then stores."""
        proposal_state, store = state.proposal_state, state.store
        if norms is not None:
            proposal_state = self.proposal.observe(
                proposal_state, state.basis, store, indices, norms, scored_at, importance_weights
            )
            indices = order_after(indices, proposal_state)
        store, rejected = store.write(indices, scores, scored_at)
        return state._replace(store=store, proposal_state=proposal_state, rejected=state.rejected.merge(rejected))

    def _rebuilt(self, state: SamplerState) -> SamplerState:
        basis = self.proposal.basis(state.proposal_state, state.store, state.step)
        return state._replace(basis=basis, table=self.proposal.table(basis, state.store, state.step))


# Not `register_dataclass`: the argument `draw` cannot also be a field, as the method has that name.
jax.tree_util.register_pytree_node(
    Sampler,
    lambda sampler: ((sampler.proposal,), (sampler.num_examples, sampler.batch_size, sampler.draw_method)),
    lambda static, values: Sampler(static[0], static[1], values[0], static[2]),
)


def order_after(indices: jax.Array, read: Any) -> jax.Array:
    """Returns the indices of a write such that it needs, as data, what was read from the same arrays before.

    Without that, XLA does not know the order, and copies the arrays, O(N), instead of writing in place.
    """
    leaves = jax.tree.leaves(read)
    num_nan = sum(jnp.sum(jnp.isnan(x), dtype=jnp.int32) for x in leaves)
    return jnp.where(num_nan > sum(x.size for x in leaves), NO_EXAMPLE, indices)  # never more than all


# The old table is not read, but stays an argument: the new one takes over its memory.
@functools.partial(jax.jit, donate_argnames="state", keep_unused=True, static_argnames=("are_norms", "rebuild"))
def _ingest(sampler: Sampler, state: SamplerState, indices, scores, scored_at, are_norms: bool, rebuild: bool):
    indices, scores = indices.reshape(-1), scores.reshape(-1)
    state = sampler._write(state, indices, scores, scores if are_norms else None, 1.0, scored_at)
    if rebuild:
        return sampler._rebuilt(state)
    inside = jnp.clip(indices, 0, sampler.num_examples - 1)
    v = sampler.proposal.v(state.basis, *state.store.at(inside), state.step)
    return state._replace(table=state.table.write(indices, v))


@functools.partial(jax.jit, donate_argnames="state", keep_unused=True)
def _rebuild(sampler: Sampler, state: SamplerState) -> SamplerState:
    return sampler._rebuilt(state)
