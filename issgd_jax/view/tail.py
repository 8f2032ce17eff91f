"""Rows of metrics of a run that is running: reads only what was appended. Imports no jax."""

import pathlib

from issgd_jax.files import reading
from issgd_jax.run.metrics import parse_row


class Tail:
    """Rows of a metrics.jsonl that may appear later, grow, be cut, replaced or removed.

    Args:
      path: of the file.

    Example:
      >>> import tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "metrics.jsonl"
      >>> tail = Tail(path)
      >>> tail.read()
      []
      >>> _ = path.write_text('{"step": 0}\\n{"step"')
      >>> tail.read()
      [{'step': 0}]
    """

    def __init__(self, path: pathlib.Path):
        self._path, self._position = path, 0
        self._last: bytes = b""  # line before the position
        self._rows: list[dict] = []
        self._malformed = 0

    @property
    def malformed(self) -> int:
        """Lines so far that are no row of metrics that can come next."""
        return self._malformed

    def read(self) -> list[dict]:
        """Returns all rows so far; a line that is still being written is left out, and so is one that is no row that
        can come next, which `malformed` counts.

        Raises:
          InputError: the file cannot be read now.
        """
        with reading(self._path):
            try:
                with open(self._path, "rb") as file:
                    self._read(file)
            except (FileNotFoundError, NotADirectoryError):
                self._forget()
        return list(self._rows)

    def _read(self, file) -> None:
        # A run that is resumed cuts rows off, and may have written as many since; another may be in its place.
        file.seek(self._position - len(self._last))
        if file.read(len(self._last)) != self._last:
            self._forget()
            file.seek(0)
        content = file.read()
        lines = content[: content.rfind(b"\n") + 1].splitlines(keepends=True)
        for line in lines:
            row = parse_row(line)
            if row and (not self._rows or row["step"] > self._rows[-1]["step"]):
                self._rows.append(row)
            else:
                self._malformed += 1
        self._position += sum(map(len, lines))
        self._last = lines[-1] if lines else self._last

    def _forget(self) -> None:
        self._position, self._last, self._rows, self._malformed = 0, b"", [], 0
