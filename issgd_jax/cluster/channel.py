"""Messages and parameters between the learner's process and the driver, over a socket that only these two hold.

Messages are pickled: each of the two is the other's parent or child, and no third process can reach the socket. The
bytes of parameters pass in shared memory that has no name, so that none of it outlives the two.
"""

import contextlib
import itertools
import mmap
import os
import pickle
import socket
import tempfile
import threading
from multiprocessing import reduction
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np

_ALIGNMENT = 64  # of every array in shared memory


class Packed(NamedTuple):
    """A pytree of host arrays that a process can pass on without knowing its classes.

    Attributes:
      pickled: the pytree, without the bytes of its arrays.
      buffers: u8[bytes] of each array.
    """

    pickled: bytes
    buffers: tuple[np.ndarray, ...]

    @property
    def num_bytes(self) -> int:
        """Size of everything."""
        return len(self.pickled) + sum(buffer.size for buffer in self.buffers)


def pack(tree: Any) -> Packed:
    """Returns a pytree of host arrays as bytes; copies no array that is contiguous.

    Example:
      >>> packed = pack({"kernel": np.arange(6.0).reshape(2, 3)})
      >>> [buffer.shape for buffer in packed.buffers]
      [(48,)]
      >>> unpack(packed)["kernel"].tolist()
      [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    """
    from ray import cloudpickle  # also what the user's program itself defines

    buffers: list[pickle.PickleBuffer] = []
    pickled = cloudpickle.dumps(tree, protocol=5, buffer_callback=buffers.append)
    return Packed(pickled, tuple(np.frombuffer(buffer.raw(), np.uint8) for buffer in buffers))


def unpack(packed: Packed) -> Any:
    """Returns the pytree; its arrays share the memory of the buffers."""
    return pickle.loads(packed.pickled, buffers=packed.buffers)


def pair() -> tuple[Connection, socket.socket]:
    """Returns two connected ends: one for this process, and one for a child, which makes a `Connection` of it."""
    here, there = socket.socketpair()
    return Connection(here.detach()), there


class Outlet:
    """Sends packed arrays through one piece of shared memory, which grows to the largest of them.

    Args:
      connection: no other thread may send while `send` does.

    Attributes:
      connection: the same.
      is_free: set by the owner once the other side has read what was sent, or has ended.
    """

    def __init__(self, connection: Connection):
        self.connection = connection
        self._memory = _map(0, None)
        self.is_free = threading.Event()
        self.is_free.set()

    def send(self, packed: Packed) -> None:
        """Waits until the memory is free, and sends; `Inlet.receive` must be the other side's next call.

        Raises:
          OSError: the other side has ended, or the memory is full.
        """
        self.is_free.wait()
        self.is_free.clear()
        sizes = [buffer.size for buffer in packed.buffers]
        offsets, size = _layout(sizes)
        descriptor = None
        if size > self._memory.size:
            descriptor = _make_file(size)
            self._memory = _map(size, descriptor)
        try:
            for offset, buffer in zip(offsets, packed.buffers):
                np.copyto(self._memory[offset : offset + buffer.size], buffer)  # other threads run meanwhile
            self.connection.send((packed.pickled, sizes, descriptor is not None))
            if descriptor is not None:
                reduction.send_handle(self.connection, descriptor, None)
        finally:
            if descriptor is not None:
                os.close(descriptor)


class Inlet:
    """The other side of an `Outlet`."""

    def __init__(self, connection: Connection):
        self._connection = connection
        self._memory = _map(0, None)

    def receive(self) -> Packed:
        """Returns what was sent; its arrays may be read until the other side is told that its memory is free.

        Raises:
          EOFError, OSError: the other side has ended.
        """
        pickled, sizes, is_new = self._connection.recv()
        offsets, size = _layout(sizes)
        if is_new:
            descriptor = reduction.recv_handle(self._connection)
            try:
                self._memory = _map(size, descriptor)
            finally:
                os.close(descriptor)
        if size > self._memory.size:
            raise OSError(f"{size:,} bytes were sent, but the shared memory has {self._memory.size:,}")
        return Packed(pickled, tuple(self._memory[start : start + size] for start, size in zip(offsets, sizes)))


def _layout(sizes: list[int]) -> tuple[list[int], int]:
    """Returns where each array begins in shared memory, and the size of all."""
    *offsets, size = itertools.accumulate((-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes), initial=0)
    return offsets, size


def _map(size: int, descriptor: int | None) -> np.ndarray:
    """Returns u8[size], the memory of a file; released with its last reader."""
    return np.frombuffer(mmap.mmap(descriptor, size), np.uint8) if size else np.zeros(0, np.uint8)


def _make_file(size: int) -> int:
    """Returns the descriptor of a file in memory that has no name."""
    descriptor = os.memfd_create("issgd_jax") if hasattr(os, "memfd_create") else _temporary_file()
    os.ftruncate(descriptor, size)
    return descriptor


def _temporary_file() -> int:
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def end(connection: Connection) -> None:
    """Ends a connection, for both sides and for threads that wait for it; its last reader closes it."""
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(connection.fileno())) as side:
        side.shutdown(socket.SHUT_RDWR)
