"""The potential of an experiment: of plain SGD whatever the config says, with losses that take keys, and printed."""

import dataclasses

import jax
import numpy as np
import pytest

import issgd_jax
from issgd_jax import prospect
from issgd_jax.run import wiring
from tests.helpers import smoke

TIMES = {"norms_cost": 0, "refresh_cost": 0}
# ml_collections reads the config file so.
pytestmark = pytest.mark.filterwarnings(r"ignore:the load_module\(\) method is deprecated:DeprecationWarning")


def test_the_config_is_trained_as_plain_sgd():
    """Red if workers, draws by importance or several learners change what is measured."""
    plain = smoke(proposal__name="uniform", workers__enabled=False)
    other = smoke(
        learner__draw="stride",
        learner__rate_by_gain=True,
        learner__limit=5.0,
        devices__learners=2,
        devices__workers=1,
        learner__batch_size=plain.learner.batch_size,
    )
    found = [prospect.measure(config, after=20, sample=256) for config in (plain, other)]
    assert dataclasses.replace(found[0], **TIMES) == dataclasses.replace(found[1], **TIMES)
    assert found[0].gain.value > 1


def test_the_gain_grows_as_examples_are_learned():
    """Red if the parameters before training are measured."""
    first, later = (prospect.measure(smoke(), after=after, sample=1024).gain for after in (0, 300))
    assert later.low > first.high


def test_a_loss_with_keys(monkeypatch):
    """Red if a dropout loss gets no keys, or one for all examples."""

    def noisy(params, x, key):
        return jax.numpy.sum(params * x * jax.random.normal(key, x.shape))

    x = np.random.default_rng(0).normal(size=(400, 3)).astype(np.float32)
    problem = issgd_jax.Problem(init=lambda key: jax.numpy.ones(3), loss_fn=noisy, train=x, keyed=True, name="noisy")
    monkeypatch.setattr(wiring, "make_problem", lambda config: problem)
    found = prospect.measure(smoke(learner__batch_size=8), after=3, sample=400)
    # Independent normal factors: E[x² n²] against (E|x n|)².
    assert 1.2 < found.gain.value < 2


def test_the_command_prints_estimates_and_a_verdict(run_command):
    code, text = run_command("potential", "--config=experiments/configs/digits.py:smoke", "--after=5", "--sample=64")
    assert code == 0 and "gain of scores never stale" in text and "Importance sampling" in text


def test_training_that_diverges_is_one_readable_line(run_command):
    rate = "--config.learner.learning_rate=1e30"
    code, text = run_command("potential", "--config=experiments/configs/digits.py:smoke", "--after=9", rate)
    assert code == 1 and "finite" in text and "Traceback" not in text


def test_wrong_arguments_of_the_command_are_told(run_command):
    code, text = run_command("potential", "--sample=3")
    assert code and "16" in text
