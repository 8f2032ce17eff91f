"""When rounds of scoring start, and when their scores may enter the store.

is_reproducible: whether a run is a function of its seed alone, whatever the speed of its machines.
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
    """One broadcast of parameters and what the workers made of it; the arrays may still be in the making.

    step: learner step of the parameters. indices, scores: [workers, chunk]. num_examples: how many are scored.
    """

    step: int
    indices: object
    scores: object
    num_examples: int

    def is_ready(self) -> bool:
        """True once the scores can be read without waiting."""
        return self.scores.is_ready()


@dataclasses.dataclass(frozen=True)
class Exact:
    """Barriers kept: every example is scored with the current parameters before every step."""

    sweep: int  # rounds that score every example once
    is_reproducible = True

    def rounds_to_start(self, step: int, num_in_flight: int) -> int:
        del step, num_in_flight
        return self.sweep

    def may_enter(self, round_: Round, step: int) -> bool:
        del round_, step
        return True


@dataclasses.dataclass(frozen=True)
class Relaxed:
    """A round every `steps_per_round` learner steps; its scores enter exactly `score_delay` steps after its parameters.

    The staleness is part of the schedule, not of the machine's speed: the same seed gives the same run, bit for bit.
    Where workers need longer than the delay, the learner waits.
    """

    steps_per_round: int
    score_delay: int
    is_reproducible = True

    def rounds_to_start(self, step: int, num_in_flight: int) -> int:
        del num_in_flight
        return int(step % self.steps_per_round == 0)

    def may_enter(self, round_: Round, step: int) -> bool:
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
    """Nobody waits: scores enter when they are ready, and workers always have something to go on with.

    rounds_ahead: how many rounds in flight that takes; it changes with the workers there are.
    """

    rounds_ahead: Callable[[], int]
    is_reproducible = False

    def rounds_to_start(self, step: int, num_in_flight: int) -> int:
        del step
        return max(0, self.rounds_ahead() - num_in_flight)

    def may_enter(self, round_: Round, step: int) -> bool:
        del step
        return round_.is_ready()
