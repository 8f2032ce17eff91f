"""Trains with importance sampling and uniformly, over several seeds, and shows what the method gives.

    issgd-jax compare --workdir=runs/digits [--config=FILE.py] [--config.FIELD=VALUE ...]

Leaves a run for each arm and seed, `importance-0`, `uniform-0`, ..., `summary.png` and `report.html` in
workdir.
"""

import contextlib
import math
import pathlib
import statistics
import tempfile
from collections.abc import Iterator

import jax
from absl import app, flags, logging
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict

from issgd_jax import config as config_lib
from issgd_jax import main as main_lib
from issgd_jax import plots
from issgd_jax.config import parsers
from issgd_jax.errors import InputError
from issgd_jax.history import seconds_per_step, steps_of_seeds
from issgd_jax.paths import local_path
from issgd_jax.run import wiring
from issgd_jax.run import workdir as workdir_lib
from issgd_jax.run.training import train
from issgd_jax.task.problem import import_problem
from issgd_jax.view import page
from issgd_jax.view.report import FILE, report
from issgd_jax.view.runs import IMPORTANCE, UNIFORM

_SEEDS = flags.DEFINE_integer("seeds", 1, "Number of seeds; the first is the config's.", lower_bound=1)
_UNIFORM_RATE = parsers.define_optional("uniform_rate", float, "Learning rate of uniform sampling; None: the config's.")
flags.adopt_module_key_flags(main_lib)  # so that --help lists them

Histories = dict[str, list[list[dict]]]
# Of the uniform arm: a gain of 1 changes no rate, and no importance weight is lowered. Where the other arm has evenly
# spaced visits, it has those that plain SGD can have, shuffled epochs.
_PLAIN = {"proposal.name": "uniform", "learner.rate_by_gain": False, "learner.limit": None}
_ROWS = (
    ("final training loss", "train/loss", "{:.5f}"),
    ("training error", "train/error", "{:.2%}"),
    ("test error", "test/error", "{:.2%}"),
    ("√Tr Σ uniform", "variance/uniform", "{:.4f}"),
    ("√Tr Σ actual", "variance/actual", "{:.4f}"),
    ("√Tr Σ ideal", "variance/ideal", "{:.4f}"),
    ("variance gain", "variance/gain", "{:.2f}×"),
    ("examples scored by workers", "worker_examples", "{:,.0f}"),
)


def compare(
    config: ConfigDict, workdir: str | pathlib.Path, *, seeds: int, uniform_rate: float | None, overwrite: bool
) -> Histories:
    """Runs both arms, seed by seed, and writes summary.png and report.html.

    Args:
      config: of the arm with importance sampling.
      workdir: of all runs.
      seeds: number of seeds.
      uniform_rate: learning rate of the uniform arm; None: the config's.
      overwrite: whether runs that are there are replaced.

    Returns:
      {arm: [rows of metrics of each seed]}.

    Raises:
      InputError: the config samples uniformly, or as `issgd_jax.train`.
      MissingExtraError: the library of the report's charts is not installed.
    """
    workdir = local_path(workdir, "workdir")
    page.check()  # before the runs have spent their time
    if not config_lib.samples_by_importance(config):
        raise InputError(
            f"proposal.name is {config.proposal.name} and proposal.when {config.proposal.when}, which draws uniformly: "
            "nothing to compare; choose proportional or calibrated, and on or auto"
        )
    if workdir_lib.holds_run(workdir):
        raise InputError(f"{workdir} holds a run: name a folder for the runs of both arms")
    uniform = config.copy_and_resolve_references()
    with uniform.ignore_type():
        uniform.update_from_flattened_dict(_PLAIN)
        if config_lib.draw_and_limit(config)[0] == "stride":
            uniform.learner.draw = "shuffled"
    if uniform_rate is not None:
        if not 0 < uniform_rate < math.inf:
            raise InputError(f"uniform_rate must be above 0 and finite, got {uniform_rate}")
        if config.problem is not None and import_problem(config.problem).optimizer is not None:
            raise InputError(
                f"uniform_rate has no effect, as {config.problem} has an optimizer of its own: leave one of them out"
            )
        uniform.learner.learning_rate = uniform_rate
    config_lib.validate(uniform)
    runs = []
    for seed in range(config.seed, config.seed + seeds):
        for arm, folder, base in ((IMPORTANCE, "importance", config), (UNIFORM, "uniform", uniform)):
            arm_config = base.copy_and_resolve_references()
            arm_config.seed = seed
            runs.append((arm, workdir / f"{folder}-{seed}", arm_config))
    for _, folder, arm_config in runs:  # before the first has spent its time
        workdir_lib.check(folder, wiring.resolve(arm_config).to_dict(), overwrite=overwrite)
    histories: Histories = {IMPORTANCE: [], UNIFORM: []}
    with _shared_compilation():
        for arm, folder, arm_config in runs:
            histories[arm].append(train(arm_config, folder, overwrite=overwrite))
    task = config.problem or f"{config.data.name}: {config.model.name}"
    title = f"{task}, minibatch {config.learner.batch_size}, {seeds} seed(s)"
    plots.save(plots.summary_figure(histories, title=title), workdir / "summary.png")
    report([folder for _, folder, _ in runs], workdir / FILE)
    return histories


