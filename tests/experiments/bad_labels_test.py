"""The experiment on wrong labels: what it replaces, what it counts, and what it needs."""

import importlib.util

import numpy as np
import pytest

from experiments.paper import bad_labels


def test_so_many_labels_are_another_class():
    """Red if a label is replaced by itself, by no class, or more or fewer are replaced than is said."""
    labels = np.arange(1437, dtype=np.int32) % 10
    flipped = bad_labels.flip(labels, 10, seed=0)
    wrong = flipped != labels
    assert wrong.sum() == 71 and set(flipped) == set(range(10)) and flipped.dtype == labels.dtype
    assert set((flipped - labels)[wrong] % 10) == set(range(1, 10))


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
