"""Trains an experiment in a folder, or resumes the run that is there."""

import contextlib
import dataclasses
import functools
import json
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Sequence

import jax
from ml_collections import ConfigDict

from issgd_jax import config as config_lib
from issgd_jax import processes
from issgd_jax.cluster.pool import ClusterPool
from issgd_jax.config import flatten
from issgd_jax.console import say
from issgd_jax.errors import InputError, NonFiniteLossError
from issgd_jax.files import writing
from issgd_jax.paths import local_path
from issgd_jax.provenance import versions
from issgd_jax.run import diagnosis, loop, metrics, pictures, run_state, wiring
from issgd_jax.run import workdir as workdir_lib
from issgd_jax.run import writers as writers_lib
from issgd_jax.run.checkpoint import Checkpoint
from issgd_jax.run.checkpoints import Checkpoints
from issgd_jax.run.progress import Progress
from issgd_jax.run.supervision import Supervision
from issgd_jax.task.problem import Problem, explain_norms

# Fields in which the processes of a learner may differ.
_PROCESS_FIELDS = ("distributed.process_id", "data.dir", "log.", "checkpoint.")


def train(
    config: ConfigDict,
    workdir: str | pathlib.Path,
    *,
    problem: Problem | None = None,
    overwrite: bool = False,
    writers: Sequence[writers_lib.Write] = (),
) -> list[dict]:
    """Trains as the config says and returns the rows of metrics.jsonl.

    A run of the same experiment in workdir is resumed from its newest checkpoint; one that has done all its steps is
    left as it is. Leaves metrics.jsonl, TensorBoard events, config.json, checkpoints, heartbeat.json and, unless
    sampling is uniform, scores.npz. Where the learner spans processes, process 0 alone reads and writes the workdir,
    and sends the others the checkpoint.

    Args:
      config: see `issgd_jax.config.default`.
      workdir: folder of the run, on this machine; `~` is expanded; created if it is missing.
      problem: model, loss, data and optimiser of the caller's own; None: those of the config.
      overwrite: whether a run that is there is replaced.
      writers: functions `(step, row)` that get every row as it is measured, {name: number, None or list of numbers};
        their errors are logged and stop nothing. Libraries are named by `log.writers`.

    Guarantees:
      With the exact and the relaxed schedule and on the same hardware, a run that was stopped and resumed equals, bit
      by bit, one that never stopped; but where `proposal.when` is auto, and decides by the cost of a step that it
      measures, not by `proposal.cost`.

    Raises:
      InputError: before anything is compiled or written, if a value cannot work, or workdir holds another experiment
        or is in use.
      MissingExtraError: a library of `log.writers` is not installed.
      NonFiniteLossError: training diverges.
      BadScoreError: a score is bad and workers.strict is set.
      StoppedError: after a signal, to whichever process, with a checkpoint.
      ProcessLostError: another process is gone.

    Example:
      >>> import tempfile, issgd_jax
      >>> config = issgd_jax.config.default()
      >>> config.steps, config.eval_every, config.workers.chunk_size, config.log.progress = 20, 10, 256, False
      >>> config.schedule.score_delay = 10
      >>> rows = train(config, tempfile.mkdtemp(), writers=[lambda step, row: print(step, row["learner_examples"])])
      0 0
      10 1280
      20 2560
      >>> [row["step"] for row in rows]
      [0, 10, 20]
    """
    workdir = local_path(workdir, "workdir")
    if not overwrite and (rows := _finished(wiring.resolve(config, problem), workdir)):
        return rows
    with processes.noticing_loss():
        prepared = wiring.prepare(config, problem)
        if processes.is_first():
            return _train_in(workdir, prepared, overwrite, writers)
        with jax.default_device(prepared.roles.learner), tempfile.TemporaryDirectory() as folder:
            return _train(_without_files(prepared), pathlib.Path(folder), None, (), check_lock=lambda: None)


