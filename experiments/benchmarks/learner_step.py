"""Cost of importance sampling to the learner: its step against the same step with uniform sampling.

    python -m experiments.benchmarks.learner_step

Prints, for two sizes of network and data, medians over pairs of blocks (A B A B ... in one process) of

- `step`: draw, gather, weight, update, against the same with uniform draws and importance weights of one;
- `step + refresh`: the same with the norms of the minibatch computed and ingested;
- `step + refresh + ingest`: the same with a round of scores ingested every 32 steps, and at the start of each block,
  whose scoring is not timed;
- `one call`: up to 32 steps in one program, as the trainer's loop does where nothing happens between them, against
  uniform steps in one program; and uniform steps in one program against one at a time;
- memory on the learner's device that the uniform program does not need, in bytes an example.

Images are random bytes: times do not depend on their values. Writes results/learner_step.json.
"""

import dataclasses
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from experiments.benchmarks.environment import RESULTS, save_results
from experiments.benchmarks.measuring import median_ratio
from issgd_jax.learning.learner import Learner, TrainState
from issgd_jax.sampling import Sampler, Uniform
from issgd_jax.task import losses, models

STEPS_PER_ROUND, CHUNK_SIZE, STEPS_PER_CALL = 32, 3 * 2048, 32


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of one measurement.

    Attributes:
      shape: of an image.
      hidden_sizes: of the MLP.
      num_examples: N.
      batch_size: B.
      steps_per_block: steps that are timed together.
      num_pairs: blocks of each kind.
    """

    shape: tuple[int, ...]
    hidden_sizes: tuple[int, ...]
    num_examples: int
    batch_size: int
    steps_per_block: int
    num_pairs: int


CASES = {
    "digits 64-128x2-10, N = 1,437, B = 16": Case((8, 8, 1), (128, 128), 1437, 16, 256, 101),
    "svhn 3072-2048x4-10, N = 573,000, B = 128": Case((32, 32, 3), (2048,) * 4, 573_000, 128, 8, 25),
}


class Bench:
    """Learner, samplers and data of one case."""

    def __init__(self, case: Case):
        rng = np.random.default_rng(0)
        num_examples = case.num_examples
        images = rng.integers(0, 256, (num_examples, *case.shape), np.uint8)
        self.case, self.examples = case, jax.device_put((images, rng.integers(0, 10, num_examples, np.int32)))
        model = models.mlp(10, hidden_sizes=case.hidden_sizes)
        self._params = model.init(jax.random.key(0), jnp.zeros(case.shape))

        def loss_fn(params, image, label):
            return losses.example_loss(model.apply(params, (image - 128.0) / 64.0), label)

        self._optimizer = optax.sgd(1e-4, momentum=0.9, nesterov=True)
        self.loss_fn = loss_fn
        plain, refreshing = (Learner(loss_fn, self._optimizer, refresh=refresh) for refresh in (False, True))
        self.step, self.steps = plain.compile(), plain.compile_steps()
        self.refreshing_step, self.refreshing_steps = refreshing.compile(), refreshing.compile_steps()
        self.uniform = Sampler(num_examples, case.batch_size, Uniform())
        # As in the trainer, whose loop rebuilds.
        self.weighted = jax.device_put(Sampler(num_examples, case.batch_size, rebuild_every=0))
        scores = rng.lognormal(0, 1.5, num_examples).astype(np.float32)
        indices = jnp.arange(num_examples)
        self._scored = self.weighted.ingest(self.weighted.init(0), indices, scores, jnp.int32(0))
        chunk = min(CHUNK_SIZE, num_examples // 4)
        self.round = indices[:chunk], jnp.asarray(scores[:chunk])

    def new_states(self, sampler: Sampler):
        """Returns states of learner and sampler that may be donated."""
        sampler_state = sampler.init(0) if sampler is self.uniform else self._scored
        params, sampler_state = jax.tree.map(jnp.copy, (self._params, sampler_state))
        return TrainState.init(params, self._optimizer), sampler_state

    def block(self, step, sampler: Sampler, *, rounds: bool = False):
        """Returns `(run, states)`: a function of states that takes the steps of a block, and states to start with."""

        def run(states):
            state, sampler_state = states
            for i in range(self.case.steps_per_block):
                if rounds and i % STEPS_PER_ROUND == 0:
                    sampler_state = sampler.ingest(sampler_state, *self.round, jnp.int32(i))
                state, sampler_state, _ = step(state, sampler_state, sampler, self.examples)
            return state, sampler_state

        return run, self.new_states(sampler)

    def block_of_calls(self, steps, sampler: Sampler):
        """Returns the same of steps that are done by few calls."""
        most = min(STEPS_PER_CALL, self.case.steps_per_block)
        count = jnp.int32(most)

        def run(states):
            for _ in range(self.case.steps_per_block // most):
                *states, _ = steps(*states, sampler, self.examples, count)
            return states

        return run, self.new_states(sampler)


def measure(case: Case) -> dict:
    """Returns medians of pairwise ratios, times and bytes of one case."""
    bench = Bench(case)
    blocks = {
        "uniform": bench.block(bench.step, bench.uniform),
        "step": bench.block(bench.step, bench.weighted),
        "step + refresh": bench.block(bench.refreshing_step, bench.weighted),
        "step + refresh + ingest": bench.block(bench.refreshing_step, bench.weighted, rounds=True),
        "uniform, one call": bench.block_of_calls(bench.steps, bench.uniform),
        "step + refresh, one call": bench.block_of_calls(bench.refreshing_steps, bench.weighted),
    }
    seconds = paired_blocks(blocks, case.num_pairs)
    baselines = dict.fromkeys(blocks, "uniform") | {"step + refresh, one call": "uniform, one call"}
    return {
        **{name: median_ratio(seconds, name, baselines[name]) for name in blocks if name != "uniform"},
        **{f"{name}, us": 1e6 * statistics.median(times) / case.steps_per_block for name, times in seconds.items()},
        "pairs": case.num_pairs,
        "steps_per_block": case.steps_per_block,
        **memory(bench),
    }


def paired_blocks(blocks, num_pairs) -> dict[str, list[float]]:
    """Returns the seconds of each block, in turn, in rotated order, after one warm-up of each."""
    seconds = {name: [] for name in blocks}
    states = {name: jax.block_until_ready(run(start)) for name, (run, start) in blocks.items()}
    names = list(blocks)
    for i in tqdm(range(num_pairs), leave=False):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start = time.perf_counter()
            states[name] = jax.block_until_ready(blocks[name][0](states[name]))
            seconds[name].append(time.perf_counter() - start)
    return seconds


def memory(bench: Bench) -> dict:
    """Returns bytes an example: held by the sampler, needed beside it to ingest a round, and growth of the peak."""
    states = bench.new_states(bench.weighted)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(states[1]))
    in_uniform_step = beside_arguments(
        bench.refreshing_step, *bench.new_states(bench.uniform), bench.uniform, bench.examples
    )
    in_step = beside_arguments(bench.refreshing_step, *states, bench.weighted, bench.examples)
    ingest = jax.jit(Sampler.ingest, donate_argnums=1, keep_unused=True)
    in_ingest = beside_arguments(ingest, bench.weighted, states[1], *bench.round, jnp.int32(1))
    num_examples = bench.case.num_examples
    return {
        "held_bytes_an_example": held / num_examples,
        "beside_in_ingest_bytes_an_example": in_ingest / num_examples,
        "peak_growth_bytes_an_example": (held + max(in_step, in_ingest) - in_uniform_step) / num_examples,
    }


def beside_arguments(function, *arguments, **keywords) -> int:
    """Returns the bytes that a compiled program needs beside its arguments: temporaries, and outputs not donated to."""
    memory = function.lower(*arguments, **keywords).compile().memory_analysis()
    return memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes


def main():
    results = {}
    for name, case in CASES.items():
        results[name] = measure(case)
        print(name)
        for key, value in results[name].items():
            print(f"  {key:<40}{value:10.3f}" if isinstance(value, float) else f"  {key:<40}{value:10d}")
    command = "python -m experiments.benchmarks.learner_step"
    save_results(RESULTS / "learner_step.json", command, results)


if __name__ == "__main__":
    main()
