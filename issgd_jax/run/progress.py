"""Progress bar of a run. Imports no jax."""

import functools

from tqdm import tqdm

# As long as 80 columns allow.
_COMPILING = "{desc}: {n_fmt}/{total_fmt} steps, compiling"
_STEPS = "{desc} |{bar}| {n_fmt}/{total_fmt} {elapsed}<{remaining} {rate_fmt}{postfix}"


class Progress:
    """Progress bar over learner steps, with the minibatch loss and the last measured test error and gain in variance.

    Until the first step has returned, it says that programs are compiled. Rate and time left are of the steps after it,
    without later compilations. A context manager, whose exit leaves the last figures.
    """

    def __init__(self, steps: int, *, shown: bool, description: str, start: int = 0):
        """Shows the bar.

        Args:
          steps: of the whole run.
          shown: whether there is a bar.
          description: to begin with.
          start: steps that were done before.
        """
        self._open = functools.partial(
            tqdm, total=steps, desc=description, unit="step", disable=not shown, dynamic_ncols=True, smoothing=0.1
        )
        self._done, self._loss, self._measured = start, "", ""
        self._is_compiling = True
        self._bar = self._open(initial=start, leave=False, bar_format=_COMPILING)

    def step(self, done: int, loss: float) -> None:
        """Shows that so many steps are done, and the minibatch loss of the last."""
        self._done, self._loss = done, f"loss={loss:.4g}"
        if self._is_compiling:
            self._show_steps()
        else:
            self._bar.set_postfix_str(self._loss + self._measured, refresh=False)
            self._bar.update(done - self._bar.n)

    def measured(self, row: dict) -> None:
        """Shows the test error and the gain of a row of metrics from now on."""
        figures = {"test/error": " test={:.2%}", "variance/gain": " gain={:.2f}"}
        self._measured = "".join(form.format(row[name]) for name, form in figures.items() if row.get(name) is not None)

    def compiled(self) -> None:
        """Leaves the time since the bar was last drawn, in which a program was compiled, out of rate and time left."""
        self._bar.unpause()

    def _show_steps(self) -> None:
        """Replaces the bar by one whose clock begins now."""
        self._bar.close()
        self._is_compiling = False
        self._bar = self._open(initial=self._done, bar_format=_STEPS, postfix=self._loss + self._measured)

    def __enter__(self):
        return self

    def __exit__(self, error_type, *error):
        if self._is_compiling and error_type is None:
            self._show_steps()
        self._bar.set_postfix_str(self._loss + self._measured, refresh=False)
        self._bar.close()
