"""The processes that one learner spans, through `jax.distributed`: all do the same steps, each on its own devices.

A step that they do together fails in all of them when one is gone; where the hardware does not tell, JAX ends them
after 100 s without its heartbeat.
"""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import broadcast_one_to_all
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from issgd_jax.errors import InputError, ProcessLostError, brief

AUTO = "auto"


def join(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Makes this process one of several; must come before JAX runs anything. Does nothing without a coordinator.

    coordinator: host:port of process 0; or "auto", on a cluster that JAX knows (Slurm, Open MPI, Cloud TPU, ...).

    Raises: InputError if JAX runs already, or the processes do not find each other.
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
    told = {} if coordinator == AUTO else {"coordinator_address": coordinator, "process_id": process_id}
    try:
        jax.distributed.initialize(num_processes=num_processes, **told)
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"distributed.coordinator is {coordinator}, but the processes cannot be joined there ({brief(error)}): "
            "start a new process, or see --config.distributed"
        ) from error


def is_first() -> bool:
    """Whether this is process 0, which keeps what a run leaves behind; so is one that is alone."""
    return jax.process_index() == 0


def from_first(told: Any, arrays: dict[str, np.ndarray]) -> tuple[Any, dict[str, np.ndarray]]:
    """What process 0 passes, in all processes, to the last bit.

    told: whatever JSON can hold. All must call this; what the others pass is not looked at.
    """
    if jax.process_count() == 1:
        return told, arrays
    layout = {name: (x.shape, x.dtype.name) for name, x in arrays.items()}
    header = json.dumps([told, layout]).encode()
    size = int(broadcast_one_to_all(np.int32(len(header))))
    told, layout = json.loads(_bytes_of_first(header, size))
    found = {}
    for name, (shape, dtype) in layout.items():
        size = int(np.prod(shape)) * jnp.dtype(dtype).itemsize
        content = _bytes_of_first(arrays[name].tobytes() if is_first() else b"", size)
        found[name] = np.frombuffer(content, jnp.dtype(dtype)).reshape(shape)
    return told, found


def _bytes_of_first(content: bytes, size: int) -> bytes:
    """As bytes: a sum, which the broadcast is, would make 0 of -0."""
    return broadcast_one_to_all(np.frombuffer(content if is_first() else bytes(size), np.uint8)).tobytes()


def agreement(mesh: Mesh | None) -> Callable[[int], int]:
    """Returns `number -> number`: the largest that any process passed one call before, 0 at first; the same in all.

    All must call it equally often. It never waits for what was not needed a step before. mesh: of the learner devices.
    Alone, the number itself.
    """
    if jax.process_count() == 1:
        return lambda number: number
    of_each = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    largest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
    before = None

    def agree(number: int) -> int:
        nonlocal before
        mine = [jax.device_put(np.full(1, number, np.int32), device) for device in of_each.addressable_devices]
        asked_for = jax.make_array_from_single_device_arrays((mesh.size,), of_each, mine)
        found, before = before, largest(asked_for)
        return 0 if found is None else int(jax.device_get(found))

    return agree


@contextlib.contextmanager
def noticing_loss() -> Iterator[None]:
    """Turns what JAX raises when another process is gone into ProcessLostError, which says what to do."""
    try:
        yield
    except Exception as error:
        if jax.process_count() > 1 and (isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error)):
            raise ProcessLostError(
                f"process {jax.process_index()} of {jax.process_count()} cannot go on, most likely as another is gone "
                f"({brief(error)}): end all, and the same commands go on from the newest checkpoint"
            ) from error
        raise


def leave(status: int) -> None:
    """Ends this process at once: JAX would wait for the others, which wait for this one in their next step."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
