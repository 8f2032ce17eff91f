"""TensorBoard events of rows of metrics. Imports no jax."""

import contextlib
import pathlib
import socket
import time
from collections.abc import Callable

from issgd_jax.console import say
from issgd_jax.errors import InputError


class Events:
    """TensorBoard events: a copy of metrics.jsonl, written again as a whole after an error and when a run is resumed.

    Not tensorboardX's `SummaryWriter(purge_step=...)`: its thread ends at the first error of the disk.
    """

    def __init__(self, workdir: pathlib.Path, rows: Callable[[], list[dict]]):
        """Opens nothing yet.

        Args:
          workdir: folder of the run.
          rows: reads metrics.jsonl.
        """
        self._workdir, self._rows, self._writer = workdir, rows, None

    def add(self, row: dict) -> None:
        """Adds a row that metrics.jsonl has already."""
        try:
            if self._writer is None:
                self._open()
            else:
                self._write(row)
            self._writer.flush()
        except (OSError, InputError) as error:
            say(f"the TensorBoard events of step {row['step']:,} cannot be written yet, training continues: {error}")
            self.close()

    def _open(self) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.record_writer import RecordWriter

        for old in self._workdir.glob("events.out.tfevents.*"):
            old.unlink()
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}"
        self._writer = RecordWriter(str(self._workdir / name))
        self._writer.write(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())
        for row in self._rows():
            self._write(row)

    def _write(self, row: dict) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import Summary

        values = [
            Summary.Value(tag=name, simple_value=value)
            for name, value in row.items()
            if name != "step" and value is not None
        ]
        event = Event(wall_time=time.time(), step=row["step"], summary=Summary(value=values))
        self._writer.write(event.SerializeToString())

    def close(self) -> None:
        writer, self._writer = self._writer, None
        if writer:
            with contextlib.suppress(OSError):  # logged when it was written
                writer.close()
