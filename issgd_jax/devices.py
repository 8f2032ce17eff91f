"""Device roles: one learner, the rest workers; a single device plays both."""

import contextlib
import dataclasses
import math
import os

import jax

from issgd_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Roles:
    """learner: the device that updates the parameters. workers: the devices that score, at least one."""

    learner: jax.Device
    workers: tuple[jax.Device, ...]


def assign_roles(num_workers: int | None = None, host_platform_count: int = 0) -> Roles:
    """Splits the machine's devices into the first as learner and the next `num_workers` (None: all) as workers.

    host_platform_count: 0 takes the devices that JAX finds by default; k > 0 simulates k devices on the CPU, which must
    be settled before JAX runs anything. With one device, learner and worker share it.

    Raises: InputError if there are fewer devices than asked for.
    """
    devices = _cpu_devices(host_platform_count) if host_platform_count else jax.local_devices()
    available = max(1, len(devices) - 1)
    if num_workers is not None and not 1 <= num_workers <= available:
        raise InputError(
            f"devices.workers must be between 1 and {available} with {len(devices)} device(s), got {num_workers}: "
            f"lower --config.devices.workers, or set --config.devices.host_platform_count={num_workers + 1}"
        )
    workers = devices[1:] or devices
    return Roles(learner=devices[0], workers=tuple(workers[:num_workers]))


def scoring_devices(num_devices: int | None = None, host_platform_count: int = 0) -> tuple[jax.Device, ...]:
    """The first `num_devices` (None: all) of a machine that only scores. host_platform_count: see `assign_roles`.

    Raises: InputError if there are fewer devices than asked for.
    """
    devices = _cpu_devices(host_platform_count) if host_platform_count else jax.local_devices()
    if num_devices is not None and not 1 <= num_devices <= len(devices):
        raise InputError(
            f"devices.workers is {num_devices}, but this machine has {len(devices)} device(s): lower "
            "--config.devices.workers"
        )
    return tuple(devices[:num_devices])


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
