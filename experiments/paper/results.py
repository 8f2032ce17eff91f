"""Results of a study: medians and quartiles over seeds, each arm at its own best rate. Imports no jax.

Results are plain JSON in `results/STUDY-DATA.json`; figures and tables are made from them.
"""

import bisect
import json
import math
import pathlib
import re
import statistics
import sys
from collections.abc import Sequence

import numpy as np

from experiments.paper import runs, studies
from experiments.paper.study import Study
from issgd_jax.errors import InputError
from issgd_jax.files import write_text_atomically
from issgd_jax.run import workdir as workdir_lib

FOLDER = pathlib.Path(__file__).parent / "results"
CURVES = (
    "train/loss", "train/error", "test/loss", "test/error",
    "variance/uniform", "variance/actual", "variance/ideal", "variance/window", "variance/gain",
    "scores/staleness_mean",
)  # fmt: skip
FINALS = ("train/loss", "train/error", "test/error")
# Fields that results must have in common to be shown side by side.
_EXPERIMENT = ("study", "data", "network", "train_examples", "steps")
# A loss above this multiple of the median of the SPIKE_WINDOW measurements before it is a spike.
SPIKE, SPIKE_WINDOW = 2.0, 5


def results_path(study: str, data: str) -> pathlib.Path:
    """Returns the file of the saved results."""
    return FOLDER / f"{study}-{data}.json"


def load(study: str, data: str) -> dict:
    """Returns the saved results.

    Raises:
      InputError: there are none.
    """
    saved = _read(results_path(study, data))
    if saved is None:
        raise InputError(f"there are no results of {study} on {data}: name the --workdir of a sweep")
    return saved


def _read(path: pathlib.Path) -> dict | None:
    return json.loads(path.read_text()) if path.exists() else None


def save(results: dict) -> pathlib.Path:
    """Saves the results and returns the file.

    Saved arms of the same experiment that are not among these stay: arms may be swept on several machines.
    """
    path = results_path(results["study"], results["data"])
    path.parent.mkdir(exist_ok=True)
    text = json.dumps(merged(_read(path), results), indent=1)
    # A list of numbers is one line.
    write_text_atomically(path, re.sub(r"\[[^][{}]*\]", lambda match: " ".join(match[0].split()), text) + "\n")
    return path


def is_as_saved(results: dict) -> bool:
    """Returns whether results are of the same experiment as the saved ones, or there are none."""
    saved = _read(results_path(results["study"], results["data"]))
    return saved is None or all(saved[name] == results[name] for name in _EXPERIMENT)


def merged(saved: dict | None, results: dict) -> dict:
    """Returns the results and the arms of `saved` that they lack, if of the same experiment; in the study's order."""
    if saved is None or any(saved[name] != results[name] for name in _EXPERIMENT):
        return results
    arms = saved["arms"] | results["arms"]
    order = [name for name in studies.get_study(results["study"]).arms if name in arms]
    commits = sorted({*saved["git_commits"], *results["git_commits"]})
    return results | {"git_commits": commits, "arms": {name: arms[name] for name in order}}


