"""Extras of the installation: parts that need more than JAX, NumPy and Optax. Imports no jax."""

import importlib.util


class MissingExtraError(ImportError):
    """A part of the package is used whose libraries are not installed; names the command that installs them."""


def check_extra(part: str, library: str, extra: str = "train") -> None:
    """Checks that a library of an extra is installed; does not import it.

    Args:
      part: what needs it, for the error.
      library: name of its module.
      extra: that has it.

    Raises:
      MissingExtraError: it is not installed.

    Example:
      >>> check_extra("issgd_jax.train", "flaxx")
      Traceback (most recent call last):
      ...
      issgd_jax.extras.MissingExtraError: issgd_jax.train needs flaxx: pip install 'issgd-jax[train]'
    """
    if importlib.util.find_spec(library) is None:
        raise MissingExtraError(f"{part} needs {library}: pip install 'issgd-jax[{extra}]'")
