"""Errors that say what to change; `main` prints them without a traceback."""


class InputError(Exception):
    """A value given by the user cannot work; names the value, the limit and the remedy.

    Not a ValueError, which the parser of config files would wrap in a traceback.
    """


class FolderLostError(InputError):
    """The folder of a run was removed, renamed or replaced while the run was using it; names the folder."""


class NonFiniteLossError(FloatingPointError):
    """A loss or gradient is NaN or infinite; names the step, the minibatch and the last good metrics.

    Attributes:
      batch: {"step", "indices", "importance_weights", "losses"} of the minibatch; without losses, but with
        "previous", the minibatch before it, if it was drawn uniformly; "step" alone if a whole split was measured.
    """

    def __init__(self, message: str, batch: dict):
        super().__init__(message)
        self.batch = batch


class BadScoreError(FloatingPointError):
    """A score is NaN, infinite or negative, with workers.strict; names the example."""


class StoppedError(Exception):
    """A signal stopped the run between two steps; names the step and the checkpoint to resume from.

    Attributes:
      signal: its number.
    """

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal


class ProcessLostError(Exception):
    """Another process of a distributed learner has ended; names the remedy."""


class ClusterLostError(Exception):
    """No worker of a cluster can score any more; names the reason. Training can continue without them."""


def brief(error: Exception) -> str:
    """Returns an error in one line; of an error with several lines the first and the last.

    Args:
      error: of a library, whose text may hold a traceback.

    Example:
      >>> brief(ValueError("lost\\n  line 3\\ndevice 2"))
      'ValueError: lost … device 2'
    """
    lines = str(error).strip().splitlines() or [""]
    text = lines[0] if len(lines) == 1 else f"{lines[0]} … {lines[-1]}"
    return f"{type(error).__name__}: {text[:400]}"
