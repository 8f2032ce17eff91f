"""Messages to the terminal. Imports no jax."""

import sys

from tqdm import tqdm


def say(message: str) -> None:
    """Prints one line to standard error, above the progress bar.

    Args:
      message: text without a prefix; `issgd_jax: ` is put before it.
    """
    tqdm.write(f"issgd_jax: {message}", file=sys.stderr)
