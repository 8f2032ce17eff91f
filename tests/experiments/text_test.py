"""The language model of the study: its pieces of a text, and what is no text."""

import jax
import numpy as np
import pytest

from experiments.paper import text
from issgd_jax.errors import InputError


@pytest.fixture
def file(tmp_path, monkeypatch):
    path = tmp_path / "text"
    path.write_bytes(np.random.default_rng(0).integers(0, 256, text.NUM_BYTES + 5, np.uint8).tobytes())
    monkeypatch.setenv(text.VARIABLE, str(path))
    return path


def test_every_byte_is_predicted_once_and_the_last_tenth_is_test_data(file):
    """Red if pieces overlap in what they predict, leave bytes out, or test data stands before training data."""
    problem = text.make_problem()
    (train,), (test,) = problem.train, problem.test
    targets = np.concatenate([train, test])[:, 1:].reshape(-1)
    content = np.frombuffer(file.read_bytes(), np.uint8)
    assert (targets == content[1 : len(targets) + 1]).all() and text.NUM_BYTES - len(targets) <= text.LENGTH
    assert len(test) == (len(train) + len(test)) // 10


def test_loss_and_error_are_those_of_bytes(file):
    """Red if the model sees what it predicts: at the start it knows nothing of random bytes."""
    problem = text.make_problem()
    params = jax.jit(problem.init)(jax.random.key(0))
    pieces = problem.train[0][:8]
    loss, error = (
        jax.vmap(function, (None, 0))(params, pieces).mean() for function in (problem.loss_fn, problem.metrics["error"])
    )
    assert np.log(256) < loss < np.log(256) + 1.5 and error > 0.95
    changed = pieces.copy()
    changed[:, -1] ^= 1
    logits = [text.gradnorm_models.transformer_logits(params, piece[0][:-1]) for piece in (pieces, changed)]
    assert (logits[0] == logits[1]).all()


@pytest.mark.parametrize(
    ("content", "message"), [(None, "cannot be read"), (b"short", "has 5 bytes: choose a text of at least 1,000,000")]
)
def test_what_is_no_text_is_one_readable_error(content, message, file):
    file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises(InputError, match=message):
        text.make_problem()


def test_without_a_text_it_says_which_variable_to_set(monkeypatch):
    monkeypatch.delenv(text.VARIABLE, raising=False)
    with pytest.raises(InputError, match="set ISSGD_TEXT to a file"):
        text.make_problem()
