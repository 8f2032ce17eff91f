"""Minibatches of host data, gathered in a thread while the learner computes the steps before."""

import collections
import contextlib
import functools
import queue
import threading
import weakref
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from issgd_jax.loading.source import Source, as_source
from issgd_jax.sampling import Draw, Sampler, SamplerState, Table
from issgd_jax.sampling import visits as visits_lib
from issgd_jax.sampling.draws import STRIDE, draw_earliest, draw_number
from issgd_jax.sampling.relative_limit import RelativeLimit
from issgd_jax.sampling.visits import Visits


class Prefetch:
    """Draws minibatches of host data ahead of the learner, in place of `Sampler.draw`.

    Each call of `draw` dispatches the draw of `depth` calls later. A thread waits for its indices, gathers the rows and
    puts them on the device, while the learner computes.

    Use it as a context manager; or not, and its thread ends with `close` or when the object is garbage-collected.

    Guarantees:
      - The draw of number k comes from the table of `depth` calls before it. A draw from an older table has the
        importance weights of that table and is as unbiased.
      - The draws are those of `Sampler.draw` as long as the table does not change; with depth 0 always.
      - With draw "stride", an example that is in flight is not drawn again before its minibatch is returned. A limit is
        higher the more draws are ahead, where one norm is far above the mean, see `Sampler`.
      - A run is a function of its states: draws and tables do not depend on how fast anything is.
      - The learner waits for nothing but data, and may donate the state that it gets.
      - One object serves one run. A state that does not continue the last one, by its number or its key, is noticed
        when its draw arrives, `depth` calls later, and is an error: nothing waits for a state that is being computed.

    Example:
      >>> x = np.arange(1000.0, dtype=np.float32)
      >>> sampler = Sampler(num_examples=1000, batch_size=4)
      >>> state = sampler.init(seed=0)
      >>> with Prefetch(sampler, (x, 2 * x)) as prefetch:
      ...     for _ in range(3):
      ...         state, drawn, (inputs, targets) = prefetch.draw(state)
      >>> int(state.num_draws), inputs.tolist() == x[drawn.indices].tolist()
      (3, True)
    """

    def __init__(
        self,
        sampler: Sampler,
        source: Any,
        depth: int = 2,
        collate: Callable[[list], Any] | None = None,
        device: jax.Device | Sharding | None = None,
    ):
        """Starts the thread, which waits for the first draw.

        Args:
          sampler: draws the indices.
          source: N examples on the host, see `loading.source.as_source`.
          depth: draws ahead, >= 0; so many batches more are on the device. 0: each call waits for its own batch.
          collate: `list of examples -> batch`, see `as_source`.
          device: device or sharding of the batches; None: JAX's default.

        Raises:
          TypeError: the source cannot be read by index, or has values that are not numbers.
          ValueError: depth < 0, or source and sampler differ in their number of examples.
        """
        self._source = as_source(source, collate)
        if self._source.num_examples != sampler.num_examples:
            raise ValueError(
                f"source has {self._source.num_examples:,} examples, but sampler.num_examples is "
                f"{sampler.num_examples:,}: they must be the same, in the same order"
            )
        if depth < 0:
            raise ValueError(f"depth must be >= 0, got {depth}")
        if sampler.draw_method == STRIDE and (depth + 1) * sampler.batch_size > sampler.num_examples:
            raise ValueError(
                f'draw "stride" needs depth + 1 minibatches of different examples, got depth {depth}, batch_size '
                f"{sampler.batch_size} and {sampler.num_examples:,} examples: lower the depth"
            )
        self._sampler = sampler
        self._ahead = [jax.device_put(np.int32(i)) for i in range(depth + 1)]
        self._queue = collections.deque()  # of (draw, its reply), the oldest first
        self._next = None  # number and key that the oldest must have
        self._requests = queue.SimpleQueue()  # of (array with the indices, reply); None: the end
        thread = threading.Thread(target=_serve, args=(self._requests, self._source, device), daemon=True)
        self._close = weakref.finalize(self, _end, self._requests, thread)
        thread.start()

    def draw(self, state: SamplerState) -> tuple[SamplerState, Draw, Any]:
        """Returns the next minibatch and its rows, and dispatches a later one.

        Args:
          state: as returned by the last call, updated or not; of the first call any. Not donated, but for the visits
            of draw "stride".

        Returns:
          The state with one more draw counted; the draw, as `Sampler.draw` returns it; and the batch, a pytree of
          arrays [B, ...] on the device.

        Raises:
          RuntimeError: the `Prefetch` is closed, or a state does not continue the one before it.
          TypeError, ValueError: state is not one of the sampler's, or the call is inside `jit`.
          Exception: of the source or of collate, at the draw whose batch it concerns.

        After an error, the next call begins again from the state that it is given.
        """
        if not self._close.alive:
            raise RuntimeError("Prefetch is closed: make a new one")
        self._sampler.check_state(state)
        if isinstance(state.num_draws, jax.core.Tracer):
            raise TypeError("Prefetch.draw cannot be compiled: call it outside jit, and pass the batch to the function")
        batch_size, method = self._sampler.batch_size, self._sampler.draw_method
        try:
            for ahead in self._ahead[len(self._queue) :]:
                args = state.key, state.num_draws, ahead, state.table
                if method == STRIDE:
                    args = *args, [drawn.indices for drawn, _ in self._queue]
                num_draws, drawn, for_host = _draw_ahead(*args, batch_size=batch_size, method=method)
                for_host.copy_to_host_async()
                reply = queue.SimpleQueue()
                self._requests.put((for_host, batch_size, reply))
                self._queue.append((drawn, reply))
            drawn, reply = self._queue.popleft()
            number, key, batch = _answer(reply)
            if self._next is not None and (number, key) != self._next:
                raise RuntimeError(
                    f"draw {self._next[0]} was to follow, but the states given are those of draw {number}"
                    + (" of another seed" if key != self._next[1] else "")
                    + ": make a new Prefetch for another run, or for one that is restored"
                )
        except BaseException:
            self._clear()
            raise
        self._next = number + 1, key
        if method == STRIDE:
            args = state.visits, drawn, state.norm_levels, state.num_draws, state.step
            visits, drawn = _visit(*args, limit=self._sampler.relative_limit, depth=len(self._ahead) - 1)
            state = state._replace(visits=visits)
        return state._replace(num_draws=num_draws), drawn, batch

    def close(self) -> None:
        """Ends the thread; waits for the rows that it is gathering."""
        self._clear()
        self._close()

    def __enter__(self) -> "Prefetch":
        return self

    def __exit__(self, *exception):
        self.close()

    def _clear(self) -> None:
        _drop(self._requests)
        self._queue.clear()
        self._next = None


