"""Any config runs or fails with one readable error that names a field; any bytes are read or refused.

A fixed share of the examples in `make test`; more in `make soak`, of a seed that pytest prints.
"""

import warnings

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

import issgd_jax
from issgd_jax import BadScoreError, InputError, NonFiniteLossError, ScoreStore
from issgd_jax.config import default, flatten
from issgd_jax.run import metrics, wiring
from tests.helpers import smoke, soak, soak_seed

FIELDS = sorted(flatten(default()))
NUMBERS = st.one_of(
    st.integers(-3, 40),
    st.sampled_from([2**31 - 1, 2**31, 2**32 - 1, 2**63, -(2**63), 10**30]),
    st.floats(),
    st.sampled_from([1e-45, 1e-30, 1e15, 1e30, 3e38, 1e300, 0.999, 1.0]),
)
CHOICES = (
    "exact relaxed free_running uniform proportional mixture calibrated on off auto systematic independent shuffled "
    "stride random_subset mlp convnet gru transformer sgd adam lion adagrad lbfgs sam cosine linear gradient_norm "
    "last_layer loss stop skip digits train test train[:7] test[:0] train[:1%] / .. ~ mnist"
)
WORDS = st.one_of(st.text(max_size=8), st.sampled_from(CHOICES.split()))
VALUES = st.one_of(
    NUMBERS, WORDS, st.booleans(), st.none(), st.lists(NUMBERS, max_size=3).map(tuple), st.binary(max_size=3)
)
# A few fields at once: what one value allows, another may forbid.
CHANGES = st.dictionaries(st.sampled_from(FIELDS), VALUES, min_size=1, max_size=4)


def changed(changes):
    config = smoke()
    with config.ignore_type():
        config.update_from_flattened_dict(changes)
    return config


def names_a_field(error):
    text = str(error)
    assert len(text) < 2000, text
    return any(field in text or field.split(".")[-1] in text or field.split(".")[0] in text for field in FIELDS)


@seed(soak_seed())
@settings(max_examples=soak(80, 400), deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(changes=CHANGES)
def test_any_config_is_ready_to_compile_or_refused_in_words(changes):
    """Red at any other error: of JAX, flax, optax, TFDS or Python itself."""
    try:
        wiring.prepare(changed(changes))
    except InputError as error:
        assert names_a_field(error), error


# Right types within their limits, and sizes that compile in a second.
POSITIVE = st.floats(0, 1e30, exclude_min=True)
RUNNABLE = {
    "seed": st.integers(0, 2**32 - 1),
    "steps": st.integers(1, 5),
    "eval_every": st.integers(1, 7),
    "on_nonfinite": st.sampled_from(["stop", "skip"]),
    "learner.batch_size": st.integers(1, 1200),
    "learner.learning_rate": POSITIVE,
    "learner.momentum": st.floats(0, 1, exclude_max=True),
    "learner.nesterov": st.booleans(),
    "learner.draw": st.sampled_from([None, "systematic", "independent", "without_replacement", "stride"]),
    "learner.limit": st.none() | st.floats(2, 1e6),
    "learner.refresh": st.booleans(),
    "learner.asynchronous": st.integers(1, 5),
    "learner.max_gradient_delay": st.none() | st.integers(0, 9),
    "learner.lr_schedule": st.sampled_from(["constant", "cosine", "linear"]),
    "workers.enabled": st.booleans(),
    "workers.chunk_size": st.integers(1, 400),
    "workers.score": st.sampled_from(["gradient_norm", "last_layer", "loss"]),
    "workers.precision": st.sampled_from(["float32", "bfloat16"]),
    "workers.strict": st.booleans(),
    "schedule.name": st.sampled_from(["exact", "relaxed", "free_running"]),
    "schedule.steps_per_round": st.integers(1, 2**31 - 1),
    "schedule.score_delay": st.integers(0, 4),
    "proposal.name": st.sampled_from(["uniform", "proportional", "mixture", "calibrated"]),
    "proposal.when": st.sampled_from(["on", "off", "auto"]),
    "proposal.cost": st.none() | st.floats(0, 1e30),
    "proposal.smoothing": st.floats(0, 1e15),
    "proposal.relative": st.booleans(),
    "proposal.max_staleness": st.none() | st.integers(0, 2**31 - 1),
    "proposal.uniform_fraction": st.none() | st.floats(0, 0.999),
    "proposal.half_life": POSITIVE,
    "monitor.examples": st.integers(2, 2**31 - 1),
    "checkpoint.every_steps": st.integers(0, 3),
    "checkpoint.keep": st.integers(1, 2),
    "model.mlp.init_stddev": st.none() | POSITIVE,
}


@seed(soak_seed())
@settings(max_examples=soak(4, 12), deadline=None, suppress_health_check=list(HealthCheck))
@given(changes=st.fixed_dictionaries({}, optional=RUNNABLE))
def test_a_config_within_its_limits_runs_or_says_why_not(changes, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("fuzz") / "run"
    config = changed({"model.mlp.hidden_sizes": (4,), "steps": 3, "eval_every": 2, "workers.chunk_size": 50} | changes)
    if config.schedule.name == "exact":  # a round for each chunk
        config.workers.chunk_size = 400
    try:
        history = issgd_jax.train(config, workdir)
    except (InputError, NonFiniteLossError, BadScoreError) as error:
        assert names_a_field(error), error
    else:
        assert history[-1]["step"] == config.steps
        assert metrics.read_metrics(workdir / "metrics.jsonl") == history


@seed(soak_seed())
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_bytes_as_metrics_are_rows_or_an_error(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("metrics") / "metrics.jsonl"
    lines = st.sampled_from(
        [b'{"step": 0}\n', b'{"step": 1, "train/loss": 2}\n', b"3\n", b"[" * 5000, b"null\n", b"\x85\n"]
    )
    text = b"".join(data.draw(st.lists(st.one_of(lines, st.binary(max_size=20)), max_size=4)))
    path.write_bytes(text)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*metrics.jsonl: last line", UserWarning)
            rows = metrics.read_metrics(path)
    except InputError as error:
        assert "is not a row of metrics" in str(error)
    else:
        assert all(isinstance(row["step"], int) for row in rows) and len(rows) <= text.count(b"\n") + 1


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("scores") / "scores.npz"
    store = ScoreStore.init(50)
    store, _ = store.write(np.arange(30), jax.numpy.arange(30.0), 4)
    store.save(path)
    return path


@seed(soak_seed())
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_bytes_as_scores_are_a_store_or_an_error(data, saved, tmp_path_factory):
    """Red if a broken archive raises an error of zipfile or numpy, or gives scores that are not finite."""
    path = tmp_path_factory.mktemp("scores") / "scores.npz"
    text = bytearray(saved.read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, len(text) - 1))
        text[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    path.write_bytes(text)
    try:
        store = ScoreStore.load(path)
    except InputError as error:
        assert str(path) in str(error)
    else:
        score = np.asarray(store.score)
        assert np.all(np.isfinite(score)) and np.all(score >= 0)


@seed(soak_seed())
@settings(max_examples=200, deadline=None)
@given(text=st.binary(max_size=300))
def test_random_bytes_as_scores_are_an_error(text, tmp_path_factory):
    path = tmp_path_factory.mktemp("scores") / "scores.npz"
    path.write_bytes(text)
    with pytest.raises(InputError, match="is not a file of scores"):
        ScoreStore.load(path)
