"""Train on the examples that matter: distributed importance sampling for SGD in JAX.

Public names load when they are first used: importing this package imports nothing else.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from issgd_jax import config as config
    from issgd_jax import gradnorm as gradnorm
    from issgd_jax import plots as plots
    from issgd_jax import sampling as sampling
    from issgd_jax.errors import BadScoreError as BadScoreError
    from issgd_jax.errors import InputError as InputError
    from issgd_jax.errors import NonFiniteLossError as NonFiniteLossError
    from issgd_jax.errors import ProcessLostError as ProcessLostError
    from issgd_jax.errors import StoppedError as StoppedError
    from issgd_jax.gradnorm import NoiseScale as NoiseScale
    from issgd_jax.gradnorm import average_noise_scale as average_noise_scale
    from issgd_jax.gradnorm import check as check
    from issgd_jax.gradnorm import clipped_grad as clipped_grad
    from issgd_jax.gradnorm import el2n as el2n
    from issgd_jax.gradnorm import explain as explain
    from issgd_jax.gradnorm import grand as grand
    from issgd_jax.gradnorm import noise_scale as noise_scale
    from issgd_jax.gradnorm import per_example as per_example
    from issgd_jax.gradnorm import per_example_grad_norms as per_example_grad_norms
    from issgd_jax.gradnorm import value_grad_and_norms as value_grad_and_norms
    from issgd_jax.learning.potential import potential as potential
    from issgd_jax.learning.rate_by_gain import rate_by_gain as rate_by_gain
    from issgd_jax.loading.prefetch import Prefetch as Prefetch
    from issgd_jax.run.training import train as train
    from issgd_jax.sampling import Calibrated as Calibrated
    from issgd_jax.sampling import Draw as Draw
    from issgd_jax.sampling import Mixture as Mixture
    from issgd_jax.sampling import Proportional as Proportional
    from issgd_jax.sampling import Sampler as Sampler
    from issgd_jax.sampling import SamplerState as SamplerState
    from issgd_jax.sampling import ScoreStore as ScoreStore
    from issgd_jax.sampling import Table as Table
    from issgd_jax.sampling import Uniform as Uniform
    from issgd_jax.sampling import build_table as build_table
    from issgd_jax.sampling import draw as draw
    from issgd_jax.sampling import uniform_table as uniform_table
    from issgd_jax.scoring.scores import GradientNorm as GradientNorm
    from issgd_jax.scoring.scores import PerExample as PerExample
    from issgd_jax.scoring.scores import last_layer as last_layer
    from issgd_jax.scoring.sweep import score_all as score_all
    from issgd_jax.scoring.workers import WorkerPool as WorkerPool
    from issgd_jax.task.data import Dataset as Dataset
    from issgd_jax.task.data import load as load
    from issgd_jax.task.problem import Problem as Problem

    __version__: str

# Where each name is defined; a test holds this to the imports above.
_MODULE_OF = {
    "train": "run.training",
    "Problem": "task.problem",
    "load": "task.data",
    "Dataset": "task.data",
    "per_example": "gradnorm",
    "per_example_grad_norms": "gradnorm",
    "value_grad_and_norms": "gradnorm",
    "clipped_grad": "gradnorm",
    "check": "gradnorm",
    "el2n": "gradnorm",
    "grand": "gradnorm",
    "noise_scale": "gradnorm",
    "average_noise_scale": "gradnorm",
    "NoiseScale": "gradnorm",
    "explain": "gradnorm",
    "Sampler": "sampling",
    "SamplerState": "sampling",
    "ScoreStore": "sampling",
    "Uniform": "sampling",
    "Proportional": "sampling",
    "Mixture": "sampling",
    "Calibrated": "sampling",
    "Draw": "sampling",
    "Table": "sampling",
    "build_table": "sampling",
    "uniform_table": "sampling",
    "draw": "sampling",
    "rate_by_gain": "learning.rate_by_gain",
    "potential": "learning.potential",
    "Prefetch": "loading.prefetch",
    "GradientNorm": "scoring.scores",
    "PerExample": "scoring.scores",
    "last_layer": "scoring.scores",
    "score_all": "scoring.sweep",
    "WorkerPool": "scoring.workers",
    "InputError": "errors",
    "NonFiniteLossError": "errors",
    "BadScoreError": "errors",
    "StoppedError": "errors",
    "ProcessLostError": "errors",
}
_MODULES = ("config", "gradnorm", "plots", "sampling")
__all__ = [*_MODULE_OF, *_MODULES]  # noqa: PLE0604
# Libraries of the extra `train` that the core does without, by what needs one.
_LIBRARY_OF = {"train": "flax", "Problem": "flax", "load": "sklearn", "config": "ml_collections", "plots": "matplotlib"}


if not TYPE_CHECKING:  # a type checker that saw it would accept any name

    def __getattr__(name):
        if name == "__version__":
            from importlib import metadata

            return metadata.version("issgd-jax")
        if name not in __all__:
            raise AttributeError(f"module 'issgd_jax' has no attribute {name!r}")
        if name in _LIBRARY_OF:
            from issgd_jax.extras import check_extra

            check_extra(f"issgd_jax.{name}", _LIBRARY_OF[name])
        module = importlib.import_module(f"issgd_jax.{_MODULE_OF.get(name, name)}")
        return module if name in _MODULES else getattr(module, name)


def __dir__():
    return [*__all__, "__version__"]
