"""How well scores find wrong labels, beside confident learning (cleanlab; Northcutt, Jiang and Chuang 2021).

    python -m experiments.paper.bad_labels [--data=digits,fashion_mnist] [--seeds=5] [--data_dir=...]

Replaces 5 % of the training labels by another class, trains the experiment of `experiments/configs/` with each kind of
score, and ranks all examples by what the run knows: scores at several steps, and their mean over the run; and by
cleanlab's measures, with the probabilities of the run with gradient norms (in sample), and with those of five networks
that did not see the example (out of sample: plain SGD at its best rate of the study, the same network and steps).
Prints the share of wrong labels among the first k of each ranking, and writes results/bad_labels.json.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import statistics
import tempfile

import jax
import numpy as np
from ml_collections import ConfigDict

from experiments.benchmarks.environment import save_results
from experiments.configs import digits, fashion_mnist
from experiments.paper import results
from issgd_jax.provenance import versions
from issgd_jax.run import loop, metrics, wiring
from issgd_jax.run.progress import Progress
from issgd_jax.task.images import ImageProblem, make_problem

PATH = results.FOLDER / "bad_labels.json"
FLIPPED, FOLDS, MEASUREMENTS = 0.05, 5, 16
# Points of the run at which its scores are ranked, in measurements.
EARLY = {"1/8": 2, "1/4": 4, "1/2": 8, "all": 16}
SCORES = ("gradient_norm", "last_layer", "loss")  # of config.workers.score
PLAIN = {"proposal.name": "uniform", "workers.enabled": False, "devices.host_platform_count": 0, "devices.workers": 1}


@dataclasses.dataclass(frozen=True)
class Trial:
    """An experiment, its steps, and plain SGD's best rate in the study."""

    get_config: object
    steps: int
    plain_rate: float


TRIALS = {
    "digits": Trial(digits.get_config, steps=992, plain_rate=0.02),
    "fashion_mnist": Trial(fashion_mnist.get_config, steps=3200, plain_rate=0.01),
}


def flip(labels: np.ndarray, num_classes: int, seed: int) -> np.ndarray:
    """Returns labels of which a share FLIPPED, rounded down, is another class, each as likely."""
    random = np.random.default_rng(seed)
    chosen = random.choice(len(labels), int(FLIPPED * len(labels)), replace=False)
    flipped = labels.copy()
    flipped[chosen] = (labels[chosen] + random.integers(1, num_classes, len(chosen))) % num_classes
    return flipped


def probabilities(problem: ImageProblem, params, images: np.ndarray) -> np.ndarray:
    """Returns the network's probabilities f64[N, C]."""
    logits = _logits(problem.logits_fn, params, images)
    return np.asarray(jax.nn.softmax(logits), np.float64)


@functools.partial(jax.jit, static_argnums=0)
def _logits(logits_fn, params, images):
    return jax.lax.map(functools.partial(logits_fn, params), images, batch_size=1024)


def train(config: ConfigDict, problem: ImageProblem) -> list[tuple[np.ndarray, object]]:
    """Trains, and returns scores f32[N] and parameters at each of the MEASUREMENTS."""
    parts = wiring.make_parts(config, problem)
    state = loop.start(parts)
    snapshots = []
    with (
        tempfile.TemporaryDirectory() as folder,
        metrics.MetricsWriter(pathlib.Path(folder), tensorboard=False) as writer,
        Progress(config.steps, shown=False, description="") as progress,
    ):
        for i in range(1, MEASUREMENTS + 1):
            until = i * config.steps // MEASUREMENTS
            loop.run(parts, loop.Plan(until, config.steps, strict=False, progress=progress), writer, state=state)
            snapshots.append((np.asarray(state.sampler_state.score), jax.device_get(state.train_state.params)))
    return snapshots


def out_of_sample(config: ConfigDict, problem: ImageProblem, plain_rate: float) -> np.ndarray:
    """Returns probabilities f64[N, C], each of a network that was trained without the fold of the example."""
    config = config.copy_and_resolve_references()
    with config.ignore_type():
        config.update_from_flattened_dict(PLAIN | {"learner.learning_rate": plain_rate})
    images, labels = problem.train
    fold_of = np.random.default_rng(config.seed).permutation(len(labels)) % FOLDS
    found = np.zeros((len(labels), problem.num_classes))
    for fold in range(FOLDS):
        seen = fold_of != fold
        parts = wiring.make_parts(config, dataclasses.replace(problem, train=(images[seen], labels[seen])))
        state, sampler_state = parts.train_state, parts.sampler_state
        for _ in range(config.steps):
            state, sampler_state, _ = parts.train_step(state, sampler_state, parts.sampler, parts.train_examples)
        found[~seen] = probabilities(problem, jax.device_get(state.params), images[~seen])
    return found


