"""Ray, as far as the pool needs it: connection, machines of the cluster, and worker processes on them."""

import contextlib
import dataclasses
import math
import os
import socket
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import psutil

from issgd_jax.errors import InputError, brief

LOCAL = "local"
NAMESPACE = "issgd_jax"
# Ray reads these when it is imported. Without the first, a cluster of this machine alone listens on all interfaces.
_LOOPBACK_ONLY = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
# No usage reports, and no message of Ray's own about a worker's death, which the dispatcher logs.
_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS_SKIP_REGEX": "A worker died or was killed"}
# On a machine that is busy Ray would end what has not started within a minute, start it again, and so on without end.
# Workers start with the priority of all else, and lower it when they have (`Worker.prepare`).
_PATIENT = {
    "RAY_worker_register_timeout_seconds": "3600",
    "RAY_raylet_start_wait_time_s": "600",
    "RAY_health_check_failure_threshold": "60",
    "RAY_worker_niceness": "0",
}
_NICENESS = 15  # Ray's own for workers
_CONNECT_SECONDS = 5.0


@dataclasses.dataclass(frozen=True)
class Machine:
    """Machine of the cluster.

    Attributes:
      node: Ray's id of it.
      name: host name.
      resources: {name: amount} that Ray manages.
      is_here: whether the learner runs on it.
    """

    node: str
    name: str
    resources: dict[str, float]
    is_here: bool


