"""Processes of one learner, through `jax.distributed`: all do the same steps, each on its own devices.

A step that they share fails in all of them when one is lost; where the hardware does not report it, JAX ends them after
100 s without its heartbeat.
"""

import contextlib
import json
import os
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import broadcast_one_to_all
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from issgd_jax.console import say
from issgd_jax.errors import InputError, ProcessLostError, brief

AUTO = "auto"


def join(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Joins this process with the others; to be called before JAX runs anything.

    Args:
      coordinator: host:port of process 0; "auto" on a cluster that JAX knows (Slurm, Open MPI, Cloud TPU, ...); None:
        nothing is done.
      num_processes, process_id: of all, and of this one; None with "auto".

    Raises:
      InputError: JAX runs already, process 0 cannot listen at the coordinator's address, or the processes do not find
        each other.

    Guarantees:
      The coordinator listens at the host that is given and nowhere else, unless JAX_COORDINATOR_BIND_ADDRESS names
      another; with "auto" JAX chooses, and it listens on all interfaces unless that is set.
    """
    if coordinator is None:
        return
    if jax.distributed.is_initialized():
        if coordinator != AUTO and (num_processes, process_id) != (jax.process_count(), jax.process_index()):
            raise InputError(
                f"distributed.process_id is {process_id} of {num_processes}, but this process is "
                f"{jax.process_index()} of {jax.process_count()} already: start a new process"
            )
        return
    place = {}
    if coordinator != AUTO:
        place = {"coordinator_address": coordinator, "process_id": process_id}
        place["coordinator_bind_address"] = _listening_address(coordinator, is_first=process_id == 0)
    try:
        jax.distributed.initialize(num_processes=num_processes, **place)
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"distributed.coordinator is {coordinator}, but the processes cannot be joined there ({brief(error)}): "
            "start a new process, or see --config.distributed"
        ) from error


def _listening_address(coordinator: str, *, is_first: bool) -> str:
    """Returns where process 0 listens; raises InputError where it cannot, for which JAX would abort the process."""
    address = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", coordinator)
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port) < 2**16):
        raise InputError(
            f"distributed.coordinator must be auto or HOST:PORT with a port from 1 to 65535, got {address!r}"
        )
    if is_first:
        try:
            hosts = _bind(host.strip("[]"), int(port))
        except OSError as error:
            raise InputError(
                f"distributed.coordinator is {coordinator}, but process 0 cannot listen at {address} ({error}): give "
                "an address of its machine and a free port, or set JAX_COORDINATOR_BIND_ADDRESS where another machine "
                "passes connections on to it"
            ) from error
        if not _is_loopback(host) and all(map(_is_loopback, hosts)):
            say(f"distributed.coordinator is {coordinator}, here {', '.join(hosts)}: no other machine can join")
    return address


def _bind(host: str, port: int) -> list[str]:
    """Returns the addresses of a host at which this machine can listen; raises OSError if there are none."""
    hosts, errors = [], []
    for family, kind, *_, place in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        with socket.socket(family, kind) as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                server.bind(place)
                hosts.append(place[0])
            except OSError as error:
                errors.append(error)
    if not hosts:
        raise errors[0]
    return hosts


def _is_loopback(host: str) -> bool:
    return host in ("localhost", "::1", "[::1]") or host.startswith("127.")


def is_first() -> bool:
    """Returns whether this is process 0, which alone writes files; so is a process that is alone."""
    return jax.process_index() == 0


def from_first(values: Any, arrays: dict[str, np.ndarray]) -> tuple[Any, dict[str, np.ndarray]]:
    """Returns, in all processes, the arguments of process 0, to the last bit.

    All processes must call this; the arguments of the others are ignored.

    Args:
      values: whatever JSON can hold.
      arrays: {name: host array}.
    """
    if jax.process_count() == 1:
        return values, arrays
    layout = {name: (x.shape, x.dtype.name) for name, x in arrays.items()}
    header = json.dumps([values, layout]).encode()
    size = int(broadcast_one_to_all(np.int32(len(header))))
    values, layout = json.loads(_broadcast_bytes(header, size))
    received = {}
    for name, (shape, dtype) in layout.items():
        size = int(np.prod(shape)) * jnp.dtype(dtype).itemsize
        content = _broadcast_bytes(arrays[name].tobytes() if is_first() else b"", size)
        received[name] = np.frombuffer(content, jnp.dtype(dtype)).reshape(shape)
    return values, received


def _broadcast_bytes(content: bytes, size: int) -> bytes:
    """Broadcasts bytes of process 0: the broadcast is a sum, which would turn a float -0 into 0."""
    return broadcast_one_to_all(np.frombuffer(content if is_first() else bytes(size), np.uint8)).tobytes()


def agreement(mesh: Mesh | None) -> Callable[[int], int]:
    """Returns `number -> number`: the largest that any process passed in the call before, the same in all; 0 at first.

    All processes must call it equally often. It waits for nothing but the call before. For a process that is alone it
    returns the number itself.

    Args:
      mesh: of the learner devices.
    """
    if jax.process_count() == 1:
        return lambda number: number
    one_each = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    largest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
    previous = None

    def agree(number: int) -> int:
        nonlocal previous
        numbers = [jax.device_put(np.full(1, number, np.int32), device) for device in one_each.addressable_devices]
        gathered = jax.make_array_from_single_device_arrays((mesh.size,), one_each, numbers)
        result, previous = previous, largest(gathered)
        return 0 if result is None else int(jax.device_get(result))

    return agree


@contextlib.contextmanager
def noticing_loss() -> Iterator[None]:
    """Turns JAX's errors of a lost process into ProcessLostError, which says what to do."""
    try:
        yield
    except Exception as error:
        if jax.process_count() > 1 and (isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error)):
            raise ProcessLostError(
                f"process {jax.process_index()} of {jax.process_count()} cannot continue, most likely as another is "
                f"lost ({brief(error)}): end all, and the same commands resume from the newest checkpoint"
            ) from error
        raise


def leave(status: int) -> None:
    """Ends this process at once: JAX would wait for the others, which wait for this one in their next step."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
