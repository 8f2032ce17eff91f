"""Device roles: the first are learners, the rest workers; where none is left, the learners are workers too."""

import contextlib
import dataclasses
import math
import os
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from issgd_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Roles:
    """learners: the devices that update the parameters, each its own copy. workers: those that score, at least one."""

    learners: tuple[jax.Device, ...]
    workers: tuple[jax.Device, ...]

    @property
    def learner(self) -> jax.Device:
        """The first of the learners: what one device does alone is done there."""
        return self.learners[0]

    @property
    def mesh(self) -> Mesh | None:
        """The learners that share every minibatch; None where one has it all."""
        return Mesh(np.asarray(self.learners), ("learner",)) if len(self.learners) > 1 else None

    @property
    def placement(self) -> jax.Device | NamedSharding:
        """Where the learners' arrays lie: whole on each of them."""
        return NamedSharding(self.mesh, PartitionSpec()) if self.mesh else self.learner


def assign_roles(num_learners: int = 1, num_workers: int | None = None, host_platform_count: int = 0) -> Roles:
    """Splits the machine's devices into the first as learners and the next `num_workers` (None: all) as workers.

    host_platform_count: 0 takes the devices that JAX finds by default; k > 0 simulates k devices on the CPU, which must
    be settled before JAX runs anything. Where all devices are learners, they are the workers too.

    Raises: InputError if there are fewer devices than asked for.
    """
    devices = _cpu_devices(host_platform_count) if host_platform_count else jax.local_devices()
    if not 1 <= num_learners <= len(devices):
        raise InputError(
            f"devices.learners must be between 1 and {len(devices)} with {len(devices)} device(s), got {num_learners}: "
            f"lower --config.devices.learners, or set --config.devices.host_platform_count={num_learners}"
        )
    workers = devices[num_learners:] or devices
    if num_workers is not None and not 1 <= num_workers <= len(workers):
        learners = f", {num_learners} of them learners" if num_learners > 1 else ""
        raise InputError(
            f"devices.workers must be between 1 and {len(workers)} with {len(devices)} device(s){learners}, got "
            f"{num_workers}: lower --config.devices.workers, or set "
            f"--config.devices.host_platform_count={num_learners + num_workers}"
        )
    return Roles(learners=tuple(devices[:num_learners]), workers=tuple(workers[:num_workers]))


def one_copy(arrays: Any) -> Any:
    """Of arrays that lie whole on each of several devices, those on the first; nothing is copied."""
    return jax.tree.map(lambda x: x.addressable_data(0), arrays)


def memory_bytes(device: jax.Device) -> float:
    """What the device can hold at most; infinity where it does not tell."""
    if device.platform == "cpu":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return (device.memory_stats() or {}).get("bytes_limit", math.inf)


def _cpu_devices(count: int) -> list[jax.Device]:
    with contextlib.suppress(RuntimeError):  # JAX has started: what it has is checked below
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.local_devices(backend="cpu")
    if len(devices) < count:
        raise InputError(
            f"devices.host_platform_count is {count}, but JAX has started with {len(devices)} CPU device(s): "
            f"start a new process, or call jax.config.update('jax_num_cpu_devices', {count}) first"
        )
    return devices[:count]
