"""The fields of an experiment: every config has these, with these types; and the check that they make sense."""

import difflib
from typing import Any

from ml_collections import ConfigDict, config_dict

from issgd_jax.errors import InputError

LR_SCHEDULES = ("constant", "cosine", "linear")
SCHEDULES = ("exact", "relaxed", "free_running")
PROPOSALS = ("uniform", "proportional", "calibrated")


def default() -> ConfigDict:
    """All fields with their defaults; an experiment's file sets what differs."""
    return ConfigDict(
        {
            "seed": 0,
            "steps": 1000,  # learner updates
            "eval_every": 100,  # steps between measurements of whole splits
            "data": {
                "name": "digits",
                "dir": config_dict.placeholder(str),  # None: TFDS's default folder
                "train_split": "train",
                "test_split": "test",
            },
            "model": {
                "name": "mlp",
                "mlp": {"hidden_sizes": (256,) * 4, "init_stddev": config_dict.placeholder(float)},  # None: He 2015
                "convnet": {"channels": (32, 32, 64, 64), "dense_size": 256},
                "gru": {"units": 128},
                "transformer": {"num_layers": 2, "width": 64, "num_heads": 4, "patch_size": 4},
            },
            "learner": {
                "batch_size": 128,
                "optimizer": "sgd",  # any of optax by name
                "learning_rate": 0.01,
                "lr_schedule": "constant",  # or cosine, linear: decay to 0 at `steps`
                "momentum": 0.9,  # or the decay of the first moment (b1), where the optimizer has that instead
                "nesterov": True,
            },
            "workers": {"chunk_size": 2048},  # examples each worker scores in a round
            "devices": {
                "workers": config_dict.placeholder(int),  # None: all devices but the learner's
                "host_platform_count": 0,  # k > 0: simulate k devices on the CPU
            },
            "schedule": {
                "name": "relaxed",
                "steps_per_round": 32,  # learner steps from one round to the next (relaxed)
                "score_delay": 32,  # learner steps from a round's parameters to its scores' entry (relaxed)
            },
            "proposal": {
                "name": "calibrated",
                "smoothing": 1.0,  # proportional: v = score + smoothing
                "max_staleness": config_dict.placeholder(int),  # proportional: BIASED, drops older scores; None: keep
                "uniform_fraction": 0.2,  # calibrated: bounds importance weights by 1 / fraction
                "half_life": 1.0,  # calibrated: sweeps until an observation counts half
            },
            "monitor": {"examples": 2048},  # examples on which the variance is measured; >= 2
            "log": {"progress": True, "tensorboard": True},
        }
    )


def with_options(config: ConfigDict, options: str) -> ConfigDict:
    """Applies what follows the colon in `--config=FILE.py:options`: nothing, or `smoke` for a run of seconds on a CPU.

    Raises: InputError for any other option.
    """
    if options == "smoke":
        config.steps, config.eval_every = 40, 20
        config.data.train_split, config.data.test_split = "train[:1200]", "test[:300]"
        config.model.mlp.hidden_sizes = (32, 32)
        config.learner.batch_size = 32
        config.workers.chunk_size = 100
        config.devices.workers, config.devices.host_platform_count = 3, 4
        config.schedule.steps_per_round = config.schedule.score_delay = 4
        config.monitor.examples = 256
    elif options:
        raise InputError(f"unknown config option {options!r}: the only one is smoke, as in --config=FILE.py:smoke")
    return config


def fields(config: ConfigDict) -> list[str]:
    """Dotted names of all fields, groups left out."""
    return list(flatten(config))


def flatten(config: ConfigDict) -> dict[str, Any]:
    """{dotted name: value} of all fields."""
    flat = {}
    for name in config:
        value = config[name]
        if isinstance(value, ConfigDict):
            flat |= {f"{name}.{key}": leaf for key, leaf in flatten(value).items()}
        else:
            flat[name] = value
    return flat


def check_field(name: str) -> None:
    """Raises InputError, with the nearest names, unless the dotted `name` is a field."""
    known = fields(default())
    if name not in known:
        raise InputError(f"config has no field {name!r}: {nearest(name, known)}")


def nearest(name: str, known) -> str:
    """A hint for somebody who wrote `name` and meant one of `known`."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    group = [field for field in known if "." in name and field.startswith(name.rsplit(".", 1)[0] + ".")]
    if near:
        return f"did you mean {near[0]}?"
    return f"choose one of {', '.join(group or known)}"


def validate(config: ConfigDict) -> None:
    """Checks fields, types and ranges, whatever can be checked without data and devices.

    Raises: InputError that names the field, its value, the limit and the remedy.
    """
    expected, given = flatten(default()), flatten(config)
    for name in given:
        check_field(name)
    if missing := expected.keys() - given.keys():
        raise InputError(
            f"config lacks the field(s) {', '.join(sorted(missing))}: start from issgd_jax.config.default()"
        )

    for name, at_least in {
        "steps": 1,
        "eval_every": 1,
        "seed": 0,
        "learner.batch_size": 1,
        "workers.chunk_size": 1,
        "devices.workers": 1,
        "devices.host_platform_count": 0,
        "schedule.steps_per_round": 1,
        "schedule.score_delay": 0,
        "proposal.max_staleness": 0,
        "monitor.examples": 2,
        "model.convnet.dense_size": 1,
        "model.gru.units": 1,
        "model.transformer.num_layers": 1,
        "model.transformer.width": 1,
        "model.transformer.num_heads": 1,
        "model.transformer.patch_size": 1,
    }.items():
        _check_range(name, given[name], at_least)
    _check_range("learner.learning_rate", given["learner.learning_rate"], 0, strict=True)
    _check_range("learner.momentum", given["learner.momentum"], 0, below=1)
    _check_range("proposal.smoothing", given["proposal.smoothing"], 0)
    _check_range("proposal.uniform_fraction", given["proposal.uniform_fraction"], 0, below=1)
    _check_range("proposal.half_life", given["proposal.half_life"], 0, strict=True)
    for name in ("model.mlp.hidden_sizes", "model.convnet.channels"):
        for size in given[name]:
            _check_range(name, size, 1)
    if given["model.mlp.init_stddev"] is not None:
        _check_range("model.mlp.init_stddev", given["model.mlp.init_stddev"], 0, strict=True)
    transformer = config.model.transformer
    if transformer.width % transformer.num_heads:
        raise InputError(
            f"model.transformer.width must be a multiple of num_heads, got {transformer.width} "
            f"and {transformer.num_heads}"
        )
    for name, choices in {
        "model.name": [group for group in config.model if group != "name"],
        "learner.lr_schedule": LR_SCHEDULES,
        "schedule.name": SCHEDULES,
        "proposal.name": PROPOSALS,
    }.items():
        if given[name] not in choices:
            raise InputError(f"{name} must be one of {', '.join(choices)}, got {given[name]!r} (see --config.{name})")


def _check_range(name, value, at_least, *, below=None, strict=False):
    if value is None:
        return
    fits = value > at_least if strict else value >= at_least
    if not fits or (below is not None and not value < below) or value in (float("inf"), -float("inf")):
        limit = f"{'>' if strict else '>='} {at_least}" + (f" and < {below}" if below is not None else "")
        raise InputError(f"{name} must be {limit} and finite, got {value} (see --config.{name})")
