"""Cost of what a run records of its scores: counts of draws in every step, histograms at every measurement.

    python -m experiments.benchmarks.recording [--data_dir=...]

Prints, for digits and Fashion-MNIST with refresh alone, medians over pairs of blocks in one process, and the share of a
run's time that both take together, with the config's steps between two measurements. Writes results/recording.json.
"""

import argparse
import statistics

import jax

from experiments.benchmarks.environment import RESULTS, save_results
from experiments.benchmarks.measuring import median_ratio, paired_seconds
from experiments.configs import digits, fashion_mnist
from issgd_jax.run import wiring
from issgd_jax.run.measure import make_measure
from issgd_jax.sampling import Sampler
from issgd_jax.task.images import make_problem

STEPS_PER_BLOCK = 100
ALONE = {"workers.enabled": False, "devices.host_platform_count": 0, "devices.workers": 1}


def measure(config, num_pairs: int) -> dict[str, float]:
    """Returns seconds of a step and of a measurement, with what is recorded and without, and its share of a run."""
    with config.ignore_type():
        config.update_from_flattened_dict(ALONE)
    problem = make_problem(config)
    parts = wiring.make_parts(config, problem)
    counting = parts.sampler
    other = Sampler(
        counting.num_examples,
        counting.batch_size,
        counting.proposal,
        counting.draw_method,
        rebuild_every=0,
        limit=counting.limit,
    )
    samplers = {"step": counting, "step, draws not counted": other}
    blocks = {name: _steps(parts, sampler, config.seed) for name, sampler in samplers.items()}
    seconds = paired_seconds(blocks, num_pairs)
    of_scores = make_measure(config, problem, parts.sampler)
    arguments = (
        parts.train_state.params,
        parts.sampler.init(config.seed),
        parts.train_examples,
        problem.examples("test"),
    )

    def without_lists(*arguments):
        return {name: value for name, value in of_scores(*arguments).items() if not value.ndim}

    programs = {"measurement": of_scores, "measurement without histograms": jax.jit(without_lists)}
    measurements = {name: _measurement(program, arguments) for name, program in programs.items()}
    seconds |= paired_seconds(measurements, num_pairs)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    median |= {name: median[name] / STEPS_PER_BLOCK for name in blocks}
    steps, (counted, plain), (whole, short) = config.eval_every, blocks, measurements
    step_share = median_ratio(seconds, counted, plain) - 1
    measurement_share = median_ratio(seconds, whole, short) - 1
    added = steps * median[plain] * step_share + median[short] * measurement_share
    return {
        **{f"{name}, ms": 1e3 * value for name, value in median.items()},
        "counted / not counted": 1 + step_share,
        "with histograms / without": 1 + measurement_share,
        "share of a run": added / (steps * median[plain] + median[short]),
        "steps between measurements": steps,
        "pairs": num_pairs,
    }


def _steps(parts, sampler, seed):
    states = [jax.tree.map(jax.numpy.copy, parts.train_state), sampler.init(seed)]

    def run():
        for _ in range(STEPS_PER_BLOCK):
            states[:] = parts.train_step(*states, sampler, parts.train_examples)[:2]
        jax.block_until_ready(states)

    return run


def _measurement(program, arguments):
    return lambda: jax.block_until_ready(program(*arguments))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", help="TFDS folder of Fashion-MNIST")
    options = parser.parse_args()
    results = {}
    for name, config, num_pairs in (
        ("digits", digits.get_config(), 101),
        ("fashion_mnist", fashion_mnist.get_config(), 21),
    ):
        config.data.dir = options.data_dir
        results[name] = measure(config, num_pairs)
        print(name)
        for key, value in results[name].items():
            print(f"  {key:<40}{value:10.4f}")
    save_results(RESULTS / "recording.json", "python -m experiments.benchmarks.recording", results)


if __name__ == "__main__":
    main()
