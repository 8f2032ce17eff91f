"""The sampler: everything between a score and a draw, as a frozen value."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from issgd_jax.sampling import table as table_lib
from issgd_jax.sampling import transitions
from issgd_jax.sampling import visits as visits_lib
from issgd_jax.sampling.calibrated import Calibrated
from issgd_jax.sampling.checks import MAX_STEP, as_indices, as_numbers, as_step, as_whole, check_number
from issgd_jax.sampling.draws import STRIDE, check_draw, check_minibatch, draw_number
from issgd_jax.sampling.proposal import Mixture, Uniform, check_proposal
from issgd_jax.sampling.relative_limit import RelativeLimit
from issgd_jax.sampling.state import SamplerState, check_state
from issgd_jax.sampling.table import Draw
from issgd_jax.sampling.uniform import EPOCHS

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
      limit: with "stride" alone: the largest weighted gradient norm of an example in a minibatch, in units of the mean
        norm of all examples, >= 2; 5 is a good value. None: no limit. An example whose gradient has grown since its
        last visit would else shake the parameters by all that it has waited for. With a limit, the importance weights
        of a draw are `LimitedWeights`, which `value_grad_and_norms` lowers; what is left of one is owed. So that all
        can be paid, the limit is at least 2 B / N times the largest norm, and k + 1 times that where k other
        minibatches are drawn before the update of this one, as with `Prefetch`.

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
        is in flight until its `update`; it is drawn again before only where nothing else is left, or after the longest
        stride.
      - With a limit, the importance weights of an example add up to the time less what is owed, to half a visit each
        time that one is lowered. Who is owed is due as much earlier, often in the next minibatch. What an example is
        owed beyond 32 epochs is lost. Others wait longer than above while many are owed.
      - Bad scores (NaN, infinite, negative) and indices outside [0, N) change nothing; the scores are counted.

    Raises:
      TypeError: num_examples, batch_size or rebuild_every is no whole number, count_draws no bool, limit no number, or
        proposal no proposal.
      ValueError: num_examples, batch_size, draw, rebuild_every or limit is out of range, or draw does not go with the
        proposal or the limit.

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
    limit: float | None
    _state_structure: Any = dataclasses.field(repr=False)  # of what the proposal has learned

    def __init__(
        self,
        num_examples: int,
        batch_size: int,
        proposal: Any = _DEFAULT_PROPOSAL,
        draw: str = "systematic",
        *,
        rebuild_every: int | None = None,
        count_draws: bool = False,
        limit: float | None = None,
    ):
        num_examples, batch_size = as_whole("num_examples", num_examples), as_whole("batch_size", batch_size)
        if not 1 <= num_examples <= table_lib.MAX_EXAMPLES:
            raise ValueError(f"num_examples must be between 1 and {table_lib.MAX_EXAMPLES}, got {num_examples}")
        check_draw(draw, num_examples, batch_size)
        if rebuild_every is None:
            rebuild_every = max(REBUILD_EVERY, num_examples // (EXAMPLES_REBUILT_A_DRAW * batch_size))
        rebuild_every = as_whole("rebuild_every", rebuild_every)
        if not 0 <= rebuild_every <= MAX_STEP:
            raise ValueError(
                f"rebuild_every must be between 0 and {MAX_STEP}, got {rebuild_every}: 0 leaves it to the caller"
            )
        if not isinstance(count_draws, bool):
            raise TypeError(f"count_draws must be True or False, got {count_draws!r}")
        check_proposal(proposal)
        if limit is not None:
            check_number("limit", limit, lambda x: 2 <= x < math.inf, ">= 2 and finite, or None: no limit")
            if draw != STRIDE:
                raise ValueError(f'limit {limit} needs draw "stride", whose next visits make up for it, got {draw!r}')
            limit = float(limit)
        if draw in EPOCHS and not isinstance(proposal, Uniform):
            raise ValueError(f"draw {draw!r} is uniform, but the proposal is {proposal}: use Uniform(), or systematic")
        if draw == STRIDE and getattr(proposal, "max_staleness", None) is not None:
            raise ValueError(
                f"draw {draw!r} visits every example, but max_staleness = {proposal.max_staleness} excludes some: use "
                "None, or systematic draws"
            )
        if draw == STRIDE and isinstance(proposal, Mixture) and proposal.uniform_fraction is None:
            proposal = Mixture(proposal.proposal, STRIDE_FRACTION)
        structure = jax.tree.structure(jax.eval_shape(proposal.init))
        _set(self, num_examples, batch_size, proposal, draw, rebuild_every, count_draws, limit, structure)

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
        return transitions.init(
            self.proposal,
            jax.random.key_data(jax.random.key(seed)),
            num_examples=self.num_examples,
            is_strided=self.draw_method == STRIDE,
            count_draws=self.count_draws,
            has_limit=self.limit is not None,
        )

    def draw(self, state: SamplerState, *, uniform_draw: bool = False) -> tuple[SamplerState, Draw]:
        """Draws the next minibatch; O(B log N).

        Args:
          state: not donated, but with draw "stride".
          uniform_draw: whether this draw ignores the scores; not with draw "stride".

        Returns:
          The state with one more draw counted, and the draw: indices i32[B], importance_weights f32[B], or with a limit
          `LimitedWeights`.

        Raises:
          TypeError: state is not the state of a sampler.
          ValueError: state is of another number of examples, or uniform_draw does not go with the draw.
        """
        if self.draw_method == STRIDE:
            self._refuse_other_draws(uniform_draw)
            self.check_state(state)
            return transitions.visit_earliest(state, batch_size=self.batch_size, limit=self.relative_limit)
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
          norms: f[B], the gradient norms of its examples, without importance weights; None, but with a limit: nothing
            was measured, and only the step is counted; with draw "stride", its examples are in flight no longer.
          scores: f[B], where scores are not gradient norms, but with a limit; None: the norms.
          scored_at: i32[], step of the parameters of the norms, see `ingest`; None: the present one.

        Raises:
          TypeError: state or drawn is something else.
          ValueError: norms or scores have another shape than the draw, the draw has no importance weights, or state or
            draw is of another number of examples.
        """
        self.check_state(state)
        drawn, norms, scores = check_minibatch(drawn, norms, scores, self.num_examples, self.limit)
        scored_at = None if scored_at is None else _step_beside(state, scored_at)
        return transitions.update(
            self.proposal,
            state,
            drawn,
            norms,
            scores,
            scored_at,
            rebuild_every=self.rebuild_every,
            limit=self.relative_limit,
        )

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
          scored_at: i[], step of the parameters that gave them, as `state.step` counts; a later one counts as that.
          are_norms: whether scores are gradient norms; the proposal learns from no others, and a limit needs them.
          rebuild: whether the whole table is rebuilt, O(N); else only these examples change, O(m log N).

        Raises:
          TypeError: state is not the state of a sampler, indices or scored_at are not whole numbers, or scores not
            real ones.
          ValueError: indices and scores differ in shape, scored_at is not one step, or no array of JAX and not below
            2^30, or state is of another number of examples.
        """
        self.check_state(state)
        indices = as_indices(indices, self.num_examples)
        scores = as_numbers("a score", scores, indices.shape)
        scored_at = _step_beside(state, scored_at)
        if self.limit is not None and not are_norms:
            raise ValueError("are_norms is False, but the limit of this sampler is one of norms: score by these")
        return transitions.ingest(
            self.proposal,
            state,
            indices,
            scores,
            scored_at,
            are_norms=are_norms,
            whole_table=rebuild,
            limit=self.relative_limit,
        )

    def rebuild(self, state: SamplerState) -> SamplerState:
        """Recomputes the probabilities of all examples from what is known now; O(N). The state is donated."""
        self.check_state(state)
        return transitions.rebuild(self.proposal, state, limit=self.relative_limit)

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
        return sampler, sampler.rebuild(state)

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
        return sampler, sampler.rebuild(state), kept

    def _resized(self, num_examples: int) -> "Sampler":
        return Sampler(
            num_examples,
            self.batch_size,
            self.proposal,
            self.draw_method,
            rebuild_every=self.rebuild_every,
            count_draws=self.count_draws,
            limit=self.limit,
        )

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
        measured = transitions.metrics(state, batch_size=self.batch_size)
        if any(isinstance(value, jax.core.Tracer) for value in measured.values()):
            return measured
        return {name: value.item() for name, value in jax.device_get(measured).items()}

    def _refuse_other_draws(self, is_other: bool) -> None:
        if self.draw_method == STRIDE and is_other:
            raise ValueError(
                'draw "stride" makes one draw after the other, and no uniform ones between: every visit is counted'
            )

    @property
    def relative_limit(self) -> RelativeLimit | None:
        """The limit, in units of the mean norm; None: there is none."""
        return None if self.limit is None else RelativeLimit(self.limit, self.num_examples, self.batch_size)

    def _draw(self, state: SamplerState, number: int | jax.Array | None, uniform_draw: bool) -> tuple[jax.Array, Draw]:
        """Returns the number after this one (None: that of the state), and the draw of this one."""
        self.check_state(state)
        number = state.num_draws if number is None else as_step("number", number)
        table = table_lib.uniform_table(self.num_examples) if uniform_draw else state.table
        return draw_number(state.key, number, table, self.batch_size, self.draw_method)

    @property
    def is_uniform(self) -> bool:
        """Whether draws depend on nothing but their number: uniform ones that no state describes."""
        return isinstance(self.proposal, Uniform) and self.draw_method != STRIDE

    def check_state(self, state: SamplerState) -> None:
        """Raises TypeError or ValueError if state is not one of this sampler."""
        check_state(
            state,
            num_examples=self.num_examples,
            draw_method=self.draw_method,
            proposal=self.proposal,
            proposal_structure=self._state_structure,
            count_draws=self.count_draws,
            limit=self.limit,
        )


def _step_beside(state: SamplerState, scored_at: int | jax.Array) -> jax.Array:
    """Returns a step as an array that is no part of a state, which is donated."""
    return jnp.copy(state.step) if scored_at is state.step else as_step("scored_at", scored_at)


# Not `register_dataclass`: the argument `draw` cannot also be a field, as the method has that name.
jax.tree_util.register_pytree_node(
    Sampler,
    lambda sampler: (
        (sampler.proposal,),
        (
            sampler.num_examples,
            sampler.batch_size,
            sampler.draw_method,
            sampler.rebuild_every,
            sampler.count_draws,
            sampler.limit,
            sampler._state_structure,
        ),
    ),
    lambda static, values: _set(object.__new__(Sampler), *static[:2], *values, *static[2:]),
)


def _set(sampler: Sampler, *values) -> Sampler:
    for field, value in zip(dataclasses.fields(Sampler), values):
        object.__setattr__(sampler, field.name, value)
    return sampler
