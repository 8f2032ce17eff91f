"""Parts of splits such as `train[:10%]+test`, read as TFDS reads them."""

import re
from collections.abc import Mapping, Sequence

# As in tensorflow_datasets/core/splits.py; a test holds this module to that.
_PART = re.compile(r"(?P<name>[\w-]+)(?:\[(?P<slice>[^][]*)\])?")
_BOUND = re.compile(r"(?P<number>-?[\d_.]+)(?P<unit>%|shard|)|")


def rows(split: str, shards: Mapping[str, Sequence[int]]) -> list[tuple[str, range]]:
    """Returns the name and the rows of each part of a split.

    Args:
      split: names of splits, or slices of them in rows, percent or shards, joined by `+`; `all` is all of them.
      shards: {name: examples in each shard} of the splits that there are.

    Raises:
      ValueError: a name is unknown, a part is no slice, or is beyond the data or in reverse; or there is no row.

    Example:
      >>> rows("train[:50%]+test[-2:]", {"train": [11], "test": [5]})
      [('train', range(0, 6)), ('test', range(3, 5))]
    """
    if not isinstance(split, str):
        raise ValueError("it is no text")
    parts = [part for text in re.split(r"\s*\+\s*", split) for part in _rows_of_part(text, shards)]
    if not any(part for _, part in parts):
        raise ValueError("it has no example")
    return parts


def _rows_of_part(text: str, shards: Mapping[str, Sequence[int]]) -> list[tuple[str, range]]:
    if text == "all":
        return [(name, range(sum(sizes))) for name, sizes in shards.items()]
    match = _PART.fullmatch(text)
    if not match:
        raise ValueError(f"{text!r} is no split and no slice of one")
    name = match["name"]
    if name not in shards:
        raise ValueError(f"there is no {name!r}")
    start, stop = (0, sum(shards[name])) if match["slice"] is None else _boundaries(match["slice"], shards[name])
    if start > stop:
        raise ValueError(f"{text!r} is of rows {start:,} to {stop:,}, in reverse")
    return [(name, range(start, stop))]


def _boundaries(text: str, sizes: Sequence[int]) -> tuple[int, int]:
    """Returns (start, stop) of a slice of a split with shards of these sizes."""
    bounds = [_BOUND.fullmatch(bound) for bound in text.split(":")]
    if None in bounds or len(bounds) > 2 or not any(bound[0] for bound in bounds):
        raise ValueError(f"{text!r} is no slice")
    unit = bounds[0]["unit"] or bounds[-1]["unit"]
    number = float if unit == "%" else int
    start, stop = (number(bound["number"]) if bound[0] else None for bound in (bounds[0], bounds[-1]))
    if len(bounds) == 1:
        if unit != "shard":
            raise ValueError(f"{text!r} is one row: write {text}:{start + 1:g}")
        stop = start + 1
    if unit == "shard":
        first, last = slice(start or 0), slice(len(sizes) + stop if stop is not None and stop <= 0 else stop)
        return sum(sizes[first]), sum(sizes[last])
    total = sum(sizes)
    return _position(start or 0, total, unit), total if stop is None else _position(stop, total, unit)


def _position(number: float, size: int, unit: str) -> int:
    """Returns a boundary in rows or percent as a row in [0, size]; ValueError if it is beyond the data."""
    if unit == "%" and abs(number) > 100:
        raise ValueError(f"{number:g}% is not between -100% and 100%")
    position = round(number * size / 100.0) if unit == "%" else int(number)
    if abs(position) > size:
        raise ValueError(f"row {position:,} is beyond its {size:,} examples")
    return position + size if position < 0 else position
