"""The learner: draws, gathers, weighs, updates, refreshes; takes in the workers' scores.

On one device; or on each of several the same, but that they share the backward pass of every minibatch.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from issgd_jax import sampling
from issgd_jax.gradnorm import value_grad_and_norms
from issgd_jax.learning import variance
from issgd_jax.sampling.store import NOBODY, Rejected, ScoreStore
from issgd_jax.sampling.uniform import shuffled

# Draws that are uniform by epochs.
EPOCHS = ("shuffled", "random_subset")


class TrainState(NamedTuple):
    """params, opt_state: pytrees. step: i32[], updates done. in_flight: what asynchronous learners have begun."""

    params: Any
    opt_state: Any
    step: jax.Array
    in_flight: Any = ()


class SamplerState(NamedTuple):
    """Everything between a score and a draw.

    store: the score database. proposal_state: what the proposal has learned. basis: what it makes of all examples, as
    of the last round. table: what is drawn from. rejected: scores that were NaN, infinite or negative.
    """

    store: ScoreStore
    proposal_state: Any
    basis: Any
    table: sampling.Table
    rejected: Rejected


class Minibatch(NamedTuple):
    """indices: i32[B], the examples drawn. importance_weights, losses: f32[B], of each."""

    indices: jax.Array
    importance_weights: jax.Array
    losses: jax.Array


class Gradient(NamedTuple):
    """What the backward pass of a minibatch gives.

    minibatch: what was drawn. gradient: like the parameters, of `mean(importance_weights * losses)`. norms, scores:
    f32[B], of its examples; None where nobody asks. finite: bool[], whether the losses and, where that is looked at,
    the gradient are. step: i32[], of the parameters.
    """

    minibatch: Minibatch
    gradient: Any
    norms: jax.Array | None
    scores: jax.Array | None
    finite: jax.Array
    step: jax.Array


class StepMetrics(NamedTuple):
    """loss: f32[], importance-weighted loss of the minibatch, an unbiased estimate of the training loss; NaN if one of
    its losses or, where that is looked at, its gradient is not finite. moments: what the minibatch tells of the
    gradient's variance; None unless asked for. minibatch: what was drawn; None if uniformly."""

    loss: jax.Array
    moments: variance.Moments | None
    minibatch: Minibatch | None


