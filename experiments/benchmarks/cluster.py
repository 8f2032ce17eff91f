"""Measures what the cluster costs the learner, and its throughput.

    python -m experiments.benchmarks.cluster [--only=round,overlap,database,scaling,network]

- `round`: the learner's Python time for a round of 8 simulated devices: broadcast, dispatch, collect; and of a round of
  a cluster, which its own thread does for the learner;
- `overlap`: learner steps a second while three simulated devices score, against those without any, the table of all
  examples being made once in both (on two cores from 0.5 to 1.4, by the machine, which is not understood); and how
  long it takes to dispatch a round;
- `database`: scores a second from workers in other processes into the store and its table, and bytes of parameters a
  second from the learner to all of them, over loopback;
- `scaling`: leases a second of 1, 2, 4, 8 machines, each a process that takes as long for a chunk as was measured, and
  does nothing meanwhile, as these two cores have no others: so the cost of the cluster alone is seen;
- `network`: learner steps a second while the line to a machine takes 500 ms each way, and while it is cut for 30 s,
  against those before and after. Needs the right to make network namespaces.

Medians. Writes results/cluster.json.
"""

import argparse
import contextlib
import json

from experiments.benchmarks import cluster_learner, cluster_pool
from experiments.benchmarks.environment import RESULTS, hardware
from issgd_jax.files import write_text_atomically
from issgd_jax.provenance import versions

FILE = RESULTS / "cluster.json"
MEASURES = {
    "round": cluster_pool.measure_round,
    "overlap": cluster_learner.measure_overlap,
    "database": cluster_pool.measure_database,
    "scaling": cluster_pool.measure_scaling,
    "network": cluster_learner.measure_network,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default=",".join(MEASURES))
    arguments = parser.parse_args()
    for name in arguments.only.split(","):
        import jax

        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", cluster_pool.DEVICES + 1)
        measured = MEASURES[name]()
        print(json.dumps({name: measured}, indent=2), flush=True)
        kept = json.loads(FILE.read_text()) if FILE.exists() else {}
        kept |= {
            name: measured,
            "command": "python -m experiments.benchmarks.cluster",
            "hardware": hardware(),
            "versions": versions(),
        }
        write_text_atomically(FILE, json.dumps(kept, indent=2) + "\n")


if __name__ == "__main__":
    main()
