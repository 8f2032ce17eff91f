"""Schema of an experiment: every field in one row with its default, its limit and its documentation.

`default`, `validate`, `--help` and docs/config.md all come from `FIELDS`.
"""

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ml_collections import ConfigDict, config_dict

from issgd_jax import paths
from issgd_jax.errors import InputError

_LARGEST = 2**31 - 1
DEFAULT_LIMIT = 5.0


@dataclasses.dataclass(frozen=True)
class Limit:
    """Allowed values of a field.

    Attributes:
      text: completes "must be ..." in errors; empty where the type is the only limit.
      allows: returns whether a value of the right type is allowed.
    """

    text: str
    allows: Callable[[Any], bool]


def _between(low: int, high: int = _LARGEST) -> Limit:
    return Limit(f"between {low:,} and {high:,}", lambda value: low <= value <= high)


def _one_of(*choices: str) -> Limit:
    return Limit(f"one of {', '.join(choices)}", lambda value: value in choices)


_ANY = Limit("", lambda value: True)
_NAME = Limit("a non-empty string", bool)
_FOLDER = Limit("a folder of this machine, not a URL", lambda value: value != "" and not paths.is_url(value))
# float32 can square and sum numbers of these sizes.
_POSITIVE = Limit("> 0 and <= 1e+30", lambda value: 0 < value <= 1e30)
_NON_NEGATIVE = Limit(">= 0 and <= 1e+30", lambda value: 0 <= value <= 1e30)
_SIZES = Limit("sizes >= 1", lambda sizes: all(type(size) is int and 1 <= size <= _LARGEST for size in sizes))
_WRITERS = ("wandb", "mlflow")


