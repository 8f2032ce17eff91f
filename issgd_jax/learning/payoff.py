"""Payoff of importance sampling: measured gain in variance against measured cost of a step.

A minibatch of B drawn by importance has the variance of a uniform one of gain · B. So it pays as long as its step, with
all scoring, takes less than gain times as long as a uniform step (the argument of Katharopoulos and Fleuret 2018).
"""

import dataclasses
import statistics
from typing import NamedTuple

from issgd_jax.learning.variance import Moments

# Windows of each kind that are timed before the cost is known: the first few compile.
IDLE_WINDOWS, ACTIVE_WINDOWS = 3, 5
# Number of last windows whose medians are gain and cost.
REMEMBERED = 5
# Idle time in lengths of a trial: the first, doubled after each trial that does not pay, and the longest.
FIRST_IDLE, LONGEST_IDLE = 1, 16


class State(NamedTuple):
    """State of the decision, plain numbers.

    Attributes:
      active: whether examples are scored and drawn by the proposal; else neither.
      left: windows until the next decision.
      idle: length of the next idle time, in trials.
      moments: sums over the present window.
      gains: of the last active windows since it became active.
      active_seconds, idle_seconds: of a step, in the last windows of each kind.
    """

    active: bool
    left: int
    idle: int = FIRST_IDLE
    moments: Moments = Moments(0.0, 0.0, 0.0)
    gains: tuple[float, ...] = ()
    active_seconds: tuple[float, ...] = ()
    idle_seconds: tuple[float, ...] = ()

    @classmethod
    def from_dict(cls, fields: dict) -> "State":
        """Returns the state whose `_asdict` went through JSON."""
        fields = {name: tuple(x) if isinstance(x, list) else x for name, x in fields.items()}
        return cls(**fields | {"moments": Moments(*fields["moments"])})


@dataclasses.dataclass(frozen=True)
class Payoff:
    """Tries importance sampling, continues while it pays, and else draws uniformly until the next trial.

    Attributes:
      batch_size: B.
      steps: of a window; decisions fall at the end of windows.
      trial: windows in which every example can be scored.
      cost: time of a step with importance sampling and scoring, in uniform steps; None: measured, so that the run
        depends on the machine's speed.

    Example:
      >>> payoff = Payoff(batch_size=8, steps=1, trial=1, cost=1.5)
      >>> state = payoff.observe(payoff.init(), Moments(uniform=4.0, proposed=2.0, gradient=0.0))
      >>> state = payoff.end_window(state, seconds=0.1)
      >>> payoff.gain(state), state.active
      (2.0, True)
    """

    batch_size: int
    steps: int
    trial: int
    cost: float | None = None

    def init(self) -> State:
        """Returns the first state: without a known cost the first windows are uniform, to measure their time."""
        if self.cost is None:
            return State(active=False, left=IDLE_WINDOWS)
        return State(active=True, left=self.trial)

    def observe(self, state: State, moments: Moments) -> State:
        """Returns the state with the moments of one more minibatch, plain numbers."""
        return state._replace(moments=Moments(*(old + new for old, new in zip(state.moments, moments))))

    def end_window(self, state: State, seconds: float) -> State:
        """Returns the state of the next window.

        Args:
          state: of the window that has ended.
          seconds: of one of its steps, without measurements.
        """
        kind = "active_seconds" if state.active else "idle_seconds"
        state = state._replace(**{kind: (*getattr(state, kind), seconds)[-REMEMBERED:]}, left=max(state.left - 1, 0))
        if state.active:
            state = state._replace(gains=(*state.gains, self._window_gain(state.moments))[-REMEMBERED:])
        state = state._replace(moments=Moments(0.0, 0.0, 0.0))
        if state.left > 0:
            return state
        if not state.active:
            return state._replace(active=True, left=max(self.trial, ACTIVE_WINDOWS), gains=())
        if self.gain(state) > self.measured_cost(state):
            return state._replace(idle=FIRST_IDLE)
        longer = min(2 * state.idle, LONGEST_IDLE)
        return state._replace(active=False, left=state.idle * max(self.trial, ACTIVE_WINDOWS), idle=longer)

    def gain(self, state: State) -> float:
        """Returns the variance of a uniform minibatch over that of the proposal's, as last measured; NaN before."""
        return statistics.median(state.gains) if state.gains else float("nan")

    def measured_cost(self, state: State) -> float:
        """Returns the time of a step with importance sampling, in uniform steps; NaN before both were timed."""
        if self.cost is not None:
            return self.cost
        if len(state.active_seconds) < ACTIVE_WINDOWS:
            return float("nan")
        return statistics.median(state.active_seconds) / statistics.median(state.idle_seconds)

    def _window_gain(self, moments: Moments) -> float:
        uniform, proposed, gradient = (moment / self.steps for moment in moments)
        # ||E g||^2: the square of a minibatch's gradient is too large by the minibatch's own variance.
        mean_square = max(0.0, (self.batch_size * gradient - proposed) / max(1, self.batch_size - 1))
        if min(uniform, proposed) <= mean_square:  # too few observations to tell a variance from zero
            return uniform / proposed if proposed > 0 else 1.0
        return (uniform - mean_square) / (proposed - mean_square)
