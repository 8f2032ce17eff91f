"""TensorBoard events of rows of metrics. Imports no jax."""

import contextlib
import itertools
import pathlib
import socket
import struct
import time
from collections.abc import Callable

from issgd_jax.console import say
from issgd_jax.errors import InputError
from issgd_jax.run.histograms import EDGES, HARDEST, known_counts


class Events:
    """TensorBoard events: a copy of metrics.jsonl, written again as a whole after an error and when a run is resumed.

    Not tensorboardX's `SummaryWriter(purge_step=...)`: its thread ends at the first error of the disk.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        rows: Callable[[], list[dict]],
        picture: Callable[[list[int]], bytes] | None = None,
    ):
        """Opens nothing yet.

        Args:
          workdir: folder of the run.
          rows: reads metrics.jsonl.
          picture: returns examples as PNG; None: none are shown.
        """
        self._workdir, self._rows, self._picture, self._writer = workdir, rows, picture, None

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
            if name != "step" and isinstance(value, int | float)
        ]
        values += [
            Summary.Value(tag=name, histo=_histogram(counts, edges))
            for name, edges in EDGES.items()
            if (counts := known_counts(row, name))
        ]
        if self._picture and row.get(HARDEST):
            png = self._picture(row[HARDEST])
            width, height = struct.unpack(">II", png[16:24])
            image = Summary.Image(encoded_image_string=png, width=width, height=height)
            values.append(Summary.Value(tag=HARDEST, image=image))
        event = Event(wall_time=time.time(), step=row["step"], summary=Summary(value=values))
        self._writer.write(event.SerializeToString())

    def close(self) -> None:
        writer, self._writer = self._writer, None
        if writer:
            with contextlib.suppress(OSError):  # logged when it was written
                writer.close()


def _histogram(counts: list[int], edges: tuple[float, ...]):
    """Returns the message of TensorBoard, with the bins that are in use and what of the values follows from them."""
    from tensorboardX.proto.summary_pb2 import HistogramProto

    used = [place for place, count in enumerate(counts) if count] or [0]
    first, last = used[0], used[-1]
    centres = [(low + high) / 2 for low, high in itertools.pairwise(edges)]
    return HistogramProto(
        min=edges[first],
        max=edges[last + 1],
        num=sum(counts),
        sum=sum(count * centre for count, centre in zip(counts, centres)),
        sum_squares=sum(count * centre**2 for count, centre in zip(counts, centres)),
        bucket_limit=edges[first + 1 : last + 2],
        bucket=counts[first : last + 1],
    )