def _are_writers(names: tuple) -> bool:
    return all(name in _WRITERS for name in names) and len({*names}) == len(names)


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of every config.

    Attributes:
      name: dotted, as in `--config.learner.batch_size`.
      default: value; or a type, for a field that is None unless a value of this type is set.
      limit: allowed values; None is allowed where it is the default.
      doc: one sentence or two, with units.
    """

    name: str
    default: Any
    limit: Limit
    doc: str

    @property
    def type(self) -> type:
        return self.default if self.is_optional else type(self.default)

    @property
    def is_optional(self) -> bool:
        return isinstance(self.default, type)


GROUPS = {
    "": "The run",
    "data": "Training and test data",
    "model": "The network; only the fields of the model that is named are used",
    "learner": "Training steps of the learner",
    "workers": "Devices that score training examples",
    "devices": "Assignment of devices",
    "distributed": "A learner that spans processes: all run the same command, except for process_id",
    "cluster": "Workers on other machines, with Ray",
    "schedule": "When workers score and when their scores enter",
    "proposal": "From scores to the distribution that examples are drawn from",
    "monitor": "Measurement of the gradient variance",
    "checkpoint": "Checkpoints",
    "log": "Output",
}

FIELDS = (
    Field("seed", 0, _between(0, 2**32 - 1), "Seed of the initial parameters and of all draws."),
    Field("steps", 1000, _between(1, 2**30 - 1), "Learner updates."),
    Field("eval_every", 100, _between(1), "Steps between measurements of whole splits."),
    Field(
        "on_nonfinite", "stop", _one_of("stop", "skip"),
        "At a loss or gradient that is not finite: stop the run, or skip the update, which is BIASED.",
    ),
    Field(
        "watchdog_seconds", 600.0, Limit("> 0 and <= 1e+9", lambda value: 0 < value <= 1e9),
        "Seconds without a finished step after which the stacks of all threads are logged.",
    ),
    Field(
        "problem", str, Limit("module:function", lambda value: re.fullmatch(r"[\w.]+:\w+", value) is not None),
        "module:function that returns the issgd_jax.Problem to train; None: data and model as named below.",
    ),
    Field("data.name", "digits", _NAME, "digits, or an image classification data set of TFDS."),
    Field("data.dir", str, _FOLDER, "Data folder of TFDS; ~ is expanded; None: its default ($TFDS_DATA_DIR)."),
    Field("data.train_split", "train", _NAME, "Training split, as in TFDS: train, train[:10%], train+extra."),
    Field("data.test_split", "test", _NAME, "Test split."),
    Field("model.name", "mlp", _one_of("convnet", "gru", "mlp", "transformer"), "Network."),
    Field("model.mlp.hidden_sizes", (256,) * 4, _SIZES, "Units of each hidden layer."),
    Field("model.mlp.init_stddev", float, _POSITIVE, "Deviation of the initial kernels; None: He et al. 2015."),
    Field("model.convnet.channels", (32, 32, 64, 64), _SIZES, "Channels of each convolution."),
    Field("model.convnet.dense_size", 256, _between(1), "Units of the hidden dense layer."),
    Field("model.gru.units", 128, _between(1), "Units of the recurrent state."),
    Field("model.transformer.num_layers", 2, _between(1), "Blocks of attention and MLP."),
    Field("model.transformer.width", 64, _between(1), "Size of a token; a multiple of num_heads."),
    Field("model.transformer.num_heads", 4, _between(1), "Attention heads."),
    Field("model.transformer.patch_size", 4, _between(1), "Side of a square patch, in pixels."),
    Field("learner.batch_size", 128, _between(1), "Examples in the minibatch of each learner device."),
    Field("learner.optimizer", "sgd", _ANY, "Name of any optax optimiser that needs only gradients and parameters."),
    Field("learner.learning_rate", 0.01, _POSITIVE, "Initial learning rate."),
    Field(
        "learner.lr_schedule", "constant", _one_of("constant", "cosine", "linear"),
        "Learning-rate schedule; cosine and linear decay to 0 at `steps`.",
    ),
    Field(
        "learner.momentum", 0.9, Limit(">= 0 and < 1", lambda value: 0 <= value < 1),
        "Momentum, or the decay of the first moment (b1) where the optimiser has that instead.",
    ),
    Field(
        "learner.rate_by_gain", False, _ANY,
        "Multiply the learning rate by the measured gain of the draws, at most 4; its schedule then runs in effective "
        "steps.",
    ),
    Field("learner.nesterov", True, _ANY, "Use Nesterov momentum where the optimiser has `momentum`; not Adam's kind."),
    Field(
        "learner.draw", str,
        _one_of("systematic", "independent", "without_replacement", "stride", "shuffled", "random_subset"),
        "How a minibatch is drawn. stride: evenly spaced visits. Only uniformly: shuffled (epochs), random_subset "
        "(epochs over a random third). None: stride with a limit, of 5 unless learner.limit is set. If that "
        "is None too, systematic where a limit cannot be: proposal.name=uniform, proposal.when=auto, "
        "proposal.max_staleness, learner.refresh=False, or other scores than gradient norms.",
    ),
    Field(
        "learner.limit", float, Limit(">= 2 and <= 1e6", lambda value: 2 <= value <= 1e6),
        "Largest weighted gradient norm of an example in a minibatch, in units of the mean norm, with draw stride; "
        "what is left of its importance weight is owed to its next visits. None: no limit, if learner.draw is set.",
    ),
    Field("learner.refresh", True, _ANY, "Write the gradient norms of each minibatch back as its examples' scores."),
    Field(
        "learner.asynchronous", 1, _between(1, 1024),
        "Number k of learners, each at its own pace: gradients are k - 1 updates old on average.",
    ),
    Field(
        "learner.max_gradient_delay", int, _between(0),
        "Largest age of a gradient in updates, with schedule free_running; None: 2 * (k - 1).",
    ),
    Field("workers.enabled", True, _ANY, "Let workers score examples; if not, only learner.refresh gives scores."),
    Field("workers.chunk_size", 2048, _between(1), "Examples that each worker scores in a round."),
    Field(
        "workers.score", "gradient_norm", _one_of("gradient_norm", "last_layer", "loss"),
        "Score of an example: the norm of its gradient, of its gradient at the logits, or its loss.",
    ),
    Field(
        "workers.precision", "float32", _one_of("float32", "bfloat16"),
        "Type in which workers compute scores; parameters and the norms of minibatches stay float32. Scores set "
        "the draws and the limit alone, so that nothing is biased.",
    ),
    Field(
        "workers.strict", False, _ANY,
        "Stop the run at a score that is NaN, infinite or negative; if not, such scores are discarded and counted.",
    ),
    Field("devices.learners", 1, _between(1), "Devices, of all processes, that share each minibatch."),
    Field(
        "devices.workers", int, _between(1),
        "Worker devices (in a cluster: of each machine); None: all but the learners, or the learner's own if alone.",
    ),
    Field(
        "devices.host_platform_count", 0, _between(0, 1024),
        "Number of devices to simulate on the CPU of each process; 0: use the real ones.",
    ),
    Field(
        "distributed.coordinator", str, _ANY,
        "host:port of process 0; auto: detected by JAX; None: a single process.",
    ),
    Field("distributed.num_processes", int, _between(1), "Number of processes."),
    Field("distributed.process_id", int, _between(0), "Number of this process, from 0."),
    Field(
        "cluster.address", str, _ANY,
        "Address of Ray: auto, HOST:PORT, or local, which starts Ray here; None: workers on this machine's devices.",
    ),
    Field("cluster.workers", int, _between(1, 100_000), "Workers; None: one on each machine except the learner's."),
    Field(
        "schedule.name", "relaxed", _one_of("exact", "relaxed", "free_running"),
        "exact: all examples are scored before each step. relaxed: rounds start and scores enter at fixed steps. "
        "free_running: scores enter when they are ready; not reproducible.",
    ),
    Field("schedule.steps_per_round", 32, _between(1), "Learner steps from one round to the next (relaxed)."),
    Field(
        "schedule.score_delay", 32, _between(0),
        "Learner steps from the parameters of a round to the entry of its scores (relaxed).",
    ),
    Field(
        "proposal.name", "calibrated", _one_of("uniform", "proportional", "mixture", "calibrated"),
        "uniform: plain SGD. proportional: score + smoothing. mixture: proportional with a uniform share. "
        "calibrated: expected norm given score and staleness, with a uniform share.",
    ),
    Field(
        "proposal.when", "on", _one_of("on", "off", "auto"),
        "Use of importance sampling; auto: while it lowers the variance by more than it slows down steps, with "
        "systematic draws.",
    ),
    Field("proposal.cost", float, _NON_NEGATIVE, "Time of a step, in uniform steps, for auto; None: measured."),
    Field(
        "proposal.smoothing", 1.0, Limit(">= 0 and <= 1e+15", lambda value: 0 <= value <= 1e15),
        "Constant added to each score (proportional, mixture).",
    ),
    Field("proposal.relative", False, _ANY, "Give smoothing in units of the mean score."),
    Field(
        "proposal.max_staleness", int, _between(0),
        "Age in steps above which examples are not drawn (proportional): BIASED; None: no limit.",
    ),
    Field(
        "proposal.uniform_fraction", float, Limit(">= 0 and <= 0.999", lambda value: 0 <= value <= 0.999),
        "Uniform share of the draws (mixture, calibrated); None: 0.3 with evenly spaced visits, else learned.",
    ),
    Field("proposal.half_life", 1.0, _POSITIVE, "Sweeps after which an observation counts half (calibrated)."),
    Field("monitor.examples", 2048, _between(2), "Training examples on which the variance is measured."),
    Field(
        "checkpoint.every_steps", 1000, _between(0),
        "Steps between checkpoints, which are also saved at signals, at the end and at the best test error; 0: none.",
    ),
    Field("checkpoint.keep", 3, _between(1), "Newest checkpoints to keep, besides the best by test error."),
    Field("log.progress", True, _ANY, "Show a progress bar."),
    Field("log.tensorboard", True, _ANY, "Write TensorBoard events."),
    Field(
        "log.tensorboard_images", 0, _between(0, 64),
        "Number of hardest examples that the TensorBoard events show at every measurement, if examples are images and "
        "have scores.",
    ),
    Field(
        "log.writers", (), Limit(f"names out of {', '.join(_WRITERS)}, each once", _are_writers),
        "Libraries that get the rows of metrics too: Weights & Biases (wandb), MLflow (mlflow).",
    ),
    Field("log.explain", False, _ANY, "Print how the gradient norm of each parameter is computed."),
)  # fmt: skip


def default() -> ConfigDict:
    """Returns all fields with their defaults; the file of an experiment sets those that differ.

    Example:
      >>> config = default()
      >>> config.learner.batch_size, config.devices.workers
      (128, None)
    """
    config = ConfigDict()
    for field in FIELDS:
        *groups, key = field.name.split(".")
        group = config
        for name in groups:
            if name not in group:
                group[name] = ConfigDict()
            group = group[name]
        # A placeholder is a reference, which configs must not share.
        group[key] = config_dict.placeholder(field.default) if field.is_optional else field.default
    return config


def samples_by_importance(config: ConfigDict) -> bool:
    """Returns whether examples are drawn by their scores, not uniformly.

    Example:
      >>> samples_by_importance(default())
      True
    """
    return config.proposal.name != "uniform" and config.proposal.when != "off"


def draw_and_limit(config: ConfigDict) -> tuple[str, float | None]:
    """Returns how minibatches are drawn, and the limit on what one example adds; None: there is none.

    Example:
      >>> config = default()
      >>> draw_and_limit(config)
      ('stride', 5.0)
      >>> config.workers.score = "loss"
      >>> draw_and_limit(config)
      ('systematic', None)
    """
    learner, proposal = config.learner, config.proposal
    if learner.draw is not None or learner.limit is not None:
        return learner.draw or "stride", learner.limit
    has_norms = learner.refresh and config.workers.score == "gradient_norm"
    visits_all = proposal.name != "proportional" or proposal.max_staleness is None
    if samples_by_importance(config) and proposal.when == "on" and has_norms and visits_all:
        return "stride", DEFAULT_LIMIT
    return "systematic", None


def with_options(config: ConfigDict, options: str) -> ConfigDict:
    """Applies the options of `--config=FILE.py:options`.

    Args:
      config: changed in place.
      options: empty, or "smoke" for a run of seconds on a CPU.

    Returns:
      The config.

    Raises:
      InputError: options is something else.
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


