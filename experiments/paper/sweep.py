"""Runs a study: every arm, learning rate and seed, several seeds in one compiled program.

    python -m experiments.paper.sweep --study=fair --data=fashion_mnist --seeds=10 --workdir=runs/paper

Finished runs are skipped, so that the same command resumes a sweep. Where an arm is tuned, all rates run on the first
seeds, and the best rate, by `runs.mean_log_loss`, on all seeds. Several processes may share a workdir if their --arms
differ. Figures and tables: `experiments.paper.figures`, `experiments.paper.table`.
"""

import contextlib
import dataclasses
import itertools
import json
import pathlib
from collections.abc import Iterator

from ml_collections import ConfigDict
from tqdm import tqdm

from experiments.paper import command, runs, studies
from issgd_jax import config as config_lib
from issgd_jax.config import parsers
from issgd_jax.errors import BadScoreError, InputError, NonFiniteLossError
from issgd_jax.run import metrics
from issgd_jax.run import workdir as workdir_lib

_AT_ONCE = parsers.define_optional(
    "at_once", int, "Replicas in one program; None: as memory allows, on a CPU at most 8.", command.FLAGS
)

# Seeds on which the learning rate of an arm is chosen, and those of an arm that only gives context.
TUNING_SEEDS, CONTEXT_SEEDS = 2, 5

Run = tuple[float, int]  # learning rate, seed


def sweep(
    workdir: pathlib.Path,
    *,
    study: str,
    data: str,
    num_seeds: int,
    arms: list[str] | None = None,
    overrides: dict | None = None,
    at_once: int | None = None,
    shown: bool = True,
) -> None:
    """Trains all runs of a study that are not finished.

    Args:
      workdir: of all runs, see `runs.folder_of`.
      study: name of the study.
      data: name of the data set.
      num_seeds: seeds of each arm, fewer for arms that only give context.
      arms: names of the arms; None: all of the study on these data.
      overrides: {config field: value}, in every arm.
      at_once: replicas in one compiled program; None: as memory allows.
      shown: whether a progress bar is shown.

    Raises:
      InputError: an unknown study, data set or arm, fewer than one seed, or a workdir with runs of another experiment.
    """
    chosen = studies.get_study(study).choose_arms(data, arms)
    if not 1 <= num_seeds <= 2**32 or (at_once is not None and at_once < 1):
        raise InputError(f"seeds must be between 1 and 2^32 and at_once >= 1, got {num_seeds} and {at_once}")
    todo = [_ArmSweep(workdir, study, data, name, num_seeds, overrides or {}) for name in chosen]
    for arm in todo:
        arm.check()
    with tqdm(total=sum(arm.num_runs for arm in todo), unit="run", disable=not shown, dynamic_ncols=True) as bar:
        bar.bar_format = "{l_bar}{bar}| {n:.1f}/{total} runs [{elapsed}<{remaining}{postfix}]"
        for arm in todo:
            arm.run(at_once, bar)


