"""The learner: draws, gathers, weighs, updates, refreshes; takes in the workers' scores. All on one device."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from issgd_jax import sampling
from issgd_jax.gradnorm import value_grad_and_norms
from issgd_jax.store import ScoreStore


class TrainState(NamedTuple):
    """params, opt_state: pytrees. step: i32[], updates done."""

    params: Any
    opt_state: Any
    step: jax.Array


class SamplerState(NamedTuple):
    """Everything between a score and a draw.

    store: the score database. proposal_state: what the proposal has learned. table: what is drawn from. rejected:
    i32[], scores that were NaN, infinite or negative and never entered the store.
    """

    store: ScoreStore
    proposal_state: Any
    table: sampling.Table
    rejected: jax.Array


class StepMetrics(NamedTuple):
    """loss: f32[], importance-weighted loss of the minibatch, an unbiased estimate of the training loss."""

    loss: jax.Array


def init_train_state(params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    return TrainState(params, optimizer.init(params), jnp.int32(0))


def init_sampler(proposal, num_examples: int) -> SamplerState:
    """An empty store and its table: every example equally likely."""
    store, state = ScoreStore.init(num_examples), proposal.init()
    return SamplerState(store, state, proposal.table(state, store, jnp.int32(0)), jnp.int32(0))


def make_train_step(
    loss_fn: Callable[..., jax.Array],
    optimizer: optax.GradientTransformation,
    *,
    batch_size: int,
    seed: int,
    refresh: bool = True,
) -> Callable[..., tuple[TrainState, SamplerState, StepMetrics]]:
    """Returns `(state, sampler, proposal, examples) -> (state, sampler, metrics)`, compiled; both states are donated.

    loss_fn: `(params, *example) -> f[]`, the loss of one example. examples: pytrees with leading axis N on the
      learner's device. refresh: whether the norms of the minibatch, which its own backward pass gives, become the
      scores of its examples. They enter the store and teach the proposal; the table follows with the next round.

    The gradient is that of `mean(importance_weights * losses)`: unbiased, whatever the table, as long as no v is 0
    (paper, Corollary 1). The key is `fold_in(seed, step)`: a run is a function of its seed and its scores alone.
    """

    def train_step(state: TrainState, sampler: SamplerState, proposal, examples):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        indices, importance_weights = sampling.draw(key, sampler.table, batch_size)
        batch = jax.tree.map(lambda x: x[indices], examples)
        losses, gradient, norms = value_grad_and_norms(loss_fn)(state.params, importance_weights, *batch)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        if refresh:
            sampler = _write(proposal, sampler, indices, norms, scored_at=state.step)
        return (
            TrainState(params, opt_state, state.step + 1),
            sampler,
            StepMetrics(jnp.mean(importance_weights * losses)),
        )

    return jax.jit(train_step, donate_argnames=("state", "sampler"))


def _write(proposal, sampler: SamplerState, indices, scores, *, scored_at) -> SamplerState:
    """Scores enter: the proposal learns from them, the store keeps them."""
    proposal_state = proposal.observe(sampler.proposal_state, sampler.store, indices, scores, scored_at)
    store, rejected = sampler.store.write(indices, scores, scored_at)
    return SamplerState(store, proposal_state, sampler.table, sampler.rejected + rejected)


# The old table is not read, but stays an argument: the new one takes over its memory.
@functools.partial(jax.jit, donate_argnames="sampler", keep_unused=True)
def take_in(proposal, sampler: SamplerState, indices, scores, *, scored_at, step) -> SamplerState:
    """One round enters: the proposal learns from it, the store keeps it, the table is made anew; O(N), once a round.

    indices: i32[...], scores: f32[...] of the same shape, on the learner's device, measured with the parameters of step
    `scored_at`; `step` is the learner's own. The sampler given is donated.
    """
    sampler = _write(proposal, sampler, indices.reshape(-1), scores.reshape(-1), scored_at=scored_at)
    return sampler._replace(table=proposal.table(sampler.proposal_state, sampler.store, step))
