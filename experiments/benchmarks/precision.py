"""What scores lose in bfloat16: their ranks, and the gain of draws by them.

    python -m experiments.benchmarks.precision [--networks=mlp] [--data=svhn_cropped --split=train[:10000]]

Scores of three networks (the paper's MLP 2048×4 among them) by `workers.precision`, on at most 2,048 training examples
at the first parameters and during plain SGD: rank correlation (Spearman) with those in float32; Tr Σ of draws by them,
over that of draws by the exact norms; and the gain of both over uniform draws. Draws by either are unbiased. Prints all
and writes results/precision-DATA.json.
"""

import argparse
import sys

import jax
import numpy as np
from scipy import stats
from tqdm import tqdm

from experiments.benchmarks.environment import RESULTS, path_argument, save_results
from experiments.benchmarks.gradnorm import names_among
from issgd_jax import config as config_lib
from issgd_jax.learning.evaluate import make_measure_variance
from issgd_jax.learning.learner import Learner, TrainState
from issgd_jax.run.wiring import make_optimizer
from issgd_jax.sampling import Sampler, Uniform, build_table
from issgd_jax.task.images import make_problem
from issgd_jax.task.problem import make_worker_score_fn

# {network: the fields that differ from the defaults}
NETWORKS = {
    "mlp": {"model.name": "mlp", "model.mlp.hidden_sizes": (2048,) * 4},
    "convnet": {"model.name": "convnet"},
    "transformer": {"model.name": "transformer", "learner.optimizer": "adam", "learner.learning_rate": 1e-3},
}
SCORED = 2048


def measure(config, all_steps) -> dict[int, dict]:
    """Returns {steps: what scores in bfloat16 lose} of one network."""
    problem, optimizer = make_problem(config), make_optimizer(config)
    examples = jax.device_put(problem.examples("train"))
    sampler = Sampler(len(examples[1]), config.learner.batch_size, Uniform())
    step = Learner(problem.loss_fn, optimizer, refresh=False).compile()
    state, sampler_state = TrainState.init(problem.init(jax.random.key(0)), optimizer), sampler.init(0)
    sample = jax.tree.map(lambda x: x[:SCORED], examples)
    score_fns = {}
    for config.workers.precision in ("float32", "bfloat16"):
        score_fns[config.workers.precision] = jax.jit(make_worker_score_fn(config, problem))
    measure_variance = make_measure_variance(problem.loss_fn, score_fns["float32"])
    results = {}
    for i in tqdm(range(max(all_steps) + 1), leave=False):
        if i in all_steps:
            scores = {name: score_fn(state.params, *sample) for name, score_fn in score_fns.items()}
            variance = measure_variance(
                state.params, build_table(scores["bfloat16"]), sample, np.arange(len(sample[1]))
            )
            results[i] = compared(variance, **{name: np.asarray(x) for name, x in scores.items()})
            print(
                f"{i} steps", *(f"  {name:<28}{value:.6g}" for name, value in results[i].items()), sep="\n", flush=True
            )
        state, sampler_state, _ = step(state, sampler_state, sampler, examples)
    return results


def compared(variance, float32, bfloat16) -> dict:
    """Returns how scores differ, and how draws by them do."""
    scored = float32 > 0
    return {
        "rank_correlation": float(stats.spearmanr(float32, bfloat16).statistic),
        "median_relative_error": float(np.median(np.abs(bfloat16[scored] / float32[scored] - 1))),
        "largest_over_median_score": float(np.max(float32) / np.median(float32)),
        "zeros": int(np.sum((bfloat16 == 0) & scored)),
        "variance_to_float32": float((variance.actual / variance.ideal) ** 2),
        "gain_float32": float((variance.uniform / variance.ideal) ** 2),
        "gain_bfloat16": float((variance.uniform / variance.actual) ** 2),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=names_among(NETWORKS), default=list(NETWORKS), help="separated by commas")
    parser.add_argument("--data", default="digits", help="digits, or a data set of TFDS")
    parser.add_argument("--split", default="train", help="of training examples")
    parser.add_argument("--data_dir", type=path_argument)
    parser.add_argument("--steps", type=lambda text: [int(steps) for steps in text.split(",")], default=[0, 200])
    options, results = parser.parse_args(), {}
    for network in options.networks:
        config = config_lib.default()
        data = {"data.name": options.data, "data.train_split": options.split}
        folder = {"data.dir": str(options.data_dir)} if options.data_dir else {}
        config.update_from_flattened_dict(data | folder | NETWORKS[network])
        print(network)
        results[network] = measure(config, options.steps)
    command = " ".join(["python -m experiments.benchmarks.precision", *sys.argv[1:]])
    save_results(RESULTS / f"precision-{options.data}.json", command, results)


if __name__ == "__main__":
    main()
