"""Shared by several test files."""

import os


def soak(quick, whole):
    """Returns `whole` where the environment has ISSGD_SOAK=1 (`make soak`), else `quick`."""
    return whole if os.environ.get("ISSGD_SOAK") == "1" else quick
