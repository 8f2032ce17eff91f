"""Whatever somebody, or a disk, has made of the JSON in a run's folder: one InputError that names the file."""

import json

import pytest

from experiments.paper import runs
from issgd_jax import InputError, records
from issgd_jax.config import default
from issgd_jax.run import metrics, status, workdir

HUGE, ENDLESS = "1" + "0" * 400, "1" + "0" * 5000
# What no file of a run may be.
NO_OBJECT = {
    "empty": b"",
    "blank": b" \n\n",
    "cut off": b'{"config": {"ste',
    "nested without end": b'{"config":' + b"[" * 100_000,
    "list": b"[1]",
    "null": b"null",
    "text": b'"config"',
    "number": b"7",
    "NaN": b"NaN",
    "binary": bytes(range(256)),
    "zeros": bytes(4096),
    "two objects": b"{}{}",
    "UTF-16": '{"config": {}}'.encode("utf-16"),
    "a name twice": b'{"config": {}, "config": {}}',
    "another name twice": b'{"config": {"steps": 20, "steps": 20}, "step": 3, "at": 0.0}',
}
CONFIGS = {
    "list": [1],
    "null": None,
    "text": "steps",
    "steps are text": {"steps": "20"},
    "steps are true": {"steps": True},
    "steps below zero": {"steps": -20},
    "a group is a number": {"steps": 20, "checkpoint": 3},
    "a group is null": {"steps": 20, "checkpoint": None},
    "a count is text": {"steps": 20, "checkpoint": {"every_steps": "often"}},
    "a dot in a name": {"steps": 20, "checkpoint.keep": 3},
    "a name of Python's": {"steps": 20, "items": 3, "__class__": 4},
}


def write_run(folder):
    folder.mkdir(exist_ok=True)
    fields = default().to_dict() | {"steps": 20}
    (folder / "config.json").write_text(json.dumps({"config": fields}))
    (folder / "heartbeat.json").write_text(json.dumps({"step": 10, "at": 0.0}))
    (folder / "metrics.jsonl").write_text('{"step": 0, "train/loss": 1.0}\n{"step": 10, "train/loss": 0.5}\n')
    worker = {"worker": "worker 0", "machine": None, "process": None, "devices": ["cpu"], "alive": False, "leases": 8}
    worker |= {"restarts": 0, "seconds_since_last_result": None, "problem": None}
    counts = ("seconds", "broadcasts", "broadcast_step", "leases_done", "leases_waiting", "leases_running", "bytes_in")
    counts += ("leases_reissued", "results_discarded", "bytes_out")
    cluster = {"workers": [worker], "typical_lease_seconds": None} | dict.fromkeys(counts, 1)
    (folder / "cluster.json").write_text(json.dumps(cluster))
    return folder


def readers(folder):
    """What reads each file: the command `status`, that which trains or compares, and the studies."""
    fields = default().to_dict() | {"steps": 20}
    return {
        "config.json": [
            lambda: status.read(folder),
            lambda: workdir.read_record(folder),
            lambda: workdir.check(folder, fields, overwrite=False),
        ],
        "heartbeat.json": [lambda: status.read(folder)],
        "cluster.json": [lambda: status.read(folder)],
        "metrics.jsonl": [lambda: status.read(folder), lambda: metrics.read_run(folder)],
    }


def check_refused(folder, name, content):
    (folder / name).write_bytes(content)
    for read in readers(folder)[name]:
        with pytest.raises(InputError) as error:
            read()
        assert str(folder) in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 1000


def test_a_run_as_it_is_written_is_read(tmp_path):
    """Else the tests below could not fail."""
    for read in readers(write_run(tmp_path))["heartbeat.json"]:
        assert "step 10 of 20" in read() and "worker 0" in read()
    assert workdir.read_record(tmp_path) == readers(tmp_path)["config.json"][2]()
    assert [row["step"] for row in metrics.read_run(tmp_path)] == [0, 10]


@pytest.mark.parametrize("content", NO_OBJECT.values(), ids=NO_OBJECT.keys())
@pytest.mark.parametrize("name", ["config.json", "heartbeat.json", "cluster.json"])
def test_what_is_no_object(name, content, tmp_path):
    check_refused(write_run(tmp_path), name, content)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_a_config_that_none_writes(config, tmp_path):
    """Red if `{"config": [1]}` ends in an AttributeError, here or in a study."""
    folder = write_run(tmp_path)
    text = json.dumps({"config": config})
    (folder / "config.json").write_text(text)
    for read in readers(folder)["config.json"][1:]:
        with pytest.raises(InputError, match=r"config.*cannot be read"):
            read()
    assert runs.read_config(folder) == {} and not runs.is_finished(folder)
    if not isinstance(config, dict) or config["steps"] != 20:
        with pytest.raises(InputError, match="config.json cannot be read"):
            status.read(folder)


