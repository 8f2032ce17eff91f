"""Rounds of scoring: when they start, when their scores enter, and what a lost one costs."""

import collections

import jax
import numpy as np

from issgd_jax.console import say
from issgd_jax.devices import one_copy, put
from issgd_jax.errors import ClusterLostError, brief
from issgd_jax.run.parts import Parts
from issgd_jax.run.run_state import RunState
from issgd_jax.sampling.draws import STRIDE
from issgd_jax.sampling.transitions import is_early
from issgd_jax.scoring.schedule import Round

# Rounds lost in a row, after which training continues without workers.
MAX_FAILED_ROUNDS = 3


class Rounds:
    """Drives the worker pool as the schedule says, and keeps the sampler's table no older than a window."""

    def __init__(self, parts: Parts, state: RunState):
        """Moves the pool to the cursor of the state.

        Args:
          parts: pool, schedule, sampler and window are used.
          state: of the run; changed in place.
        """
        self._parts, self._state, self._pool = parts, state, parts.pool
        self._failed_in_a_row = 0
        if self._pool:
            self._pool.seek(state.cursor)

    def advance(self) -> None:
        """Starts the rounds that are due, ingests those whose scores may enter, and rebuilds an old table."""
        state, schedule = self._state, self._parts.schedule
        if self._pool:
            self._start()
            # One that is late must not hold up those behind it.
            entering = [round_ for round_ in state.in_flight if schedule.may_enter(round_, state.step)]
            state.in_flight = collections.deque(round_ for round_ in state.in_flight if round_ not in entering)
            # Where rounds enter at every step, rebuilding the table each time would be most of the work.
            rebuild = schedule.is_reproducible or self._is_table_old(state.step)
            for round_ in entering:
                self._ingest(round_, rebuild=rebuild and round_ is entering[-1])
        if state.payoff_state.active and self._is_table_old(state.step):  # scores age too where none come in
            state.sampler_state = self._parts.sampler.rebuild(state.sampler_state)
            state.rebuilt_at = state.step

    def steps_without_any(self, most: int) -> int:
        """Returns how many steps, up to so many, can follow each other before `advance` may change anything."""
        return next((n for n in range(1, most) if self._may_change(self._state.step + n)), most)

    def _may_change(self, step: int) -> bool:
        """Returns whether `advance` may change anything before a later step, if nothing has changed until then."""
        state, schedule = self._state, self._parts.schedule
        if state.payoff_state.active and self._is_table_old(step):
            return True
        if not self._pool:
            return False
        starts = schedule.rounds_to_start(step, len(state.in_flight)) > 0
        return starts or any(schedule.may_enter(round_, step) for round_ in state.in_flight)

    def _is_table_old(self, step: int) -> bool:
        # Other draws forget a table in the wrong unit at the first rebuild; a deadline would stand for epochs.
        is_due = step > 0 and self._parts.sampler.draw_method == STRIDE and is_early(step)
        return is_due or step - self._state.rebuilt_at >= self._parts.window

    def _start(self) -> None:
        state = self._state
        if not state.payoff_state.active:
            return
        num_rounds = self._parts.schedule.rounds_to_start(state.step, len(state.in_flight))
        if num_rounds == 0:
            return
        try:
            params = one_copy(self._parts.broadcast(state.train_state))
            state.in_flight.extend(self._pool.score_next(params, state.step, num_rounds))
        except jax.errors.JaxRuntimeError as error:
            self._fail(error)
        except ClusterLostError as error:
            self._give_up(error)
        if self._pool:
            state.cursor = self._pool.cursor

    def _ingest(self, round_: Round, *, rebuild: bool) -> None:
        state, parts = self._state, self._parts
        try:
            # An error on a worker must not reach the learner's arrays.
            jax.block_until_ready((round_.indices, round_.scores))
        except jax.errors.JaxRuntimeError as error:
            self._fail(error)
            return
        except ClusterLostError as error:
            self._give_up(error)
            return
        self._failed_in_a_row = 0
        state.worker_examples += round_.num_examples
        indices, scores = one_copy((round_.indices, round_.scores))
        indices, scores, scored_at = put((indices, scores, np.int32(round_.step)), parts.placement)
        state.sampler_state = parts.sampler.ingest(
            state.sampler_state, indices, scores, scored_at, are_norms=parts.are_norms, rebuild=rebuild
        )
        if rebuild:
            state.rebuilt_at = state.step

    def _fail(self, error: Exception) -> None:
        """Logs a lost round; gives the workers up after several in a row."""
        if jax.process_count() > 1:  # the other processes did not see it, and would diverge
            raise error
        self._state.failed_rounds += 1
        self._failed_in_a_row += 1
        say(
            f"a round of scoring is lost at step {self._state.step:,}, training continues with older scores: "
            f"{brief(error)}"
        )
        if self._failed_in_a_row == MAX_FAILED_ROUNDS:
            self._give_up(f"{MAX_FAILED_ROUNDS} rounds in a row are lost")

    def _give_up(self, reason: object) -> None:
        """Goes on without workers; logged once."""
        if self._pool:
            say(f"{reason}: training continues without workers")
        self._pool = None
        self._state.in_flight.clear()
