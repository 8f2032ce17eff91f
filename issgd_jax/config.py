"""The fields of an experiment: every config has these, with these types; and the check that they make sense."""

import difflib
import re
from typing import Any

from ml_collections import ConfigDict, config_dict

from issgd_jax.errors import InputError

LR_SCHEDULES = ("constant", "cosine", "linear")
SCHEDULES = ("exact", "relaxed", "free_running")
DRAWS = ("systematic", "independent", "without_replacement", "shuffled", "random_subset")
UNIFORM_DRAWS = ("shuffled", "random_subset")
SCORES = ("gradient_norm", "last_layer", "loss")
PROPOSALS = ("uniform", "proportional", "mixture", "calibrated")
WHEN = ("on", "off", "auto")
ON_NONFINITE = ("stop", "skip")
MAX_ROUNDS_IN_FLIGHT = 16

_LARGEST = 2**31 - 1
_INTEGERS = {
    "seed": (0, 2**32 - 1),  # what a JAX key takes without x64
    "steps": (1, 2**30 - 1),
    "eval_every": (1, _LARGEST),
    "learner.batch_size": (1, _LARGEST),
    "learner.asynchronous": (1, 1024),
    "learner.max_gradient_delay": (0, _LARGEST),
    "workers.chunk_size": (1, _LARGEST),
    "devices.learners": (1, _LARGEST),
    "devices.workers": (1, _LARGEST),
    "devices.host_platform_count": (0, 1024),
    "cluster.workers": (1, 100_000),
    "distributed.num_processes": (1, _LARGEST),
    "distributed.process_id": (0, _LARGEST),
    "schedule.steps_per_round": (1, _LARGEST),
    "schedule.score_delay": (0, _LARGEST),
    "proposal.max_staleness": (0, _LARGEST),
    "monitor.examples": (2, _LARGEST),
    "checkpoint.every_steps": (0, _LARGEST),
    "checkpoint.keep": (1, _LARGEST),
    "model.convnet.dense_size": (1, _LARGEST),
    "model.gru.units": (1, _LARGEST),
    "model.transformer.num_layers": (1, _LARGEST),
    "model.transformer.width": (1, _LARGEST),
    "model.transformer.num_heads": (1, _LARGEST),
    "model.transformer.patch_size": (1, _LARGEST),
}
# Bounds that float32 can square and sum.
_POSITIVE = ("> 0 and <= 1e+30", lambda x: 0 < x <= 1e30)
_REALS = {
    "learner.learning_rate": _POSITIVE,
    "learner.momentum": (">= 0 and < 1", lambda x: 0 <= x < 1),
    "proposal.smoothing": (">= 0 and <= 1e+15", lambda x: 0 <= x <= 1e15),
    "proposal.uniform_fraction": (">= 0 and <= 0.999", lambda x: 0 <= x <= 0.999),
    "proposal.half_life": _POSITIVE,
    "proposal.cost": (">= 0 and <= 1e+30", lambda x: 0 <= x <= 1e30),
    "model.mlp.init_stddev": _POSITIVE,
    "watchdog_seconds": ("> 0 and <= 1e+9", lambda x: 0 < x <= 1e9),
}


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
                "batch_size": 128,  # of each learner device
                "optimizer": "sgd",  # any of optax by name
                "learning_rate": 0.01,
                "lr_schedule": "constant",  # or cosine, linear: decay to 0 at `steps`
                "momentum": 0.9,  # or the decay of the first moment (b1), where the optimizer has that instead
                "nesterov": True,
                # or independent, without_replacement; uniformly also shuffled (epochs), random_subset (of a third)
                "draw": "systematic",
                "refresh": True,  # the norms of each minibatch become its examples' scores; not with uniform
                "asynchronous": 1,  # k learners, each at its own pace: gradients are k - 1 updates old on the average
                "max_gradient_delay": config_dict.placeholder(int),  # free_running, in updates; None: 2 * (k - 1)
            },
            "workers": {
                "enabled": True,  # False: only the learner's own refresh gives scores
                "chunk_size": 2048,  # examples each worker scores in a round
                "score": "gradient_norm",  # or last_layer (its gradient at the logits), loss
                "strict": False,  # True: a score that is NaN, infinite or negative stops the run; else it is left out
            },
            "devices": {
                "learners": 1,  # devices, of all processes, that share every minibatch of learners * batch_size
                "workers": config_dict.placeholder(
                    int
                ),  # None: all but the learners', or those; in a cluster, of each machine
                "host_platform_count": 0,  # k > 0: simulate k devices on the CPU of each process
            },
            "distributed": {  # a learner that spans processes: all run the same command, but for process_id
                "coordinator": config_dict.placeholder(str),  # host:port of process 0; auto: as JAX finds out
                "num_processes": config_dict.placeholder(int),
                "process_id": config_dict.placeholder(int),
            },
            "cluster": {
                "address": config_dict.placeholder(str),  # of Ray: auto, HOST:PORT, or local, which starts one here
                "workers": config_dict.placeholder(int),  # None: one on every machine but the learner's
            },
            "schedule": {
                "name": "relaxed",
                "steps_per_round": 32,  # learner steps from one round to the next (relaxed)
                "score_delay": 32,  # learner steps from a round's parameters to its scores' entry (relaxed)
            },
            "proposal": {
                "name": "calibrated",
                "when": "on",  # or off; auto: while the gradient is steadied by more than steps are slowed
                "cost": config_dict.placeholder(float),  # auto: of a step, in uniform steps; None: measured
                "smoothing": 1.0,  # proportional, mixture: v = score + smoothing
                "relative": False,  # smoothing in units of the mean score
                "max_staleness": config_dict.placeholder(int),  # proportional: BIASED, drops older scores; None: keep
                "uniform_fraction": config_dict.placeholder(float),  # calibrated, mixture; None: learned on line
                "half_life": 1.0,  # calibrated: sweeps until an observation counts half
            },
            "monitor": {"examples": 2048},  # examples on which the variance is measured; >= 2
            "checkpoint": {
                "every_steps": 1000,  # also at signals, at the end, and where the test error is the best; 0: none
                "keep": 3,  # the newest, and the best by test error
            },
            "on_nonfinite": "stop",  # or skip: BIASED, drops an update whose loss or gradient is not finite
            "watchdog_seconds": 600.0,  # without a finished step until the stacks of all threads are reported
            "log": {
                "progress": True,
                "tensorboard": True,
                "explain": False,  # print how the gradient norm of each parameter is computed
            },
        }
    )


