"""When rounds of scoring start, and when their scores may enter the store.

is_reproducible: whether a run is a function of its seed alone, whatever the speed of its machines.
"""

import dataclasses
from collections.abc import Callable


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