@pytest.mark.parametrize("resumed", [5, "often", {"at": "now"}, None])
def test_resumptions_that_are_no_list(resumed, tmp_path):
    folder = write_run(tmp_path)
    record = json.loads((folder / "config.json").read_text()) | {"resumed": resumed}
    (folder / "config.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match="config.json cannot be read .*resumed is no list"):
        workdir.read_record(folder)


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999", HUGE, ENDLESS, "-" + HUGE, "true", '"7"', "[]", "{}"])
def test_numbers_that_are_none(number, tmp_path):
    folder = write_run(tmp_path)
    texts = {
        "config.json": f'{{"config": {{"steps": {number}}}}}',
        "heartbeat.json": f'{{"step": {number}, "at": 0.0}}',
        "cluster.json": (folder / "cluster.json").read_text().replace('"bytes_in": 1', f'"bytes_in": {number}'),
        "metrics.jsonl": f'{{"step": {number}}}\n{{"step": 10}}\n',
    }
    if number == "true":
        del texts["cluster.json"]  # a count of one, to Python
    for name, text in texts.items():
        check_refused(write_run(tmp_path), name, text.encode())


@pytest.mark.parametrize(
    "line",
    [
        "", "7", "[]", "null", "{}", "{broken", '{"step": -1}', '{"step": 1.5}', '{"step": null}',
        '{"step": 5, "step": 5}',
        '{"step": 5, "train/loss": "low"}', '{"step": 5, "train/loss": [1]}', '{"step": 5, "train/loss": true}',
        '{"step": 5, "train/loss": NaN}', '{"step": 5, "train/loss": 1e300}', "\x00" * 50, '{"step":' * 100_000,
    ],
)  # fmt: skip
@pytest.mark.parametrize("last", [False, True], ids=["in the middle", "last"])
def test_a_line_that_is_no_row(line, last, tmp_path):
    folder = write_run(tmp_path)
    rows = ['{"step": 0, "train/loss": 1.0}', line, *([] if last else ['{"step": 10, "train/loss": 0.5}'])]
    check_refused(folder, "metrics.jsonl", ("\n".join(rows) + "\n").encode())


def test_steps_that_do_not_increase(tmp_path):
    """Red if the seconds of a step are divided by none."""
    check_refused(write_run(tmp_path), "metrics.jsonl", b'{"step": 5}\n{"step": 5}\n')
    check_refused(write_run(tmp_path), "metrics.jsonl", b'{"step": 5}\n{"step": 4}\n')


@pytest.mark.parametrize("name", ["config.json", "heartbeat.json", "cluster.json", "metrics.jsonl"])
def test_a_folder_in_the_place_of_a_file(name, tmp_path):
    folder = write_run(tmp_path)
    (folder / name).unlink()
    (folder / name).mkdir()
    if name == "cluster.json":  # as if there were no cluster
        assert "step 10 of 20" in status.read(folder)
    else:
        with pytest.raises(InputError, match=name):
            status.read(folder)


def test_a_run_whose_last_step_cannot_be_read_is_not_finished(tmp_path):
    for content in (b'{"step":' * 100_000, b"[]", b"", b"\xff", b'{"step": 1' + b"0" * 5000):
        (tmp_path / "metrics.jsonl").write_bytes(content)
        assert workdir.last_step(tmp_path) is None


def test_a_config_that_cannot_be_read_now_is_not_malformed(tmp_path):
    """Red if a finished run whose disk fails for a moment is taken for none, and trained again."""
    file = write_run(tmp_path) / "config.json"
    file.unlink()
    for read in (lambda: workdir.read_record(tmp_path), lambda: runs.read_config(tmp_path)):
        file.symlink_to("/proc/self/mem")  # opens, and then gives a real EIO
        with pytest.raises(InputError, match="cannot be read .Input/output error.. Nothing was changed") as error:
            read()
        assert not isinstance(error.value, records.MalformedError)
        file.unlink()
    with pytest.raises(records.MalformedError, match="config.json cannot be read .No such file or directory"):
        workdir.read_record(tmp_path)
    assert runs.read_config(tmp_path) == {}


def test_errors_of_other_kinds_pass():
    """Red if a mistake of this package is told as one of a file."""
    with pytest.raises(NameError), records.parsing("config.json", "repair it"):
        raise NameError
