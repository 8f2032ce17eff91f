"""Trains one experiment twice, with importance sampling and uniformly, from the same seed, and shows both side by side.

    python -m experiments.compare --config=experiments/configs/digits.py --workdir=runs/digits [--config.a.b=value ...]

Leaves two runs, `importance/` and `uniform/`, and `summary.png` in workdir.
"""

import pathlib
import sys

from absl import app, flags, logging
from ml_collections import ConfigDict

from issgd_jax import main as main_lib
from issgd_jax import plots
from issgd_jax.errors import InputError
from issgd_jax.run import workdir as workdir_lib
from issgd_jax.run.training import train

_ROWS = (
    ("training loss", "train/loss", "{:.5f}"),
    ("training error", "train/error", "{:.2%}"),
    ("test error", "test/error", "{:.2%}"),
    ("√Tr Σ uniform", "variance/uniform", "{:.4f}"),
    ("√Tr Σ actual", "variance/actual", "{:.4f}"),
    ("√Tr Σ ideal", "variance/ideal", "{:.4f}"),
    ("variance gain", "variance/gain", "{:.2f}×"),
    ("learner examples", "learner_examples", "{:,}"),
    ("examples scored by workers", "worker_examples", "{:,}"),
    ("seconds", "wall_seconds", "{:.1f}"),
)


def compare(config: ConfigDict, workdir: pathlib.Path, *, overwrite: bool) -> dict[str, list[dict]]:
    """Runs both arms and writes summary.png; returns {arm: history}, importance sampling first.

    Raises: InputError if the config is of uniform sampling already, and as `issgd_jax.train`.
    """
    if config.proposal.name == "uniform":
        raise InputError("proposal.name is uniform: nothing to compare; choose proportional or calibrated")
    arms = {"importance": config, "uniform": config.copy_and_resolve_references()}
    arms["uniform"].proposal.name = "uniform"
    for arm, arm_config in arms.items():  # before the first has spent its time
        workdir_lib.check(workdir / arm, arm_config.to_dict(), overwrite=overwrite)
    histories = {arm: train(arm_config, workdir / arm, overwrite=overwrite) for arm, arm_config in arms.items()}
    labels = {"importance sampling": histories["importance"], "uniform (SGD)": histories["uniform"]}
    title = f"{config.data.name}: {config.model.name}, minibatch {config.learner.batch_size}, seed {config.seed}"
    plots.save(plots.summary_figure(labels, title=title), workdir / "summary.png")
    return histories


def table(histories: dict[str, list[dict]]) -> str:
    """The last row of each history, side by side."""
    last = [rows[-1] for rows in histories.values()]
    lines = [f"{'after ' + format(last[0]['step'], ',') + ' steps':<28}" + "".join(f"{arm:>14}" for arm in histories)]
    for label, name, form in _ROWS:
        cells = (form.format(row[name]) if row.get(name) is not None else "–" for row in last)
        lines.append(f"{label:<28}" + "".join(f"{cell:>14}" for cell in cells))
    return "\n".join(lines)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}; options begin with --")
    logging.set_verbosity(logging.WARNING)
    workdir = pathlib.Path(flags.FLAGS.workdir)
    histories = compare(flags.FLAGS.config, workdir, overwrite=flags.FLAGS.overwrite)
    print(f"\n{table(histories)}\n\npicture  {workdir / 'summary.png'}", file=sys.stdout)
    print(f"runs     {workdir}/{{{','.join(histories)}}}: metrics.jsonl, TensorBoard events, config.json")


if __name__ == "__main__":
    main_lib.run(main)
