"""Atomic replacement of files. Imports no jax."""

import contextlib
import os
import pathlib
from collections.abc import Iterator

# Ending of a file that is not complete yet; one that stays was left by a killed process.
LEFTOVER = ".new"


@contextlib.contextmanager
def replace_atomically(path: str | pathlib.Path, *, sync: bool = False) -> Iterator[pathlib.Path]:
    """Yields a new path to write to, and renames it to `path` when the block ends without an error.

    Args:
      path: the file to create or replace; its folder must exist.
      sync: whether the content is on the disk before the rename, so that it also survives a power failure.

    Guarantees:
      A reader, or a crash at any moment, finds the old file or the new one, never a part. Processes that replace the
      same file do not disturb each other: the last one wins. After an error the old file is untouched, and only a
      process that is killed leaves an incomplete file beside it, whose name ends in `LEFTOVER`.

    Raises:
      OSError: the folder cannot be written or the disk is full.

    Example:
      >>> import tempfile
      >>> folder = pathlib.Path(tempfile.mkdtemp())
      >>> with replace_atomically(folder / "a.txt") as new:
      ...     _ = new.write_text("hello")
      >>> (folder / "a.txt").read_text()
      'hello'
    """
    path = pathlib.Path(path)
    new = path.with_name(f"{path.name}.{os.getpid()}{LEFTOVER}")
    try:
        yield new
        if sync:
            sync_to_disk(new)
        os.replace(new, path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    if sync:
        sync_to_disk(path.parent)


def write_text_atomically(path: str | pathlib.Path, text: str, *, sync: bool = False) -> None:
    """Replaces `path` by a file with this text, see `replace_atomically`."""
    with replace_atomically(path, sync=sync) as new:
        new.write_text(text)


def sync_to_disk(path: pathlib.Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on the disk (`fsync`)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
