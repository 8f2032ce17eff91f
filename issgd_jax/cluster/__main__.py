"""What the cluster is doing now: python -m issgd_jax.cluster status [--address=auto]."""

import argparse
import json
import sys

from issgd_jax.cluster import machines
from issgd_jax.errors import InputError

_ANSWER_SECONDS = 10.0


def status(address: str) -> str:
    """A text of all runs on the cluster. Raises InputError if there is no cluster, or no run on it."""
    with machines.connected(address):
        boards = machines.read_boards(_ANSWER_SECONDS)
    if not boards:
        raise InputError(f"nothing trains on the Ray cluster at {address!r}")
    return "\n\n".join(_as_text(json.loads(board)) for board in boards)


def _as_text(status: dict) -> str:
    usual = status["usual_seconds_a_lease"]
    lines = [
        f"{status['seconds']:,.0f} s; parameters of step {status['broadcast_step']} sent last, "
        f"{status['broadcasts']:,} broadcasts, {status['bytes_out'] / 1e6:,.1f} MB out, "
        f"{status['bytes_in'] / 1e6:,.1f} MB of scores in",
        f"leases: {status['leases_done']:,} done, {status['leases_out']} out, {status['leases_waiting']} waiting, "
        f"{status['leases_issued_again']} issued again, {status['results_dropped']} results dropped; "
        f"{'no' if usual is None else f'{usual:.3f} s'} a lease",
        f"{'worker':<12}{'machine':<20}{'process':>8}  {'state':<8}{'leases':>8}{'restarts':>9}{'age s':>8}  devices",
    ]
    for worker in status["workers"]:
        state = "alive" if worker["alive"] else "unfit" if worker["problem"] else "lost"
        age, process = worker["seconds_since_last_result"], worker["process"]
        lines.append(
            f"{worker['worker']:<12}{worker['machine'] or '-':<20}{process or '-':>8}  {state:<8}{worker['leases']:>8,}"
            f"{worker['restarts']:>9}{'-' if age is None else f'{age:.1f}':>8}  {', '.join(worker['devices'])}"
            f"{worker['problem'] or ''}"
        )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(prog="python -m issgd_jax.cluster", description=__doc__.split(":")[0])
    parser.add_argument("command", choices=["status"])
    parser.add_argument("--address", default="auto", help="of Ray: auto or HOST:PORT")
    arguments = parser.parse_args()
    try:
        print(status(arguments.address))
    except InputError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