def summarize(
    workdir: pathlib.Path, study: str, data: str, *, arms: list[str] | None = None, seeds: Sequence[int] | None = None
) -> dict:
    """Summarizes the finished runs of a study; arms and runs that are skipped are printed to stderr.

    Args:
      workdir: of the sweep.
      study: name of the study.
      data: name of the data set.
      arms: names of the arms, all of which must have finished runs; None: those that have.
      seeds: of each arm; None: all that are finished.

    Raises:
      InputError: an unknown study, data set, arm or seed, arms of different lengths (but those with a length of their
        own), or runs of one arm that were measured at different steps.
    """
    the_study = studies.get_study(study)
    summaries, folders = {}, []
    for name in the_study.choose_arms(data, arms):
        by_rate = runs.finished(workdir, study, data, name)
        _report_unfinished(workdir / study / data / name)
        if not by_rate:
            if arms:
                raise InputError(f"arm {name} of {study} on {data} has no finished run in {workdir}: sweep first")
            print(f"{name}: no finished run, skipped", file=sys.stderr)
            continue
        rate = runs.best_rate(workdir, study, data, name)
        chosen = _choose_seeds(name, rate, by_rate[rate], seeds)
        folders.append(runs.folder_of(workdir, study, data, name, rate, min(chosen)))
        summaries[name] = _arm_head(the_study, name, rate, by_rate) | _summarize_arm(name, chosen)
    if not summaries:
        raise InputError(f"{workdir} has no finished run of {study} on {data}: sweep first")
    records = [json.loads((folder / workdir_lib.CONFIG_FILE).read_text()) for folder in folders]
    config = records[0]["config"]
    return {
        "study": study,
        "data": data,
        "command": f"python -m experiments.paper.sweep --study={study} --data={data}",
        "network": describe_network(the_study, config),
        "train_examples": config["data"]["train_split"],
        "steps": _common_length(the_study, data, summaries),
        "devices": records[0]["devices"],
        "versions": records[0]["versions"],
        "git_commits": sorted({record["git_commit"] or "?" for record in records}),
        "arms": summaries,
    }


def _choose_seeds(arm: str, rate: float, by_seed: dict[int, list[dict]], seeds: Sequence[int] | None) -> dict:
    if seeds is None:
        return by_seed
    if missing := sorted(set(seeds) - set(by_seed)):
        raise InputError(f"arm {arm} has no finished run of seed(s) {missing} at rate {rate:g}: sweep first")
    return {seed: by_seed[seed] for seed in seeds}


def _arm_head(study: Study, name: str, rate: float, by_rate: dict) -> dict:
    tuning = {f"{r:g}": _round(_median_final(by_seed)) for r, by_seed in sorted(by_rate.items())}
    baseline = study.baseline_of(name)
    return {"label": study.arms[name].label, "baseline": baseline, "learning_rate": rate, "tuning": tuning}


def _common_length(study: Study, data: str, summaries: dict) -> int:
    """Returns the steps of the arms that have no length of their own; those of the study if each has one."""
    lengths = {name: summary["step"][-1] for name, summary in summaries.items()}
    lengths = {name: steps for name, steps in lengths.items() if "steps" not in study.arms[name].overrides}
    if not lengths:
        return study.config(next(iter(study.arms)), data, learning_rate=1.0, seed=0).steps
    if len(set(lengths.values())) > 1:
        raise InputError(f"arms have different lengths, {lengths}: sweep them with the same --steps")
    return next(iter(lengths.values()))


def _summarize_arm(name: str, by_seed: dict[int, list[dict]]) -> dict:
    seeds, histories = list(by_seed), list(by_seed.values())
    steps = _common_steps(name, by_seed)
    variances = [row for rows in histories for row in rows if row.get("variance/ideal")]
    over_uniform = [row["variance/actual"] / row["variance/uniform"] for row in variances if row["variance/uniform"]]
    over_ideal = [row["variance/actual"] / row["variance/ideal"] for row in variances]
    return {
        "seeds": seeds,
        "n": len(seeds),
        "step": steps,
        "examples_scored_a_step": _round((histories[0][-1].get("worker_examples") or 0) / steps[-1]),
        "diverged": sum(rows[-1].get("train/loss") is None for rows in histories),
        "with_spikes": sum(_num_spikes(rows) > 0 for rows in histories),
        "final": {f: [_round(runs.final(rows, f)) for rows in histories] for f in FINALS},
        "loss_by_seed": [[_round(row.get("train/loss")) for row in rows] for rows in histories],
        "actual_over_uniform_max": _round(max(over_uniform)),
        "actual_over_ideal_median": _round(statistics.median(over_ideal)),
        "curves": _curves(histories),
    }


