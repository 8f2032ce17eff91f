"""Device roles: the first devices are learners, the rest workers; where none is left, the learners are workers too.

With several processes, each has the same number of both.
"""

import contextlib
import dataclasses
import functools
import math
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from issgd_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Roles:
    """Roles of the devices of all processes, in their order.

    Attributes:
      learners: devices that compute gradients.
      workers: devices that score, at least one.
      together: whether learners share every minibatch, and each has its own copy of the learner's arrays; or each has
        its own minibatch, and the first alone has those arrays.
    """

    learners: tuple[jax.Device, ...]
    workers: tuple[jax.Device, ...]
    together: bool = True

    @property
    def learner(self) -> jax.Device:
        """The first learner of this process, which does what one device does alone."""
        return next(device for device in self.learners if device.process_index == jax.process_index())

    @property
    def mesh(self) -> Mesh | None:
        """The learners that share every minibatch; None where one has it all."""
        return Mesh(np.asarray(self.learners), ("learner",)) if self.together and len(self.learners) > 1 else None

    @property
    def placement(self) -> jax.Device | NamedSharding:
        """Placement of the learners' arrays: whole on each of them."""
        return NamedSharding(self.mesh, PartitionSpec()) if self.mesh else self.learner


def assign_roles(
    num_learners: int = 1, num_workers: int | None = None, host_platform_count: int = 0, *, together: bool = True
) -> Roles:
    """Splits the devices into the first as learners and the next `num_workers` (None: all) as workers.

    Where all devices are learners, they are the workers too.

    Args:
      num_learners: of all processes together; each process takes its part from its own devices.
      num_workers: the same; None: all that are left.
      host_platform_count: 0: the devices that JAX finds by default; k > 0: k devices simulated on each process's CPU,
        which must be set before JAX runs anything.
      together: see `Roles`; learners with a minibatch each share the devices there are.

    Raises:
      InputError: there are fewer devices, or the processes would differ.
    """
    by_process = _devices(host_platform_count)
    count, size = len(by_process), len(by_process[0])
    if any(len(devices) != size for devices in by_process):
        sizes = ", ".join(str(len(devices)) for devices in by_process)
        raise InputError(f"the processes have {sizes} devices: all must have as many (see CUDA_VISIBLE_DEVICES)")
    if not together:
        num_learners = min(num_learners, size)
    total = f"{count * size} device(s)" + (f" of {count} processes" if count > 1 else "")
    if not 1 <= num_learners <= count * size:
        raise InputError(
            f"devices.learners must be between 1 and {count * size} with {total}, got {num_learners}: lower "
            f"--config.devices.learners, or set --config.devices.host_platform_count={-(-num_learners // count)}"
        )
    _check_multiple("learners", num_learners, count)
    learners = [device for devices in by_process for device in devices[: num_learners // count]]
    left = [devices[num_learners // count :] or devices for devices in by_process]
    available = count * len(left[0])
    if num_workers is None:
        num_workers = available
    if not 1 <= num_workers <= available:
        beside = f", {num_learners} of them learners" if num_learners > 1 else ""
        raise InputError(
            f"devices.workers must be between 1 and {available} with {total}{beside}, got {num_workers}: lower "
            "--config.devices.workers, or set "
            f"--config.devices.host_platform_count={-(-(num_learners + num_workers) // count)}"
        )
    _check_multiple("workers", num_workers, count)
    workers = [device for devices in left for device in devices[: num_workers // count]]
    return Roles(tuple(learners), tuple(workers), together)


def _check_multiple(name: str, number: int, num_processes: int) -> None:
    if number % num_processes:
        raise InputError(
            f"devices.{name} must be a multiple of the {num_processes} processes, among which they are divided, got "
            f"{number}: set --config.devices.{name}={-(-number // num_processes) * num_processes}"
        )


def put(arrays: Any, placement: jax.Device | Sharding, **options) -> Any:
    """Puts arrays whole on every device of a placement; what is on devices does not pass through the host.

    Args:
      arrays: pytree; where the placement spans processes, equal in all of them, and each puts its own copy. Arrays
        sharded over several devices are sharded along their first axis.
      placement: a device, or a replicated sharding.
      **options: of `jax.device_put`.

    Example:
      >>> put(np.float32(2), jax.devices()[0]).tolist()
      2.0
    """
    arrays = jax.tree.map(functools.partial(_joined, device=_first_device(placement)), arrays)
    if not isinstance(placement, NamedSharding) or placement.is_fully_addressable:
        return jax.device_put(arrays, placement, **options)
    here = [device for device in placement.mesh.devices.flat if device.process_index == jax.process_index()]
    local = jax.device_put(arrays, NamedSharding(Mesh(np.asarray(here), ("here",)), PartitionSpec()), **options)

    def joined(x):
        parts = [shard.data for shard in x.addressable_shards]
        return jax.make_array_from_single_device_arrays(x.shape, placement, parts)

    return jax.tree.map(joined, local)


def _first_device(placement: jax.Device | Sharding) -> jax.Device:
    """Returns the first device of a placement that is this process's."""
    return placement if isinstance(placement, jax.Device) else min(placement.addressable_devices, key=lambda d: d.id)


def _joined(x: Any, device: jax.Device) -> Any:
    """Returns a sharded array whole on one device: from JAX 0.12 on, `jax.device_put` would do it through the host."""
    if not isinstance(x, jax.Array) or x.is_fully_replicated:
        return x
    shards = sorted(x.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    return _concatenated(*jax.device_put([shard.data for shard in shards], device))


@jax.jit
def _concatenated(*parts: jax.Array) -> jax.Array:
    return jnp.concatenate(parts)


def one_copy(arrays: Any) -> Any:
    """Returns this process's first copy of each replicated array; nothing is copied.

    Args:
      arrays: pytree; leaves that are not replicated are returned as they are.
    """

    def one(x):
        return x.addressable_data(0) if isinstance(x, jax.Array) and x.is_fully_replicated else x

    return jax.tree.map(one, arrays)


def scoring_devices(num_devices: int | None = None, host_platform_count: int = 0) -> tuple[jax.Device, ...]:
    """Returns the devices of a machine that only scores.

    Args:
      num_devices: the first so many; None: all.
      host_platform_count: see `assign_roles`.

    Raises:
      InputError: there are fewer devices.
    """
    (devices,) = _devices(host_platform_count)
    if num_devices is not None and not 1 <= num_devices <= len(devices):
        raise InputError(
            f"devices.workers is {num_devices}, but this machine has {len(devices)} device(s): lower "
            "--config.devices.workers"
        )
    return tuple(devices[:num_devices])


def memory_bytes(device: jax.Device) -> float:
    """Returns the memory of a device in bytes; infinity where it is unknown."""
    if device.platform == "cpu":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return (device.memory_stats() or {}).get("bytes_limit", math.inf)


def _devices(host_platform_count: int) -> list[list[jax.Device]]:
    """Returns the devices of each process."""
    if not host_platform_count:
        return [jax.local_devices(index) for index in range(jax.process_count())]
    with contextlib.suppress(RuntimeError):  # JAX has started: what it has is checked below
        jax.config.update("jax_num_cpu_devices", host_platform_count)
    here = jax.local_devices(backend="cpu")
    if len(here) < host_platform_count:
        raise InputError(
            f"devices.host_platform_count is {host_platform_count}, but JAX has started with {len(here)} CPU "
            "device(s): start a new process, or call "
            f"jax.config.update('jax_num_cpu_devices', {host_platform_count}) first"
        )
    by_process = [jax.local_devices(index, backend="cpu") for index in range(jax.process_count("cpu"))]
    return [devices[:host_platform_count] for devices in by_process]
