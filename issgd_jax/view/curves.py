"""Curves as text. Imports no jax."""

import math
import statistics
from collections.abc import Sequence

_BLOCKS = " ▁▂▃▄▅▆▇█"
# For terminals that have no such characters.
_ASCII = " .:-=+*#%@"
# Share of the values by which they must differ to be drawn at different heights: rounding is no news.
_FLAT = 1e-3


def curve(
    steps: Sequence[int],
    values: Sequence[float | None],
    *,
    last_step: int,
    width: int,
    height: int = 1,
    log: bool = False,
    ascii_only: bool = False,
) -> list[str]:
    """Returns lines of text, the highest first, in which columns are as high as the values.

    Args:
      steps: of the values, ascending.
      values: a column shows the mean of those that fall into it, or else the one before; None: not known.
      last_step: of the right border.
      width: in columns.
      height: in lines.
      log: whether heights are of the logarithms; values that are not positive are as low as the least that is.
      ascii_only: whether the terminal has no block characters; for a height of 1.

    Example:
      >>> curve([0, 1, 2, 3], [8.0, 4.0, None, 1.0], last_step=7, width=8, log=True)
      ['█▆▆▁    ']
      >>> curve([0, 1, 2], [0, 1, 2], last_step=2, width=3, height=2)
      [' ▁█', '▁██']
    """
    if log:
        least = min((value for value in values if value is not None and value > 0), default=1.0)
        values = [value if value is None else math.log(max(value, least)) for value in values]
    columns: list[list[float]] = [[] for _ in range(width)]
    for step, value in zip(steps, values):
        if value is not None:
            columns[min(width - 1, step * (width - 1) // max(1, last_step))].append(value)
    means = [statistics.fmean(column) if column else None for column in columns]
    known = [mean for mean in means if mean is not None]
    if not known:
        return [" " * width] * height
    blocks = _ASCII if ascii_only else _BLOCKS
    low, high, levels = min(known), max(known), len(blocks) - 1
    if high - low <= _FLAT * (1 if log else max(abs(low), abs(high))):
        high = math.inf
    last_place = max(place for place, mean in enumerate(means) if mean is not None)
    ranks, rank = [], 0
    for place, mean in enumerate(means):
        if mean is not None:
            rank = 1 + round((mean - low) / (high - low) * (height * levels - 1))
        ranks.append(rank if place <= last_place else 0)
    return [
        "".join(blocks[min(levels, max(0, rank - line * levels))] for rank in ranks) for line in reversed(range(height))
    ]
