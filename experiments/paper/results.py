"""What the runs of a study say: medians and quartiles over seeds, each arm at its own best rate. Imports no jax.

Results are plain JSON, kept in `results/STUDY-DATA.json`: figures and table are made of them.
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
from issgd_jax.errors import InputError
from issgd_jax.run import workdir as workdir_lib

FOLDER = pathlib.Path(__file__).parent / "results"
CURVES = (
    "train/loss", "train/error", "test/loss", "test/error",
    "variance/uniform", "variance/actual", "variance/ideal", "variance/gain", "scores/staleness_mean",
)  # fmt: skip
FINALS = ("train/loss", "train/error", "test/error")
# What results must have in common to be shown side by side.
_EXPERIMENT = ("study", "data", "network", "train_examples", "steps")
# A loss above this multiple of the median of the SPIKE_WINDOW measurements before it is a spike.
SPIKE, SPIKE_WINDOW = 2.0, 5


def path_of(study: str, data: str) -> pathlib.Path:
    """Where the results are kept."""
    return FOLDER / f"{study}-{data}.json"


def load(study: str, data: str) -> dict:
    """The results kept; raises InputError if there are none."""
    kept = _read(path_of(study, data))
    if kept is None:
        raise InputError(f"there are no results of {study} on {data}: name the --workdir of a sweep")
    return kept


def _read(path: pathlib.Path) -> dict | None:
    return json.loads(path.read_text()) if path.exists() else None


def save(results: dict) -> pathlib.Path:
    """Keeps the results; returns where. Arms kept before stay if they are of the same experiment and not among these,
    so that arms may be swept on several machines."""
    path = path_of(results["study"], results["data"])
    path.parent.mkdir(exist_ok=True)
    text = json.dumps(merged(_read(path), results), indent=1)
    # A list of numbers is one line.
    path.write_text(re.sub(r"\[[^][{}]*\]", lambda found: " ".join(found[0].split()), text) + "\n")
    return path


def merged(kept: dict | None, results: dict) -> dict:
    """The results, and the arms of `kept` that they lack, if both are of one experiment; in the study's order."""
    if kept is None or any(kept[name] != results[name] for name in _EXPERIMENT):
        return results
    arms = kept["arms"] | results["arms"]
    order = [name for name in studies.get_study(results["study"]).arms if name in arms]
    commits = sorted({*kept["git_commits"], *results["git_commits"]})
    return results | {"git_commits": commits, "arms": {name: arms[name] for name in order}}


def summarize(
    workdir: pathlib.Path, study: str, data: str, *, arms: list[str] | None = None, seeds: Sequence[int] | None = None
) -> dict:
    """Summarizes the finished runs of a study; what is left out is said on stderr.

    Raises: InputError for a study, data, arm or seed that there is not, arms of different lengths (but those that have
      a length of their own), and runs of one arm that were measured at different steps.
    """
    the_study = studies.get_study(study)
    summaries, folders = {}, []
    for name, arm in studies.choose_arms(the_study, data, arms).items():
        found = runs.finished(workdir, study, data, name)
        _report_unfinished(workdir / study / data / name)
        if not found:
            if arms:
                raise InputError(f"arm {name} of {study} on {data} has no finished run in {workdir}: sweep first")
            print(f"{name}: no finished run, left out", file=sys.stderr)
            continue
        rate = runs.best_rate(workdir, study, data, name)
        chosen = found[rate]
        if seeds is not None:
            if missing := sorted(set(seeds) - set(chosen)):
                raise InputError(f"arm {name} has no finished run of seed(s) {missing} at rate {rate:g}: sweep first")
            chosen = {seed: chosen[seed] for seed in seeds}
        folders.append(studies.folder(workdir, study, data, name, rate, min(chosen)))
        tuning = {f"{r:g}": _round(_median_final(of_rate)) for r, of_rate in sorted(found.items())}
        summaries[name] = {
            "label": arm.label,
            "baseline": studies.baseline_of(the_study, name),
            "learning_rate": rate,
            "tuning": tuning,
            **_summary(name, chosen),
        }
    if not summaries:
        raise InputError(f"{workdir} has no finished run of {study} on {data}: sweep first")
    lengths = {name: summary["step"][-1] for name, summary in summaries.items()}
    lengths = {name: x for name, x in lengths.items() if "steps" not in the_study.arms[name].overrides} or lengths
    if len(set(lengths.values())) > 1:
        raise InputError(f"arms have different lengths, {lengths}: sweep them with the same --steps")
    record = json.loads((folders[0] / workdir_lib.CONFIG_FILE).read_text())
    return {
        "study": study,
        "data": data,
        "command": f"python -m experiments.paper.sweep --study={study} --data={data}",
        "network": network_of(the_study, record["config"]),
        "train_examples": record["config"]["data"]["train_split"],
        "steps": next(iter(lengths.values())),
        "devices": record["devices"],
        "versions": record["versions"],
        "git_commits": sorted(
            {json.loads((f / workdir_lib.CONFIG_FILE).read_text())["git_commit"] or "?" for f in folders}
        ),
        "arms": summaries,
    }


