"""Ctrl-C while there is nothing to save: during imports, and until the first step is done. Imports no jax."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def ending_at_interrupt() -> Iterator[None]:
    """Has Ctrl-C end this process at once, with exit status 130, while the context lasts.

    Python itself would raise KeyboardInterrupt, which a library that is being imported may swallow, or take for an
    error of its own. Where another handler is set, or SIGINT is ignored (nohup), nothing is changed.
    """
    is_main = threading.current_thread() is threading.main_thread()  # signals can be handled only there
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def raising_at_interrupt() -> Iterator[None]:
    """Has Ctrl-C raise KeyboardInterrupt again, and SIGTERM SystemExit, where a terminal must be left as it was.

    In another thread than the main one nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: _exit}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _exit(number, frame):
    del frame
    sys.exit(128 + number)


def _end(number, frame):
    del frame
    os.write(2, b"\nstopped by SIGINT\n")
    os._exit(128 + number)  # a shell's status for an end by signal
