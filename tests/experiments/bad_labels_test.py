"""The experiment on wrong labels: what it replaces, what it counts, and what it needs."""

import importlib.util
import itertools

import jax
import numpy as np
import pytest

from experiments.configs import digits
from experiments.paper import bad_labels
from issgd_jax.task.images import make_problem


def test_so_many_labels_are_another_class():
    """Red if a label is replaced by itself, by no class, or more or fewer are replaced than is said."""
    labels = np.arange(1437, dtype=np.int32) % 10
    flipped = bad_labels.flip(labels, 10, seed=0)
    wrong = flipped != labels
    assert wrong.sum() == 71 and set(flipped) == set(range(10)) and flipped.dtype == labels.dtype
    assert set((flipped - labels)[wrong] % 10) == set(range(1, 10))


def test_the_run_is_seen_at_every_measurement():
    """Red if the loop cannot be driven from outside, or scores and parameters are those of one moment."""
    config = digits.get_config()
    with config.ignore_type():
        config.update_from_flattened_dict(
            {"steps": 32, "eval_every": 16, "devices.host_platform_count": 0, "devices.workers": 1,
             "model.mlp.hidden_sizes": (4,), "data.train_split": "train[:64]", "workers.chunk_size": 32}
        )  # fmt: skip
    config.learner.batch_size = 8
    snapshots = bad_labels.train(config, make_problem(config))
    assert len(snapshots) == bad_labels.MEASUREMENTS
    for (score, params), (later_score, later_params) in itertools.pairwise(snapshots):
        assert score.shape == (64,) and (score != later_score).any()
        assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (params, later_params))))


def test_precisions_are_of_the_largest():
    wrong = np.arange(200) < 60
    assert bad_labels.precisions(np.where(wrong, 2.0, 1.0), wrong) == {"50": 1.0, "wrong": 1.0}
    assert bad_labels.precisions(np.where(wrong, 1.0, 2.0), wrong) == {"50": 0.0, "wrong": 0.0}
    assert bad_labels.precisions(np.where(np.arange(200) < 30, 2.0, 0.0) - np.arange(200) / 1e9, wrong)["wrong"] == 1.0


@pytest.mark.skipif(importlib.util.find_spec("cleanlab") is not None, reason="cleanlab is installed")
def test_without_cleanlab_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr("sys.argv", ["bad_labels"])
    with pytest.raises(SystemExit, match="pip install cleanlab"):
        bad_labels.main()
