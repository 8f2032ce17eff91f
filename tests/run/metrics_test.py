"""Files that a crash cut off, values that JSON has no word for, and figures that must not lie."""

import json
import time

import jax.numpy as jnp
import numpy as np
import pytest

from issgd_jax import InputError
from issgd_jax.run import histograms, measure, metrics
from issgd_jax.run.progress import Progress


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


def test_the_clock_of_the_bar_begins_after_the_first_step_and_leaves_compilations_out(capsys):
    """Red if rate and time left count compilation, or steps that were done before."""
    with Progress(100, shown=True, description="run", start=40) as progress:
        assert "run: 40/100 steps, compiling" in capsys.readouterr().err
        progress.measured({"test/error": 0.25, "variance/gain": 2.0})
        compiled_at = time.time()
        progress.step(41, 0.5)
        bar = progress._bar
        assert bar.initial == bar.n == 41 and bar.start_t >= compiled_at
        assert "| 41/100 " in (shown := capsys.readouterr().err) and "loss=0.5 test=25.00% gain=2.00" in shown
        began_at = bar.start_t
        while time.time() == began_at:
            pass
        progress.compiled()
        assert bar.start_t > began_at
        progress.step(100, 0.25)
        progress.measured({"test/error": 0.125})
    last = capsys.readouterr().err.split("\r")[-1]
    assert last.startswith("run |") and "| 100/100 " in last and last.endswith("step/s, loss=0.25 test=12.50%\n")


def test_a_bar_without_a_step_to_do_still_leaves_its_figures(capsys):
    with Progress(100, shown=True, description="run", start=100) as progress:
        progress.measured({"test/error": 0.25})
    assert "| 100/100 " in (shown := capsys.readouterr().err) and shown.endswith("test=25.00%\n")


def test_an_error_while_compiling_leaves_no_bar(capsys):
    with pytest.raises(ValueError), Progress(100, shown=True, description="run"):
        raise ValueError
    assert "|" not in capsys.readouterr().err


@pytest.mark.parametrize("edges", histograms.EDGES.values(), ids=histograms.EDGES)
def test_a_number_is_counted_in_the_bin_whose_edges_enclose_it(edges):
    """Red if an edge, zero, the least or the largest number is counted in the bin beside, or an unknown one at all."""
    inner = np.asarray(edges[1:-1], np.float32)
    below = np.nextafter(inner, np.float32(0))
    values = np.concatenate([np.array([0, 1e-45, 3e38], np.float32), inner, below, inner * 3 / 2])
    values = np.minimum(values, np.float32(min(edges[-1] * (1 - 1e-7), 3e38)))
    known = np.arange(len(values)) % 5 != 1
    expected = np.bincount(np.digitize(values[known], inner), minlength=len(edges) - 1)
    assert measure._histogram(jnp.asarray(values), jnp.asarray(known), edges).tolist() == expected.tolist()