# Takes no more than it needs of sampler and state: each argument costs time at every step.
@functools.partial(jax.jit, static_argnames=("batch_size", "method"))
def _draw_ahead(
    key: jax.Array, num_draws: jax.Array, ahead: jax.Array, table: Table | Visits, between: list[jax.Array] = (), *,
    batch_size: int, method: str,
):  # fmt: skip
    """Returns the next num_draws, the draw so far ahead, and its number, key and indices as one array.

    Of evenly spaced visits, the indices of the draws between are needed.
    """
    number = num_draws + ahead
    if method == STRIDE:
        drawn = draw_earliest(table, key, number, batch_size, jnp.stack(between) if between else None)
    else:
        _, drawn = draw_number(key, number, table, batch_size, method)
    parts = number[None], key, drawn.indices  # one array, as every copy to the host has its own cost
    return num_draws + 1, drawn, jnp.concatenate([part.astype(jnp.uint32) for part in parts])


@functools.partial(jax.jit, donate_argnames="visits", static_argnames=("limit", "depth"))
def _visit(
    visits: Visits, drawn: Draw, norm_levels: jax.Array | None, num_draws: jax.Array, step: jax.Array, *,
    limit: RelativeLimit | None, depth: int,
) -> tuple[Visits, Draw]:  # fmt: skip
    """Returns the visits after a draw, and the draw with its limit."""
    if limit is None:
        return visits_lib.visit(visits, drawn.indices), drawn
    visits = visits_lib.visit_late(visits, *drawn)
    return visits, limit.lower(drawn, norm_levels, num_draws - step + depth)


# No method: a thread that holds the Prefetch would keep it from being garbage-collected.
def _serve(requests: queue.SimpleQueue, source: Source, device: jax.Device | Sharding | None) -> None:
    """Replies to each request with the draw's number and key, and its rows on the device; or with what was raised."""
    # Implicit transfers take half the time of explicit ones, which matters where a CPU computes the step too.
    with jax.transfer_guard("allow"):
        while (request := requests.get()) is not None:
            for_host, batch_size, reply = request
            try:
                values = np.asarray(for_host)
                batch = source.gather(values[-batch_size:].astype(np.int64))
                batch = _on_default_device(batch) if device is None else jax.device_put(batch, device)
                reply.put((int(values[0]), values[1:-batch_size].tobytes(), batch))
            except BaseException as error:
                reply.put(error)
            del request, for_host, reply  # else they live until the next


@jax.jit
def _on_default_device(batch: Any) -> Any:
    return batch


def _answer(reply: queue.SimpleQueue) -> Any:
    answer = reply.get()
    if isinstance(answer, BaseException):
        raise answer
    return answer


def _drop(requests: queue.SimpleQueue) -> None:
    with contextlib.suppress(queue.Empty):
        while True:
            requests.get_nowait()


def _end(requests: queue.SimpleQueue, thread: threading.Thread) -> None:
    """Ends the thread, and waits for it: the interpreter must not end under it."""
    _drop(requests)
    requests.put(None)
    if thread is not threading.current_thread():  # that may be the one that collects garbage
        thread.join()
