"""Runs in a terminal: any width, any state of the files, and nothing of the run is touched."""

import fcntl
import io
import json
import os
import pty
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from rich.console import Console

from issgd_jax.view.curves import curve
from issgd_jax.view.tail import Tail
from issgd_jax.view.watch import watch
from tests.view.helpers import row, write_run


def shown(*runs, width=80):
    console = Console(file=io.StringIO(), width=width, highlight=False)
    watch(runs, once=True, console=console)
    return console.file.getvalue()


def append(path, *rows):
    with open(path, "a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


def test_only_what_was_appended_is_read(tmp_path):
    """Red if earlier rows are read again: here they are spoiled after they were read."""
    path = tmp_path / "metrics.jsonl"
    append(path, row(0), row(1))
    tail = Tail(path)
    assert [row["step"] for row in tail.read()] == [0, 1]
    content = path.read_bytes()
    with open(path, "r+b") as file:
        file.write(b"x" * content.index(b"\n"))
    append(path, row(2))
    assert [row["step"] for row in tail.read()] == [0, 1, 2]


def test_rows_of_a_run_that_is_resumed_replaced_or_removed(tmp_path):
    """Red if rows that a resumed run has cut off stay, a run in place of another is not noticed, or a gap raises."""
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert tail.read() == []
    append(path, row(0), row(1), row(2, loss=1.0))
    assert len(tail.read()) == 3
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2]))
    append(path, row(2, loss=2.0), row(3))
    assert [row.get("loss") for row in tail.read()] == [None, None, 2.0, None]
    other = tmp_path / "other"
    append(other, row(5))
    other.rename(path)
    assert [row["step"] for row in tail.read()] == [5]
    path.write_text('{"step": 0}\nno row\n{"step": 1}\n{"step"')
    assert [row["step"] for row in tail.read()] == [0, 1] and tail.malformed == 1
    path.unlink()
    assert tail.read() == [] and tail.malformed == 0


@pytest.mark.parametrize("width", [200, 80, 40, 12, 1])
def test_a_snapshot_fits_any_width(width, tmp_path):
    """Red if a line is wider than the terminal, or a narrow one raises."""
    full = write_run(
        tmp_path / "full", alive=False,
        **{"payoff/active": 1, "payoff/gain": 2.0, "payoff/cost": None, "scores/staleness_mean": 3.0, "test/own": 1.0},
    )  # fmt: skip
    worker = {"worker": "w0", "machine": None, "alive": True, "leases": 5, "seconds_since_last_result": None}
    status = {"seconds": 2.0, "workers": 12 * [worker], "leases_done": 60, "leases_waiting": 0, "leases_reissued": 0}
    (full / "cluster.json").write_text(json.dumps(status))
    text = shown(full, write_run(tmp_path / "young", steps=()), tmp_path / "none", width=width)
    assert max(map(len, text.splitlines())) <= width
    if width == 80:
        for part in (
            "finished", "20 of 20 steps, 10/s", "variance gain", "gain 2.00×, cost - of", "workers scored 400",
            "12 of 12 workers alive, 30.0 leases/s", "and 4 more", "no run yet", "no row of metrics yet",
        ):  # fmt: skip
            assert part in text, part


def test_states_and_time_left(tmp_path):
    assert "running" in (text := shown(write_run(tmp_path / "a", of=60))) and "10/s, 4.0 s left" in text
    assert "200/s" in text  # examples scored
    assert "stopped, last step 0:01:40 ago" in shown(write_run(tmp_path / "b", of=60, alive=False))


def test_a_folder_of_runs_is_those_in_it(tmp_path, run_command):
    """Red if a comparison that is running cannot be followed by its folder, or a new run in it is not seen."""
    write_run(tmp_path / "both" / "importance-0")
    assert "importance-0" in shown(tmp_path / "both", width=300) and "uniform-0" not in shown(
        tmp_path / "both", width=300
    )
    write_run(tmp_path / "both" / "uniform-0")
    assert "uniform-0" in shown(tmp_path / "both", width=300)
    for name in ("status", "hardest"):
        code, text = run_command(name, tmp_path / "both")
        assert code == 1 and f"name one of those in it, such as {tmp_path / 'both' / 'importance-0'}" in text


def test_what_is_left_out_and_why_a_run_stopped_are_said(tmp_path):
    folder = write_run(tmp_path / "run", of=60, alive=False)
    (folder / "nonfinite.json").write_text('{"step": 21}')
    with open(folder / "metrics.jsonl", "a") as file:
        file.write("no row\n" + json.dumps(row(3)) + "\n")
    text = shown(folder, width=200)
    assert "it stopped at step 21, as a loss or gradient is not finite: see nonfinite.json" in text
    assert "2 lines of metrics.jsonl are no rows that can come next" in text
    os.utime(folder / "nonfinite.json", (0, 0))  # of an earlier stop: the run went on afterwards
    assert "not finite" not in shown(folder, width=200)


