"""Who watches over a run: a heartbeat, a watchdog, and the signals that ask it to stop. Imports no jax."""

import json
import os
import pathlib
import signal
import socket
import sys
import threading
import time
import traceback

import psutil

from issgd_jax.console import say
from issgd_jax.files import write_text_atomically
from issgd_jax.run.workdir import HEARTBEAT_FILE, WATCHDOG_FILE

# The terminal's, the system's, the terminal's end, and what batch systems and spot instances are told to send.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
HEARTBEAT_SECONDS = 1.0


class Supervision:
    """Watches over one run while its context lasts, in a thread of its own that never touches the run.

    heartbeat.json tells the last finished step and its time. Where no step finishes for `watchdog_seconds`, the stacks
    of all threads are told, and kept in watchdog.txt. The first signal of SIGNALS is kept in `signal`, so that the run
    can stop between two steps; a second SIGINT interrupts at once.
    """

    def __init__(self, workdir: pathlib.Path, *, watchdog_seconds: float):
        self.signal: int | None = None
        self._workdir, self._watchdog_seconds = workdir, watchdog_seconds
        self._step, self._finished_at = 0, time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="supervision", daemon=True)
        self._handlers = {}
        self._complained = False

    def finished(self, step: int) -> None:
        """So many steps are done."""
        self._step, self._finished_at = step, time.monotonic()

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # only there can signals be handled
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
                    self._handlers[number] = signal.signal(number, self._on_signal)
        self._thread.start()
        return self

    def __exit__(self, *exception):
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._ended.set()
        self._thread.join()

    def _on_signal(self, number, frame):
        del frame
        if self.signal == signal.SIGINT == number:
            raise KeyboardInterrupt
        self.signal = number

    def _watch(self) -> None:
        told, reported = None, None
        interval = min(HEARTBEAT_SECONDS, self._watchdog_seconds / 4)
        while True:
            ended = self._ended.wait(interval)
            step, finished_at = self._step, self._finished_at
            if finished_at != told:
                self._write_heartbeat(step, finished_at)
                told = finished_at
            if ended:
                return
            if time.monotonic() - finished_at > self._watchdog_seconds and reported != finished_at:
                self._report(step)
                reported = finished_at

    def _write_heartbeat(self, step: int, finished_at: float) -> None:
        at = time.time() - (time.monotonic() - finished_at)
        beat = {"step": step, "at": round(at, 3), "process": os.getpid(), "host": socket.gethostname()}
        try:
            write_text_atomically(self._workdir / HEARTBEAT_FILE, json.dumps(beat) + "\n")
        except OSError as error:
            if not self._complained:
                say(f"the heartbeat cannot be written, training goes on: {error}")
            self._complained = True

    def _report(self, step: int) -> None:
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        stacks = [
            f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
            for ident, frame in sys._current_frames().items()
            if ident != threading.get_ident()
        ]
        message = f"no step has finished for {self._watchdog_seconds:g} s since step {step:,}; where all threads are:\n"
        say(message + "\n".join(stacks))
        try:
            (self._workdir / WATCHDOG_FILE).write_text(message + "\n".join(stacks))
        except OSError as error:
            say(f"{WATCHDOG_FILE} cannot be written: {error}")


def resident_bytes() -> int:
    """Memory that this process has in use."""
    return psutil.Process().memory_info().rss
