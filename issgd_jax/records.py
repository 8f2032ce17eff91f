"""JSON that a run wrote, and that anybody may have changed since: read strictly. Imports no jax."""

import contextlib
import json
import math
import pathlib
from collections.abc import Iterator
from typing import Any

from issgd_jax.errors import InputError
from issgd_jax.files import reading, reason

# What malformed content raises where it is used, and what reading raises where there is no file.
_ERRORS = (
    ArithmeticError, AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError, FileNotFoundError,
    IsADirectoryError, NotADirectoryError,
)  # fmt: skip


class MalformedError(InputError):
    """A file is missing, or its content is not what a run writes; names the file and the remedy."""


def parse(text: str) -> Any:
    """Returns the content of a JSON text.

    Raises:
      ValueError: it is not JSON; it has NaN, infinity, a number of more than 64 bits, or a name twice in one object; or
        is nested too deeply.

    Example:
      >>> parse('{"step": 1}')
      {'step': 1}
      >>> parse('{"step": 1, "step": 2}')
      Traceback (most recent call last):
      ...
      ValueError: 'step' is there twice
    """
    try:
        return json.loads(
            text, parse_int=_int, parse_float=_float, parse_constant=_float, object_pairs_hook=_unique_names
        )
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read(path: pathlib.Path) -> dict:
    """Returns the JSON object in a file.

    Raises:
      OSError, ValueError: it cannot be read, or is none.
    """
    content = parse(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"a JSON object is needed, and it is a {type(content).__name__}")
    return content


@contextlib.contextmanager
def parsing(path: pathlib.Path, remedy: str) -> Iterator[None]:
    """Turns the errors of reading a file, and of using its content, into an InputError that names the file.

    Args:
      path: of the file.
      remedy: what to do if the file is missing or malformed.

    Raises:
      MalformedError: the file is missing or malformed.
      InputError: it cannot be read now, which may pass; see `files.reading`.

    Example:
      >>> with parsing(pathlib.Path("config.json"), "repair it"):
      ...     {"config": [1]}["config"]["steps"]
      Traceback (most recent call last):
      ...
      issgd_jax.records.MalformedError: config.json cannot be read (TypeError: list indices must be integers or \
slices, not str): repair it
    """
    with reading(path):
        try:
            yield
        except _ERRORS as error:
            raise MalformedError(f"{path} cannot be read ({reason(error)}): {remedy}") from error


def whole_number(value: Any) -> int:
    """Returns a value that must be an int >= 0; TypeError if it is none."""
    if type(value) is not int or value < 0:
        raise TypeError(f"{value!r} is no whole number")
    return value


def _int(text: str) -> int:
    if len(text) > 20 or not -(2**63) <= int(text) < 2**63:
        raise ValueError(f"{text[:20]}… has more than 64 bits")
    return int(text)


def _float(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text[:20]} is not finite")
    return number


def _unique_names(pairs: list[tuple[str, Any]]) -> dict:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
    return values
