"""Files that a crash cut off, values that JSON has no word for, and figures that must not lie."""

import json

import pytest

from issgd_jax import InputError
from issgd_jax.run import metrics


def row(step, loss=1.0):
    names = (
        "train/error",
        "test/loss",
        "test/error",
        "variance/uniform",
        "variance/actual",
        "variance/ideal",
        "variance/gain",
    )
    return {"step": step, "train/loss": loss} | dict.fromkeys(names, 0.5)


def test_rows_are_on_disk_as_soon_as_they_are_written(tmp_path):
    with metrics.MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(row(0))
        writer.write(row(5))
        assert metrics.read_metrics(tmp_path / "metrics.jsonl") == [row(0), row(5)]


def test_a_value_that_is_not_finite_is_null(tmp_path):
    with metrics.MetricsWriter(tmp_path, tensorboard=True) as writer:
        writer.write({"step": 0, "variance/gain": float("nan"), "train/loss": float("inf")})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
        "step": 0,
        "variance/gain": None,
        "train/loss": None,
    }


def test_a_last_line_cut_off_is_left_out_aloud(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text(json.dumps(row(0)) + "\n" + json.dumps(row(1))[:17])
    with pytest.warns(UserWarning, match="last line 2 is cut off"):
        assert metrics.read_metrics(file) == [row(0)]


def test_a_broken_line_in_the_middle_is_an_error(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text("{broken\n" + json.dumps(row(1)) + "\n")
    with pytest.raises(InputError, match="line 1 is not a row of metrics"):
        metrics.read_metrics(file)
