"""Cost of reliability: checkpoints, resuming from one, and memory over a long run.

    python -m experiments.benchmarks.lasting [--pairs=11]

- `checkpoint every 100 steps`: blocks of 100 learner steps of the paper's 3072-2048x4-10 with importance sampling over
  73,257 examples, with a checkpoint written at their start and without one, in turn in one process: median ratio;
- `start`: seconds of a whole process that trains one step from the start and from a checkpoint, in turn: median ratio;
- `soak`: 100,000 steps of the digits config with checkpoints, events and a heartbeat: growth of resident memory after
  the first tenth.

Images of the first are random bytes: times do not depend on their values. Writes results/lasting.json.
"""

import argparse
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

from experiments.benchmarks.environment import RESULTS, save_results
from experiments.benchmarks.measuring import median_ratio, paired_seconds
from issgd_jax.run.metrics import read_metrics

NUM_EXAMPLES, BATCH_SIZE, STEPS = 73_257, 128, 100
SOAK_STEPS = 100_000


def checkpoint_cost(num_pairs: int) -> dict:
    """Measures the ratio of a block of steps with a checkpoint to one without."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    from issgd_jax.learning import payoff
    from issgd_jax.learning.learner import Learner, TrainState
    from issgd_jax.run.checkpoints import Checkpoints
    from issgd_jax.run.run_state import RunState, Snapshot
    from issgd_jax.sampling import Sampler
    from issgd_jax.task import losses, models

    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (NUM_EXAMPLES, 32, 32, 3), np.uint8)
    examples = jax.device_put((images, rng.integers(0, 10, NUM_EXAMPLES, np.int32)))
    model = models.mlp(10, hidden_sizes=(2048,) * 4)
    params = model.init(jax.random.key(0), jnp.zeros((32, 32, 3)))

    def loss_fn(params, image, label):
        return losses.example_loss(model.apply(params, (image - 128.0) / 64.0), label)

    optimizer = optax.sgd(1e-4, momentum=0.9, nesterov=True)
    step = Learner(loss_fn, optimizer).compile()
    sampler = jax.device_put(Sampler(NUM_EXAMPLES, BATCH_SIZE))
    state = RunState(TrainState.init(params, optimizer), sampler.init(0), payoff.State(active=True, left=0))

    def block(checkpoints):
        if checkpoints:
            state.step += 1  # a checkpoint is named after its step
            checkpoints.save(Snapshot.take(state))
        for _ in range(STEPS):
            state.train_state, state.sampler_state, step_metrics = step(
                state.train_state, state.sampler_state, sampler, examples
            )
            step_metrics.loss.block_until_ready()  # the loop runs one step ahead
        jax.block_until_ready(state.train_state)

    with (
        tempfile.TemporaryDirectory() as folder,
        Checkpoints(pathlib.Path(folder), every_steps=STEPS, keep=3) as checkpoints,
    ):
        seconds = paired_seconds({"with": lambda: block(checkpoints), "without": lambda: block(None)}, num_pairs)
        begun = time.perf_counter()
        state.step = 10**6
        checkpoints.save(Snapshot.take(state))
        checkpoints.wait()
        alone = time.perf_counter() - begun
        size = sum(f.stat().st_size for f in pathlib.Path(folder).glob("step_0001000000/**/*") if f.is_file())
    return {
        "ratio": median_ratio(seconds, "with", "without"),
        "seconds of 100 steps": statistics.median(seconds["without"]),
        "seconds of one checkpoint, alone": alone,
        "megabytes": size / 1e6,
        "pairs": len(seconds["with"]),
    }


def start_cost(name: str, num_pairs: int, *arguments: str) -> dict:
    """Measures the ratio of the time of a process that resumes from a checkpoint to that of one that starts a run."""
    with tempfile.TemporaryDirectory() as folder:
        cold, saved, resumed = (pathlib.Path(folder) / name for name in ("cold", "saved", "resumed"))

        def run(workdir, steps):
            command = [sys.executable, "-m", "issgd_jax.main", f"--config=experiments/configs/{name}.py"]
            options = [f"--config.steps={steps}", "--config.eval_every=1", "--config.schedule.score_delay=0"]
            subprocess.run([*command, f"--workdir={workdir}", *options, *arguments], check=True, capture_output=True)

        def start():
            shutil.rmtree(cold, ignore_errors=True)
            run(cold, 1)

        def resume():
            shutil.rmtree(resumed, ignore_errors=True)
            shutil.copytree(saved, resumed)
            run(resumed, 2)

        run(saved, 1)
        seconds = paired_seconds({"cold": start, "resumed": resume}, num_pairs)
    return {
        "ratio": median_ratio(seconds, "resumed", "cold"),
        "seconds from nothing": statistics.median(seconds["cold"]),
        "seconds from a checkpoint": statistics.median(seconds["resumed"]),
        "pairs": num_pairs,
    }


def soak(steps: int = SOAK_STEPS) -> dict:
    """Measures the growth of resident memory after the first tenth of a long run."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "issgd_jax.main", "--config=experiments/configs/digits.py"]
        options = [f"--config.steps={steps}", "--config.eval_every=100", "--config.log.progress=False"]
        subprocess.run([*command, f"--workdir={folder}", *options], check=True)
        rows = read_metrics(pathlib.Path(folder) / "metrics.jsonl")
    resident = [row["memory/resident_bytes"] for row in rows]
    begin, end = resident[len(rows) // 10], resident[-1]
    return {
        "steps": steps,
        "growth": end / begin - 1,
        "highest growth": max(resident[len(rows) // 10 :]) / begin - 1,
        "megabytes after a tenth": begin / 1e6,
        "megabytes at the end": end / 1e6,
        "seconds": rows[-1]["wall_seconds"],
        "final training loss": rows[-1]["train/loss"],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=11)
    options = parser.parse_args()
    results = {
        "checkpoint every 100 steps": checkpoint_cost(options.pairs),
        "start, digits": start_cost("digits", options.pairs),
        "soak": soak(),
    }
    for name, result in results.items():
        print(name)
        for key, value in result.items():
            print(f"  {key:<40}{value:12.4g}")
    command = f"python -m experiments.benchmarks.lasting --pairs={options.pairs}"
    save_results(RESULTS / "lasting.json", command, results)


if __name__ == "__main__":
    main()
