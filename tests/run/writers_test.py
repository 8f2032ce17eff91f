"""Rows of metrics reach libraries and the caller's own functions, and no error of theirs stops a run."""

import json
import struct
import sys

import pytest

import issgd_jax
from issgd_jax import InputError
from issgd_jax.extras import MissingExtraError
from issgd_jax.run import metrics, writers
from tests.helpers import smoke

ROWS = [{"step": step, "train/loss": 1.0 / (1 + step), "variance/gain": None, "scores": [1.0, 2.0]} for step in (0, 5)]
FIELDS = {"steps": 10, "model.mlp.hidden_sizes": (8, 8), "workers.chunk_size": None}


class Unsteady:
    """Takes rows except while the network is gone, and never that of step 3."""

    def __init__(self):
        self.taken, self.is_gone = [], False

    def __call__(self, step, row):
        if self.is_gone or step == 3:
            raise ConnectionError("no route")
        self.taken.append((step, row))


def test_rows_that_a_writer_refuses_are_written_again_and_one_that_it_never_takes_is_dropped(tmp_path, capsys):
    """Red if an error reaches the run, is told at every row, or loses, repeats or moves a row that could be written."""
    unsteady, steady = Unsteady(), []
    both = [writers.Writer("mine", unsteady), writers.Writer("other", lambda step, row: steady.append(step))]
    with metrics.MetricsWriter(tmp_path, tensorboard=False, writers=both) as writer:
        for step in range(8):
            unsteady.is_gone = step in (1, 2, 7)
            writer.write({"step": step, "train/loss": 0.5})
        unsteady.is_gone = False
    assert [step for step, _ in unsteady.taken] == [0, 1, 2, 4, 5, 6, 7] and steady == [*range(8)]
    assert unsteady.taken[0] == (0, {"train/loss": 0.5})
    assert len(metrics.read_metrics(tmp_path / "metrics.jsonl")) == 8
    messages = capsys.readouterr().err.splitlines()
    assert [line.split(":")[1] for line in messages] == [
        *(f" mine cannot write the metrics of step {step} yet, training continues" for step in (1, 7)),
        " mine lacks 1 row(s) of metrics, which metrics.jsonl has",
    ]


def test_rows_that_are_refused_to_the_end_are_told(tmp_path, capsys):
    """Red if a writer that never worked ends without a word of what it lacks."""
    writer = writers.Writer("mine", Unsteady())
    writer.add({"step": 3})
    writer.close()
    assert "mine lacks 1 row(s) of metrics, which metrics.jsonl has" in capsys.readouterr().err


def test_a_writer_that_takes_nothing_is_tried_twice_a_row_and_all_are_tried_at_the_end():
    """Red if a network that is gone holds up the run once for every row that waits, or one bad row hides the others."""
    tried, taken = [], []

    def write(step, row):
        tried.append(step)
        if step in (2, 3) or len(tried) <= 7:
            raise ConnectionError("no route")
        taken.append(step)

    writer = writers.Writer("mine", write)
    for step in range(5):
        writer.add({"step": step})
    assert tried == [0, 0, 1, 0, 1, 0, 1, 0, 1, 2, 3] and taken == [0, 1]
    writer.close()
    assert taken == [0, 1, 4]


@pytest.mark.parametrize("library", ["wandb", "mlflow"])
def test_a_library_that_is_missing_ends_the_run_before_it_begins(library, tmp_path, monkeypatch):
    """Red if a run that cannot write where it should compiles or leaves anything."""
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingExtraError, match=rf"log.writers={library} needs .* 'issgd-jax\[{library}\]'"):
        issgd_jax.train(smoke(log__writers=(library,)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_is_no_writer_is_named(tmp_path):
    """Red if a name in place of a function, or an unknown library, fails only at the first row."""
    with pytest.raises(InputError, match="writers must be functions .*'wandb'; libraries are named by --config"):
        issgd_jax.train(smoke(), tmp_path / "run", writers=["wandb"])
    with pytest.raises(InputError, match="log.writers must be names out of wandb, mlflow, each once, got .'wandbb'"):
        issgd_jax.train(smoke(log__writers=("wandbb",)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def write_in_two_parts(library, folder):
    """Writes a row, as a run that ends by an error, and another, as one that resumes; returns the ids of both."""
    ids = []
    for row, error in zip(ROWS, (KeyboardInterrupt, None)):
        try:
            with (
                writers.opened([library], [], folder, FIELDS) as opened,
                metrics.MetricsWriter(folder, tensorboard=False, position=0, writers=opened) as writer,
            ):
                writer.write(row)
                if error:
                    raise error
        except KeyboardInterrupt:
            pass
        ids.append(json.loads((folder / "writers.json").read_text())[library])
    return ids


def wandb_records(path):
    """Yields the records of an offline run shorter than 32 KiB: after 7 bytes, each with its checksum, length, type."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position = path.read_bytes(), 7
    while position < len(data):
        (length,) = struct.unpack_from("<H", data, position + 4)
        yield Record.FromString(data[position + 7 : position + 7 + length])
        position += 7 + length


# Of the libraries themselves.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")
def test_weights_and_biases_gets_rows_histograms_and_config(tmp_path, monkeypatch, capsys):
    """Red if a row is lost, a list of numbers breaks it, or a run that is resumed gets another id."""
    pytest.importorskip("wandb")
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_CONSOLE": "off"}.items():
        monkeypatch.setenv(name, value)
    first, second = write_in_two_parts("wandb", tmp_path)
    assert first == second and "cannot" not in capsys.readouterr().err
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime)
    records = [record for path in files for record in wandb_records(path)]
    histories = [record.history.item for record in records if record.HasField("history")]
    rows = [{item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in row} for row in histories]
    assert [(row["_step"], row["train/loss"]) for row in rows] == [(row["step"], row["train/loss"]) for row in ROWS]
    assert all(row["scores._type"] == "histogram" and "variance/gain" not in row for row in rows)
    runs = [record.run for record in records if record.HasField("run")]
    assert {run.display_name for run in runs} == {tmp_path.name}
    assert {item.key or item.nested_key[0] for run in runs for item in run.config.update} >= {*FIELDS}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")
def test_mlflow_gets_numbers_and_config(tmp_path, monkeypatch, capsys):
    """Red if a row is lost, a list of numbers breaks it, or a run that is resumed gets another id."""
    mlflow = pytest.importorskip("mlflow")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/store.db")
    first, second = write_in_two_parts("mlflow", tmp_path)
    assert first == second and "cannot" not in capsys.readouterr().err
    client = mlflow.MlflowClient()
    run = client.get_run(first)
    assert run.info.status == "FINISHED" and run.info.run_name == tmp_path.name
    assert run.data.params == {"steps": "10", "model.mlp.hidden_sizes": "(8, 8)"}
    history = client.get_metric_history(first, "train/loss")
    assert [(point.step, point.value) for point in history] == [(row["step"], row["train/loss"]) for row in ROWS]
    assert run.data.metrics.keys() == {"train/loss"}
