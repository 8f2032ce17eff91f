"""Arrays on the disk in Orbax's format, which others read too; without what its threads print."""

import contextlib
import errno
import functools
import logging
import os
import pathlib
import shutil
import sys
import threading
from collections.abc import Callable, Iterator

import numpy as np

from issgd_jax.paths import plainly_named

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EMFILE)


def save(folder: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes arrays to a new folder; nothing of it need be on the disk when this returns.

    Raises:
      OSError: the disk is full or broken.
      ValueError: they cannot be written for another reason.
    """
    import orbax.checkpoint as ocp

    _check_space(folder.parent, arrays)
    with _naming_disk_errors(folder.parent), plainly_named(folder.parent) as plain:
        _checkpointer().save(plain / folder.name, args=ocp.args.PyTreeSave(arrays))


def load(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns the arrays in a folder; raises whatever Orbax does."""
    with plainly_named(folder.parent) as plain:
        return _checkpointer().restore(plain / folder.name)


@functools.cache
def _checkpointer():
    import orbax.checkpoint as ocp

    logging.getLogger("absl").addFilter(_is_not_orbax)
    sys.unraisablehook = functools.partial(_print_unless_late, sys.unraisablehook)
    # Of the processes of a run the first alone writes; the others would never reach a barrier.
    alone = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0})
    # Noise does not compress, and the time would be taken from the learner.
    handler = ocp.PyTreeCheckpointHandler(use_compression=False, use_zarr3=True, multiprocessing_options=alone)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _is_not_orbax(record: logging.LogRecord) -> bool:
    """Drops Orbax's log, tracebacks included: its errors arrive as exceptions too."""
    return f"{os.sep}orbax{os.sep}" not in record.pathname


def _print_unless_late(print_error: Callable, raised) -> None:
    """Prints an error that nobody can catch, but not those of threads of Orbax that outlive a failed write."""
    is_late = raised.exc_type is RuntimeError and str(raised.exc_value) == "Event loop is closed"
    if not is_late or threading.current_thread() is threading.main_thread():
        print_error(raised)


@contextlib.contextmanager
def _naming_disk_errors(path: pathlib.Path) -> Iterator[None]:
    """Turns Orbax's long errors of the disk into the OSErrors that they tell of."""
    try:
        yield
    except Exception as error:
        for number in _DISK_ERRORS:
            if os.strerror(number) in str(error):
                raise OSError(number, os.strerror(number), str(path.parent)) from error
        raise


def _check_space(folder: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    """Raises OSError if the disk is too full, before Orbax has begun."""
    needed, free = sum(array.nbytes for array in arrays.values()), shutil.disk_usage(folder).free
    if needed > free:
        message = f"{os.strerror(errno.ENOSPC)}: {needed / 1e6:,.1f} MB needed, {free / 1e6:,.1f} MB free"
        raise OSError(errno.ENOSPC, message, str(folder.parent))
