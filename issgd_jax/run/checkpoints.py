"""Checkpoints of one run: which are kept, and which is resumed from; written by a thread of their own."""

import concurrent.futures
import contextlib
import dataclasses
import math
import pathlib
import shutil
from collections.abc import Callable
from typing import Protocol

from issgd_jax.console import say
from issgd_jax.errors import FolderLostError, InputError, brief
from issgd_jax.files import writing
from issgd_jax.run import checkpoint
from issgd_jax.run.checkpoint import Checkpoint, DamagedError


class Readable(Protocol):
    """A state that can become a checkpoint, such as `run_state.Snapshot`."""

    step: int

    def read(self) -> Checkpoint | None:
        """Returns the checkpoint, perhaps after waiting; None if the state must not be kept."""


class Checkpoints:
    """Checkpoints of one run; a context manager, whose exit waits for the one that is being written.

    One thread writes, so that the run continues; a full or broken disk costs the checkpoint, with a message. Only of
    the last one it is an error.

    Attributes:
      best_error: the least test error of those there are; inf without one.
      record: content of config.json, saved with every checkpoint; None: not yet known.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        *,
        every_steps: int,
        keep: int,
        about: dict | None = None,
        check_lock: Callable[[], None] = lambda: None,
    ):
        """Removes what an interrupted write has left.

        Args:
          folder: of the checkpoints.
          every_steps: see `is_due`.
          keep: how many of the newest are kept, beside the best by test error.
          about: saved with the state of every checkpoint.
          check_lock: called before anything is written, renamed or removed; a FolderLostError of it is raised by the
            next call of `save` or `wait`.

        Raises:
          InputError: the folder cannot be read.
        """
        self._folder, self._every_steps, self._keep, self._about = folder, every_steps, keep, about or {}
        self._check_lock = check_lock
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._writing: concurrent.futures.Future | None = None
        errors = {step: checkpoint.test_error_of(checkpoint.path_of(folder, step)) for step in self.steps}
        self._test_errors = {step: error for step, error in errors.items() if error is not None}
        self.best_error = self._least_error()
        self.record: dict | None = None
        self._remove_partial()

    def is_intact(self, step: int) -> bool:
        """Returns whether there is a checkpoint of this step that `newest` would return; changes nothing.

        Raises:
          InputError: it cannot be read now.
        """
        try:
            return step in self.steps and bool(checkpoint.verify(self._path(step)))
        except DamagedError:
            return False

    def is_due(self, step: int) -> bool:
        """Returns whether the state at the beginning of this step is to be saved."""
        return step > 0 and step % self._every_steps == 0

    def next_due(self, step: int) -> int:
        """Returns the first step after this one of which `is_due`."""
        return step - step % self._every_steps + self._every_steps

    def save(self, snapshot: Readable, *, test_error: float | None = None, is_last: bool = False) -> None:
        """Starts to write a snapshot, once the one before is written.

        Args:
          snapshot: the thread calls its `read`.
          test_error: of this state, where it was measured.
          is_last: whether no other follows, so that it is an error if this one cannot be written.

        Raises:
          FolderLostError: the folder is no longer that of this run.
        """
        self.wait()
        if test_error is not None and math.isnan(test_error):  # compared with it, no other would be less
            test_error = None
        if test_error is not None:
            self.best_error = min(self.best_error, test_error)
        self._writing = self._thread.submit(self._write, snapshot, test_error, is_last)

    def wait(self) -> None:
        """Returns once nothing is being written.

        Raises:
          FolderLostError: the folder is no longer that of this run.
          InputError: the last checkpoint could not be written.
        """
        writing, self._writing = self._writing, None
        if writing:
            writing.result()

    @property
    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        return checkpoint.steps_in(self._folder)

    def newest(self, obstacle: Callable[[dict], str | None] = lambda state: None) -> Checkpoint | None:
        """Returns the newest checkpoint that is intact, or one of the `keep` newest without an obstacle; None if none.

        Damaged ones are logged and renamed, and so are those after the one that is returned: the run that goes on from
        there writes them again. What cannot be read is not damaged: it ends the run and changes nothing.

        Args:
          obstacle: returns why one before had better be used, if one has no obstacle; else None. May raise InputError.

        Raises:
          InputError: a checkpoint cannot be read now, or all are damaged.
        """
        hindered: list[tuple[pathlib.Path, dict]] = []
        for step in reversed(self.steps):
            path = self._path(step)
            try:
                state = checkpoint.verify(path)
            except DamagedError as error:
                self._put_aside(path)
                say(f"the checkpoint of step {step:,} cannot be used ({error}): it is renamed, and the one before used")
                continue
            why = obstacle(state)
            if state.get("step") != step:
                raise InputError(
                    f"{path} holds the state of step {state.get('step')!r}: give the folder its own name, or remove it"
                )
            if why:
                say(f"the checkpoint of step {step:,} cannot be used ({why}): the one before is tried")
                hindered.append((path, state))
                if len(hindered) == self._keep:  # from one still older too many steps would be done again
                    break
            else:
                found = checkpoint.restore(path, state)
                for newer, newer_state in hindered:
                    say(f"the checkpoint of step {newer_state['step']:,} is renamed: the run writes it again")
                    self._put_aside(newer)
                return found
        if hindered:
            path, state = hindered[0]
            say(f"nor can those before it: the newest is used all the same, of step {state['step']:,}")
            return checkpoint.restore(path, state)
        if damaged := checkpoint.damaged_in(self._folder):
            raise InputError(
                f"none of the {len(damaged)} checkpoint(s) in {self._folder} can be used, as their files differ from "
                f"what was written: replace one by a copy without {checkpoint.DAMAGED!r} in its name, or choose "
                "another --workdir; --overwrite deletes them all"
            )
        return None

    def _put_aside(self, path: pathlib.Path) -> None:
        with writing(path):
            self._check_lock()
            checkpoint.put_aside(path)
        self._test_errors = {step: error for step, error in self._test_errors.items() if self._path(step) != path}

    def _write(self, snapshot: Readable, test_error: float | None, is_last: bool) -> None:
        path = self._path(snapshot.step)
        if path.is_dir():  # such as one of a run that was stopped before it measured
            self._note_late(path, snapshot.step, test_error)
            return
        try:
            self._remove_partial()
            if not (content := snapshot.read()):
                return
            state = content.state | self._about | {"test_error": test_error}
            complete = dataclasses.replace(content, state=state, record=self.record)
            checkpoint.write(path, complete, check_lock=self._check_lock)
        except FolderLostError:
            raise
        except Exception as error:  # no failure to save may end the run before its end
            self.best_error = self._least_error()
            if is_last:
                raise InputError(self._loss(snapshot.step, error)) from error
            say(f"the checkpoint of step {snapshot.step:,} could not be written, training continues: {brief(error)}")
            return
        if test_error is not None:
            self._test_errors[snapshot.step] = test_error
        try:
            self._remove_old()
        except FolderLostError:
            raise
        except (InputError, OSError) as error:
            say(f"old checkpoints cannot be removed, training continues: {error}")

    def _note_late(self, path: pathlib.Path, step: int, test_error: float | None) -> None:
        """Keeps a test error that was measured after the checkpoint was written."""
        if test_error is None or step in self._test_errors:
            return
        self._test_errors[step] = test_error
        try:
            self._check_lock()
            checkpoint.note_test_error(path, test_error)
        except OSError as error:
            say(f"the test error of the checkpoint of step {step:,} cannot be noted, training continues: {error}")

    def _loss(self, step: int, error: Exception) -> str:
        """Returns what is lost where the last checkpoint cannot be written."""
        steps = self.steps
        again = f"repeats the steps from {steps[-1]:,} on" if steps else "with --overwrite starts again"
        return (
            f"the last checkpoint, of step {step:,}, could not be written, so that the run's last parameters are not "
            f"saved ({brief(error)}): make room in {self._folder}, and the same command {again}"
        )

    def _remove_old(self) -> None:
        best = min(self._test_errors, key=self._test_errors.get, default=None)
        for step in self.steps[: -self._keep]:
            if step != best and checkpoint.was_complete(self._path(step)):
                self._check_lock()
                checkpoint.remove(self._path(step))
                self._test_errors.pop(step, None)

    def _remove_partial(self) -> None:
        """Removes what interrupted and failed writes left: threads of Orbax may write for a moment after an error."""
        for name in checkpoint.leftovers_in(self._folder):
            with writing(self._folder):
                self._check_lock()
            shutil.rmtree(self._folder / name, ignore_errors=True)

    def _least_error(self) -> float:
        return min(self._test_errors.values(), default=math.inf)

    def _path(self, step: int) -> pathlib.Path:
        return checkpoint.path_of(self._folder, step)

    def __enter__(self):
        return self

    def __exit__(self, error_type, *error):
        try:
            self.wait()
        except InputError:
            if error_type is None:  # else the error that is there already tells why
                raise
        finally:
            self._thread.shutdown()
            with contextlib.suppress(InputError):
                self._remove_partial()
