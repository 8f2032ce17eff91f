"""Prints the workers of a run: python -m issgd_jax.cluster status --workdir=runs/cluster."""

import argparse
import sys

from issgd_jax.cluster import status
from issgd_jax.errors import InputError


def main():
    parser = argparse.ArgumentParser(prog="python -m issgd_jax.cluster", description=__doc__.split(":")[0])
    parser.add_argument("command", choices=["status"])
    parser.add_argument("--workdir", required=True, help="folder of the run")
    arguments = parser.parse_args()
    try:
        print(status.read(arguments.workdir))
    except InputError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