def _summary(name: str, by_seed: dict[int, list[dict]]) -> dict:
    seeds, histories = list(by_seed), list(by_seed.values())
    steps = [row["step"] for row in histories[0]]
    for seed, rows in by_seed.items():
        if [row["step"] for row in rows] != steps:
            common = sorted(set(steps) & {row["step"] for row in rows})
            raise InputError(
                f"arm {name}: seeds {seeds[0]} and {seed} were measured at different steps ({len(common)} in common, "
                f"{len(steps)} and {len(rows)} in all): sweep them into one workdir with the same settings"
            )
    curves = {}
    for curve in CURVES:
        values = np.array([[math.nan if row.get(curve) is None else row[curve] for row in rows] for rows in histories])
        if not np.isnan(values).all():
            # A run that diverged counts as the worst.
            worst = np.where(np.isnan(values), np.inf, values)
            quartiles = np.quantile(worst, (0.25, 0.5, 0.75), axis=0, method="nearest")
            curves[curve] = {q: [_round(x) for x in xs] for q, xs in zip(("q1", "median", "q3"), quartiles)}
    variances = [row for rows in histories for row in rows if row.get("variance/ideal")]
    return {
        "seeds": seeds,
        "n": len(seeds),
        "step": steps,
        "examples_scored_a_step": _round((histories[0][-1].get("worker_examples") or 0) / steps[-1]),
        "diverged": sum(rows[-1].get("train/loss") is None for rows in histories),
        "with_spikes": sum(_num_spikes(rows) > 0 for rows in histories),
        "final": {f: [_round(runs.final(rows, f)) for rows in histories] for f in FINALS},
        "loss_by_seed": [[_round(row.get("train/loss")) for row in rows] for rows in histories],
        "actual_over_uniform_max": _round(
            max(row["variance/actual"] / row["variance/uniform"] for row in variances if row["variance/uniform"])
        ),
        "actual_over_ideal_median": _round(
            statistics.median(row["variance/actual"] / row["variance/ideal"] for row in variances)
        ),
        "curves": curves,
    }


def _num_spikes(rows: list[dict]) -> int:
    losses = [math.inf if row.get("train/loss") is None else row["train/loss"] for row in rows]
    before = [losses[max(0, i - SPIKE_WINDOW) : i] for i in range(len(losses))]
    return sum(bool(w) and x > SPIKE * statistics.median(w) for x, w in zip(losses, before))


def steps_to(loss: float, step: Sequence[int], losses: Sequence[float | None]) -> float:
    """Steps until the training loss is first as low as `loss`, log-linear between measurements; inf if never."""
    last = None
    for now, x in zip(step, losses):
        if x is not None and x <= loss:
            if last is None or x <= 0:
                return float(now)
            before, y = last
            return before + (now - before) * math.log(y / loss) / math.log(y / x) if y > x else float(now)
        last = None if x is None else (now, x)
    return math.inf


def loss_at(place: float, step: Sequence[int], losses: Sequence[float | None]) -> float:
    """Training loss after `place` steps, log-linear between measurements, the last one beyond; inf if it diverged."""
    logs = [math.inf if x is None else math.log(max(x, sys.float_info.min)) for x in losses]
    right = min(bisect.bisect_left(step, place), len(step) - 1)
    left = max(right - 1, 0)
    if math.inf in (logs[left], logs[right]):
        return math.inf
    return math.exp(float(np.interp(place, (step[left], step[right]), (logs[left], logs[right]))))


def _median_final(by_seed: dict[int, list[dict]]) -> float:
    return statistics.median(runs.final(rows, "train/loss") for rows in by_seed.values())


def typical(arm: dict, curve: str) -> float | None:
    """The median over measurements, but the first, of a curve's median over seeds; None where nothing was measured."""
    known = sorted(x for x in arm["curves"].get(curve, {"median": ()})["median"][1:] if x is not None)
    return statistics.median_high(known) if known else None


def network_of(study: studies.Study, config: dict) -> str:
    """The network of a config, in words; how many there are where it differs from arm to arm."""
    if compared := {arm.overrides["model.name"] for arm in study.arms.values() if "model.name" in arm.overrides}:
        return f"{len(compared)} networks"
    name, of_model = config["model"]["name"], config["model"][config["model"]["name"]]
    if name == "mlp":
        sizes = of_model["hidden_sizes"]
        return f"MLP with {len(sizes)} hidden layers of {', '.join(map(str, dict.fromkeys(sizes)))}"
    return f"{name} {of_model}"


def _round(x: float | None) -> float | None:
    """Four digits; None for what is no number: JSON has no infinity."""
    return None if x is None or not math.isfinite(x) else float(f"{x:.4g}")


def _report_unfinished(folder: pathlib.Path) -> None:
    for run in sorted(folder.glob("lr=*/seed=*")):
        if not runs.is_finished(run):
            rows = runs.read_rows(run)
            print(f"{run}: left out, it ends at step {rows[-1]['step'] if rows else 'none'}", file=sys.stderr)
