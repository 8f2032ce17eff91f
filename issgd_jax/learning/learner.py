"""The learner's step: draw, gather, gradient, update, refresh of the scores of the minibatch.

On one device; or on several that share the backward pass of every minibatch and otherwise all do the same.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from issgd_jax.gradnorm import example_keys, positional_key, value_grad_and_norms
from issgd_jax.learning import variance
from issgd_jax.limits import limit_weights, weights_and_limit, with_limit
from issgd_jax.sampling import Draw, Sampler, SamplerState
from issgd_jax.sampling.in_place import order_after

# Of the keys of losses, see `example_keys`.
_LOSS_STREAM = 2**32 - 1


class TrainState(NamedTuple):
    """State of training.

    Attributes:
      params, opt_state: pytrees.
      step: i32[], updates done.
      in_flight: gradients that asynchronous learners have begun.
    """

    params: Any
    opt_state: Any
    step: jax.Array
    in_flight: Any = ()

    @classmethod
    def init(cls, params, optimizer: optax.GradientTransformation) -> "TrainState":
        """Returns the state before the first step."""
        return cls(params, optimizer.init(params), jnp.int32(0))


class Minibatch(NamedTuple):
    """A drawn minibatch and its losses.

    Attributes:
      indices: i32[B].
      importance_weights, losses: f32[B].
    """

    indices: jax.Array
    importance_weights: jax.Array
    losses: jax.Array


class Gradient(NamedTuple):
    """Result of the backward pass of a minibatch.

    Attributes:
      minibatch: the draw and its losses.
      gradient: like the parameters, of `mean(importance_weights * losses)`, with the weights that the limit leaves.
      norms, scores: f32[B], of its examples; None where they are not needed.
      finite: bool[], whether all losses and, where it is checked, the gradient are finite.
      step: i32[], of the parameters.
      limit: f32[], of the draw; None: there is none.
    """

    minibatch: Minibatch
    gradient: Any
    norms: jax.Array | None
    scores: jax.Array | None
    finite: jax.Array
    step: jax.Array
    limit: jax.Array | None = None


class StepMetrics(NamedTuple):
    """Metrics of one step.

    Attributes:
      loss: f32[], importance-weighted loss of the minibatch, an unbiased estimate of the training loss where no limit
        lowers the importance weights; NaN if one of its losses or, where it is checked, its gradient is not finite.
      moments: estimates of the gradient's variance; None unless asked for.
      minibatch: the draw and its losses; None after a uniform draw, which can be repeated.
    """

    loss: jax.Array
    moments: variance.Moments | None
    minibatch: Minibatch | None


class StepsMetrics(NamedTuple):
    """Metrics of several steps.

    Attributes:
      metrics: of the first step whose loss is NaN or infinite; if there is none, of the last step.
      place: i32[], which of the steps that is, from 0.
      nonfinite: i32[], number of steps whose loss is NaN or infinite.
    """

    metrics: StepMetrics
    place: jax.Array
    nonfinite: jax.Array


@dataclasses.dataclass(frozen=True)
class Learner:
    """One training step as pure functions; its parts may run at different times and places.

    The gradient is that of `mean(importance_weights * losses)`: unbiased, whatever the scores, as long as no example
    has probability 0 (paper, Corollary 1). Of a draw with a limit, importance weights are lowered, see `Sampler`.

    Attributes:
      loss_fn: `(params, *example) -> f[]`, the loss of one example.
      optimizer: of optax.
      refresh: whether the norms of each minibatch, which its own backward pass gives, become its examples' scores.
      score_fn: `(params, *batch) -> f32[B]` where scores are not gradient norms; a refresh then costs that too, and the
        norms still teach the proposal what scores mean. None: the gradient norms. Of a loss that takes a key, keys
        are the last batch argument.
      moments: whether metrics include moments of the gradient.
      skip_nonfinite: BIASED: a minibatch whose loss or gradient is not finite updates nothing.
      check_gradient: whether the gradient is checked too where nothing else needs its norm.
      loss_seed: of the keys of the losses, one for each example and step; None: loss_fn takes no `key=`.
      mesh: of one axis, the devices that share every minibatch, whose size they divide; None: one device.
    """

    loss_fn: Callable[..., jax.Array]
    optimizer: optax.GradientTransformation
    refresh: bool = True
    score_fn: Callable[..., jax.Array] | None = None
    moments: bool = False
    skip_nonfinite: bool = False
    check_gradient: bool = False
    loss_seed: int | None = None
    mesh: Mesh | None = None

    def gradient(self, params, step: jax.Array, drawn: Draw, examples) -> Gradient:
        """Computes losses, gradient and norms of a minibatch.

        Args:
          params: of `step` i32[].
          drawn: the minibatch.
          examples: pytrees with leading axis N on the learner's device.
        """
        importance_weights, limit = weights_and_limit(drawn.importance_weights)
        backward = functools.partial(self._backward, limit)
        if self.mesh:
            backward = _shared(backward, self.mesh.axis_names[0])
        keys = None
        if self.loss_seed is not None:
            keys = example_keys(self.loss_seed, _LOSS_STREAM, step, drawn.indices.size)
        losses, gradient, norms, scores = backward(params, examples, drawn.indices, importance_weights, keys)
        finite = jnp.all(jnp.isfinite(losses))
        if self.refresh:
            finite &= jnp.all(jnp.isfinite(norms))
        elif self.skip_nonfinite or self.check_gradient:  # else the next loss shows it: this would slow uniform draws
            finite &= jnp.isfinite(optax.tree.norm(gradient))
        return Gradient(
            minibatch=Minibatch(drawn.indices, importance_weights, losses),
            gradient=gradient,
            norms=norms if self.refresh or self.moments else None,
            scores=scores if self.refresh else None,
            finite=finite,
            step=step,
            limit=limit,
        )

    def update(
        self, state: TrainState, sampler_state: SamplerState, sampler: Sampler, gradient: Gradient
    ) -> tuple[TrainState, SamplerState, StepMetrics]:
        """Applies a gradient, and ingests the norms of its minibatch.

        Args:
          gradient: perhaps of older parameters; its scores count as of their step.
        """
        indices, importance_weights, losses = gradient.minibatch
        drawn = Draw(indices, with_limit(importance_weights, gradient.limit), sampler.num_examples)
        if gradient.limit is not None and gradient.norms is not None:
            importance_weights = limit_weights(importance_weights, gradient.norms, gradient.limit)
        loss = jnp.where(gradient.finite, jnp.mean(importance_weights * losses), jnp.nan)
        params, opt_state = self._apply(state, gradient, importance_weights)
        moments = None
        if self.moments:
            norm = optax.tree.norm(gradient.gradient)
            moments = variance.minibatch_moments(gradient.norms, importance_weights, norm)
        sampler_state = sampler.update(
            sampler_state,
            dataclasses.replace(drawn, indices=order_after(indices, moments)) if self.refresh else drawn,
            gradient.norms if self.refresh else None,
            scores=gradient.scores if self.score_fn else None,
            scored_at=gradient.step,
        )
        state = state._replace(params=params, opt_state=opt_state, step=state.step + 1)
        return state, sampler_state, StepMetrics(loss, moments, gradient.minibatch)

    def step(
        self, state: TrainState, sampler_state: SamplerState, sampler: Sampler, examples, *, uniform: bool = False
    ) -> tuple[TrainState, SamplerState, StepMetrics]:
        """Draws a minibatch, computes its gradient and applies it.

        Args:
          examples: pytrees with leading axis N on the learner's device.
          uniform: whether this step's draw ignores the scores; refreshes continue.
        """
        sampler_state, drawn = sampler.draw(sampler_state, uniform_draw=uniform)
        gradient = self.gradient(state.params, state.step, drawn, examples)
        state, sampler_state, metrics = self.update(state, sampler_state, sampler, gradient)
        # One more array to return takes longer than a uniform draw, which can be repeated.
        return state, sampler_state, metrics._replace(minibatch=None) if uniform else metrics

    def compile(self) -> Callable[..., tuple[TrainState, SamplerState, StepMetrics]]:
        """Returns `step` compiled, both states donated; with a mesh, arrays are whole on each of its devices."""

        def train_step(state, sampler_state, sampler, examples, *, uniform: bool = False):
            step = functools.partial(self.step, uniform=uniform)
            if self.mesh:
                # Not left to jit: over a sharded batch the gradients of a convolution come out wrong there. check_vma
                # would sum cotangents of the parameters over the devices.
                whole = PartitionSpec()
                step = jax.shard_map(step, mesh=self.mesh, in_specs=whole, out_specs=whole, check_vma=False)
            return step(state, sampler_state, sampler, examples)

        return jax.jit(train_step, donate_argnames=("state", "sampler_state"), static_argnames="uniform")

    def compile_steps(self) -> Callable[..., tuple[TrainState, SamplerState, StepsMetrics]]:
        """Returns a function that does several steps in one program, both states donated; without a mesh.

        Returns:
          `(state, sampler_state, sampler, examples, num_steps, *, uniform=False)`, where num_steps is i32[], >= 1. The
          states are the same, bit by bit, however the steps are divided among calls.

        Raises:
          ValueError: the learner has a mesh. When called: the optimiser changes the structure or shapes of its state.
        """
        if self.mesh:
            raise ValueError("several steps in one program are those of one device, but the learner has a mesh")

        def train_steps(state, sampler_state, sampler, examples, num_steps, *, uniform: bool = False):
            step = jax.jit(functools.partial(self.step, uniform=uniform), inline=True)  # traced once
            shapes = jax.eval_shape(step, state, sampler_state, sampler, examples)[2]
            first = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

            def body(i, carry):
                states, told = carry
                *new, metrics = step(*states, sampler, examples)
                nonfinite = told.nonfinite + (~jnp.isfinite(metrics.loss)).astype(jnp.int32)
                metrics, place = jax.tree.map(
                    lambda x, y: jnp.where(told.nonfinite == 0, x, y), (metrics, i), (told.metrics, told.place)
                )
                return _with_form(tuple(new), states), StepsMetrics(metrics, place, nonfinite)

            told = StepsMetrics(first, jnp.int32(0), jnp.int32(0))
            (state, sampler_state), told = jax.lax.fori_loop(0, num_steps, body, ((state, sampler_state), told))
            return state, sampler_state, told

        return jax.jit(train_steps, donate_argnames=("state", "sampler_state"), static_argnames="uniform")

    def _backward(self, limit, params, examples, indices, importance_weights, keys):
        batch, loss_fn = jax.tree.map(lambda x: x[indices], examples), self.loss_fn
        if keys is not None:
            batch, loss_fn = (*batch, keys), positional_key(loss_fn)
        importance_weights = with_limit(importance_weights, limit)
        losses, gradient, norms = value_grad_and_norms(loss_fn)(params, importance_weights, *batch)
        scores = self.score_fn(params, *batch) if self.refresh and self.score_fn else norms
        return losses, gradient, norms, scores

    def _apply(self, state: TrainState, gradient: Gradient, importance_weights: jax.Array) -> tuple[Any, Any]:
        """Returns the parameters and the optimiser's state after the update."""
        updates, opt_state = optax.with_extra_args_support(self.optimizer).update(
            gradient.gradient,
            state.opt_state,
            state.params,
            norms=gradient.norms,
            importance_weights=importance_weights,
        )
        params = optax.apply_updates(state.params, updates)
        if not self.skip_nonfinite:
            return params, opt_state
        new, old = (params, opt_state), (state.params, state.opt_state)
        return jax.tree.map(lambda x, y: jnp.where(gradient.finite, x, y), new, old)


