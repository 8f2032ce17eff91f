"""What is compared with what: studies, their arms, and the experiment behind each. Imports no jax.

A study has a base experiment and arms; an arm is a set of overrides and the learning rates that it is tuned over. Runs
lie in `WORKDIR/STUDY/DATA/ARM/lr=RATE/seed=SEED`.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from experiments.configs import digits, fashion_mnist, svhn_paper_set1
from issgd_jax.config import nearest
from issgd_jax.errors import InputError

# Seeds on which the learning rate of an arm is chosen, by the median of its final training loss.
TUNING_SEEDS = 2
# Seeds that are enough where an arm only gives context.
CONTEXT_SEEDS = 5


@dataclasses.dataclass(frozen=True)
class Arm:
    """One line of a comparison.

    label: for figures. overrides: {dotted field of the config: value}. learning_rates: the grid it is tuned over; None
    = the study's. context: whether five seeds are enough, as nothing is claimed of it.
    """

    label: str
    overrides: Mapping[str, Any]
    learning_rates: tuple[float, ...] | None = None
    context: bool = False


@dataclasses.dataclass(frozen=True)
class Study:
    """title: for figures. base: overrides of the data's experiment, for all arms. arms: {name: Arm}, the first one is
    what the others are compared with. learning_rates: the grid. data: names of DATA that it is made for."""

    title: str
    base: Mapping[str, Any]
    arms: Mapping[str, Arm]
    learning_rates: tuple[float, ...]
    data: tuple[str, ...]


_ONE_DEVICE = {
    "devices.workers": None,
    "devices.host_platform_count": 0,
    "log.progress": False,
    "log.tensorboard": False,
}


def _on(get_config, **overrides):
    return get_config, _ONE_DEVICE | {name.replace("__", "."): value for name, value in overrides.items()}


# {name: (function that gives the config, overrides)}; the chunk is what one worker scores in ten steps.
DATA = {
    "fashion_mnist": _on(fashion_mnist.get_config),
    "svhn": _on(
        fashion_mnist.get_config, data__name="svhn_cropped", data__train_split="train", data__test_split="test"
    ),
    "svhn_extra": _on(svhn_paper_set1.get_config, schedule__steps_per_round=10, schedule__score_delay=10),
    "digits": _on(digits.get_config, workers__chunk_size=360, eval_every=50),
}

_UNIFORM = {"proposal.name": "uniform"}
_REFRESH_ONLY = {"workers.enabled": False}


def _issgd(smoothing: float) -> dict:
    """The paper's: additive smoothing, no refresh, draws with replacement."""
    return {
        "proposal.name": "proportional",
        "proposal.smoothing": smoothing,
        "learner.refresh": False,
        "learner.draw": "independent",
    }


def _workers(examples: int, steps: int) -> dict:
    """So many examples scored every so many steps, known as many steps later."""
    return {"workers.chunk_size": examples, "schedule.steps_per_round": steps, "schedule.score_delay": steps}


def _paper_pairs() -> dict[str, Arm]:
    """The full 2 x 2: both arms of a pair have the same learning rate, and SGD does not depend on the smoothing."""
    arms = {}
    for rate in (0.01, 0.001):
        arms[f"sgd_lr{rate}"] = Arm(f"SGD, rate {rate}", _UNIFORM, (rate,))
        for smoothing in (10.0, 1.0):
            label = f"ISSGD, rate {rate}, c = {smoothing:g}"
            arms[f"issgd_lr{rate}_c{smoothing:g}"] = Arm(label, _issgd(smoothing), (rate,))
        arms[f"calibrated_lr{rate}"] = Arm(f"calibrated, rate {rate}", {}, (rate,))
    return arms


STUDIES = {
    "svhn": Study(
        title="The paper's experiment",
        # The paper's network, momentum, batch, chunk and cadence: three workers with 2,048 examples in 32 steps.
        base={
            "learner.momentum": 0.95,
            "model.mlp.init_stddev": 0.01,
            "model.mlp.hidden_sizes": (2048,) * 4,
            "workers.chunk_size": 3 * 2048,
            "schedule.steps_per_round": 32,
            "schedule.score_delay": 32,
            "eval_every": 800,
        },
        arms=_paper_pairs(),
        learning_rates=(),
        data=("svhn", "svhn_extra", "fashion_mnist"),
    ),
    "fair": Study(
        title="Equal cost, each arm at its own best rate",
        base={},
        arms={
            "uniform": Arm("SGD, i.i.d.", _UNIFORM | {"learner.draw": "independent"}),
            "issgd_c10": Arm("paper's ISSGD, c = 10", _issgd(10.0), context=True),
            "issgd_c1": Arm("paper's ISSGD, c = 1", _issgd(1.0), context=True),
            "calibrated_refresh": Arm("calibrated, refresh alone", _REFRESH_ONLY),
            "calibrated_workers": Arm("calibrated, workers alone", {"learner.refresh": False}, context=True),
            "calibrated": Arm("calibrated, workers and refresh", {}),
            "calibrated_50": Arm("calibrated, a worker at a quarter of its time", _workers(500, 10)),
            "calibrated_3": Arm("calibrated, three workers and refresh", _workers(3 * 400, 2)),
            "calibrated_7": Arm("calibrated, seven workers and refresh", _workers(7 * 400, 2)),
        },
        learning_rates=(0.005, 0.01, 0.02, 0.05),
        data=("fashion_mnist", "svhn", "digits"),
    ),
}


def get_study(name: str) -> Study:
    """Raises InputError, with the nearest name, if there is no such study."""
    if name not in STUDIES:
        raise InputError(f"no study {name!r}: {nearest(name, list(STUDIES))}")
    return STUDIES[name]


def choose_arms(study: Study, names: list[str] | None) -> dict[str, Arm]:
    """The arms of these names, all for None.

    Raises: InputError, with the nearest name, if there is no such arm.
    """
    for name in names or ():
        if name not in study.arms:
            raise InputError(f"no arm {name!r}: {nearest(name, list(study.arms))}")
    return {name: arm for name, arm in study.arms.items() if not names or name in names}


def check_data(study: Study, data: str) -> None:
    """Raises InputError, with the nearest name, if the study is not made for such data."""
    if data not in study.data:
        raise InputError(f"this study has no data {data!r}: {nearest(data, list(study.data))}")


def make_config(
    study: Study, arm: Arm, data: str, *, overrides: Mapping[str, Any] = {}, learning_rate: float, seed: int
) -> ConfigDict:
    """The experiment of one run; raises as check_data."""
    check_data(study, data)
    get_config, of_data = DATA[data]
    config = get_config()
    chosen = {"seed": seed, "learner.learning_rate": learning_rate}
    with config.ignore_type():
        config.update_from_flattened_dict({**of_data, **study.base, **arm.overrides, **overrides, **chosen})
    return config


def folder(workdir: pathlib.Path, study: str, data: str, arm: str, learning_rate: float, seed: int) -> pathlib.Path:
    """Where a run lies."""
    return workdir / study / data / arm / f"lr={learning_rate:g}" / f"seed={seed}"