def rankings(config: ConfigDict, problem: ImageProblem, plain_rate: float) -> dict[str, np.ndarray]:
    """Returns {ranking: f64[N]}, most suspicious first in descending order."""
    from cleanlab import rank

    images, labels = problem.train
    found = {}
    for kind in SCORES:
        config.workers.score = kind
        snapshots = train(config, problem)
        scores = [score for score, _ in snapshots]
        found |= {f"{kind}, score after {name} of the run": scores[i - 1] for name, i in EARLY.items()}
        found[f"{kind}, mean of {MEASUREMENTS} scores"] = np.mean(scores, 0)
        found[f"{kind}, mean of 4 scores"] = np.mean(scores[MEASUREMENTS // 4 - 1 :: MEASUREMENTS // 4], 0)
        if kind == "gradient_norm":
            inside = [probabilities(problem, params, images) for _, params in snapshots]
    by_network = {f"in sample, after {name} of the run": inside[i - 1] for name, i in EARLY.items()}
    by_network[f"in sample, mean of {MEASUREMENTS}"] = np.mean(inside, 0)
    by_network["out of sample"] = out_of_sample(config, problem, plain_rate)
    for method in ("self_confidence", "normalized_margin"):
        for name, of_network in by_network.items():
            found[f"cleanlab {method}, {name}"] = -rank.get_label_quality_scores(labels, of_network, method=method)
    return found


def precisions(suspicion: np.ndarray, wrong: np.ndarray) -> dict[str, float]:
    """Returns the share of wrong labels among the 50, and among the as many as are wrong, that rank first."""
    first = np.argsort(-suspicion, kind="stable")
    return {name: round(float(wrong[first[:k]].mean()), 4) for name, k in (("50", 50), ("wrong", int(wrong.sum())))}


def measured(data: str, seed: int, data_dir: str | None) -> dict[str, dict[str, float]]:
    """Returns the precisions of every ranking."""
    trial = TRIALS[data]
    config = trial.get_config()
    config.seed, config.steps, config.data.dir = seed, trial.steps, data_dir
    config.learner.draw = "systematic"  # of all scores alike: the default depends on them
    problem = make_problem(config)
    images, labels = problem.train
    flipped = flip(labels, problem.num_classes, seed)
    noisy = dataclasses.replace(problem, train=(images, flipped), name="bad_labels")
    found = rankings(config, noisy, trial.plain_rate)
    return {name: precisions(suspicion, flipped != labels) for name, suspicion in found.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits,fashion_mnist", help="names, separated by commas")
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0, 1, ... of each data set")
    parser.add_argument("--data_dir", help="TFDS folder of the data")
    options = parser.parse_args()
    try:
        import cleanlab
    except ImportError:
        raise SystemExit("error: cleanlab is missing, which nothing else here needs: pip install cleanlab") from None
    found = json.loads(PATH.read_text())["results"] if PATH.exists() else {}
    for data in options.data.split(","):
        by_seed = []
        for seed in range(options.seeds):
            by_seed.append(measured(data, seed, options.data_dir))
            found[data] = {
                "n": len(by_seed),
                "seeds": list(range(len(by_seed))),
                "steps": TRIALS[data].steps,
                "precision": {
                    ranking: {k: [of_seed[ranking][k] for of_seed in by_seed] for k in by_seed[0][ranking]}
                    for ranking in by_seed[0]
                },
            }
            save_results(
                PATH,
                "python -m experiments.paper.bad_labels",
                found,
                versions=versions() | {"cleanlab": cleanlab.__version__},
            )
        for ranking, of_k in found[data]["precision"].items():
            shown = (f"at {k}: {statistics.median(x):.2f} ({min(x):.2f} to {max(x):.2f})" for k, x in of_k.items())
            print(f"{data} {ranking}: {', '.join(shown)}", flush=True)


if __name__ == "__main__":
    main()
