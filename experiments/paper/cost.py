"""Cost of a step of each arm on one device that does everything, in steps of its baseline.

    python -m experiments.paper.cost --study=fair --data=fashion_mnist [--width=...] [--data_dir=...]

Times blocks of steps, each a run of `issgd_jax.run.loop` without its measurements, in pairs of an arm and its baseline,
all arms in turn, in one process. Medians over pairs. Writes results/cost-STUDY-DATA.json.

Asynchronous learners are charged, not timed: see `charged`.
"""

import dataclasses
import json
import pathlib
import statistics
import tempfile
import time

from absl import flags
from tqdm import tqdm

from experiments.paper import command, results, studies
from issgd_jax.files import write_text_atomically
from issgd_jax.provenance import git_commit, versions
from issgd_jax.run import metrics
from issgd_jax.run.progress import Progress

# Least number of steps of a block: its start must not count.
MIN_STEPS = 100

_BLOCKS = flags.DEFINE_integer("blocks", 15, "Blocks of each arm.", flag_values=command.FLAGS)


def cost_path(study: str, data: str) -> pathlib.Path:
    """Returns the file of the saved costs."""
    return results.FOLDER / f"cost-{study}-{data}.json"


def load(study: str, data: str, network: str | None = None) -> dict[str, float]:
    """Returns {arm: cost of a step in steps of its baseline}; {} if it was not measured, or of another network."""
    try:
        saved = json.loads(cost_path(study, data).read_text())
    except FileNotFoundError:
        return {}
    return saved["ratio"] if network in (None, saved["network"]) else {}


def save(measured: dict) -> None:
    """Saves measured costs, beside saved ones of other arms with the same network, hardware and versions."""
    path = cost_path(measured["study"], measured["data"])
    path.parent.mkdir(exist_ok=True)
    saved = json.loads(path.read_text()) if path.exists() else measured
    if all(saved[name] == measured[name] for name in ("network", "hardware", "versions")):
        by_arm = ("ratio", "milliseconds", "measured")
        measured = measured | {name: saved.get(name, {}) | measured[name] for name in by_arm}
    write_text_atomically(path, json.dumps(measured, indent=2) + "\n")


def charged(step: float, owner: float, learners: int) -> float:
    """Returns the time of an update by asynchronous learners, each with a device like this one, with free transfers.

    Args:
      step: time of a step on one device.
      owner: the part of it that only the owner of the parameters can do: draw, update, refresh, rebuilds of the table.
        The rest, the gradient, is computed by all learners at once.
      learners: their number, k.

    Example:
      >>> charged(5.0, 1.0, 4)
      2.0
    """
    return (step - owner) / learners + owner


def measure(study: str, data: str, *, arms: list[str] | None, overrides: dict, num_blocks: int) -> dict:
    """Measures arms and their baselines, see the module.

    Args:
      study: name of the study.
      data: name of the data set.
      arms: names of the arms; None: all.
      overrides: {config field: value}, in every arm.
      num_blocks: blocks of each arm, after one that compiles.

    Returns:
      The content of the JSON file.
    """
    from experiments.benchmarks.environment import hardware

    the_study = studies.get_study(study)
    chosen = the_study.choose_arms(data, the_study.with_baselines(arms))
    blocks = {}
    for name in chosen:
        rate = min(the_study.rates(name, data))
        config = the_study.config(name, data, overrides=overrides, learning_rate=rate, seed=0)
        blocks[name] = _Charged(config) if config.learner.asynchronous > 1 else _Block(config)
    baselines = {name: the_study.baseline_of(name) for name in blocks}
    seconds, ratio = _time_pairs(blocks, baselines, num_blocks)
    return {
        "study": study,
        "data": data,
        "network": results.describe_network(the_study, config.to_dict()),
        "command": f"python -m experiments.paper.cost --study={study} --data={data}",
        "ratio": {name: round(statistics.median(xs), 3) for name, xs in ratio.items()},
        "milliseconds": {name: round(1e3 * statistics.median(times), 3) for name, times in seconds.items()},
        "measured": {name: f"{time.strftime('%Y-%m-%d')}, {git_commit()}, {num_blocks} blocks" for name in ratio},
        "hardware": hardware(),
        "versions": versions(),
    }


