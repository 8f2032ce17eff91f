"""Schedules: when rounds of scoring start, and when their scores may enter the store.

A schedule has `is_reproducible` (whether a run is a function of its seed alone, whatever the speed of its machines),
`rounds_to_start` and `may_enter`.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np


def chunk_items(start, chunk_size: int, num_items: int):
    """Returns the items of one chunk, i32[chunk_size]; at the end it wraps around to the first item.

    Args:
      start: first item, an int or i32[] on a device.
      chunk_size: items in a chunk.
      num_items: of which there are.

    Example:
      >>> chunk_items(3, chunk_size=3, num_items=5).tolist()
      [3, 4, 0]
    """
    return (start + np.arange(chunk_size, dtype=np.int32)) % num_items


def chunk_starts(chunk_size: int, num_items: int) -> np.ndarray:
    """Returns the first items of consecutive chunks, i32[...], up to where they repeat.

    Example:
      >>> chunk_starts(chunk_size=4, num_items=6).tolist()
      [0, 4, 2]
    """
    num_starts = num_items // math.gcd(num_items, chunk_size)
    return (np.arange(num_starts, dtype=np.int64) * chunk_size % num_items).astype(np.int32)


@dataclasses.dataclass(frozen=True, eq=False)
class Round:
    """One broadcast of parameters and the scores of one chunk from every worker; the arrays may not be ready yet.

    Attributes:
      step: learner step of the parameters.
      indices: i32[workers, chunk]; those outside [0, N) are padding.
      scores: f32[workers, chunk].
      num_examples: how many are scored.
    """

    step: int
    indices: object
    scores: object
    num_examples: int

    def is_ready(self) -> bool:
        """Returns whether the scores can be read without waiting."""
        return self.scores.is_ready()


@dataclasses.dataclass(frozen=True)
class Exact:
    """The paper's barriers: every example is scored with the current parameters before every step.

    Attributes:
      sweep: rounds that score every example once.

    Example:
      >>> Exact(sweep=3).rounds_to_start(step=7, num_in_flight=0)
      3
    """

    sweep: int
    is_reproducible = True

    def rounds_to_start(self, step: int, num_in_flight: int) -> int:
        """Returns how many rounds start before this step."""
        del step, num_in_flight
        return self.sweep

    def may_enter(self, round_: Round, step: int) -> bool:
        """Returns whether the scores of a round may enter before this step."""
        del round_, step
        return True


@dataclasses.dataclass(frozen=True)
class Relaxed:
    """A round every so many learner steps, whose scores enter at a fixed step.

    The staleness is part of the schedule, not of the machine's speed: the same seed gives the same run, bit for bit.
    Where workers need longer than the delay, the learner waits.

    Attributes:
      steps_per_round: steps from one round to the next.
      score_delay: steps from the parameters of a round to the entry of its scores.

    Example:
      >>> schedule = Relaxed(steps_per_round=4, score_delay=6)
      >>> [schedule.rounds_to_start(step, num_in_flight=0) for step in range(5)]
      [1, 0, 0, 0, 1]
      >>> schedule.delay, schedule.num_entered(step=10)
      ((1, 2), 2)
    """

    steps_per_round: int
    score_delay: int
    is_reproducible = True

    def rounds_to_start(self, step: int, num_in_flight: int) -> int:
        """Returns how many rounds start before this step."""
        del num_in_flight
        return int(step % self.steps_per_round == 0)

    def may_enter(self, round_: Round, step: int) -> bool:
        """Returns whether the scores of a round may enter before this step."""
        return step >= round_.step + self.score_delay

    @property
    def delay(self) -> tuple[int, int]:
        """The delay as whole rounds and further steps."""
        return divmod(self.score_delay, self.steps_per_round)

    def num_entered(self, step: int) -> int:
        """Returns the number of rounds whose scores have entered before update `step`."""
        return max(0, (step - self.score_delay) // self.steps_per_round + 1)


@dataclasses.dataclass(frozen=True)
class FreeRunning:
    """Scores enter when they are ready, and workers always have a next round.

    Attributes:
      rounds_ahead: returns how many rounds in flight keep all workers busy; it may change with the workers.

    Example:
      >>> FreeRunning(lambda: 2).rounds_to_start(step=7, num_in_flight=1)
      1
    """

    rounds_ahead: Callable[[], int]
    is_reproducible = False

    def rounds_to_start(self, step: int, num_in_flight: int) -> int:
        """Returns how many rounds start before this step."""
        del step
        return max(0, self.rounds_ahead() - num_in_flight)

    def may_enter(self, round_: Round, step: int) -> bool:
        """Returns whether the scores of a round may enter before this step."""
        del step
        return round_.is_ready()