def _common_steps(name: str, by_seed: dict[int, list[dict]]) -> list[int]:
    """Returns the steps of the measurements, which all runs of an arm must share."""
    seeds = list(by_seed)
    steps = [row["step"] for row in by_seed[seeds[0]]]
    for seed, rows in by_seed.items():
        if [row["step"] for row in rows] != steps:
            common = sorted(set(steps) & {row["step"] for row in rows})
            raise InputError(
                f"arm {name}: seeds {seeds[0]} and {seed} were measured at different steps ({len(common)} in common, "
                f"{len(steps)} and {len(rows)} in all): sweep them into one workdir with the same settings"
            )
    return steps


def _curves(histories: list[list[dict]]) -> dict[str, dict[str, list]]:
    """Returns {curve: {quartile: values}} over seeds; a run that diverged counts as the worst."""
    curves = {}
    for curve in CURVES:
        values = np.array([[math.nan if row.get(curve) is None else row[curve] for row in rows] for rows in histories])
        if not np.isnan(values).all():
            worst = np.where(np.isnan(values), np.inf, values)
            quartiles = np.quantile(worst, (0.25, 0.5, 0.75), axis=0, method="nearest")
            curves[curve] = {q: [_round(x) for x in xs] for q, xs in zip(("q1", "median", "q3"), quartiles)}
    return curves


def _num_spikes(rows: list[dict]) -> int:
    losses = [math.inf if row.get("train/loss") is None else row["train/loss"] for row in rows]
    windows = [losses[max(0, i - SPIKE_WINDOW) : i] for i in range(len(losses))]
    return sum(bool(window) and x > SPIKE * statistics.median(window) for x, window in zip(losses, windows))


def loss_at(steps: float, step: Sequence[int], losses: Sequence[float | None]) -> float:
    """Returns the training loss after `steps` steps; inf if training diverged by then.

    Args:
      steps: beyond the last measurement, that one counts.
      step: of the measurements.
      losses: of the measurements, interpolated log-linearly; None after divergence.

    Example:
      >>> round(loss_at(15, [0, 10, 20], [1.0, 1.0, 0.01]), 6)
      0.1
    """
    logs = [math.inf if x is None else math.log(max(x, sys.float_info.min)) for x in losses]
    right = min(bisect.bisect_left(step, steps), len(step) - 1)
    left = max(right - 1, 0)
    if math.inf in (logs[left], logs[right]):
        return math.inf
    return math.exp(float(np.interp(steps, (step[left], step[right]), (logs[left], logs[right]))))


def _median_final(by_seed: dict[int, list[dict]]) -> float:
    return statistics.median(runs.final(rows, "train/loss") for rows in by_seed.values())


def typical(arm: dict, curve: str) -> float | None:
    """Returns the median of a curve over all measurements but the first; None if nothing was measured."""
    known = sorted(x for x in arm["curves"].get(curve, {"median": ()})["median"][1:] if x is not None)
    return statistics.median_high(known) if known else None


def describe_network(study: Study, config: dict) -> str:
    """Returns the network of a config in words, or the number of networks where arms differ in it."""
    if compared := {arm.overrides["model.name"] for arm in study.arms.values() if "model.name" in arm.overrides}:
        return f"{len(compared)} networks"
    if config.get("problem"):
        return f"network of {config['problem']}"
    name = config["model"]["name"]
    model = config["model"][name]
    if name == "mlp":
        sizes = model["hidden_sizes"]
        return f"MLP with {len(sizes)} hidden layers of {', '.join(map(str, dict.fromkeys(sizes)))}"
    return f"{name} {model}"


def _round(x: float | None) -> float | None:
    """Rounds to four digits; None for NaN and infinity, which JSON lacks."""
    return None if x is None or not math.isfinite(x) else float(f"{x:.4g}")


def _report_unfinished(folder: pathlib.Path) -> None:
    """Prints the runs of an arm that are not finished."""
    for run in sorted(folder.glob("lr=*/seed=*")):
        if not runs.is_finished(run):
            rows = runs.read_rows(run)
            print(f"{run}: skipped, it ends at step {rows[-1]['step'] if rows else 'none'}", file=sys.stderr)