@contextlib.contextmanager
def _shared_compilation() -> Iterator[None]:
    """Lets runs that differ in their seed alone compile once."""
    names = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    previous = {name: getattr(jax.config, name) for name in names}
    with tempfile.TemporaryDirectory() as folder:
        for name, value in zip(names, (previous[names[0]] or folder, 0.0)):
            jax.config.update(name, value)
        try:
            yield
        finally:
            for name, value in previous.items():
                jax.config.update(name, value)
            compilation_cache.reset_cache()  # else what is compiled later is written into the folder that is gone


def table(histories: Histories) -> str:
    """Returns the arms side by side, medians over seeds; first what it took to reach the uniform arm's final loss."""
    target = statistics.median(rows[-1]["train/loss"] for rows in histories[UNIFORM])
    seeds, steps = len(histories[UNIFORM]), histories[UNIFORM][0][-1]["step"]
    columns = [_column(runs, target, is_uniform=arm == UNIFORM) for arm, runs in histories.items()]
    measured = [label for label in columns[0] if any(column[label] != "–" for column in columns)]
    lines = [f"{f'{steps:,} steps, median of {seeds} seed(s)':<44}" + "".join(f"{arm:>22}" for arm in histories)]
    for label in measured:
        lines.append(f"{label:<44}" + "".join(f"{column[label]:>22}" for column in columns))
    return "\n".join(lines)


def _column(runs: list[list[dict]], target: float, *, is_uniform: bool) -> dict[str, str]:
    """Returns {label: text} of one arm."""
    seconds = seconds_per_step(runs)
    reached = statistics.median(steps_of_seeds(target, runs, ends_there=is_uniform))
    column = {
        "steps to uniform's final training loss": f"{reached:,.0f}" if math.isfinite(reached) else "not reached",
        "seconds to it, without compilation": f"{reached * seconds:.2f}" if math.isfinite(reached) else "–",
        "milliseconds of a step": f"{1e3 * seconds:.2f}",
    }
    for label, name, form in _ROWS:
        values = [rows[-1][name] for rows in runs if rows[-1].get(name) is not None]
        column[label] = form.format(statistics.median(values)) if values else "–"
    return column


def main(argv: list[str]) -> None:
    """Compares as the flags say."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}; options begin with --")
    logging.set_verbosity(logging.WARNING)
    workdir = main_lib.workdir()
    histories = compare(
        main_lib.experiment(),
        workdir,
        seeds=_SEEDS.value,
        uniform_rate=_UNIFORM_RATE.value,
        overwrite=flags.FLAGS.overwrite,
    )
    print(f"\n{table(histories)}\n\npicture  {workdir / 'summary.png'}")
    print(f"runs     {workdir}/{{importance,uniform}}-*: metrics.jsonl, TensorBoard events, config.json")
    print(f"report   {workdir / FILE}: open it in a browser")
