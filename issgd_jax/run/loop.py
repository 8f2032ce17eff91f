"""The training loop: one thread for all devices. It dispatches and does not wait; the loss is read one call late.

Where nothing happens between steps, one call does several: a program of the device costs a fraction of a small step.
"""

import dataclasses
import functools
import math
import signal
import time
from collections.abc import Callable

import jax
import numpy as np

from issgd_jax.console import say
from issgd_jax.devices import one_copy, put
from issgd_jax.errors import FolderLostError, InputError, StoppedError
from issgd_jax.learning import payoff
from issgd_jax.learning.learner import StepsMetrics
from issgd_jax.run import diagnosis, metrics, supervision
from issgd_jax.run.checkpoints import Checkpoints
from issgd_jax.run.parts import Parts
from issgd_jax.run.progress import Progress
from issgd_jax.run.rounds import Rounds
from issgd_jax.run.run_state import RunState, Snapshot
from issgd_jax.sampling import Sampler, SamplerState, uniform_table

# Steps of one call, while they take at most so many seconds: a signal waits for their end.
MAX_STEPS_A_CALL, SHORT, LONG = 32, 0.04, 0.2


@dataclasses.dataclass(frozen=True)
class Plan:
    """Length and habits of a run.

    Attributes:
      steps: learner steps.
      eval_every: steps between rows of metrics.
      strict: whether a bad score stops the run.
      progress: the progress bar.
      skip_nonfinite: BIASED: whether an update that is not finite is skipped, and does not stop the run.
    """

    steps: int
    eval_every: int
    strict: bool
    progress: Progress
    skip_nonfinite: bool = False


def start(parts: Parts) -> RunState:
    """Returns the state before the first step."""
    payoff_state = payoff.State(active=not parts.sampler.is_uniform, left=0)
    if parts.payoff:
        payoff_state = parts.payoff.init()
    cursor = parts.pool.cursor if parts.pool else None
    return RunState(parts.train_state, parts.sampler_state, payoff_state, cursor=cursor)


def run(
    parts: Parts,
    plan: Plan,
    writer: metrics.MetricsWriter,
    *,
    state: RunState | None = None,
    checkpoints: Checkpoints | None = None,
    watch: supervision.Supervision | None = None,
) -> SamplerState:
    """Trains, writes rows of metrics and checkpoints, and returns the last state of the sampler.

    Args:
      parts: of the run.
      plan: its length.
      writer: of metrics.jsonl.
      state: to resume from; None: the start.
      checkpoints: None: none are written.
      watch: heartbeat and signals; None: none.

    Raises:
      NonFiniteLossError: training diverges.
      BadScoreError: a score is bad and plan.strict is set.
      StoppedError: after a signal.
      FolderLostError: the run's folder was removed, renamed or replaced.
      InputError: the last checkpoint could not be written.
    """
    state = state or start(parts)
    rounds = Rounds(parts, state)
    training = _Training(parts, plan, writer, state, checkpoints)
    saving = _Saving(parts, plan, writer, state, checkpoints)
    # A hidden copy to or from the host would make every device wait.
    with jax.transfer_guard("disallow"):
        first = state.step
        while state.step <= plan.steps:
            step = state.step
            is_last = step == plan.steps
            is_measured = is_last or step % plan.eval_every == 0
            stopped_by = None
            if watch:
                watch.finished(step)
                stopped_by = parts.agree(watch.signal or 0)
            is_due = checkpoints is not None and step > first and (is_last or checkpoints.is_due(step))
            if parts.train_steps and (is_due or is_measured or stopped_by):
                training.catch_up()
            snapshot = saving.snapshot() if checkpoints and (is_due or is_measured or stopped_by) else None
            if stopped_by and not is_last:
                saving.stop(stopped_by, snapshot)
            if is_last:
                training.catch_up()
            else:
                training.decide_payoff()
                rounds.advance()
                training.count_seconds()
            # The row is of the very parameters and probabilities that this step draws with.
            test_error = training.measure() if is_measured else None
            saving.maybe_save(snapshot, due=is_due, test_error=test_error, is_last=is_last)
            if is_last:
                break
            if parts.train_steps:
                next_measured = step - step % plan.eval_every + plan.eval_every
                next_saved = checkpoints.next_due(step) if checkpoints else plan.steps
                most = min(plan.steps, next_measured, next_saved, step + MAX_STEPS_A_CALL) - step
                state.step += training.learn_several(rounds.steps_without_any(most))
            else:
                training.learn()
                state.step += 1
    if checkpoints:
        checkpoints.wait()
    return state.sampler_state


