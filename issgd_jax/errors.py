"""Errors that tell a person what to change; `main` prints them without a traceback."""


class InputError(Exception):
    """A value given by the user cannot work: names the value, the limit and the remedy.

    No ValueError, which the parser of config files would wrap into a traceback.
    """


class NonFiniteLossError(FloatingPointError):
    """A loss or gradient became NaN or infinite: names step, minibatch and last good metrics.

    batch: {"step", "indices", "importance_weights", "losses"} of the minibatch; without losses, but with the minibatch
      "before", if it was drawn uniformly; None if a whole split was measured.
    """

    def __init__(self, message: str, batch: dict | None = None):
        super().__init__(message)
        self.batch = batch


class BadScoreError(FloatingPointError):
    """With workers.strict, a score was NaN, infinite or negative: names the example."""


class StoppedError(Exception):
    """A signal stopped the run between two steps: names the step and the checkpoint to go on from.

    signal: its number.
    """

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal


class ProcessLostError(Exception):
    """Another of the processes that a learner spans is gone: names what to do."""


def brief(error: Exception) -> str:
    """An error in one line: of those of a library, which bring their own traceback, the first and the last."""
    lines = str(error).strip().splitlines() or [""]
    text = lines[0] if len(lines) == 1 else f"{lines[0]} … {lines[-1]}"
    return f"{type(error).__name__}: {text[:400]}"