def init_train_state(params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    return TrainState(params, optimizer.init(params), jnp.int32(0))


def init_sampler(proposal, num_examples: int) -> SamplerState:
    """An empty store and its table: every example equally likely."""
    store, state, step = ScoreStore.init(num_examples), proposal.init(), jnp.int32(0)
    basis = proposal.basis(state, store, step)
    return SamplerState(store, state, basis, proposal.table(basis, store, step), Rejected.none())


def draw_minibatch(table: sampling.Table, step, *, batch_size: int, seed, draw: str) -> sampling.Draw:
    """What the step draws: a function of the seed, the step and the table. draw: see `make_train_step`."""
    key = jax.random.key(seed)
    if draw in EPOCHS:
        indices = shuffled(key, step, table.num_examples, batch_size, subset=draw == "random_subset")
        return sampling.Draw(indices, jnp.ones(batch_size, jnp.float32))
    return sampling.draw(jax.random.fold_in(key, step), table, batch_size, draw)


@dataclasses.dataclass(frozen=True)
class Stages:
    """The three parts of a step, which may run at different times and places.

    draw: `(sampler, number, *, uniform=False) -> Draw`, the draw of this number. gradient: `(params, step, drawn,
    examples) -> Gradient`. update: `(state, sampler, proposal, gradient) -> (state, sampler, metrics)`.
    """

    draw: Callable[..., sampling.Draw]
    gradient: Callable[..., Gradient]
    update: Callable[..., tuple[TrainState, SamplerState, StepMetrics]]


def make_train_step(
    loss_fn: Callable[..., jax.Array], optimizer: optax.GradientTransformation, **options
) -> Callable[..., tuple[TrainState, SamplerState, StepMetrics]]:
    """The step of `compile_step`, its parts made by `make_stages` of the same arguments."""
    return compile_step(make_stages(loss_fn, optimizer, **options), options.get("mesh"))


def compile_step(
    stages: Stages, mesh: Mesh | None = None
) -> Callable[..., tuple[TrainState, SamplerState, StepMetrics]]:
    """Returns `(state, sampler, proposal, examples, *, uniform=False) -> (state, sampler, metrics)`, compiled; both
    states are donated. uniform: whether this step's draw is uniform; refreshes go on. examples: pytrees with leading
    axis N on the learner's device. mesh: that of the stages; all arrays are whole on each of its devices, and stay
    equal.

    The gradient is that of `mean(importance_weights * losses)`: unbiased, whatever the table, as long as no v is 0
    (paper, Corollary 1). The key is `fold_in(seed, step)`: a run is a function of its seed and its scores alone.
    """

    def step_on_a_device(uniform: bool, state: TrainState, sampler: SamplerState, proposal, examples):
        drawn = stages.draw(sampler, state.step, uniform=uniform)
        gradient = stages.gradient(state.params, state.step, drawn, examples)
        state, sampler, metrics = stages.update(state, sampler, proposal, gradient)
        # An array more to hand over takes longer than a uniform draw: that can be made again.
        return state, sampler, metrics._replace(minibatch=None) if uniform else metrics

    def train_step(state: TrainState, sampler: SamplerState, proposal, examples, *, uniform: bool = False):
        step = functools.partial(step_on_a_device, uniform)
        if mesh:
            # Not left to jit: over a sharded batch the gradients of a convolution come out wrong there. check_vma would
            # sum cotangents of the parameters over the devices.
            everywhere = PartitionSpec()
            step = jax.shard_map(step, mesh=mesh, in_specs=everywhere, out_specs=everywhere, check_vma=False)
        return step(state, sampler, proposal, examples)

    return jax.jit(train_step, donate_argnames=("state", "sampler"), static_argnames="uniform")


def make_stages(
    loss_fn: Callable[..., jax.Array],
    optimizer: optax.GradientTransformation,
    *,
    batch_size: int,
    seed: int,
    refresh: bool = True,
    score_fn: Callable[..., jax.Array] | None = None,
    draw: str = "systematic",
    moments: bool = False,
    skip_nonfinite: bool = False,
    check_gradient: bool = False,
    mesh: Mesh | None = None,
) -> Stages:
    """The parts of a step; nothing is compiled.

    loss_fn: `(params, *example) -> f[]`, the loss of one example. batch_size: of the whole minibatch. refresh: whether
      the norms of the minibatch, which its own backward pass gives, become the scores of its examples. They enter store
      and table and teach the proposal. score_fn: where scores are not gradient norms, their function, see `scores`: a
      refresh then also costs that, and the norms teach the proposal what the scores mean. draw: a method of
      `sampling.draw`, or where all draws are uniform "shuffled" or "random_subset", see `uniform.shuffled`. moments:
      whether the metrics have them. skip_nonfinite: BIASED, a minibatch whose loss or gradient is not finite updates
      nothing. check_gradient: whether the gradient is looked at for that also where nothing else needs its norm. mesh:
      of one axis, the devices that share every minibatch, a multiple of their number; None: one device.
    """

    def backward(params, examples, indices, importance_weights):
        batch = jax.tree.map(lambda x: x[indices], examples)
        losses, gradient, norms = value_grad_and_norms(loss_fn)(params, importance_weights, *batch)
        scores = score_fn(params, *batch) if refresh and score_fn else norms
        return losses, gradient, norms, scores

    def draw_(sampler: SamplerState, number: jax.Array, *, uniform: bool = False) -> sampling.Draw:
        table = sampling.uniform_table(len(sampler.store)) if uniform else sampler.table
        return draw_minibatch(table, number, batch_size=batch_size, seed=seed, draw=draw)

    def gradient_(params, step: jax.Array, drawn: sampling.Draw, examples) -> Gradient:
        indices, importance_weights = drawn
        share = _shared(backward, mesh.axis_names[0]) if mesh else backward
        losses, gradient, norms, scores = share(params, examples, indices, importance_weights)
        finite = jnp.all(jnp.isfinite(losses))
        if refresh:
            finite &= jnp.all(jnp.isfinite(norms))
        elif skip_nonfinite or check_gradient:  # else the next loss tells: this pass would slow uniform sampling
            finite &= jnp.isfinite(optax.tree.norm(gradient))
        minibatch = Minibatch(indices, importance_weights, losses)
        known = norms if refresh or moments else None
        return Gradient(minibatch, gradient, known, scores if refresh else None, finite, step)

    def update(state: TrainState, sampler: SamplerState, proposal, given: Gradient):
        (indices, importance_weights, losses), gradient, norms, scores, finite, scored_at = given
        loss = jnp.where(finite, jnp.mean(importance_weights * losses), jnp.nan)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        if skip_nonfinite:
            after, before = (params, opt_state), (state.params, state.opt_state)
            params, opt_state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, before)
        found = None
        if moments:
            found = variance.minibatch_moments(norms, importance_weights, optax.tree.norm(gradient))
        if refresh:
            sampler = _refresh(
                proposal,
                sampler,
                _after(indices, (importance_weights, found)),
                scores,
                norms,
                importance_weights,
                scored_at=scored_at,
                step=state.step + 1,
            )
        state = state._replace(params=params, opt_state=opt_state, step=state.step + 1)
        return state, sampler, StepMetrics(loss, found, given.minibatch)

    return Stages(draw_, gradient_, update)