@contextlib.contextmanager
def connected(address: str, code_folders: Sequence[str] = ()) -> Iterator[None]:
    """Connects to a Ray cluster while the context lasts.

    A process that is connected already stays connected, to the same cluster. Ray ends a process whose cluster dies.

    Args:
      address: `auto` (the cluster that this machine is part of), `HOST:PORT`, or `local`, which starts a cluster of
        this machine alone that listens on the loopback interface only.
      code_folders: where workers look for modules, besides this process's folder.

    Raises:
      InputError: Ray is not installed, or no such cluster can be joined.
    """
    check_reachable(address)
    defaults = _PATIENT if address == LOCAL else {}
    os.environ.update(_QUIET | (_LOOPBACK_ONLY if _is_on_loopback(address) else {}))
    os.environ.update({name: os.environ.get(name, value) for name, value in defaults.items()})
    ray = import_ray(address)
    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {"job_config": ray.job_config.JobConfig(_py_driver_sys_path=list(code_folders))}
    if address == LOCAL:
        options |= {"include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    try:
        with warnings.catch_warnings():
            # JAX warns of any fork; the processes that Ray forks run another program at once.
            warnings.filterwarnings("ignore", message=r"os\.fork\(\) was called", category=RuntimeWarning)
            ray.init(address, namespace=NAMESPACE, log_to_driver=False, logging_level="ERROR", **options)
    except (Exception, SystemExit) as error:  # no answer, another version of Ray or Python, or an overloaded machine
        raise InputError(
            f"the Ray cluster at {address!r} cannot be joined ({brief(error)}): start one with `ray start --head`, set "
            "RAY_AUTH_MODE=token if it asks for a token, or use --config.cluster.address=local; Ray's logs are in "
            f"{log_folder()}"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def niceness_of_workers(address: str) -> int:
    """Returns the niceness that workers are to take once they have started; to be called before `connected`.

    Args:
      address: of the cluster; in one that is not `local` they keep that which Ray gives them.
    """
    return int(os.environ.get("RAY_worker_niceness", _NICENESS)) if address == LOCAL else 0  # noqa: SIM112


def import_ray(address: str) -> Any:
    """Returns Ray's module; raises InputError if it is not installed."""
    try:
        import ray
        import ray.job_config
    except ImportError as error:
        raise InputError(
            f"cluster.address is {address!r}, which needs Ray ({error}): pip install 'issgd-jax[cluster]'"
        ) from error
    return ray


def address_of_this_process(address: str) -> str:
    """Returns the address at which another process joins the cluster that this one is connected to, or else address."""
    ray = import_ray(address)
    return ray.get_runtime_context().gcs_address if ray.is_initialized() else address


def log_folder() -> str:
    """Returns the folder of Ray's logs on this machine."""
    import ray

    try:
        return ray._private.worker.global_worker.node.get_logs_dir_path()
    except AttributeError:  # not connected
        return "/tmp/ray/session_latest/logs"


def _is_on_loopback(address: str) -> bool:
    """Returns whether only this machine can connect to the cluster that is, or will be, at the address."""
    if address != "auto":
        return address == LOCAL or address.startswith(("127.", "localhost:"))
    servers = [process.info for process in psutil.process_iter(["name", "cmdline"])]
    return any(
        info["name"] == "gcs_server" and "--node-ip-address=127.0.0.1" in (info["cmdline"] or ()) for info in servers
    )


def check_reachable(address: str) -> None:
    """Raises InputError at once where Ray would try for a minute."""
    host, colon, port = address.rpartition(":")
    if not colon:
        if address not in (LOCAL, "auto"):
            raise InputError(f"cluster.address must be local, auto or HOST:PORT, got {address!r}")
        return
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()
    except (OSError, ValueError, OverflowError) as error:
        raise InputError(
            f"no Ray cluster can be reached at cluster.address {address!r} ({error}): start one with `ray start "
            "--head`, or use --config.cluster.address=local"
        ) from error


def list_machines() -> list[Machine]:
    """Returns the machines that are alive; blocks for as long as the network does."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    return [
        Machine(node["NodeID"], node["NodeManagerHostname"], node["Resources"], node["NodeID"] == here)
        for node in ray.nodes()
        if node["Alive"]
    ]


def place_workers(machines: Sequence[Machine], num_workers: int | None) -> list[Machine | None]:
    """Returns a machine for each worker; None where Ray chooses it.

    Args:
      machines: of the cluster.
      num_workers: None: one worker on each machine except the learner's, unless that is the only one.

    Example:
      >>> here, there = (Machine(node, node, {}, node == "a") for node in "ab")
      >>> [machine.name for machine in place_workers([here, there], None)]
      ['b']
      >>> place_workers([here, there], 3)
      [None, None, None]
    """
    if num_workers is not None:
        return [None] * num_workers
    return [machine for machine in machines if not machine.is_here] or list(machines)


def check_object_stores(machines: Sequence[Machine], params_bytes: int) -> None:
    """Checks that every machine has room for two broadcasts, the one that is being read and the next.

    Args:
      machines: of the cluster.
      params_bytes: size of the parameters.

    Raises:
      InputError: the object store of a machine is too small.
    """
    for machine in machines:
        size = machine.resources.get("object_store_memory", math.inf)
        if 2 * params_bytes > size:
            raise InputError(
                f"the object store of machine {machine.name} has {size:,.0f} bytes, but two copies of the parameters "
                f"need {2 * params_bytes:,}: start Ray there with a larger --object-store-memory"
            )


def start_worker(machine: Machine | None, *args) -> Any:
    """Starts a `Worker` as a Ray actor, with all accelerators of its machine; returns at once.

    Args:
      machine: where; None: Ray chooses.
      *args: of `Worker`.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from issgd_jax.cluster.worker import Worker

    # No restarts by Ray, after which the dispatcher would not know which shards a worker has in memory.
    options: dict[str, Any] = {"num_cpus": 0, "max_restarts": 0, "max_task_retries": 0}
    if machine is None:
        options["scheduling_strategy"] = "SPREAD"
    else:
        options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(machine.node, soft=False)
        options["num_gpus"] = machine.resources.get("GPU", 0)
        options["resources"] = {"TPU": tpus} if (tpus := machine.resources.get("TPU", 0)) else {}
    return ray.remote(**options)(Worker).remote(*args)


def explain_start(actor, machine: Machine | None) -> str:
    """Returns why Ray has not started a worker yet, in its own words where it has any; blocks like `list_machines`.

    Args:
      actor: of `start_worker`.
      machine: where it is to run; None: Ray chooses.
    """
    from ray._private import state  # the public interface needs the dashboard

    try:
        name = state.actors(actor._actor_id.hex()).get("State", "UNKNOWN")
        free = state.available_resources_per_node().get(machine.node, {}) if machine else {}
    except Exception as error:  # of many kinds, and only for a message
        return f"Ray does not answer: {brief(error)}"
    if name == "ALIVE":
        return "its process runs, and is loading its program and its data"
    taken = [
        f"{free.get(kind, 0):g} of {machine.resources[kind]:g} {kind} are free"
        for kind in ("GPU", "TPU")
        if machine and free.get(kind, 0) < machine.resources.get(kind, 0)
    ]
    return f"Ray has not started its process: {', '.join([name, *taken])}"


def stop_worker(actor) -> None:
    """Kills the process of a worker, whatever it is doing."""
    import ray

    with contextlib.suppress(ray.exceptions.RayError, RuntimeError):  # it, or the cluster, has ended already
        ray.kill(actor)
