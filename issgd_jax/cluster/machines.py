"""Ray, as far as the pool needs it: which machines there are, workers on them, a board for the status."""

import contextlib
import dataclasses
import math
import os
import socket
import uuid
import warnings
from collections.abc import Iterator
from typing import Any

import psutil

from issgd_jax.errors import InputError, brief

LOCAL = "local"
NAMESPACE = "issgd_jax"
_BOARD = "status"
# Read when Ray is imported: without it, a cluster of this machine alone listens on all its interfaces.
_LOOPBACK_ONLY = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
# Also read then: what Ray prints of a worker's death, which the pool tells of itself.
_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS_SKIP_REGEX": "A worker died or was killed"}
_REACH_SECONDS = 5.0


@dataclasses.dataclass(frozen=True)
class Machine:
    """One of the cluster. node: Ray's name of it. resources: what it offers. is_here: whether the learner is on it."""

    node: str
    name: str
    resources: dict[str, float]
    is_here: bool


@contextlib.contextmanager
def connected(address: str) -> Iterator[None]:
    """Joins the Ray cluster at `address`: `auto` (the one that this machine is part of), `host:port`, or `local`, which
    starts one on this machine that listens on the loopback interface only. Where Ray runs in this process already, that
    cluster is taken, and left as it is.

    Raises: InputError if Ray is not installed, or there is no cluster that can be joined.
    """
    os.environ.update(_QUIET | (_LOOPBACK_ONLY if _is_on_loopback(address) else {}))
    try:
        import ray
    except ImportError as error:
        raise InputError(
            f"cluster.address is {address!r}, which needs Ray ({error}): pip install 'issgd-jax[cluster]'"
        ) from error
    if ray.is_initialized():
        yield
        return
    _check_reachable(address)
    options = {"include_dashboard": False, "_node_ip_address": "127.0.0.1"} if address == LOCAL else {}
    try:
        with warnings.catch_warnings():
            # JAX warns of any fork; what Ray forks becomes another program at once.
            warnings.filterwarnings("ignore", message=r"os\.fork\(\) was called", category=RuntimeWarning)
            ray.init(address, namespace=NAMESPACE, log_to_driver=False, logging_level="ERROR", **options)
    except (ConnectionError, RuntimeError, ValueError) as error:  # nobody there, or another version of Ray or Python
        raise InputError(
            f"the Ray cluster at {address!r} cannot be joined ({brief(error)}): start one with `ray start --head`, set "
            "RAY_AUTH_MODE=token if it asks for a token, or use --config.cluster.address=local"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _is_on_loopback(address: str) -> bool:
    """Whether the cluster is, or will be, one that only this machine can speak with."""
    if address != "auto":
        return address == LOCAL or address.startswith(("127.", "localhost:"))
    servers = [process.info for process in psutil.process_iter(["name", "cmdline"])]
    return any(
        info["name"] == "gcs_server" and "--node-ip-address=127.0.0.1" in (info["cmdline"] or ()) for info in servers
    )


def _check_reachable(address: str) -> None:
    """Ray itself tries for a minute."""
    host, colon, port = address.rpartition(":")
    if not colon:
        if address not in (LOCAL, "auto"):
            raise InputError(f"cluster.address must be local, auto or HOST:PORT, got {address!r}")
        return
    try:
        socket.create_connection((host, int(port)), timeout=_REACH_SECONDS).close()
    except (OSError, ValueError, OverflowError) as error:
        raise InputError(
            f"no Ray cluster can be reached at cluster.address {address!r} ({error}): start one with `ray start "
            "--head`, or use --config.cluster.address=local"
        ) from error


def machines() -> list[Machine]:
    """Those that are alive. Blocks for as long as the network does."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    return [
        Machine(node["NodeID"], node["NodeManagerHostname"], node["Resources"], node["NodeID"] == here)
        for node in ray.nodes()
        if node["Alive"]
    ]


def of_workers(found: list[Machine], num_workers: int | None) -> list[Machine | None]:
    """Where workers are to be: so many wherever there is room; or on each machine but this one, unless it is alone."""
    if num_workers is not None:
        return [None] * num_workers
    return [machine for machine in found if not machine.is_here] or found


def check_room(found: list[Machine], params_bytes: int) -> None:
    """Raises InputError, naming the machine, unless two broadcasts fit: the one that is being read, and the next."""
    for machine in found:
        room = machine.resources.get("object_store_memory", math.inf)
        if 2 * params_bytes > room:
            raise InputError(
                f"the object store of machine {machine.name} has {room:,.0f} bytes, but two copies of the parameters "
                f"need {2 * params_bytes:,}: start Ray there with a larger --object-store-memory"
            )


def start_worker(machine: Machine | None, *args) -> Any:
    """A `Worker` of these arguments, as a Ray actor on the machine, with all its accelerators; None = wherever there is
    room. Returns at once."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from issgd_jax.cluster.worker import Worker

    # Whoever starts workers also starts them again: with Ray doing so, nobody would know which data they have.
    options: dict[str, Any] = {"num_cpus": 0, "max_restarts": 0, "max_task_retries": 0}
    if machine is None:
        options["scheduling_strategy"] = "SPREAD"
    else:
        options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(machine.node, soft=False)
        options["num_gpus"] = machine.resources.get("GPU", 0)
        options["resources"] = {"TPU": tpus} if (tpus := machine.resources.get("TPU", 0)) else {}
    return ray.remote(**options)(Worker).remote(*args)


def stop(actor) -> None:
    """Ends a process that was started here, whatever it is doing."""
    import ray

    with contextlib.suppress(ray.exceptions.RayError, RuntimeError):  # it has ended already, or the cluster has
        ray.kill(actor)


class _Board:
    """Keeps the last status, for whoever asks."""

    def __init__(self):
        self._text = None

    def write(self, text: str) -> None:
        self._text = text

    def read(self) -> str | None:
        return self._text


def make_board() -> Any:
    """The board of this run, as a Ray actor that ends with the run."""
    import ray

    return ray.remote(num_cpus=0)(_Board).options(name=f"{_BOARD}-{uuid.uuid4()}", namespace=NAMESPACE).remote()


def read_boards(timeout_seconds: float) -> list[str]:
    """What is written on the boards of all runs of the cluster."""
    import ray

    found = []
    for actor in ray.util.list_named_actors(all_namespaces=True):
        if actor["namespace"] == NAMESPACE and actor["name"].startswith(_BOARD):
            with contextlib.suppress(ValueError, ray.exceptions.RayError):  # it has just ended
                board = ray.get_actor(actor["name"], namespace=NAMESPACE)
                found.append(ray.get(board.read.remote(), timeout=timeout_seconds))
    return [text for text in found if text]