def test_a_run_is_finished_when_its_last_step_is_measured(tmp_path):
    """Red if watching could end before the last row is written."""
    folder = write_run(tmp_path / "run")
    (folder / "metrics.jsonl").write_text(json.dumps(row(10)) + "\n")
    assert "running" in shown(folder)


def test_the_lock_is_left_alone(tmp_path):
    """Red if a look could make a run that starts at that moment believe that its folder is in use."""
    folder = write_run(tmp_path / "run", of=60, alive=False)
    (folder / "lock").write_text("")
    os.utime(folder / "lock", (0, 0))
    with open(folder / "lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "stopped" in shown(folder)  # although the lock is held
    assert os.stat(folder / "lock").st_atime == 0


@pytest.mark.parametrize(
    "name", ["config.json", "heartbeat.json", "cluster.json", "metrics.jsonl", "scores.npz", "nonfinite.json"]
)
@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]\n", b"\xff\xfe\n", b'{"config": 3, "step": "x", "workers": [1]}\n']
)
def test_a_malformed_file_is_a_line_and_no_traceback(name, content, tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / name).write_bytes(content)
    assert str(tmp_path)[:20] in shown(folder)


@pytest.mark.parametrize("number", [1e100, -1e100, 1e-300, 2**63 - 1, None])
def test_any_number_can_be_shown(number, tmp_path):
    """Red if a number that a run would not write raises."""
    folder = write_run(tmp_path / "run", of=2**63 - 1, **{name: number for name in row(0) if name != "step"})
    for beat in (
        {"at": number},
        {"at": -1e300, "process": 2**62},
        {"at": 0, "process": True, "host": socket.gethostname()},
    ):
        (folder / "heartbeat.json").write_text(json.dumps({"step": 0} | beat))
        assert "20" in shown(folder)


def test_names_are_no_markup(tmp_path):
    assert "/[red]x[/red]" in shown(write_run(tmp_path / "[red]x[/red]"), width=300)


def test_a_run_is_followed_from_before_its_start_to_its_end(tmp_path):
    """Red if watching ends before the last row, or a folder that comes and goes raises."""
    folder, console = tmp_path / "run", Console(file=io.StringIO(), force_terminal=True, width=80, height=24)

    def run():
        for i in range(5):
            time.sleep(0.05)
            write_run(folder, steps=range(0, 5 * i, 5))
        (folder / "metrics.jsonl").unlink()
        time.sleep(0.05)
        write_run(folder)

    thread = threading.Thread(target=run)
    thread.start()
    watch([folder], seconds=0.01, console=console)
    thread.join()
    text = console.file.getvalue()
    assert "no run yet" in text and "finished" in text[-400:] and text.count("\x1b[?1049h") == 1


def test_ctrl_c_ends_it_quietly_and_shows_the_cursor_again():
    """Red if the terminal is left on another screen or without a cursor, or the status is not that of SIGINT."""
    reader, terminal = pty.openpty()
    command = [sys.executable, "-m", "issgd_jax", "watch", "none"]
    process = subprocess.Popen(command, stdout=terminal, stderr=terminal, env=os.environ | {"TERM": "xterm"})
    output = b""
    while b"no run yet" not in output:
        output += os.read(reader, 4096)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    os.close(terminal)
    while b"?25h" not in output:
        output += os.read(reader, 4096)
    os.close(reader)
    assert b"\x1b[?1049l" in output and b"Traceback" not in output


@pytest.mark.parametrize(
    ("values", "drawn"),
    [
        ([None, None], "  "),
        ([1.0, 1.0], "▁▁"),
        ([0.0, 1.0], "▁▁"),
        ([None, 1.0, None, 2.0], " ▁▁█"),
        ([], ""),
        ([0.0, 100.0, 1.0], "▁█▁"),
        ([1.0, 1.0001], "▁▁"),
        ([0.0, 0.0], "▁▁"),
    ],
)
def test_curves(values, drawn):
    """Red if a value that is missing, zero or alone raises, or is drawn where it was not measured."""
    width = len(drawn) or 1
    (line,) = curve(range(len(values)), values, last_step=len(values) - 1, width=width, log=True)
    assert line == (drawn or " ")


def test_equal_values_are_a_flat_line():
    assert curve([0, 1], [0.0, 0.0], last_step=1, width=2) == curve([0, 1], [3.0, 3.0], last_step=1, width=2) == ["▁▁"]