def _shared(backward: Callable, axis: str) -> Callable:
    """The same of the whole minibatch, of which each device along the axis does an equal part."""

    def of_the_whole(params, examples, indices, importance_weights):
        mine = [x.reshape(jax.lax.axis_size(axis), -1)[jax.lax.axis_index(axis)] for x in (indices, importance_weights)]
        losses, gradient, *others = backward(params, examples, *mine)
        losses, *others = jax.lax.all_gather((losses, *others), axis, tiled=True)
        return losses, jax.lax.pmean(gradient, axis), *others

    return of_the_whole


def _after(indices: jax.Array, read: Any) -> jax.Array:
    """The indices of a write that is to come after what was read from the same arrays, as data that it needs.

    Without that, XLA does not know the order, and copies the arrays, O(N), instead of writing in place.
    """
    leaves = jax.tree.leaves(read)
    num_nan = sum(jnp.sum(jnp.isnan(x), dtype=jnp.int32) for x in leaves)
    return jnp.where(num_nan > sum(x.size for x in leaves), NOBODY, indices)  # never more than all


def _write(proposal, sampler: SamplerState, indices, scores, norms, importance_weights, *, scored_at) -> SamplerState:
    """Scores enter the store; the gradient norms of the same examples, if known, teach the proposal what to expect."""
    proposal_state, store = sampler.proposal_state, sampler.store
    if norms is not None:
        proposal_state = proposal.observe(
            proposal_state, sampler.basis, store, indices, norms, scored_at, importance_weights
        )
        indices = _after(indices, proposal_state)
    store, rejected = store.write(indices, scores, scored_at)
    return sampler._replace(store=store, proposal_state=proposal_state, rejected=sampler.rejected.then(rejected))


def _refresh(
    proposal, sampler: SamplerState, indices, scores, norms, importance_weights, *, scored_at, step
) -> SamplerState:
    """Scores of the learner's own minibatch enter, and the table gets their v for the next step; O(m)."""
    sampler = _write(proposal, sampler, indices, scores, norms, importance_weights, scored_at=scored_at)
    v = proposal.v(sampler.basis, *sampler.store.at(indices), step)
    return sampler._replace(table=sampler.table.write(indices, v))


def _renew(proposal, sampler: SamplerState, step) -> SamplerState:
    """The v of all examples, made anew of what is now known; O(N)."""
    basis = proposal.basis(sampler.proposal_state, sampler.store, step)
    return sampler._replace(basis=basis, table=proposal.table(basis, sampler.store, step))


# The old table is not read, but stays an argument: the new one takes over its memory.
@functools.partial(jax.jit, donate_argnames="sampler", keep_unused=True, static_argnames=("are_norms", "renewing"))
def take_in(
    proposal, sampler: SamplerState, indices, scores, *, scored_at, step, are_norms=True, renewing=True
) -> SamplerState:
    """One round enters: the proposal learns from it, the store keeps it, the table is made anew; O(N).

    indices: i32[...], scores: f32[...] of the same shape, on the learner's device, measured with the parameters of step
    `scored_at`; `step` is the learner's own. are_norms: whether the scores are gradient norms; others teach the
    proposal nothing. renewing: False to only let the table have the v of these examples, O(m log N). The sampler given
    is donated.
    """
    indices, scores = indices.reshape(-1), scores.reshape(-1)
    sampler = _write(proposal, sampler, indices, scores, scores if are_norms else None, 1.0, scored_at=scored_at)
    if renewing:
        return _renew(proposal, sampler, step)
    v = proposal.v(sampler.basis, *sampler.store.at(jnp.clip(indices, 0, len(sampler.store) - 1)), step)
    return sampler._replace(table=sampler.table.write(indices, v))


@functools.partial(jax.jit, donate_argnames="sampler", keep_unused=True)
def renew(proposal, sampler: SamplerState, *, step) -> SamplerState:
    """A round without workers: the table is made anew of what the learner's own minibatches have shown; O(N)."""
    return _renew(proposal, sampler, step)
