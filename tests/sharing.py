"""Equal runs of one process share their programs, so that each is traced once.

Compiled programs are shared by all processes already, but a run defines its loss, and all that is compiled of it,
anew: what JAX then traces again takes three quarters of a run of a second. Here functions that get equal arguments
return the same object. Their arguments are all that the programs depend on, unless a test replaces a part of the
package: `forget` keeps its programs apart.
"""

import functools
import json

from issgd_jax.gradnorm import leaves
from issgd_jax.learning.learner import Learner
from issgd_jax.run import wiring
from issgd_jax.task import images

_REMEMBERED = 64
# Fields that no measurement depends on.
_NOT_MEASURED = ("seed", "steps", "eval_every", "checkpoint", "log", "watchdog_seconds")
_results = {}


def share():
    """Lets runs share programs until this process ends."""
    images.make_objective = _shared(images.make_objective, _objective_key)
    wiring.make_optimizer = _shared(wiring.make_optimizer, _optimizer_key)
    wiring.make_measure = _shared(wiring.make_measure, _measure_key)
    for name in ("compile", "compile_steps"):
        setattr(Learner, name, _shared(getattr(Learner, name), lambda learner: (type(learner), learner)))


def forget():
    """Lets the next run trace everything anew."""
    _results.clear()
    leaves._norms_of_pairs.clear_cache()


def _shared(function, make_key):
    @functools.wraps(function)
    def shared(*arguments, **keywords):
        try:
            key = function, make_key(*arguments, **keywords)
            hash(key)
        except TypeError:  # a rate that is traced, or a value that is none
            return function(*arguments, **keywords)
        if key not in _results:
            while len(_results) >= _REMEMBERED:
                del _results[next(iter(_results))]
            _results[key] = function(*arguments, **keywords)
        return _results[key]

    return shared


def _objective_key(config, num_classes, mean, std):
    return config.model.to_json(sort_keys=True), num_classes, mean.tobytes(), std.tobytes(), mean.shape


def _optimizer_key(config, learning_rate=None):
    if learning_rate is not None:
        raise TypeError("perhaps traced")
    steps = None if config.learner.lr_schedule == "constant" else config.steps
    return config.learner.to_json(sort_keys=True), steps


def _measure_key(config, problem, sampler):
    fields = {name: value for name, value in config.to_dict().items() if name not in _NOT_MEASURED}
    functions = problem.loss_fn, tuple(problem.metrics.items()), problem.keyed
    return json.dumps(fields, sort_keys=True), functions, sampler.num_examples