def _with_form(new: tuple, old: tuple[TrainState, SamplerState]) -> tuple[TrainState, SamplerState]:
    """Returns the new states with the data types of the old: an optimiser's may differ after its first update."""
    forms = [(jax.tree.structure(states), [x.shape for x in jax.tree.leaves(states)]) for states in (old, new)]
    if forms[0] != forms[1]:
        was, now = (jax.tree.map(jnp.shape, states[0].opt_state) for states in (old, new))
        raise ValueError(
            f"the optimiser's state has other arrays after an update than its init gives: {now} instead of {was}; "
            "return one of the same structure and shapes"
        )
    return jax.tree.map(lambda x, y: x if x.dtype == y.dtype else x.astype(y.dtype), new, old)


def _shared(backward: Callable, axis: str) -> Callable:
    """Returns `backward` of the whole minibatch, of which each device along the axis computes an equal part."""

    def shared_backward(params, examples, *minibatch):
        num_devices, device = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
        part = jax.tree.map(lambda x: x.reshape(num_devices, -1)[device], minibatch)
        losses, gradient, *others = backward(params, examples, *part)
        losses, *others = jax.lax.all_gather((losses, *others), axis, tiled=True)
        return losses, jax.lax.pmean(gradient, axis), *others

    return shared_backward
