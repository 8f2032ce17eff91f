"""Asynchronous SGD: several learners, each at work on a minibatch at parameters that may be old; one applies them all.

The paper's open question: importance sampling joined with ASGD (Dean et al. 2012), here with a bound on the delay (Ho
et al. 2013). Learners are peers: the norms of their minibatches, which their backward passes give, become scores too.
"""

import functools
import time
from collections.abc import Sequence
from typing import Any

import jax

from issgd_jax.learning.learner import Gradient, Learner, StepMetrics, TrainState
from issgd_jax.sampling import Sampler, SamplerState


def next_to_apply(begun: Sequence[int], ready: Sequence[bool], *, step: int, max_delay: int) -> int | None:
    """Returns which of the gradients in flight becomes update `step`; None: wait until one is ready.

    It is the first that is ready; but the oldest, ready or not, where any would else be more than max_delay late. With
    max_delay = k - 1 that is always so: k learners take turns.

    Args:
      begun: steps of their parameters, k of them, oldest gradient first.
      ready: whether they could be applied at once.
      step: number of the update.
      max_delay: updates between the parameters of a gradient and its own update, at most.

    Example:
      >>> next_to_apply([0, 1, 2], [False, True, False], step=3, max_delay=9)
      1
      >>> next_to_apply([0, 1, 2], [False, True, False], step=3, max_delay=2)
      0
    """
    if any(step + i - begun[i] >= max_delay for i in range(len(begun))):
        return 0
    return ready.index(True) if True in ready else None


def exchange(in_flight: Any, begun: Any, number: jax.Array | int, *, delay: int) -> tuple[Any, Any]:
    """Returns (oldest entry, ring after it was replaced by `begun`), for learners that take turns.

    Args:
      in_flight: pytree with leading axis `delay`, a ring: entry n is in place n % delay; anything where delay is 0.
      begun: pytree, the entry of number `number`.
      number: i32[].
      delay: entries in flight, k - 1 for k learners; 0 returns `begun` itself.

    Example:
      >>> import jax.numpy as jnp
      >>> oldest, ring = exchange(jnp.array([10, 11]), jnp.array(12), 2, delay=2)
      >>> int(oldest), ring.tolist()
      (10, [12, 11])
    """
    if not delay:
        return begun, in_flight
    place = number % delay
    oldest = jax.tree.map(lambda ring: ring[place], in_flight)
    return oldest, jax.tree.map(lambda ring, new: ring.at[place].set(new), in_flight, begun)


class AsynchronousLearners:
    """k learners, driven from one Python thread: every call dispatches, and waits only for a choice between gradients.

    At each step the learner that is idle draws at its owner's newest table, and begins on a copy of its newest
    parameters; then one of the k gradients in flight becomes the step's update. Its delay, the updates between its
    parameters and itself, is k - 1 on the average. The importance weights are those of the v that was drawn from, and
    the scores enter as of the step of their parameters, so that delay adds no bias to the gradient at the parameters
    that it is of.

    The owner is the device of the state. What is in flight after a step, k - 1 gradients, oldest first, is moved there
    as it is finished, and is part of the state.
    """

    def __init__(self, learner: Learner, examples: Any, *, devices: Sequence[jax.Device], number: int, max_delay: int):
        """Places a copy of the examples on each device; compiles nothing.

        Args:
          learner: its gradients and updates.
          examples: pytrees with leading axis N.
          devices: the owner first; where there are fewer than learners, they share them in turn.
          number: k.
          max_delay: no gradient is applied later, >= k - 1. With k - 1 learners take turns, and the run is the same
            whatever their speed: the gradient of update t is of the parameters after t - (k - 1) updates, or of the
            first. With more, gradients are applied in the order in which they become ready.

        Raises:
          ValueError: number < 1 or max_delay < number - 1.
        """
        if number < 1 or max_delay < number - 1:
            raise ValueError(f"need number >= 1 and max_delay >= number - 1, got {number} and {max_delay}")
        self._placement = [devices[i % len(devices)] for i in range(number)]
        self._owner, self._max_delay = devices[0], max_delay
        self._examples = {device: jax.device_put(examples, device) for device in self._placement}
        # Kept on the host of the state returned last: its step, identified by that array; for each gradient in flight
        # the step of its parameters and its device; the device of the learner that is idle.
        self._known_step: jax.Array | None = None
        self._step, self._begun, self._idle = 0, [], self._placement[-1]
        # Only the arrays that a draw changes leave it; the others are not copied.
        self._draw = jax.jit(Sampler.draw, static_argnames="uniform_draw")
        self._gradient = jax.jit(learner.gradient)

        # Learners may still read the parameters: donated, they would have to be waited for.
        @functools.partial(jax.jit, donate_argnames=("opt_state", "sampler_state"))
        def update(params, opt_state, step, sampler_state, sampler, gradient):
            return learner.update(TrainState(params, opt_state, step), sampler_state, sampler, gradient)

        self._update = update

    def start(
        self, state: TrainState, sampler_state: SamplerState, sampler: Sampler
    ) -> tuple[TrainState, SamplerState]:
        """Returns the states before the first step: all learners but one are at work on the first parameters."""
        in_flight = []
        for device in self._placement[:-1]:
            sampler_state, gradient = self._begin(state, sampler_state, sampler, device, uniform=False)
            in_flight.append(gradient)
        return state._replace(in_flight=tuple(in_flight)), sampler_state

    def train_step(
        self, state: TrainState, sampler_state: SamplerState, sampler: Sampler, examples, *, uniform: bool = False
    ) -> tuple[TrainState, SamplerState, StepMetrics]:
        """Does one step, as `Learner.compile()` does; the examples are those that the learners have.

        The optimiser's state and the sampler's are donated.
        """
        del examples
        if state.step is not self._known_step:
            self._read_steps(state)
        sampler_state, gradient = self._begin(state, sampler_state, sampler, self._idle, uniform=uniform)
        in_flight = [*state.in_flight, gradient]
        self._begun.append((self._step, self._idle))
        while (i := self._choose(in_flight)) is None:
            time.sleep(1e-5)
        gradient, (_, self._idle) = in_flight.pop(i), self._begun.pop(i)
        state, sampler_state, metrics = self._update(
            state.params, state.opt_state, state.step, sampler_state, sampler, gradient
        )
        self._step, self._known_step = self._step + 1, state.step
        return state._replace(in_flight=tuple(in_flight)), sampler_state, metrics

    def _choose(self, in_flight: list[Gradient]) -> int | None:
        begun = [step for step, _ in self._begun]
        ready = [gradient.finite.is_ready() for gradient in in_flight]
        return next_to_apply(begun, ready, step=self._step, max_delay=self._max_delay)

    def _read_steps(self, state: TrainState) -> None:
        """Reads the steps of a state that this object did not return: before the first step, or of a checkpoint."""
        self._step, *begun = map(int, jax.device_get((state.step, *(gradient.step for gradient in state.in_flight))))
        self._begun, self._idle = list(zip(begun, self._placement)), self._placement[-1]

    def _begin(
        self, state: TrainState, sampler_state: SamplerState, sampler: Sampler, device: jax.Device, *, uniform: bool
    ) -> tuple[SamplerState, Gradient]:
        """Draws, and dispatches the gradient of the minibatch on a device."""
        sampler_state, drawn = self._draw(sampler, sampler_state, uniform_draw=uniform)
        params, step, drawn = jax.device_put((state.params, state.step, drawn), device)
        gradient = self._gradient(params, step, drawn, self._examples[device])
        return sampler_state, jax.device_put(gradient, self._owner)
