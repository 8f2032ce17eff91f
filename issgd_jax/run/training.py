"""Trains an experiment in a folder, or goes on with the run that lies there."""

import contextlib
import dataclasses
import json
import math
import pathlib
import tempfile

import jax
from ml_collections import ConfigDict

from issgd_jax import processes
from issgd_jax.config import flatten
from issgd_jax.console import say
from issgd_jax.errors import InputError, NonFiniteLossError
from issgd_jax.files import write_text_atomically
from issgd_jax.provenance import versions
from issgd_jax.run import loop, metrics, run_state, wiring
from issgd_jax.run import workdir as workdir_lib
from issgd_jax.run.checkpoint import Checkpoint, Checkpoints
from issgd_jax.run.supervision import Supervision
from issgd_jax.task.problem import explain_norms

# Fields in which the processes of a learner may differ.
_OWN = ("distributed.process_id", "data.dir", "log.", "checkpoint.")


def train(config: ConfigDict, workdir: str | pathlib.Path, *, overwrite: bool = False) -> list[dict]:
    """Trains as the config says and returns the history, the rows of metrics.jsonl.

    A run of the same experiment that lies in workdir goes on from its newest checkpoint: with the exact and the relaxed
    schedule and on the same hardware, bit by bit as if it had never stopped. Leaves metrics.jsonl, TensorBoard events,
    config.json, checkpoints, heartbeat.json and, unless sampling is uniform, scores.npz. Where the learner spans
    processes, process 0 alone reads and writes the workdir, and tells the others where to go on.

    Raises: InputError before anything is compiled or written, if a value cannot work, or workdir holds another
      experiment or is in use; NonFiniteLossError if training diverges; BadScoreError if a score is bad and
      workers.strict is set; StoppedError after a signal, to whichever process, with a checkpoint made;
      ProcessLostError if another process is gone.
    """
    with processes.noticing_loss():
        prepared = wiring.prepare(config)
        if processes.is_first():
            return _train_in(workdir, prepared, overwrite)
        with jax.default_device(prepared.roles.learner), tempfile.TemporaryDirectory() as folder:
            return _train(_without_traces(prepared), pathlib.Path(folder), None)


def _without_traces(prepared: wiring.Prepared) -> wiring.Prepared:
    """For a process whose folder goes with it."""
    config = prepared.config.copy_and_resolve_references()
    config.log.progress = config.log.tensorboard = False
    config.checkpoint.every_steps = 0
    return dataclasses.replace(prepared, config=config)


def _train_in(workdir: str | pathlib.Path, prepared: wiring.Prepared, overwrite: bool) -> list[dict]:
    config = prepared.config
    asked_for = prepared.config.to_dict()
    workdir_lib.check(workdir, asked_for, overwrite=overwrite)
    with (
        jax.default_device(prepared.roles.learner),
        prepared.pool or contextlib.nullcontext(),
        workdir_lib.locked(workdir) as folder,
    ):
        if config.log.explain:
            print(explain_norms(prepared.problem))
        before = workdir_lib.check(workdir, asked_for, overwrite=overwrite)  # nobody else can change it any more
        if before is None:
            workdir_lib.clear(folder)
        return _train(prepared, folder, before)


def _train(prepared: wiring.Prepared, workdir: pathlib.Path, before: dict | None) -> list[dict]:
    """before: the record of the run that goes on."""
    config, roles = prepared.config, prepared.roles
    workers = prepared.pool.device_kinds if prepared.pool else []
    devices = {"learner": [device.device_kind for device in roles.learners], "workers": workers}
    with contextlib.ExitStack() as stack:
        about = {"devices": devices, "versions": versions()}
        folder = workdir / workdir_lib.CHECKPOINTS
        checkpoints = stack.enter_context(Checkpoints(folder, about=about, **config.checkpoint))
        found = checkpoints.newest(lambda state: _hindrance(state, workdir)) if before else None
        if found:
            _tell_of_resuming(found.state, config.steps, about)
        elif before:
            say("the run here was stopped before its first checkpoint: it begins anew")
        found = _of_first(found, config)
        workdir_lib.write_record(workdir, config.to_dict(), devices, before if found else None)
        watch = stack.enter_context(Supervision(workdir, watchdog_seconds=config.watchdog_seconds))

        parts = wiring.build(prepared)
        state = loop.start(parts)
        if found:
            state = run_state.restore(found, state, roles.placement, moments=parts.payoff is not None)
        plan = loop.Plan(
            steps=config.steps,
            eval_every=config.eval_every,
            window=config.schedule.steps_per_round,
            strict=config.workers.strict,
            skip_nonfinite=config.on_nonfinite == "skip",
            progress=metrics.Progress(
                config.steps, shown=config.log.progress, description=config.proposal.name, start=state.step
            ),
        )
        position = found.state["metrics_bytes"] if before and found else 0
        with metrics.MetricsWriter(workdir, tensorboard=config.log.tensorboard, position=position) as writer:
            try:
                sampler = loop.run(
                    parts,
                    plan,
                    writer,
                    state=state,
                    checkpoints=checkpoints if config.checkpoint.every_steps else None,
                    watch=watch,
                )
            except NonFiniteLossError as error:
                _keep_minibatch(error, workdir / workdir_lib.NONFINITE_FILE)
                raise
        if config.proposal.name != "uniform":
            path = workdir / workdir_lib.SCORES_FILE
            with workdir_lib.writing(path):
                sampler.store.save(path)
        return metrics.read_metrics(workdir / workdir_lib.METRICS_FILE)


def _of_first(found: Checkpoint | None, config: ConfigDict) -> Checkpoint | None:
    """The checkpoint that process 0 goes on from, in all processes; the others must run the same config."""
    mine = json.loads(json.dumps(flatten(config)))
    (first, state), arrays = processes.from_first((mine, found and found.state), found.arrays if found else {})
    differ = [f"{name} is {mine[name]!r}, there {first[name]!r}" for name in mine if mine[name] != first[name]]
    if differ := [text for text in differ if not text.startswith(_OWN)]:
        raise InputError(f"this process runs another config than process 0: {', '.join(differ)}")
    return Checkpoint(arrays, state) if state else None


def _keep_minibatch(error: NonFiniteLossError, path: pathlib.Path) -> None:
    if error.batch:
        try:
            # JSON has no word for NaN.
            kept = {name: _as_text(x) if name == "losses" else x for name, x in error.batch.items()}
            write_text_atomically(path, json.dumps(kept) + "\n")
        except OSError as problem:  # the error itself matters more
            say(f"{path} cannot be written: {problem}")


def _as_text(losses: list[float]) -> list[float | str]:
    return [loss if math.isfinite(loss) else str(loss) for loss in losses]


def _hindrance(state: dict, workdir: pathlib.Path) -> str | None:
    """Why a run cannot go on from a checkpoint, if it cannot: the rows that were measured before it must be there."""
    path = workdir / workdir_lib.METRICS_FILE
    found = path.stat().st_size if path.is_file() else 0
    if found < state["metrics_bytes"]:
        return f"{path} has {found:,} bytes and had {state['metrics_bytes']:,}"
    return None


def _tell_of_resuming(state: dict, steps: int, about: dict) -> None:
    if state["step"] > steps:
        raise InputError(
            f"steps is {steps:,}, but the run in workdir has done {state['step']:,}: raise it, or begin anew with "
            "--overwrite"
        )
    differ = " and ".join(name for name in about if state[name] != about[name])
    not_equal = f"; {differ} differ from before, so that the numbers will not be bit-equal" if differ else ""
    say(f"goes on from the checkpoint of step {state['step']:,} of {steps:,}{not_equal}")