def flatten(config: ConfigDict | dict) -> dict[str, Any]:
    """Returns {dotted name: value} of all fields.

    Example:
      >>> flatten({"steps": 10, "log": {"progress": True}})
      {'log.progress': True, 'steps': 10}
    """
    return dict(_leaves(ConfigDict(config)))


def _leaves(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def check_field(name: str) -> None:
    """Raises InputError, with the nearest names, unless `name` is the dotted name of a field."""
    known = [field.name for field in FIELDS]
    if name not in known:
        raise InputError(f"config has no field {name!r}: {nearest(name, known)}")


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns a hint for an unknown name.

    Args:
      name: the unknown name.
      known: names that exist; of dotted ones the hint lists those of the same group.

    Example:
      >>> nearest("proposal.nam", ["proposal.name", "steps"])
      'did you mean proposal.name?'
      >>> nearest("log.unknown", ["log.progress", "log.tensorboard", "steps"])
      'choose one of log.progress, log.tensorboard'
    """
    known = list(known)
    if near := difflib.get_close_matches(name, known, n=1, cutoff=0.5):
        return f"did you mean {near[0]}?"
    group = [field for field in known if "." in name and field.startswith(name.rsplit(".", 1)[0] + ".")]
    return f"choose one of {', '.join(group or known)}"