def _time_pairs(blocks: dict, baselines: dict[str, str], num_blocks: int) -> tuple[dict, dict]:
    """Returns seconds a step and their ratios to the baseline's, {arm: one a pair}; the order alternates."""
    seconds, ratio = ({name: [] for name in blocks} for _ in range(2))
    for i in tqdm(range(-1, num_blocks), leave=False):
        for name, baseline in baselines.items():
            pair = sorted({baseline, name}, reverse=i % 2 == 0)
            measured = {arm: blocks[arm].seconds_a_step() for arm in pair}
            if i >= 0:  # the first compiles
                seconds[name].append(measured[name])
                ratio[name].append(measured[name] / measured[baseline])
    return seconds, ratio


class _Charged:
    """Asynchronous learners: the loop of one learner, with and without its gradient."""

    def __init__(self, config):
        self._learners = config.learner.asynchronous
        alone = config.copy_and_resolve_references()
        alone.learner.asynchronous = 1
        self._step, self._owner = _Block(alone), _Block(alone, with_gradient=False)

    def seconds_a_step(self) -> float:
        return charged(self._step.seconds_a_step(), self._owner.seconds_a_step(), self._learners)


def _without_gradient(config, parts):
    """Returns the parts with a step that takes a gradient in the place of the examples and computes none."""
    import jax
    import jax.numpy as jnp

    from issgd_jax.learning.learner import Gradient, Learner, Minibatch
    from issgd_jax.run import wiring
    from issgd_jax.task.images import make_problem

    class Owner(Learner):
        def gradient(self, params, step, drawn, examples):
            ones = jnp.ones_like(drawn.importance_weights)
            return Gradient(Minibatch(*drawn, ones), examples, ones, ones, jnp.bool(True), step)

    learner = wiring.make_learner(config, make_problem(config), wiring.make_optimizer(config))
    owner = Owner(**{field.name: getattr(learner, field.name) for field in dataclasses.fields(learner)})
    gradient = jax.tree.map(lambda p: 1e-6 * p, parts.train_state.params)
    train_steps = parts.train_steps and owner.compile_steps()
    return dataclasses.replace(parts, train_step=owner.compile(), train_steps=train_steps, train_examples=gradient)


class _Block:
    """Loop of one arm over a few rounds, from the start at each call."""

    def __init__(self, config, *, with_gradient: bool = True):
        from issgd_jax.run import wiring

        parts = dataclasses.replace(wiring.make_parts(config), measure=lambda *_: {"train/loss": 0.0})
        self._parts = parts if with_gradient else _without_gradient(config, parts)
        window = parts.window
        # A round enters at the last step, so that all rounds but one are waited for.
        self.num_steps = -(-MIN_STEPS // window) * window + 1

    def seconds_a_step(self) -> float:
        import jax
        import jax.numpy as jnp

        from issgd_jax.run import loop

        # The loop's first step donates the states.
        states = jax.tree.map(jnp.copy, (self._parts.train_state, self._parts.sampler_state))
        parts = dataclasses.replace(self._parts, train_state=states[0], sampler_state=states[1])
        progress = Progress(self.num_steps, shown=False, description="")
        plan = loop.Plan(self.num_steps, self.num_steps, strict=False, progress=progress)
        with (
            tempfile.TemporaryDirectory() as folder,
            metrics.MetricsWriter(pathlib.Path(folder), tensorboard=False) as writer,
        ):
            jax.block_until_ready(states)
            begun = time.perf_counter()
            jax.block_until_ready(loop.run(parts, plan, writer))
            seconds = time.perf_counter() - begun
        if parts.pool:  # the round still being scored must not slow the next block
            jax.block_until_ready(parts.pool.score_next(self._parts.train_state.params, 0)[0].scores)
        return seconds / self.num_steps


def main():
    flag = command.FLAGS
    measured = measure(flag.study, flag.data, arms=flag.arms, overrides=command.overrides(), num_blocks=_BLOCKS.value)
    save(measured)
    for name, ratio in measured["ratio"].items():
        print(f"{name:<24}{ratio:8.2f}{measured['milliseconds'][name]:10.2f} ms")


if __name__ == "__main__":
    command.run(main, without=("workdir", "seeds"))
