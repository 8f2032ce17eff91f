"""A study: a base config, and arms that are compared; and the config of each of its runs. Imports no jax."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from experiments.configs import digits, fashion_mnist, svhn_paper_set1
from issgd_jax.config import default, nearest
from issgd_jax.errors import InputError

_ONE_DEVICE = {
    "devices.workers": None,
    "devices.host_platform_count": 0,
    "log.progress": False,
    "log.tensorboard": False,
    "learner.draw": "systematic",  # unless an arm says otherwise
}


def _on(get_config, **overrides):
    return get_config, _ONE_DEVICE | {name.replace("__", "."): value for name, value in overrides.items()}


# {name: (function that returns the config, overrides)}. A worker (on digits three) scores a chunk in ten steps.
DATA = {
    "fashion_mnist": _on(fashion_mnist.get_config),
    "svhn": _on(
        fashion_mnist.get_config, data__name="svhn_cropped", data__train_split="train", data__test_split="test"
    ),
    "svhn_extra": _on(svhn_paper_set1.get_config, steps=48_000, learner__refresh=True),  # a multiple of eval_every
    "digits": _on(digits.get_config, workers__chunk_size=360, eval_every=50),
    "text": _on(
        default,
        problem="experiments.paper.text:make_problem",
        learner__optimizer="adam",
        learner__momentum=0.9,
        learner__batch_size=16,
        monitor__examples=512,  # a quarter of the usual: norms of 512 cost as much as 32 steps
        steps=1000,
        eval_every=500,
    ),
}


@dataclasses.dataclass(frozen=True)
class Arm:
    """One line of a comparison.

    Attributes:
      label: for figures and tables.
      overrides: {dotted field of the config: value}.
      learning_rates: the grid it is tuned over; None: the study's.
      context: whether a few seeds are enough, because nothing is claimed of it.
      baseline: name of the arm it is compared with; None: the study's first.
      data: names in DATA that it is made for; None: the study's.
    """

    label: str
    overrides: Mapping[str, Any]
    learning_rates: tuple[float, ...] | None = None
    context: bool = False
    baseline: str | None = None
    data: tuple[str, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Study:
    """One comparison.

    Attributes:
      base: overrides of the data set's config, for all arms.
      arms: {name: Arm}.
      learning_rates: the grid that arms are tuned over.
      data: names in DATA that it is made for.
      on_data: {name in DATA: overrides that all arms need there}.
      rates_on: {name in DATA: the grid there, where it is another}.
    """

    base: Mapping[str, Any]
    arms: Mapping[str, Arm]
    learning_rates: tuple[float, ...]
    data: tuple[str, ...]
    on_data: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    rates_on: Mapping[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)

    def choose_arms(self, data: str, names: list[str] | None = None) -> dict[str, Arm]:
        """Returns the arms on a data set, or those of the given names.

        Raises:
          InputError: there is no such arm, or the study is not made for the data; names the nearest.
        """
        if data not in self.data:
            raise InputError(f"this study has no data {data!r}: {nearest(data, list(self.data))}")
        arms = {name: arm for name, arm in self.arms.items() if arm.data is None or data in arm.data}
        for name in names or ():
            if name not in arms:
                raise InputError(f"no arm {name!r} on {data}: {nearest(name, list(arms))}")
        return {name: arm for name, arm in arms.items() if not names or name in names}

    def rates(self, arm: str, data: str) -> tuple[float, ...]:
        """Returns the grid that an arm is tuned over."""
        return self.arms[arm].learning_rates or self.rates_on.get(data, self.learning_rates)

    def baseline_of(self, name: str) -> str:
        """Returns the name of the arm that an arm is compared with."""
        return (self.arms[name].baseline if name in self.arms else None) or next(iter(self.arms))

    def with_baselines(self, names: list[str] | None) -> list[str]:
        """Returns the names and those of their baselines; [] for none.

        Example:
          >>> arms = {"sgd": Arm("SGD", {}), "calibrated": Arm("calibrated", {})}
          >>> Study({}, arms, learning_rates=(0.01,), data=("digits",)).with_baselines(["calibrated"])
          ['calibrated', 'sgd']
        """
        return sorted({*(names or ()), *(self.baseline_of(name) for name in names or ())})

    def config(
        self, arm: str, data: str, *, overrides: Mapping[str, Any] = {}, learning_rate: float, seed: int
    ) -> ConfigDict:
        """Returns the config of one run."""
        get_config, data_overrides = DATA[data]
        config = get_config()
        run = {"seed": seed, "learner.learning_rate": learning_rate}
        with config.ignore_type():
            config.update_from_flattened_dict(
                {
                    **data_overrides,
                    **self.base,
                    **self.arms[arm].overrides,
                    **self.on_data.get(data, {}),
                    **overrides,
                    **run,
                }
            )
        return config
