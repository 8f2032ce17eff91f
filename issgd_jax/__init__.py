"""Train on the examples that matter: distributed importance sampling for SGD in JAX.

The pieces work alone and load when first used: importing this package imports nothing else.
"""

import importlib

_HOME = {
    "train": "training",
    "load": "data",
    "Dataset": "data",
    "per_example_grad_norms": "gradnorm",
    "value_grad_and_norms": "gradnorm",
    "explain": "gradnorm",
    "ScoreStore": "store",
    "Uniform": "proposal",
    "Proportional": "proposal",
    "Mixture": "proposal",
    "Calibrated": "calibrated",
    "GradientNorm": "scores",
    "PerExample": "scores",
    "last_layer": "scores",
    "Draw": "sampling",
    "Table": "sampling",
    "build_table": "sampling",
    "uniform_table": "sampling",
    "draw": "sampling",
    "WorkerPool": "workers",
    "InputError": "errors",
    "NonFiniteLossError": "errors",
    "BadScoreError": "errors",
    "StoppedError": "errors",
    "ProcessLostError": "errors",
}
_MODULES = (
    "calibrated", "checkpoint", "config", "data", "evaluate", "gradnorm", "learner", "losses", "metrics", "models",
    "plots", "proposal", "sampling", "schedule", "scores", "store", "training", "variance", "wiring", "workdir",
    "workers",
)  # fmt: skip
__all__ = [*_HOME, *_MODULES]  # noqa: PLE0604


def __getattr__(name):
    if name in _HOME:
        return getattr(importlib.import_module(f"issgd_jax.{_HOME[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"issgd_jax.{name}")
    raise AttributeError(f"module 'issgd_jax' has no attribute {name!r}")


def __dir__():
    return __all__
