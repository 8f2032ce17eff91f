"""Device roles: one learner, the rest workers; a single device plays both."""

import contextlib
import dataclasses
import math
import os

import jax

from issgd_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Roles:
    """learner: the device that updates the parameters. workers: the devices that score, at least one. learners: those
    that compute gradients, the learner first."""

    learner: jax.Device
    workers: tuple[jax.Device, ...]
    learners: tuple[jax.Device, ...]


def assign_roles(num_workers: int | None = None, host_platform_count: int = 0, num_learners: int = 1) -> Roles:
    """Splits the machine's devices into the first as learners and the next `num_workers` (None: all) as workers.

    host_platform_count: 0 takes the devices that JAX finds by default; k > 0 simulates k devices on the CPU, which must
    be settled before JAX runs anything. Where there are too few, learners share them, and workers those of learners,
    but for the first, if there is another.

    Raises: InputError if there are fewer devices than asked for.
    """
    devices = _cpu_devices(host_platform_count) if host_platform_count else jax.local_devices()
    others = devices[num_learners:] or devices[1:] or devices
    available = len(others)
    if num_workers is not None and not 1 <= num_workers <= available:
        raise InputError(
            f"devices.workers must be between 1 and {available} with {len(devices)} device(s), got {num_workers}: "
            f"lower --config.devices.workers, or set --config.devices.host_platform_count={num_workers + num_learners}"
        )
    return Roles(devices[0], tuple(others[:num_workers]), tuple(devices[:num_learners]))


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
