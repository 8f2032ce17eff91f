"""Ctrl-C before the first step ends the program: real processes, interrupted while they import and compile."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest

from issgd_jax.run.supervision import Supervision

ROOT = pathlib.Path(__file__).parents[1]


def interrupt(module, arguments, *, at):
    """Starts a program, sends it SIGINT when it has printed `at`, and returns its exit status and what it prints."""
    command = [sys.executable, "-X", "importtime", "-m", module, *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        text = b""
        while at not in text:
            block = os.read(process.stderr.fileno(), 65536)
            assert block, text[-2000:]
            text += block
        process.send_signal(signal.SIGINT)
        text += process.communicate(timeout=300)[1]
    return process.returncode, text


@pytest.mark.parametrize(
    ("module", "arguments", "at"),
    [
        ("issgd_jax", ["train", "--workdir=/proc/none"], b" jaxlib.version\n"),
        ("issgd_jax", ["compare"], b" flax.errors\n"),
        ("issgd_jax", ["status", "none"], b" ml_collections\n"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_an_interrupt_during_imports_ends_the_program(module, arguments, at):
    """Red if a library that is being imported takes it for an error of its own, or ignores it."""
    status, text = interrupt(module, [*arguments], at=at)
    assert (status, text.count(b"stopped by SIGINT")) == (130, 1) and b"Traceback" not in text, text[-2000:]


def test_an_interrupt_before_the_first_step_does_not_wait_for_it(tmp_path):
    """Red if it is kept until everything is compiled: the run has no step, and starts again."""
    arguments = ["train", f"--workdir={tmp_path}", "--config.steps=1000000", "--config.eval_every=1000000"]
    status, text = interrupt("issgd_jax", arguments, at=b"steps, compiling")
    assert status == 130 and text.endswith(b"\nstopped by SIGINT\n") and b"Traceback" not in text, text[-2000:]
    assert not list((tmp_path / "checkpoints").glob("step_*"))


def test_until_a_step_is_done_an_interrupt_is_one_at_once(tmp_path):
    """Afterwards the run stops between two steps, and a second one interrupts."""
    with Supervision(tmp_path, watchdog_seconds=60, is_starting=True) as watch:
        for step in (7, 7):  # the step that a run resumes from is not done, however often it is told
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            watch.finished(step)
        watch.signal = None
        watch.finished(8)
        signal.raise_signal(signal.SIGINT)
        assert watch.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
