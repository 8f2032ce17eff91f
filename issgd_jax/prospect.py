"""Measures what importance sampling could gain for an experiment, after some steps of plain SGD.

    issgd-jax potential [--config=FILE.py] [--config.FIELD=VALUE ...] [--after=STEPS]

Prints √Tr Σ of uniform and ideal draws, the gain, the share of noise, the cost on this device, and a verdict. Writes
nothing.
"""

import math

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict

from issgd_jax import main as main_lib
from issgd_jax.config import parsers
from issgd_jax.errors import InputError
from issgd_jax.learning.potential import Potential, potential
from issgd_jax.run import wiring
from issgd_jax.task.problem import minibatch_size

_AFTER = parsers.define_optional(
    "after", int, "Steps of plain SGD before the measurement; None: as many as make an epoch."
)
_SAMPLE = flags.DEFINE_integer("sample", 2048, "Training examples that are measured.", lower_bound=16)
flags.adopt_module_key_flags(main_lib)  # so that --help lists them
# One learner of plain SGD, whatever the config says of workers.
_PLAIN = {
    "proposal.name": "uniform",
    "proposal.when": "on",
    "learner.draw": "systematic",
    "learner.rate_by_gain": False,
    "learner.limit": None,
    "learner.asynchronous": 1,
    "devices.learners": 1,
    "cluster.address": None,
    "cluster.workers": None,
    "workers.enabled": False,
}


def measure(config: ConfigDict, *, after: int | None = None, sample: int = 2048) -> Potential:
    """Returns the potential of an experiment, see `learning.potential.potential`.

    Args:
      config: of the experiment.
      after: steps of plain SGD before the measurement; None: as many as make an epoch.
      sample: training examples that are measured.

    Raises:
      InputError: the config cannot work, or a gradient is not finite.
    """
    plain = config.copy_and_resolve_references()
    with plain.ignore_type():
        plain.update_from_flattened_dict(_PLAIN)
    prepared = wiring.prepare(plain)
    parts, problem = wiring.build(prepared), prepared.problem
    batch_size = minibatch_size(plain)
    steps = math.ceil(parts.sampler.num_examples / batch_size) if after is None else after
    state, sampler_state = parts.train_state, parts.sampler_state
    for _ in range(steps):
        state, sampler_state, _ = parts.train_step(state, sampler_state, parts.sampler, parts.train_examples)
    params = jax.device_put(state.params, parts.learner_device)
    source = problem.source("train")
    try:
        return potential(problem.loss_fn, params, source, batch_size=batch_size, sample=sample, keyed=problem.keyed)
    except ValueError as error:  # of the data, or of a rate with which training diverges
        raise InputError(str(error)) from error


def main(argv: list[str]) -> None:
    """Measures as the flags say."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}; options begin with --")
    logging.set_verbosity(logging.WARNING)
    print(measure(main_lib.experiment(), after=_AFTER.value, sample=_SAMPLE.value))
