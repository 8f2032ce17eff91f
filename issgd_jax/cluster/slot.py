"""Slot: the place of one worker in a cluster, and what is known of the worker there."""

import dataclasses
import time
from typing import Any

from issgd_jax.cluster.machines import Machine
from issgd_jax.cluster.worker import Handshake


@dataclasses.dataclass
class Slot:
    """Place of one worker, which keeps its name and its counts over restarts.

    Attributes:
      name: "worker 0" and so on.
      machine: where the worker runs; None: Ray chooses.
      handshake: of the latest worker process.
      devices: kinds of its devices.
      alive: whether it scores.
      has_started: whether it has ever been alive.
      num_leases: leases completed.
      restarts: worker processes that were lost.
      last_seen: time of the latest result, in seconds.
      problem: why no worker can run here.
      actor: Ray's handle of the worker process; None between two of them.
      missing_since: when it was last seen alive, or its place was made.
    """

    name: str
    machine: Machine | None
    handshake: Handshake | None = None
    devices: list[str] = dataclasses.field(default_factory=list)
    alive: bool = False
    has_started: bool = False
    num_leases: int = 0
    restarts: int = 0
    last_seen: float | None = None
    problem: str | None = None
    actor: Any = None
    missing_since: float = dataclasses.field(default_factory=time.monotonic)

    @property
    def label(self) -> str:
        """The worker and its machine, for messages."""
        place = self.handshake.machine if self.handshake else self.machine.name if self.machine else "no machine yet"
        return f"{self.name} on {place}"

    def status(self, now: float) -> dict[str, Any]:
        """Returns the row of this worker in the status of the dispatcher."""
        return {
            "worker": self.name,
            "machine": self.handshake.machine if self.handshake else None,
            "process": self.handshake.process if self.handshake else None,
            "devices": self.devices,
            "alive": self.alive,
            "leases": self.num_leases,
            "restarts": self.restarts,
            "seconds_since_last_result": None if self.last_seen is None else round(now - self.last_seen, 1),
            "problem": self.problem,
        }