def samples_by_importance(config: ConfigDict) -> bool:
    """Returns whether examples are drawn by their scores, not uniformly."""
    return config.proposal.name != "uniform"


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


def flatten(config: ConfigDict | dict) -> dict[str, Any]:
    """{dotted name: value} of all fields."""
    return {name: group[key] for name, group, key in _leaves(ConfigDict(config))}


def _leaves(config: ConfigDict, prefix: str = ""):
    """Every field as (dotted name, the group that holds it, its key there)."""
    for key in config:
        if isinstance(config[key], ConfigDict):
            yield from _leaves(config[key], f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", config, key


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

    for name, group, key in _leaves(default()):
        _check_type(name, given[name], group.get_type(key), optional=group[key] is None)
    for name, (low, high) in _INTEGERS.items():
        _check_range(name, given[name], f"between {low:,} and {high:,}", lambda x, low=low, high=high: low <= x <= high)
    for name, (limit, fits) in _REALS.items():
        _check_range(name, given[name], limit, fits)
    for name in ("model.mlp.hidden_sizes", "model.convnet.channels"):
        for size in given[name]:
            _check_range(name, size, "sizes >= 1", lambda x: type(x) is int and 1 <= x <= _LARGEST)
    for name in ("data.name", "data.train_split", "data.test_split"):
        if not given[name]:
            raise InputError(f"{name} is empty (see --config.{name})")
    _check_asynchronous(config)
    if config.proposal.name != "uniform":
        _check_scoring(config)
    _check_transformer(config.model.transformer)
    _check_distributed(config)
    for name, choices in {
        "model.name": [group for group in config.model if group != "name"],
        "learner.lr_schedule": LR_SCHEDULES,
        "schedule.name": SCHEDULES,
        "proposal.name": PROPOSALS,
        "proposal.when": WHEN,
        "learner.draw": DRAWS,
        "workers.score": SCORES,
        "on_nonfinite": ON_NONFINITE,
    }.items():
        if given[name] not in choices:
            raise InputError(f"{name} must be one of {', '.join(choices)}, got {given[name]!r} (see --config.{name})")


def _check_transformer(transformer):
    if transformer.width % transformer.num_heads:
        raise InputError(
            f"model.transformer.width must be a multiple of num_heads, got {transformer.width} "
            f"and {transformer.num_heads}"
        )


def _check_distributed(config):
    coordinator, *place = given = [config.distributed[name] for name in ("coordinator", "num_processes", "process_id")]
    if given == [None] * 3:
        return
    if coordinator == "auto":
        if place != [None, None]:
            raise InputError(
                f"distributed.coordinator is auto, which finds num_processes and process_id, but they are {place[0]} "
                f"and {place[1]}: leave them out, or give host:port"
            )
    elif None in given or not re.fullmatch(r".+:\d+", coordinator):
        raise InputError(
            f"distributed.coordinator must be host:port of process 0, with num_processes and process_id, or auto, got "
            f"{coordinator!r}, {place[0]} and {place[1]} (see --config.distributed)"
        )
    elif place[1] >= place[0]:
        raise InputError(f"distributed.process_id must be below num_processes, got {place[1]} of {place[0]}")
    if config.proposal.name == "uniform":
        return
    if config.schedule.name == "free_running" and config.workers.enabled:
        raise InputError(
            "schedule.name is free_running, whose scores enter when they are ready, but with --config.distributed they "
            "must enter everywhere at the same step: use relaxed or exact"
        )
    if config.proposal.when == "auto" and config.proposal.cost is None:
        raise InputError(
            "proposal.when is auto and measures the cost of a step, which differs between processes: give it by "
            "--config.proposal.cost, or use --config.proposal.when=on"
        )


def _check_asynchronous(config):
    learner, sharing = config.learner, config.devices.learners > 1 or config.distributed.coordinator is not None
    least = learner.asynchronous - 1
    if least and sharing:
        raise InputError(
            f"learner.asynchronous is {learner.asynchronous}, learners with a minibatch each, but devices.learners is "
            f"{config.devices.learners} and distributed.coordinator {config.distributed.coordinator}, which share one: "
            "use either"
        )
    if learner.max_gradient_delay is not None and learner.max_gradient_delay < least:
        raise InputError(
            f"learner.max_gradient_delay must be >= learner.asynchronous - 1 = {least}, got "
            f"{learner.max_gradient_delay}: gradients of so many learners are as late on the average; raise it, or "
            "lower --config.learner.asynchronous"
        )


def _check_scoring(config):
    if config.learner.draw in UNIFORM_DRAWS and config.proposal.when != "off":
        raise InputError(
            f"learner.draw is {config.learner.draw}, which draws uniformly, but proposal.name is "
            f"{config.proposal.name}: use systematic, or --config.proposal.name=uniform"
        )
    if config.workers.enabled:
        if config.schedule.name == "relaxed":
            _check_relaxed(config)
    elif not config.learner.refresh:
        raise InputError(
            f"workers.enabled and learner.refresh are both False: proposal {config.proposal.name} would never see a "
            "score; enable one, or use --config.proposal.name=uniform"
        )
    elif config.schedule.name == "exact":
        raise InputError(
            "schedule.name is exact, which scores all examples before every step, but workers.enabled is False: enable "
            "them, or use --config.schedule.name=relaxed"
        )


def _check_relaxed(config):
    """Scores must be able to enter, and snapshots of the parameters must not pile up before slow workers."""
    steps_per_round, score_delay = config.schedule.steps_per_round, config.schedule.score_delay
    if score_delay >= config.steps:
        raise InputError(
            f"schedule.score_delay is {score_delay}, but training ends after {config.steps} steps: no score would ever "
            f"enter; lower it"
        )
    if score_delay > MAX_ROUNDS_IN_FLIGHT * steps_per_round:
        raise InputError(
            f"schedule.score_delay must be <= {MAX_ROUNDS_IN_FLIGHT} * steps_per_round, got {score_delay} and "
            f"{steps_per_round}: each round in flight holds a copy of the parameters"
        )


def _check_type(name, value, expected, *, optional):
    if value is None and optional:
        return
    fits = type(value) in ((int, float) if expected is float else (expected,))
    if not fits:
        raise InputError(
            f"{name} must be of type {expected.__name__}{' or None' if optional else ''}, got {value!r} "
            f"(see --config.{name})"
        )


def _check_range(name, value, limit, fits):
    if value is not None and not fits(value):
        raise InputError(f"{name} must be {limit}, got {value} (see --config.{name})")