@dataclasses.dataclass(frozen=True)
class _ArmSweep:
    """Runs of one arm."""

    workdir: pathlib.Path
    study: str
    data: str
    arm: str
    num_seeds: int
    overrides: dict

    @property
    def rates(self) -> tuple[float, ...]:
        return studies.get_study(self.study).rates(self.arm, self.data)

    @property
    def seeds(self) -> range:
        context = studies.get_study(self.study).arms[self.arm].context
        return range(min(self.num_seeds, CONTEXT_SEEDS) if context else self.num_seeds)

    @property
    def tuning_seeds(self) -> range:
        return self.seeds[:TUNING_SEEDS] if len(self.rates) > 1 else self.seeds

    @property
    def num_runs(self) -> int:
        return len(self.rates) * len(self.tuning_seeds) + len(self.seeds) - len(self.tuning_seeds)

    def config(self, learning_rate: float, seed: int) -> ConfigDict:
        study = studies.get_study(self.study)
        return study.config(self.arm, self.data, overrides=self.overrides, learning_rate=learning_rate, seed=seed)

    def folder(self, learning_rate: float, seed: int) -> pathlib.Path:
        return runs.folder_of(self.workdir, self.study, self.data, self.arm, learning_rate, seed)

    def check(self) -> None:
        """Raises InputError if the config is not valid, or a finished run is of another experiment."""
        for rate, seed in itertools.product(self.rates, self.seeds):
            config = self.config(rate, seed)
            config_lib.validate(config)
            if runs.is_finished(self.folder(rate, seed)):
                runs.check_same(self.folder(rate, seed), config)

    def run(self, at_once: int | None, bar: tqdm) -> None:
        """Tunes the learning rate, then runs the best on all seeds."""
        self._run_all(list(itertools.product(self.rates, self.tuning_seeds)), at_once, bar)
        rest = self.seeds[len(self.tuning_seeds) :]
        if rest:
            best = runs.best_rate(self.workdir, self.study, self.data, self.arm)
            self._run_all([(best, seed) for seed in rest], at_once, bar)

    def _run_all(self, wanted: list[Run], at_once: int | None, bar: tqdm) -> None:
        todo = [run for run in wanted if not runs.is_finished(self.folder(*run))]
        bar.update(len(wanted) - len(todo))
        if not todo:
            return
        at_once = at_once or _replicas_at_once(self.config(*todo[0]))
        for start in range(0, len(todo), at_once):
            group = todo[start : start + at_once]
            bar.set_postfix_str(f"{self.arm}, {_ranges(group)}")
            for fraction in self._train(group):
                bar.update(fraction * len(group))

    def _train(self, group: list[Run]) -> Iterator[float]:
        """Trains a group of runs, writes their files, and yields the fractions done."""
        configs = [self.config(*run) for run in group]
        folders = [self.folder(*run) for run in group]
        if len(group) == 1:
            yield self._train_alone(configs[0], folders[0])
            return
        import jax

        from experiments.paper.replicas import train_replicas

        kinds = {"learner and worker": [device.device_kind for device in jax.local_devices()]}
        num_rows = configs[0].steps // configs[0].eval_every + 1
        with contextlib.ExitStack() as stack:
            writers = []
            for folder, config in zip(folders, configs):
                lock = stack.enter_context(workdir_lib.locked(folder))
                workdir_lib.check(folder, config.to_dict(), overwrite=True)  # that the folder is one of runs
                workdir_lib.clear(folder)
                workdir_lib.write_record(folder, config.to_dict(), kinds)
                writer = metrics.MetricsWriter(folder, tensorboard=False, check_lock=lock.check)
                writers.append(stack.enter_context(writer))
            for rows in train_replicas(configs[0], [(seed, rate) for rate, seed in group]):
                for writer, row in zip(writers, rows):
                    writer.write(row)
                yield 1 / num_rows

    @staticmethod
    def _train_alone(config: ConfigDict, folder: pathlib.Path) -> float:
        from issgd_jax.run.training import train

        try:
            train(config, folder, overwrite=True)
        except (NonFiniteLossError, BadScoreError):
            # The rows that train_replicas yields of such a run: without a loss, up to the end.
            rows = runs.read_rows(folder)
            first = rows[-1]["step"] + config.eval_every if rows else 0
            with open(folder / workdir_lib.METRICS_FILE, "a") as file:
                for step in [*range(first, config.steps, config.eval_every), config.steps]:
                    file.write(json.dumps({"step": step, "train/loss": None}) + "\n")
        return 1.0


def _ranges(group: list[Run]) -> str:
    rates, seeds = sorted({rate for rate, _ in group}), sorted({seed for _, seed in group})
    return f"lr {', '.join(f'{rate:g}' for rate in rates)}, seeds {seeds[0]}–{seeds[-1]}"


def _replicas_at_once(config: ConfigDict) -> int:
    """Returns how many fit into half the memory; on a CPU at most 8, and 1 where more are slower (convolutions).

    Those of a problem of its own are trained one at a time.
    """
    if config.problem is not None:
        return 1
    import jax

    from experiments.paper.replicas import replica_bytes
    from issgd_jax.devices import memory_bytes

    devices = jax.local_devices()
    on_cpu = devices[0].platform == "cpu"
    if on_cpu and config.model.name in ("convnet", "transformer"):
        return 1
    memory = memory_bytes(devices[0]) * (1 if on_cpu else len(devices))
    return max(1, int(min(8 if on_cpu else 64, memory / 2 / replica_bytes(config))))


def main():
    flag = command.FLAGS
    workdir = command.workdir()
    if workdir is None:
        raise InputError("--workdir is missing: name a folder for the runs")
    sweep(
        workdir,
        study=flag.study,
        data=flag.data,
        num_seeds=10 if flag.seeds is None else flag.seeds,
        arms=flag.arms,
        overrides=command.overrides(),
        at_once=_AT_ONCE.value,
    )


if __name__ == "__main__":
    command.run(main)
