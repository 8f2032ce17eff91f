"""The loop: one thread for all devices. It dispatches and does not wait; the loss is read one step late."""

import collections
import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from issgd_jax import learner, metrics, payoff, sampling
from issgd_jax.errors import BadScoreError, NonFiniteLossError
from issgd_jax.proposal import Uniform
from issgd_jax.schedule import Round
from issgd_jax.store import Rejected
from issgd_jax.workers import WorkerPool


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a run is made of; arrays are on the learner's device.

    pool: None without workers. payoff: None to sample by the proposal throughout. measure: `(params, sampler, step) ->
    {metric: number}`. are_norms: whether workers' scores are gradient norms.
    """

    train_state: learner.TrainState
    sampler: learner.SamplerState
    proposal: Any
    pool: WorkerPool | None
    schedule: Any
    payoff: payoff.Payoff | None
    train_step: Callable
    measure: Callable
    train_examples: tuple[jax.Array, jax.Array]
    learner_device: jax.Device
    batch_size: int
    are_norms: bool


@dataclasses.dataclass(frozen=True)
class Plan:
    """steps: learner steps. eval_every: between rows of metrics. window: steps between renewals of the table without
    workers, and between judgements of the payoff. strict: whether a bad score stops the run."""

    steps: int
    eval_every: int
    window: int
    strict: bool
    progress: metrics.Progress


def run(parts: Parts, plan: Plan, writer: metrics.MetricsWriter) -> learner.SamplerState:
    """Trains, writes rows of metrics, and returns the last state of the sampler.

    Raises: NonFiniteLossError if training diverges; BadScoreError if a score is bad and plan.strict is set.
    """
    state, sampler, judged = parts.train_state, parts.sampler, _start(parts)
    in_flight: collections.deque[Round] = collections.deque()
    worker_examples, pending = 0, None
    started, seconds = time.monotonic(), 0.0
    uniform_table = sampling.uniform_table(len(sampler.store))

    def write_row(step):
        drawn_from = sampler if judged.active else sampler._replace(table=uniform_table)
        measured = parts.measure(state.params, drawn_from, _on_learner(parts, step))
        row = {
            "step": step,
            "wall_seconds": time.monotonic() - started,
            "learner_examples": step * parts.batch_size,
            "worker_examples": worker_examples,
        } | measured
        if parts.payoff:
            row |= {
                "payoff/active": int(judged.active),
                "payoff/gain": parts.payoff.gain(judged),
                "payoff/cost": parts.payoff.measured_cost(judged),
            }
        _stop_if_not_finite(measured["train/loss"], "training", step, writer.rows)
        if plan.strict:
            _stop_if_rejected(jax.device_get(sampler.rejected), step)
        writer.write(row)
        plan.progress.measured(row)

    def read(pending, judged):
        if pending is None:
            return judged
        step, step_metrics = pending
        loss, moments = jax.tree.map(float, jax.device_get(step_metrics))
        _stop_if_not_finite(loss, "minibatch", step, writer.rows)
        plan.progress.step(loss)
        return parts.payoff.observe(judged, moments) if parts.payoff else judged

    # A hidden copy to or from the host would make every device wait.
    with jax.transfer_guard("disallow"), plan.progress:
        for step in range(plan.steps):
            begun = time.monotonic()
            if parts.payoff and step and step % plan.window == 0:
                judged, seconds = parts.payoff.end_window(judged, seconds / plan.window), 0.0
            if parts.pool:
                if judged.active:
                    num_rounds = parts.schedule.rounds_to_start(step, len(in_flight))
                    in_flight.extend(parts.pool.score_next(state.params, step, num_rounds))
                while in_flight and parts.schedule.may_enter(in_flight[0], step):
                    round_ = in_flight.popleft()
                    worker_examples += round_.num_examples
                    sampler = _take_in(parts, sampler, round_, step)
            elif judged.active and step % plan.window == 0:
                sampler = learner.renew(parts.proposal, sampler, step=_on_learner(parts, step))
            seconds += time.monotonic() - begun
            if step % plan.eval_every == 0:  # of the very parameters and probabilities that this step draws with
                write_row(step)
            begun = time.monotonic()
            state, sampler, step_metrics = parts.train_step(
                state, sampler, parts.proposal, parts.train_examples, uniform=not judged.active
            )
            judged = read(pending, judged)
            pending = (step, step_metrics)
            seconds += time.monotonic() - begun
        judged = read(pending, judged)
        write_row(plan.steps)
    return sampler


def _start(parts: Parts) -> payoff.State:
    if parts.payoff:
        return parts.payoff.init()
    return payoff.State(active=not isinstance(parts.proposal, Uniform), left=0)


def _on_learner(parts: Parts, step: int) -> jax.Array:
    return jax.device_put(np.int32(step), parts.learner_device)


def _take_in(parts: Parts, sampler: learner.SamplerState, round_: Round, step: int) -> learner.SamplerState:
    indices, scores, scored_at, now = jax.device_put(
        (round_.indices, round_.scores, np.int32(round_.step), np.int32(step)), parts.learner_device
    )
    return learner.take_in(
        parts.proposal, sampler, indices, scores, scored_at=scored_at, step=now, are_norms=parts.are_norms
    )


def _stop_if_not_finite(loss: float, kind: str, step: int, rows: list[dict]) -> None:
    if not math.isfinite(loss):
        last = ", ".join(f"{k} {v:.6g}" for k, v in rows[-1].items() if v is not None) if rows else "none"
        raise NonFiniteLossError(
            f"the {kind} loss is {loss} at step {step}; last good metrics: {last}. Lower "
            f"--config.learner.learning_rate, or bound the importance weights (--config.proposal.name=calibrated with "
            f"uniform_fraction, or more smoothing)"
        )


def _stop_if_rejected(rejected: Rejected, step: int) -> None:
    if rejected.count > 0:
        raise BadScoreError(
            f"{rejected.count} score(s) were NaN, infinite or negative up to step {step}, one of them of training "
            f"example {rejected.index}: mend its data or its loss, or have such scores left out "
            "(--config.workers.strict=False)"
        )
