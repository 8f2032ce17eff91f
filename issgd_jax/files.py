"""Files and folders that survive a crash and a power failure. Imports no jax."""

import contextlib
import errno
import os
import pathlib
import uuid
from collections.abc import Iterator

from issgd_jax.errors import InputError, brief

# Ending of a file that is not complete yet; one that stays was left by a killed process.
LEFTOVER = ".new"
# What a file system says that cannot sync folders, or a folder in which one may write but not list.
_CANNOT_SYNC_FOLDERS = (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EPERM)


@contextlib.contextmanager
def replace_atomically(path: str | pathlib.Path, *, sync: bool = True) -> Iterator[pathlib.Path]:
    """Yields a new path to write to, and renames it to `path` when the block ends without an error.

    Args:
      path: the file to create or replace; its folder must exist.
      sync: whether the content is on the disk before the rename, and the name before this returns, so that both
        survive a power failure too; False: for what is soon written again.

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
    new = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}{LEFTOVER}")
    try:
        yield new
        if sync:
            sync_to_disk(new)
        os.replace(new, path)
    except BaseException:
        with contextlib.suppress(OSError):  # the error itself matters more
            new.unlink(missing_ok=True)
        raise
    if sync:
        sync_to_disk(path.parent)


def write_text_atomically(path: str | pathlib.Path, text: str, *, sync: bool = True) -> None:
    """Replaces `path` by a file with this text, see `replace_atomically`."""
    with replace_atomically(path, sync=sync) as new:
        new.write_text(text)


def make_folder(path: pathlib.Path, *, parents: bool = True) -> None:
    """Creates a folder where it is missing; its name is on the disk when this returns.

    Args:
      path: of the folder.
      parents: whether the folders that it is in are created too.

    Raises:
      OSError: it cannot be created, or is a file.
    """
    created = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=parents, exist_ok=True)
    for folder in created:
        sync_to_disk(folder.parent)


def list_folder(path: pathlib.Path) -> list[str]:
    """Returns the names in a folder, sorted; [] if there is no such folder.

    Unlike `Path.glob` and `Path.exists`, it takes nothing that cannot be read for missing.

    Raises:
      OSError: the folder cannot be read, or is a link to one that does not exist.
    """
    try:
        return sorted(os.listdir(path))
    except FileNotFoundError:
        if path.is_symlink():
            raise OSError(errno.ENOENT, f"a link to {os.readlink(path)}, which does not exist", str(path)) from None
        return []


def sync_to_disk(path: pathlib.Path) -> None:
    """Waits until a file's content, or a folder's list of names where that can be synced, is on the disk (`fsync`)."""
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC_FOLDERS or not path.is_dir():
            raise


def sync_tree_to_disk(folder: pathlib.Path) -> None:
    """Waits until everything in a folder is on the disk, innermost folders first, and the folder itself last."""
    for inner, _, files in os.walk(folder, topdown=False, onerror=_raise):
        for file in files:
            sync_to_disk(pathlib.Path(inner, file))
        sync_to_disk(pathlib.Path(inner))


def _raise(error: OSError) -> None:
    raise error


@contextlib.contextmanager
def reading(path: pathlib.Path) -> Iterator[None]:
    """Turns an error of the disk, which may pass, into an InputError that says what to do."""
    try:
        yield
    except (OSError, MemoryError) as error:
        raise InputError(
            f"{path} cannot be read ({reason(error)}). Nothing was changed: run the same command when it can be read, "
            "or choose another --workdir"
        ) from error


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[None]:
    """Turns an OSError into an InputError that says what to do."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({reason(error)}): make room, or choose another --workdir"
        ) from error


def reason(error: Exception) -> str:
    """Returns the system's words for an error of the disk.

    Example:
      >>> reason(OSError(errno.EIO, "Input/output error", "runs/x"))
      'Input/output error'
    """
    return getattr(error, "strerror", None) or brief(error)
