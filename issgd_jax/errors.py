"""Errors that tell a person what to change; `main` prints them without a traceback."""


class InputError(Exception):
    """A value given by the user cannot work: names the value, the limit and the remedy.

    No ValueError, which the parser of config files would wrap into a traceback.
    """


class NonFiniteLossError(FloatingPointError):
    """The minibatch loss became NaN or infinite: names the step and the last good metrics."""


class BadScoreError(FloatingPointError):
    """With workers.strict, a score was NaN, infinite or negative: names the example."""
