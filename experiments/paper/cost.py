"""What a step of each arm costs where one device does everything: its time against a step of its baseline.

    python -m experiments.paper.cost --study=fair --data=fashion_mnist [--width=...] [--data_dir=...]

Blocks of steps, each a run of `issgd_jax.loop` without its measurements, go in pairs, an arm's and its baseline's, of
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
from issgd_jax.provenance import versions
from issgd_jax.run import metrics

# Steps of a block, at least: enough that its beginning does not count.
MIN_STEPS = 100

_BLOCKS = flags.DEFINE_integer("blocks", 15, "Blocks of each arm.")


def path_of(study: str, data: str) -> pathlib.Path:
    """Where the costs are kept."""
    return results.FOLDER / f"cost-{study}-{data}.json"


def load(study: str, data: str) -> dict[str, float]:
    """{arm: cost of a step in steps of its baseline}; empty if it was not measured."""
    try:
        return json.loads(path_of(study, data).read_text())["ratio"]
    except FileNotFoundError:
        return {}


def save(measured: dict) -> None:
    """Keeps what was measured, with the costs of other arms that were measured alike."""
    path = path_of(measured["study"], measured["data"])
    path.parent.mkdir(exist_ok=True)
    kept = json.loads(path.read_text()) if path.exists() else measured
    if all(kept[name] == measured[name] for name in ("network", "hardware", "versions")):
        measured = measured | {name: kept[name] | measured[name] for name in ("ratio", "milliseconds")}
    path.write_text(json.dumps(measured, indent=2) + "\n")


def charged(step: float, owner: float, learners: int) -> float:
    """What an update by k asynchronous learners would take if each had a device like this one, and sent for nothing.

    step: time of a step on one device. owner: the part of it that only the owner of the parameters can do: draw,
    update, refresh, renewals of the table. The rest, the gradient, is done by k at once.
    """
    return (step - owner) / learners + owner


def measure(study: str, data: str, *, arms: list[str] | None, overrides: dict, num_blocks: int) -> dict:
    """Measures all arms of a study; see the module."""
    from experiments.benchmarks.environment import hardware

    the_study = studies.get_study(study)
    chosen = studies.choose_arms(the_study, data, studies.with_baselines(the_study, arms))
    blocks = {}
    for name, arm in chosen.items():
        rate = min(arm.learning_rates or the_study.learning_rates)
        config = studies.make_config(the_study, name, data, overrides=overrides, learning_rate=rate, seed=0)
        blocks[name] = _Charged(config) if config.learner.asynchronous > 1 else _Block(config)
    seconds, ratio = ({name: [] for name in blocks} for _ in range(2))
    for i in tqdm(range(-1, num_blocks), leave=False):
        for name in blocks:
            baseline = studies.baseline_of(the_study, name)
            pair = sorted({baseline, name}, reverse=i % 2 == 0)
            measured = {one: blocks[one].seconds_a_step() for one in pair}
            if i >= 0:  # the first compiles
                seconds[name].append(measured[name])
                ratio[name].append(measured[name] / measured[baseline])
    return {
        "study": study,
        "data": data,
        "network": results.network_of(the_study, config.to_dict()),
        "command": f"python -m experiments.paper.cost --study={study} --data={data}",
        "ratio": {name: round(statistics.median(xs), 3) for name, xs in ratio.items()},
        "milliseconds": {name: round(1e3 * statistics.median(times), 3) for name, times in seconds.items()},
        "blocks": num_blocks,
        "hardware": hardware(),
        "versions": versions(),
    }


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
    """The same, with a step that is given a gradient in the place of the examples, and has nothing to compute of it."""
    import jax
    import jax.numpy as jnp

    from issgd_jax.learning import learner
    from issgd_jax.run import wiring
    from issgd_jax.task.problem import make_problem

    def given(params, step, drawn, gradient):
        del params
        ones = jnp.ones_like(drawn.importance_weights)
        return learner.Gradient(learner.Minibatch(*drawn, ones), gradient, ones, ones, jnp.bool(True), step)

    problem = make_problem(config)
    stages = wiring.make_stages(config, problem, wiring.make_optimizer(config), seed=config.seed)
    step = learner.compile_step(dataclasses.replace(stages, gradient=given))
    gradient = jax.tree.map(lambda p: 1e-6 * p, parts.train_state.params)
    return dataclasses.replace(parts, train_step=step, train_examples=gradient)


class _Block:
    """The loop of one arm over a few rounds, each time from the start."""

    def __init__(self, config, *, with_gradient: bool = True):
        from issgd_jax.run import wiring

        parts = dataclasses.replace(wiring.make_parts(config), measure=lambda *_: {"train/loss": 0.0})
        self._parts = parts if with_gradient else _without_gradient(config, parts)
        self._window = config.schedule.steps_per_round
        # The last step is one at which a round enters, so that all but one are waited for.
        self.num_steps = -(-MIN_STEPS // self._window) * self._window + 1

    def seconds_a_step(self) -> float:
        import jax
        import jax.numpy as jnp

        from issgd_jax.run import loop

        # The loop's first step takes over the memory of what it starts with.
        train_state, sampler = jax.tree.map(jnp.copy, (self._parts.train_state, self._parts.sampler))
        parts = dataclasses.replace(self._parts, train_state=train_state, sampler=sampler)
        progress = metrics.Progress(self.num_steps, shown=False, description="")
        plan = loop.Plan(self.num_steps, self.num_steps, self._window, strict=False, progress=progress)
        with (
            tempfile.TemporaryDirectory() as folder,
            metrics.MetricsWriter(pathlib.Path(folder), tensorboard=False) as writer,
        ):
            jax.block_until_ready((train_state, sampler))
            begun = time.perf_counter()
            jax.block_until_ready(loop.run(parts, plan, writer))
            seconds = time.perf_counter() - begun
        if parts.pool:  # the one round that nobody waited for must not slow the next block
            jax.block_until_ready(parts.pool.score_next(self._parts.train_state.params, 0)[0].scores)
        return seconds / self.num_steps


def main():
    flag = flags.FLAGS
    measured = measure(flag.study, flag.data, arms=flag.arms, overrides=command.overrides(), num_blocks=_BLOCKS.value)
    save(measured)
    for name, ratio in measured["ratio"].items():
        print(f"{name:<24}{ratio:8.2f}{measured['milliseconds'][name]:10.2f} ms")


if __name__ == "__main__":
    command.run(main)