def _finished(config: ConfigDict, workdir: pathlib.Path) -> list[dict] | None:
    """Returns the rows of a run that has done all its steps, and logs it; None if something is left to do.

    Loads no data and compiles nothing. The processes of a distributed run must all take the same way: they resume.
    """
    if config.distributed.coordinator or workdir_lib.last_step(workdir) != config.steps:
        return None
    record = workdir_lib.check(workdir, config.to_dict(), overwrite=False, is_done=True)
    has_checkpoints = record is None or flatten(record["config"]).get("checkpoint.every_steps") != 0
    folder = workdir / workdir_lib.CHECKPOINTS
    with (
        workdir_lib.locked(workdir) as lock,
        Checkpoints(folder, check_lock=lock.check, **config.checkpoint) as checkpoints,
    ):
        if has_checkpoints and not checkpoints.is_intact(config.steps):
            return None
        if config_lib.samples_by_importance(config) and not (workdir / workdir_lib.SCORES_FILE).is_file():
            return None
        path = workdir / workdir_lib.METRICS_FILE
        if metrics.missing_rows(path, path.stat().st_size):
            return None
        rows = metrics.read_metrics(path)
    can_go_on = config.learner.lr_schedule == "constant" and has_checkpoints
    raised = "raise --config.steps to continue, or " if can_go_on else ""
    say(f"the run in {workdir} has done its {config.steps:,} steps: {raised}start again with --overwrite")
    return rows


def _without_files(prepared: wiring.Prepared) -> wiring.Prepared:
    """Returns the run of a process that leaves nothing behind."""
    config = prepared.config.copy_and_resolve_references()
    config.log.progress = config.log.tensorboard = False
    config.checkpoint.every_steps = 0
    return dataclasses.replace(prepared, config=config)


def _train_in(
    workdir: pathlib.Path, prepared: wiring.Prepared, overwrite: bool, functions: Sequence[writers_lib.Write]
) -> list[dict]:
    config = prepared.config
    writers_lib.check(config.log.writers, functions)
    if config.log.tensorboard_images:
        pictures.check(prepared.problem)
    fields = config.to_dict()
    workdir_lib.check(workdir, fields, overwrite=overwrite)
    with (
        jax.default_device(prepared.roles.learner),
        prepared.pool or contextlib.nullcontext(),
        workdir_lib.locked(workdir) as lock,
    ):
        if config.log.explain:
            print(explain_norms(prepared.problem))
        record = workdir_lib.check(workdir, fields, overwrite=overwrite)  # locked now: no other program can change it
        with writing(lock.folder):
            lock.check()
        if record is None:
            workdir_lib.clear(lock.folder)
        workdir_lib.clear_leftovers(lock.folder)
        with writers_lib.opened(config.log.writers, functions, lock.folder, flatten(config)) as writers:
            return _train(prepared, lock.folder, record, writers, check_lock=lock.check)