class _Training:
    """Steps of the learner, and rows of metrics between them."""

    def __init__(self, parts: Parts, plan: Plan, writer: metrics.MetricsWriter, state: RunState, checkpoints):
        self._parts, self._plan, self._writer, self._state = parts, plan, writer, state
        self._checkpoints = checkpoints
        self._uniform_table = uniform_table(parts.sampler.num_examples)
        self._began = self._called = time.monotonic()
        self._counts, self._steps_a_call = {}, 1

    def decide_payoff(self) -> None:
        """At the end of a window, decides whether the next one samples by importance; starts the step's clock."""
        state, parts = self._state, self._parts
        self._began = time.monotonic()
        if parts.payoff and state.step and state.step % parts.window == 0:
            state.payoff_state = parts.payoff.end_window(state.payoff_state, state.window_seconds / parts.window)
            state.window_seconds = 0.0

    def count_seconds(self) -> None:
        """Adds the time since the step's clock was started."""
        seconds = time.monotonic() - self._began
        self._state.window_seconds += seconds
        self._state.step_seconds += seconds

    def learn(self) -> None:
        """Dispatches one step, and reads the loss of the one before meanwhile."""
        self._call(self._parts.train_step)

    def learn_several(self, most: int) -> int:
        """Does the same of up to so many steps, by one call; returns their number."""
        num_steps = min(most, self._steps_a_call)
        if num_steps not in self._counts:
            self._counts[num_steps] = put(np.int32(num_steps), self._parts.placement)
        self._call(self._parts.train_steps, self._counts[num_steps])
        return num_steps

    def _call(self, train: Callable, *counts: jax.Array) -> None:
        state, parts = self._state, self._parts
        self._began = called = time.monotonic()
        state.train_state, state.sampler_state, told = train(
            state.train_state,
            state.sampler_state,
            parts.sampler,
            parts.train_examples,
            *counts,
            uniform=not state.payoff_state.active,
        )
        self._read_pending()
        state.pending, self._called = (state.step, told), called
        self.count_seconds()

    def catch_up(self) -> None:
        """Waits for the steps so far, and reads their loss."""
        self._began = time.monotonic()
        self._read_pending()
        self.count_seconds()

    def _read_pending(self) -> None:
        """Reads the metrics of the call before, which did the steps up to the present one."""
        state, plan = self._state, self._plan
        if state.pending is None:
            return
        step, told = state.pending
        state.pending = None
        if isinstance(told, StepsMetrics):
            place, nonfinite = map(int, jax.device_get((told.place, told.nonfinite)))
            self._adapt(state.step - step)
            step, step_metrics = step + place, told.metrics
        else:
            nonfinite, step_metrics = 1, told
        loss, moments = jax.tree.map(float, jax.device_get((step_metrics.loss, step_metrics.moments)))
        if math.isfinite(loss):
            plan.progress.step(state.step, loss)
            if self._parts.payoff:
                state.payoff_state = self._parts.payoff.observe(state.payoff_state, moments)
        elif plan.skip_nonfinite:
            plan.progress.step(state.step, loss)
            before, state.skipped = state.skipped, state.skipped + nonfinite
            if before.bit_length() < state.skipped.bit_length():  # the 1st, 2nd, 4th, ...
                say(f"the update of step {step:,} is not finite and is skipped, {state.skipped:,} so far")
        else:
            minibatch = step_metrics.minibatch
            draws = {} if minibatch else {n: self._uniform_draw(n) for n in {step, max(0, step - 1)}}
            raise diagnosis.nonfinite_minibatch(step, minibatch, draws, self._writer.last, self._resume_hint())

    def _adapt(self, num_steps: int) -> None:
        """Lets a call do more steps or fewer, by the time that the last one took."""
        seconds = time.monotonic() - self._called
        if seconds > LONG:
            self._steps_a_call = max(1, self._steps_a_call // 2)
        elif seconds < SHORT and num_steps == self._steps_a_call:
            self._steps_a_call = min(2 * self._steps_a_call, MAX_STEPS_A_CALL)

    def measure(self) -> float | None:
        """Writes a row of metrics; returns the test error."""
        state, parts = self._state, self._parts
        sampler_state = state.sampler_state
        if not state.payoff_state.active:
            sampler_state = sampler_state.with_table(self._uniform_table)
        measured = parts.measure(*one_copy((state.train_state.params, sampler_state)))
        if not math.isfinite(measured["train/loss"]) and not self._plan.skip_nonfinite:
            raise diagnosis.nonfinite_loss(state.step, self._writer.last, self._resume_hint())
        if self._plan.strict:
            diagnosis.raise_if_rejected(jax.device_get(state.sampler_state.rejected), state.step)
        row = self._counters() | measured | self._payoff_columns() | self._memory_columns()
        with jax.transfer_guard("allow"):  # pictures and functions of the user's own may copy
            self._writer.write(row)
        self._plan.progress.measured(row)
        return measured.get("test/error", measured.get("test/loss"))

    def _counters(self) -> dict[str, float]:
        state = self._state
        return {
            "step": state.step,
            "wall_seconds": state.wall_seconds,
            "step_seconds": state.step_seconds,
            "learner_examples": state.step * self._parts.batch_size,
            "worker_examples": state.worker_examples,
            "failed_rounds": state.failed_rounds,
            "skipped_updates": state.skipped,
        }

    def _payoff_columns(self) -> dict[str, float]:
        payoff_state, decision = self._state.payoff_state, self._parts.payoff
        if not decision:
            return {}
        return {
            "payoff/active": int(payoff_state.active),
            "payoff/gain": decision.gain(payoff_state),
            "payoff/cost": decision.measured_cost(payoff_state),
        }

    def _memory_columns(self) -> dict[str, int]:
        columns = {"memory/resident_bytes": supervision.resident_bytes()}
        if in_use := (self._parts.learner_device.memory_stats() or {}).get("bytes_in_use"):
            columns["memory/learner_bytes"] = in_use
        return columns

    def _uniform_draw(self, number: int):
        draw = jax.jit(functools.partial(Sampler.draw_number, uniform_draw=True))
        return draw(self._parts.sampler, self._state.sampler_state, put(np.int32(number), self._parts.placement))

    def _resume_hint(self) -> str:
        return _resume_hint(self._checkpoints)


class _Saving:
    """Snapshots of the state, and which of them become checkpoints."""

    def __init__(self, parts: Parts, plan: Plan, writer: metrics.MetricsWriter, state: RunState, checkpoints):
        self._parts, self._plan, self._writer, self._state = parts, plan, writer, state
        self._checkpoints = checkpoints

    def snapshot(self) -> Snapshot:
        """Copies the state as it is now, without waiting."""
        return Snapshot.take(
            self._state,
            metrics_path=self._writer.path,
            metrics_bytes=self._writer.position,
            skip_nonfinite=self._plan.skip_nonfinite,
            wait_for_rounds=self._parts.schedule.is_reproducible,
        )

    def maybe_save(self, snapshot: Snapshot | None, *, due: bool, test_error: float | None, is_last: bool) -> None:
        """Saves a snapshot that is due, or whose test error is the least so far."""
        if snapshot is None:
            return
        is_best = test_error is not None and self._state.step > 0 and test_error < self._checkpoints.best_error
        if due or is_best:
            self._checkpoints.save(snapshot, test_error=test_error, is_last=is_last)

    def stop(self, number: int, snapshot: Snapshot | None) -> None:
        """Ends the run after a signal, with a checkpoint."""
        jax.block_until_ready(self._state.train_state)  # other processes need this one's part of the last step
        try:
            if snapshot:
                self._checkpoints.save(snapshot, is_last=True)
            hint = _resume_hint(self._checkpoints)
        except FolderLostError:
            raise
        except InputError as error:  # of the checkpoint
            hint = str(error)
        raise StoppedError(f"stopped by {signal.Signals(number).name} at step {self._state.step:,}; {hint}", number)


def _resume_hint(checkpoints: Checkpoints | None) -> str:
    """Waits for the checkpoint that is being written."""
    if checkpoints and not jax.process_index():
        checkpoints.wait()
    return diagnosis.resume_hint(checkpoints.steps if checkpoints else [])
