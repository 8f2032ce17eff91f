"""The learner's step with and without importance sampling, and scoring beside it on the same device."""

import dataclasses
import statistics
from collections.abc import Callable

import jax

from experiments.benchmarks import learner_step
from experiments.benchmarks.accelerator.roofline import Rates
from experiments.benchmarks.accelerator.sizes import Size
from experiments.benchmarks.learner_step import Bench
from experiments.benchmarks.measuring import median_ratio, paired_seconds
from issgd_jax.scoring.scores import GradientNorm
from issgd_jax.scoring.workers import WorkerPool
from issgd_jax.task.problem import SCORING_MICROBATCH


def parts(size: Size) -> dict[str, Callable[[Size, Rates], dict]]:
    """Returns both parts."""
    return {"learner step": step, "overlap": overlap}


def step(size: Size, rates: Rates) -> dict:
    """Returns what `learner_step` measures of one case."""
    return dataclasses.asdict(size.learner) | learner_step.measure(size.learner)


def overlap(size: Size, rates: Rates) -> dict:
    """Returns times of steps alone, of scoring alone, and of both when one thread dispatches them at once.

    Rounds of scoring are as many as would take as long as the steps if each were dispatched alone.
    hidden: share of the shorter that the longer hides; 0 where the device does one after the other.
    """
    bench = Bench(size.learner)
    pool = WorkerPool(
        GradientNorm(bench.loss_fn, SCORING_MICROBATCH),
        bench.examples,
        devices=jax.devices()[:1],
        chunk_size=size.chunk_size,
    )
    run, states = bench.block(bench.step, bench.weighted)
    num_rounds = 1

    def both(steps: bool, scores: bool):
        nonlocal states
        rounds = pool.score_next(states[0].params, step=0, num_rounds=num_rounds) if scores else []
        states = run(states) if steps else states
        jax.block_until_ready((states, [(x.indices, x.scores) for x in rounds]))

    functions = {
        "steps": lambda: both(True, False),
        "scoring": lambda: both(False, True),
        "both": lambda: both(True, True),
    }
    once = paired_seconds(functions, 3)
    num_rounds = max(1, round(min(once["steps"]) / min(once["scoring"])))
    seconds = paired_seconds(functions, size.num_pairs, size.seconds)
    hidden = statistics.median(
        (steps + scoring - together) / min(steps, scoring) for steps, scoring, together in zip(*seconds.values())
    )
    return {
        **{f"{name}, ms": 1e3 * statistics.median(times) for name, times in seconds.items()},
        "steps": size.learner.steps_per_block,
        "rounds": num_rounds,
        "chunk_size": size.chunk_size,
        "hidden": hidden,
        "both_to_steps": median_ratio(seconds, "both", "steps"),
    }
