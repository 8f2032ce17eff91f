"""Files and folders as a person names them. Imports no jax."""

import contextlib
import os
import pathlib
import re
import stat
import sys
import tempfile
from collections.abc import Iterator

from issgd_jax.errors import InputError

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
# A Path has made one slash of two, and one of what begins so.
_URL_IN_PATH = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:(/|$)")
# What no library takes for a pattern, an escape or an address.
_PLAIN = re.compile(r"[\w/.+=, -]*", re.ASCII)


def local_path(path: str | os.PathLike, name: str) -> pathlib.Path:
    """Returns the path of a file or folder of this machine, with `~` and `~user` expanded.

    Args:
      path: any legal name.
      name: of the flag, field or argument, for errors.

    Guarantees:
      The result passed to this function again is the same file.

    Raises:
      InputError: it is a URL, empty, no path at all, or in the home folder of an unknown user.

    Example:
      >>> local_path("runs/[a] b", "workdir").as_posix()
      'runs/[a] b'
      >>> local_path("gs://bucket/run", "workdir")
      Traceback (most recent call last):
      ...
      issgd_jax.errors.InputError: workdir is 'gs://bucket/run', but only folders of this machine work: mount the \
storage, and name the folder
    """
    try:
        text = os.fsdecode(path)
    except TypeError as error:
        raise InputError(f"{name} must be a path, got {path!r}") from error
    if not text or "\0" in text:
        raise InputError(f"{name} is {text!r}: name a file or folder")
    if is_url(text) or (isinstance(path, pathlib.PurePath) and _URL_IN_PATH.match(text)):
        raise InputError(
            f"{name} is {text!r}, but only folders of this machine work: mount the storage, and name the folder"
        )
    expanded = os.path.expanduser(text)
    if text.startswith("~") and (expanded == text or not os.path.isabs(os.environ.get("HOME", "/"))):
        raise InputError(
            f"{name} is {text!r}, but no user has that home folder: write ./{text} if that is the name itself"
        )
    local = pathlib.Path(expanded)
    is_ambiguous = str(local).startswith("~") or _URL_IN_PATH.match(str(local))
    return local.absolute() if is_ambiguous else local


def is_url(text: str) -> bool:
    """Returns whether a text is the address of something that is not in the file system of this machine.

    Example:
      >>> is_url("gs://bucket/run"), is_url("/runs/a:b")
      (True, False)
    """
    return _URL.match(text) is not None


def cache_folder() -> pathlib.Path:
    """Returns this program's folder in the user's cache folder ($XDG_CACHE_HOME, else ~/.cache); creates nothing.

    Raises:
      InputError: the user has no home folder.
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    parent = local_path(given, "XDG_CACHE_HOME") if given else None
    if parent is None or not parent.is_absolute():  # which the XDG specification has ignored
        parent = local_path("~/.cache", "the cache folder")
    return parent / "issgd_jax"


def private_folder(folder: pathlib.Path) -> pathlib.Path:
    """Returns a folder, created if it is missing, into which no other user can put a file: for code that is run.

    Guarantees:
      It is this user's, with mode 0700, and neither it nor a folder above it belongs to another user, who is not the
      administrator, or can be written by one; in a folder with the sticky bit, such as /tmp, others cannot rename it.

    Raises:
      OSError: it cannot be created, or another user could change it.

    Example:
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     oct(private_folder(pathlib.Path(folder) / "a" / "b").stat().st_mode)
      '0o40700'
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(mode=0o700, exist_ok=True)
    folder = folder.resolve(strict=True)
    administrators = {0, os.stat("/").st_uid}
    for path in (folder, *folder.parents):
        status = path.stat()
        if status.st_uid not in administrators | {os.getuid()}:
            raise PermissionError(f"{path} belongs to another user, who could put code there")
        is_sticky = path != folder and status.st_mode & stat.S_ISVTX
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not is_sticky:
            raise PermissionError(f"other users can write {path}, and so put code there: chmod go-w {path}")
    if folder.stat().st_mode & 0o777 != 0o700:
        with contextlib.suppress(OSError):  # the administrator's, or on a disk that is read-only: also good
            folder.chmod(0o700)
    return folder


@contextlib.contextmanager
def plainly_named(folder: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yields a name of a folder that every library takes for a name: its absolute path, or a symbolic link to it.

    Some read `[x]`, a backslash or `gs:` in a path as a pattern or an address, or cannot encode it.

    Example:
      >>> with tempfile.TemporaryDirectory(prefix="[x]") as folder, plainly_named(folder) as plain:
      ...     _ = (plain / "a").write_text("hello")
      ...     "[" in str(plain), os.listdir(folder)
      (False, ['a'])
    """
    folder = pathlib.Path(folder).absolute()
    if _PLAIN.fullmatch(str(folder)):
        yield folder
        return
    with tempfile.TemporaryDirectory() as temporary:
        link = pathlib.Path(temporary) / "folder"
        link.symlink_to(folder)
        yield link


def print_any_name() -> None:
    """Has standard output escape what its encoding lacks, as standard error does, and not raise."""
    with contextlib.suppress(AttributeError):  # not a stream of Python's own
        sys.stdout.reconfigure(errors="backslashreplace")
