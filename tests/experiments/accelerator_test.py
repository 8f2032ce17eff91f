"""The benchmark of a device, at sizes of milliseconds: every part runs, and one that fails leaves the others alone."""

import json

import jax
import jax.numpy as jnp
import pytest

from experiments.benchmarks.accelerator import __main__ as command
from experiments.benchmarks.accelerator import gram
from experiments.benchmarks.accelerator.roofline import count_operations
from experiments.benchmarks.accelerator.running import run_parts
from experiments.benchmarks.accelerator.sizes import SIZES, Size
from experiments.benchmarks.gradnorm_models import gru
from experiments.benchmarks.learner_step import Case

GRU = {"batch_size": 2, "steps": 5, "features": 3, "units": 4}
TINY = Size(
    matrix=64,
    vector=1024,
    models={"gru": GRU},
    learner=Case((4, 4, 1), (4,), num_examples=64, batch_size=4, steps_per_block=2, num_pairs=3),
    chunk_size=8,
    sampler=(100,),
    gram=((2, 5, 4, 3),),
    num_pairs=3,
    seconds=0.1,
    limit=600,
)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(SIZES, "small", TINY)


def test_every_part_runs_and_the_file_has_what_bounds_each_row(tiny, tmp_path, capsys):
    """Red if a part fails, or a row lacks its floor."""
    command.main(["--size=small", f"--out={tmp_path / 'device.json'}"])
    record = json.loads((tmp_path / "device.json").read_text())
    assert record["hardware"]["device"] == "cpu" and "busy" in record
    parts = record["results"]
    assert all("results" in part and part["compilations"] > 0 for part in parts.values())
    assert len(parts) == 5
    assert all(part["results"].pop("rates")["bandwidth"] > 0 for part in parts.values())
    rows = [row for part in parts.values() for row in part["results"].values() if isinstance(row, dict)]
    assert len(rows) == 4 + 4 + 4 and all(row["ms"] > 0 and row["bound"] and row["over_floor"] > 0 for row in rows)
    forms = parts["gram, B = 2, T = 5, I = 4, J = 3"]["results"]
    assert forms.keys() == gram.FORMS.keys() and all(form["distance"] < 1e-4 for form in forms.values())
    assert "x floor" in capsys.readouterr().out


def test_parts_go_on_where_one_runs_out_of_memory_or_fails():
    """Red if a part that cannot allocate ends the run, or is not told from one that is wrong."""
    seen = []
    parts = {
        "huge array": lambda: {"sum": float(jnp.sum(jax.jit(lambda: jnp.ones(2**46))()))},
        "wrong": lambda: {"row": 1 // 0},
        "right": lambda: {"row": 1},
    }
    done = run_parts(parts, limit=60, report=lambda done: seen.append(list(done)))
    assert "RESOURCE_EXHAUSTED" in done["huge array"]["out_of_memory"]
    assert "ZeroDivisionError" in done["wrong"]["failed"] and done["right"]["results"] == {"row": 1}
    assert seen[0] == ["huge array"] and seen[-1] == list(parts)
    assert run_parts(parts, limit=-1)["right"] == {"skipped": "-1 s were over"}


def test_operations_of_a_loop_count_as_often_as_it_runs():
    """Red if the recurrent network's products count once, as in XLA's own analysis, or what no result needs counts."""
    params, (sequences, labels), loss_fn = gru(**GRU)
    traced = jax.make_jaxpr(lambda x: (loss_fn(params, x, labels[0]), x @ x.T)[0])(sequences[0])
    steps, features, units = GRU["steps"], GRU["features"], GRU["units"]
    assert count_operations(traced) == 2 * (steps * (features + units) * 3 * units + units * 10)