def _train(
    prepared: wiring.Prepared,
    workdir: pathlib.Path,
    record: dict | None,
    writers: Sequence[writers_lib.Writer],
    *,
    check_lock: Callable[[], None],
) -> list[dict]:
    """Trains in a locked folder.

    Args:
      prepared: the run.
      workdir: folder of the run.
      record: content of config.json of the run to resume; None: a new one starts.
      writers: that get every row of metrics.
      check_lock: see `workdir.Lock.check`; called before anything is written.
    """
    config, roles = prepared.config, prepared.roles
    workers = prepared.pool.device_kinds if prepared.pool else []
    about = {
        "devices": {"learner": [device.device_kind for device in roles.learners], "workers": workers},
        "versions": versions(),
    }
    with contextlib.ExitStack() as stack:
        folder = workdir / workdir_lib.CHECKPOINTS
        checkpoints = Checkpoints(folder, about=about, check_lock=check_lock, **config.checkpoint)
        stack.enter_context(checkpoints)
        checkpoint = _from_first(_newest(checkpoints, workdir, config, about) if record else None, config)
        resumed = record if checkpoint else None
        checkpoints.record = workdir_lib.write_record(workdir, config.to_dict(), about["devices"], resumed)
        scores_file = workdir / workdir_lib.SCORES_FILE
        with writing(scores_file):
            check_lock()
            scores_file.unlink(missing_ok=True)  # of an earlier end, which is none any more
        status = prepared.pool.status if isinstance(prepared.pool, ClusterPool) else None
        first_step = checkpoint.state["step"] if checkpoint else 0
        watch = stack.enter_context(
            Supervision(
                workdir,
                first_step=first_step,
                watchdog_seconds=config.watchdog_seconds,
                cluster_status=status,
                check_lock=check_lock,
                is_starting=config.distributed.coordinator is None,  # the others would wait for this process
            )
        )
        progress = Progress(
            config.steps, shown=config.log.progress, description=workdir.resolve().name, start=first_step
        )
        plan = loop.Plan(
            steps=config.steps,
            eval_every=config.eval_every,
            strict=config.workers.strict,
            skip_nonfinite=config.on_nonfinite == "skip",
            progress=stack.enter_context(progress),
        )
        stack.enter_context(_noticing_compilations(progress.compiled))
        parts = wiring.build(prepared)
        state = loop.start(parts)
        if checkpoint:
            state = run_state.restore(checkpoint, state, roles.placement, moments=parts.payoff is not None)
        position = checkpoint.state["metrics_bytes"] if record and checkpoint else 0
        source = prepared.problem.source("train")
        writer = metrics.MetricsWriter(
            workdir,
            tensorboard=config.log.tensorboard,
            picture=functools.partial(pictures.png, source) if config.log.tensorboard_images else None,
            writers=writers,
            position=position,
            check_lock=check_lock,
        )
        with writer:
            progress.measured(writer.last or {})
            try:
                sampler_state = loop.run(
                    parts,
                    plan,
                    writer,
                    state=state,
                    checkpoints=checkpoints if config.checkpoint.every_steps else None,
                    watch=watch,
                )
            except NonFiniteLossError as error:
                diagnosis.write_minibatch(error, workdir / workdir_lib.NONFINITE_FILE, check_lock)
                raise
        if config_lib.samples_by_importance(config):
            with writing(scores_file):
                check_lock()
                sampler_state.store.save(scores_file, times_drawn=sampler_state.times_drawn)
        return metrics.read_metrics(workdir / workdir_lib.METRICS_FILE)


@contextlib.contextmanager
def _noticing_compilations(notice: Callable[[], None]) -> Iterator[None]:
    """Calls `notice` after every compilation."""

    def listen(event: str, duration: float, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            notice()

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def _newest(checkpoints: Checkpoints, workdir: pathlib.Path, config: ConfigDict, about: dict) -> Checkpoint | None:
    """Returns the checkpoint to resume from, and logs it; None if the run was stopped before the first."""
    checkpoint = checkpoints.newest(functools.partial(_missing_rows, workdir, about))
    if checkpoint is None:
        say("the run here was stopped before its first checkpoint: it starts again")
        return None
    step = checkpoint.state["step"]
    if step > config.steps:
        raise InputError(
            f"steps is {config.steps:,}, but the run in workdir has done {step:,}: raise it, or start again with "
            "--overwrite"
        )
    changed = " and ".join(name for name in about if checkpoint.state[name] != about[name])
    not_equal = f"; {changed} have changed, so that the numbers will not be bit-equal" if changed else ""
    say(f"resumes from the checkpoint of step {step:,} of {config.steps:,}{not_equal}")
    return checkpoint


def _missing_rows(workdir: pathlib.Path, about: dict, state: dict) -> str | None:
    """Says why a run had better not resume from a checkpoint: rows that were written before it are lost.

    Raises:
      InputError: the state has other fields than this version's.
    """
    run_state.check_fields(state, {*about, "test_error"})
    return metrics.missing_rows(workdir / workdir_lib.METRICS_FILE, state["metrics_bytes"])


def _from_first(checkpoint: Checkpoint | None, config: ConfigDict) -> Checkpoint | None:
    """Returns, in all processes, the checkpoint of process 0; raises InputError if their configs differ."""
    fields = json.loads(json.dumps(flatten(config)))
    arrays = checkpoint.arrays if checkpoint else {}
    (first, state), arrays = processes.from_first((fields, checkpoint and checkpoint.state), arrays)
    different = [
        f"{name} is {fields[name]!r}, there {first[name]!r}"
        for name in fields
        if fields[name] != first[name] and not name.startswith(_PROCESS_FIELDS)
    ]
    if different:
        raise InputError(f"this process runs another config than process 0: {', '.join(different)}")
    return Checkpoint(arrays, state) if state else None
