"""The loop: one thread for all devices. It dispatches and does not wait; the loss is read one step late."""

import collections
import dataclasses
import math
import signal
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from issgd_jax import sampling
from issgd_jax.cluster.pool import ClusterPool
from issgd_jax.console import say
from issgd_jax.devices import one_copy, put
from issgd_jax.errors import BadScoreError, NonFiniteLossError, StoppedError, brief
from issgd_jax.learning import learner, payoff
from issgd_jax.run import metrics, supervision
from issgd_jax.run.checkpoint import Checkpoints
from issgd_jax.run.run_state import RunState, snapshot
from issgd_jax.run.supervision import Supervision
from issgd_jax.sampling.proposal import Uniform
from issgd_jax.sampling.store import Rejected
from issgd_jax.scoring.schedule import Round
from issgd_jax.scoring.workers import WorkerPool

# Rounds lost one after the other, after which the workers are given up.
MAX_FAILED_ROUNDS = 3


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a run is made of; arrays are on the learner's device, or whole on each of its devices, of all processes.

    pool: None without workers. payoff: None to sample by the proposal throughout. draw_uniform: `step -> Draw`, what a
    step with uniform draws has drawn. measure: `(params, sampler, step) -> {metric: number}`, on the learner's
    first device. placement: where the learner's arrays are. agree: the largest of the numbers that processes pass, see
    `processes.agreement`. are_norms: whether workers' scores are gradient norms.
    """

    train_state: learner.TrainState
    sampler: learner.SamplerState
    proposal: Any
    pool: WorkerPool | ClusterPool | None
    schedule: Any
    payoff: payoff.Payoff | None
    train_step: Callable
    draw_uniform: Callable
    measure: Callable
    train_examples: tuple[jax.Array, jax.Array]
    learner_device: jax.Device
    placement: jax.Device | Sharding
    agree: Callable[[int], int]
    batch_size: int
    are_norms: bool


@dataclasses.dataclass(frozen=True)
class Plan:
    """steps: learner steps. eval_every: between rows of metrics. window: steps between renewals of the table, unless
    rounds that enter at steps of their own renew it; and between judgements of the payoff. strict: whether a bad score
    stops the run. skip_nonfinite: whether an update that is not finite is left out, and does not stop the run."""

    steps: int
    eval_every: int
    window: int
    strict: bool
    progress: metrics.Progress
    skip_nonfinite: bool = False


def start(parts: Parts) -> RunState:
    """The state before the first step."""
    judged = payoff.State(active=not isinstance(parts.proposal, Uniform), left=0)
    if parts.payoff:
        judged = parts.payoff.init()
    place = parts.pool.place if parts.pool else None
    return RunState(parts.train_state, parts.sampler, judged, place=place)


def run(
    parts: Parts,
    plan: Plan,
    writer: metrics.MetricsWriter,
    *,
    state: RunState | None = None,
    checkpoints: Checkpoints | None = None,
    watch: Supervision | None = None,
) -> learner.SamplerState:
    """Trains, writes rows of metrics and checkpoints, and returns the last state of the sampler.

    state: where to go on; None = at the start.

    Raises: NonFiniteLossError if training diverges; BadScoreError if a score is bad and plan.strict is set;
      StoppedError after a signal.
    """
    the_run = _Run(parts, plan, writer, state or start(parts), checkpoints)
    # A hidden copy to or from the host would make every device wait.
    with jax.transfer_guard("disallow"), plan.progress:
        first = the_run.state.step
        for step in range(first, plan.steps + 1):
            the_run.state.step = step
            ends = step == plan.steps
            measured = ends or step % plan.eval_every == 0
            stopped_by = None
            if watch:
                watch.finished(step)
                stopped_by = parts.agree(watch.signal or 0)
            due = checkpoints is not None and step > first and (ends or checkpoints.is_due(step))
            if checkpoints and (due or measured or stopped_by):
                the_run.hold()
            if stopped_by and not ends:
                the_run.stop(stopped_by)
            if ends:
                the_run.read_pending()
            else:
                the_run.score()
            if measured:  # of the very parameters and probabilities that this step draws with
                the_run.measure()
            the_run.save_if(due)
            if not ends:
                the_run.learn()
    if checkpoints:
        checkpoints.wait()
    return the_run.state.sampler


class _Run:
    """A run and what is done in each of its steps."""

    def __init__(self, parts: Parts, plan: Plan, writer: metrics.MetricsWriter, state: RunState, checkpoints):
        self.parts, self.plan, self.writer, self.state, self.checkpoints = parts, plan, writer, state, checkpoints
        self._pool = parts.pool
        if self._pool:
            self._pool.go_to(state.place)
        self._failed_in_a_row = 0
        self._began = time.monotonic() - state.wall_seconds
        self._uniform_table = sampling.uniform_table(len(state.sampler.store))
        self._held: Callable | None = None
        self._test_error: float | None = None

    def score(self) -> None:
        """What happens between two steps: the payoff is judged, rounds start and enter, the table is made anew."""
        state, parts, begun = self.state, self.parts, time.monotonic()
        if parts.payoff and state.step and state.step % self.plan.window == 0:
            state.judged = parts.payoff.end_window(state.judged, state.window_seconds / self.plan.window)
            state.window_seconds = 0.0
        if self._pool:
            self._start_rounds()
            # One that is late must not hold up those behind it.
            entering = [round_ for round_ in state.in_flight if parts.schedule.may_enter(round_, state.step)]
            state.in_flight = collections.deque(round_ for round_ in state.in_flight if round_ not in entering)
            # With rounds at every step, to make the table anew each time would be most of the work.
            renewing = parts.schedule.is_reproducible or self._is_table_old
            for round_ in entering:
                self._enter(round_, renewing=renewing and round_ is entering[-1])
        if state.judged.active and self._is_table_old:  # no workers, or they bring nothing: scores age all the same
            state.sampler = learner.renew(parts.proposal, state.sampler, step=self._on_learner(state.step))
            state.renewed = state.step
        state.window_seconds += time.monotonic() - begun

    @property
    def _is_table_old(self) -> bool:
        return self.state.step - self.state.renewed >= self.plan.window

    def _start_rounds(self) -> None:
        state = self.state
        if not state.judged.active:
            return
        num_rounds = self.parts.schedule.rounds_to_start(state.step, len(state.in_flight))
        if num_rounds == 0:
            return
        try:
            params = one_copy(state.train_state.params)
            state.in_flight.extend(self._pool.score_next(params, state.step, num_rounds))
        except jax.errors.JaxRuntimeError as error:
            self._round_failed(error)
        if self._pool:
            state.place = self._pool.place

    def _enter(self, round_: Round, *, renewing: bool) -> None:
        """renewing: whether the table of all examples is then made anew."""
        state, parts = self.state, self.parts
        try:
            # What failed on a worker must not reach the learner's arrays.
            jax.block_until_ready((round_.indices, round_.scores))
        except jax.errors.JaxRuntimeError as error:
            self._round_failed(error)
            return
        self._failed_in_a_row = 0
        state.worker_examples += round_.num_examples
        indices, scores = one_copy((round_.indices, round_.scores))
        indices, scores, scored_at, now = put(
            (indices, scores, np.int32(round_.step), np.int32(state.step)), parts.placement
        )
        state.sampler = learner.take_in(
            parts.proposal,
            state.sampler,
            indices,
            scores,
            scored_at=scored_at,
            step=now,
            are_norms=parts.are_norms,
            renewing=renewing,
        )
        if renewing:
            state.renewed = state.step

    def _round_failed(self, error: Exception) -> None:
        if jax.process_count() > 1:  # the others know nothing of it, and would take another way
            raise error
        self.state.failed_rounds += 1
        self._failed_in_a_row += 1
        step, reason = self.state.step, brief(error)
        say(f"a round of scoring is lost at step {step:,}, training goes on with older scores: {reason}")
        if self._failed_in_a_row == MAX_FAILED_ROUNDS:
            say(f"{MAX_FAILED_ROUNDS} rounds are lost one after the other: training goes on without workers")
            self._pool = None
            self.state.in_flight.clear()

    def learn(self) -> None:
        """One step; the loss of the one before is read meanwhile."""
        state, parts, begun = self.state, self.parts, time.monotonic()
        state.train_state, state.sampler, step_metrics = parts.train_step(
            state.train_state, state.sampler, parts.proposal, parts.train_examples, uniform=not state.judged.active
        )
        self.read_pending()
        state.pending = state.step, step_metrics
        state.window_seconds += time.monotonic() - begun

    def read_pending(self) -> None:
        """Reads the metrics of the step before."""
        state = self.state
        if state.pending is None:
            return
        step, step_metrics = state.pending
        state.pending = None
        loss, moments = jax.tree.map(float, jax.device_get((step_metrics.loss, step_metrics.moments)))
        if math.isfinite(loss):
            self.plan.progress.step(loss)
            if self.parts.payoff:
                state.judged = self.parts.payoff.observe(state.judged, moments)
        elif self.plan.skip_nonfinite:
            state.skipped += 1
            self.plan.progress.step(loss)
            if state.skipped & (state.skipped - 1) == 0:  # the 1st, 2nd, 4th, ...
                say(f"the update of step {step:,} is not finite and left out, {state.skipped:,} so far")
        else:
            self._stop_at_nonfinite(step, step_metrics.minibatch)

    def measure(self) -> None:
        """Writes a row of metrics."""
        state, parts = self.state, self.parts
        drawn_from = state.sampler if state.judged.active else state.sampler._replace(table=self._uniform_table)
        measured = parts.measure(*one_copy((state.train_state.params, drawn_from, self._on_learner(state.step))))
        row = {
            "step": state.step,
            "wall_seconds": time.monotonic() - self._began,
            "learner_examples": state.step * parts.batch_size,
            "worker_examples": state.worker_examples,
            "failed_rounds": state.failed_rounds,
            "skipped_updates": state.skipped,
        } | measured
        if parts.payoff:
            row |= {
                "payoff/active": int(state.judged.active),
                "payoff/gain": parts.payoff.gain(state.judged),
                "payoff/cost": parts.payoff.measured_cost(state.judged),
            }
        row["memory/resident_bytes"] = supervision.resident_bytes()
        if in_use := (parts.learner_device.memory_stats() or {}).get("bytes_in_use"):
            row["memory/learner_bytes"] = in_use
        if not math.isfinite(measured["train/loss"]) and not self.plan.skip_nonfinite:
            raise NonFiniteLossError(self._not_finite("training loss", state.step))
        if self.plan.strict:
            _stop_if_rejected(jax.device_get(state.sampler.rejected), state.step)
        self.writer.write(row)
        self.plan.progress.measured(row)
        self._test_error = measured.get("test/error")

    def hold(self) -> None:
        """Keeps the state as it is now, should a checkpoint be made of it."""
        self.state.wall_seconds = time.monotonic() - self._began
        make = snapshot(
            self.state,
            skipping=self.plan.skip_nonfinite,
            waiting=self.parts.schedule.is_reproducible,
            metrics_bytes=self.writer.position,
        )
        writer = self.writer

        def make_after_metrics():
            writer.to_disk()
            return make()

        self._held, self._test_error = make_after_metrics, None

    def save_if(self, due: bool) -> None:
        """Makes a checkpoint of what is held, if it is due, or the best so far by test error."""
        if not self._held:
            return
        step, error = self.state.step, self._test_error
        if due or (step > 0 and error is not None and error < self.checkpoints.best_error):
            self.checkpoints.save(step, self._held, test_error=error)
        self._held = None

    def stop(self, number: int) -> None:
        """Ends the run with a checkpoint of what is held."""
        jax.block_until_ready(self.state.train_state)  # other processes need this one's part of the last step
        if self._held:
            self.checkpoints.save(self.state.step, self._held)
            self.checkpoints.wait()
        name = signal.Signals(number).name
        raise StoppedError(f"stopped by {name} at step {self.state.step:,}; {self._where_to_go_on()}", number)

    def _stop_at_nonfinite(self, step: int, minibatch: learner.Minibatch | None) -> None:
        """Names the examples, those first whose loss is not finite."""
        message = self._not_finite("minibatch loss or gradient", step)
        before = max(0, step - 1)
        drawn = {"step": step, **(_lists(minibatch) if minibatch else self._uniformly_drawn(step))}
        if not minibatch:
            drawn["before"] = {"step": before, **self._uniformly_drawn(before)}
            message += f". Uniform steps are not asked for their gradient: the fault may be that of step {before}"
        losses = drawn.get("losses", [0.0] * len(drawn["indices"]))
        rows = sorted(
            zip(drawn["indices"], drawn["importance_weights"], losses),
            key=lambda row: (math.isfinite(row[2]), -row[1] * row[2]),
        )
        worst = ", ".join(f"{index} ({importance_weight:.3g})" for index, importance_weight, _ in rows[:5])
        more = ", …" if len(rows) > 5 else ""
        raise NonFiniteLossError(f"{message}. Its examples (importance weights): {worst}{more}", drawn)

    def _uniformly_drawn(self, step: int) -> dict[str, list]:
        return _lists(self.parts.draw_uniform(self._on_learner(step)))

    def _not_finite(self, what: str, step: int) -> str:
        row = self.writer.last
        last = ", ".join(f"{k} {v:.6g}" for k, v in row.items() if v is not None) if row else "none"
        return (
            f"the {what} is not finite at step {step}; last good metrics: {last}. Lower "
            f"--config.learner.learning_rate, or bound the importance weights (--config.proposal.name=calibrated with "
            f"uniform_fraction, or more smoothing), or leave such updates out (--config.on_nonfinite=skip, which is "
            f"biased); {self._where_to_go_on()}"
        )

    def _where_to_go_on(self) -> str:
        if jax.process_index():
            return "process 0 has the checkpoints"
        if self.checkpoints:
            self.checkpoints.wait()
        steps = self.checkpoints.steps if self.checkpoints else []
        if not steps:
            return "there is no checkpoint"
        return f"the same command goes on from the checkpoint of step {steps[-1]:,}"

    def _on_learner(self, step: int) -> jax.Array:
        return put(np.int32(step), self.parts.placement)


def _lists(minibatch) -> dict[str, list]:
    return {name: x.tolist() for name, x in jax.device_get(minibatch)._asdict().items()}


def _stop_if_rejected(rejected: Rejected, step: int) -> None:
    if rejected.count > 0:
        raise BadScoreError(
            f"{rejected.count} score(s) were NaN, infinite or negative up to step {step}, one of them of training "
            f"example {rejected.index}: mend its data or its loss, or have such scores left out "
            "(--config.workers.strict=False)"
        )
