"""Asynchronous SGD: several learners, each at work on a minibatch at parameters that may be old; one applies them all.

The paper's open question: importance sampling joined with ASGD (Dean et al. 2012), here with a bound on the delay (Ho
et al. 2013). Learners are peers: the norms of their minibatches, which their backward passes give, become scores too.
"""

import functools
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from issgd_jax.learning.learner import Gradient, SamplerState, Stages, StepMetrics, TrainState


def next_to_apply(begun: Sequence[int], ready: Sequence[bool], *, step: int, max_delay: int) -> int | None:
    """Which of the gradients in flight, oldest first, becomes update `step`; None: wait until one is ready.

    It is the first that is ready; but the oldest, ready or not, where any would else be more than max_delay late. With
    max_delay = k - 1 that is always so: k learners take turns.

    begun: steps of their parameters, k of them. ready: whether they could be applied at once.
    """
    if any(step + i - begun[i] >= max_delay for i in range(len(begun))):
        return 0
    return ready.index(True) if True in ready else None


class Learners:
    """k learners, driven from one Python thread: every call dispatches, and waits only for a choice between gradients.

    At each step the learner that is idle draws at its owner's newest table, and begins on a copy of its newest
    parameters; then one of the k gradients in flight becomes the step's update. Its delay, the updates between its
    parameters and itself, is k - 1 on the average. The importance weights are those of the v that was drawn from, and
    the scores enter as of the step of their parameters, so that delay adds no bias to the gradient at the parameters
    that it is of.

    The owner is the device of the state. What is in flight after a step, k - 1 gradients, oldest first, is moved there
    as it is finished, and is part of the state.
    """

    def __init__(self, stages: Stages, examples: Any, *, devices: Sequence[jax.Device], number: int, max_delay: int):
        """Places a copy of the examples on each device; compiles nothing.

        Args:
          examples: pytrees with leading axis N.
          devices: the owner first; where there are fewer than learners, they share them in turn.
          number: k.
          max_delay: no gradient is applied later, >= k - 1. With k - 1 learners take turns, and the run is the same
            whatever their speed: the gradient of update t is of the parameters after t - (k - 1) updates, or of the
            first. With more, gradients are applied in the order in which they become ready.

        Raises: ValueError if number < 1 or max_delay < number - 1.
        """
        if number < 1 or max_delay < number - 1:
            raise ValueError(f"need number >= 1 and max_delay >= number - 1, got {number} and {max_delay}")
        self._places = [devices[i % len(devices)] for i in range(number)]
        self._owner, self._max_delay = devices[0], max_delay
        self._examples = {device: jax.device_put(examples, device) for device in self._places}
        # What the host must know of the state that was left last: its step, known by that array; step of the parameters
        # and device of each gradient in flight; the device of the learner that is idle.
        self._left: jax.Array | None = None
        self._step, self._at_work, self._idle = 0, [], self._places[-1]
        self._draw = jax.jit(stages.draw, static_argnames="uniform")
        self._gradient = jax.jit(stages.gradient)

        # Learners may still read the parameters: donated, they would have to be waited for.
        @functools.partial(jax.jit, donate_argnames=("opt_state", "sampler"))
        def update(params, opt_state, step, sampler, proposal, gradient):
            return stages.update(TrainState(params, opt_state, step), sampler, proposal, gradient)

        self._update = update

    def start(self, state: TrainState, sampler: SamplerState) -> TrainState:
        """The state before the first step: all learners but one are at work on the first parameters."""
        numbers = range(len(self._places) - 1)
        in_flight = (self._begin(state, sampler, i, self._places[i], uniform=False) for i in numbers)
        return state._replace(in_flight=tuple(in_flight))

    def train_step(
        self, state: TrainState, sampler: SamplerState, proposal, examples, *, uniform: bool = False
    ) -> tuple[TrainState, SamplerState, StepMetrics]:
        """As what `learner.make_train_step` returns; the examples are those that the learners have.

        The optimiser's state and the sampler are donated.
        """
        del examples
        if state.step is not self._left:
            self._look_at(state)
        number = self._step + len(self._places) - 1
        begun = self._begin(state, sampler, number, self._idle, uniform=uniform)
        in_flight = [*state.in_flight, begun]
        self._at_work.append((self._step, self._idle))
        while (i := self._choose(in_flight)) is None:
            time.sleep(1e-5)
        gradient, (_, self._idle) = in_flight.pop(i), self._at_work.pop(i)
        state, sampler, metrics = self._update(state.params, state.opt_state, state.step, sampler, proposal, gradient)
        self._step, self._left = self._step + 1, state.step
        return state._replace(in_flight=tuple(in_flight)), sampler, metrics

    def _choose(self, in_flight: list[Gradient]) -> int | None:
        begun = [step for step, _ in self._at_work]
        ready = [gradient.finite.is_ready() for gradient in in_flight]
        return next_to_apply(begun, ready, step=self._step, max_delay=self._max_delay)

    def _look_at(self, state: TrainState) -> None:
        """At a state that was not left here: that before the first step, or of a checkpoint."""
        numbers = jax.device_get((state.step, *(gradient.step for gradient in state.in_flight)))
        self._step, *begun = map(int, numbers)
        self._at_work, self._idle = list(zip(begun, self._places)), self._places[-1]

    def _begin(self, state: TrainState, sampler: SamplerState, number: int, device, *, uniform: bool) -> Gradient:
        drawn = self._draw(sampler, jax.device_put(np.int32(number), self._owner), uniform=uniform)
        params, step, drawn = jax.device_put((state.params, state.step, drawn), device)
        return jax.device_put(self._gradient(params, step, drawn, self._examples[device]), self._owner)
