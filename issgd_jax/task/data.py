"""Image classification data as NumPy arrays on the host: `digits` of scikit-learn, all others through TFDS."""

import contextlib
import dataclasses
import difflib
import hashlib
import os
import pathlib
import warnings

import numpy as np

from issgd_jax.errors import InputError
from issgd_jax.files import replace_atomically
from issgd_jax.paths import cache_folder, local_path, plainly_named, private_folder
from issgd_jax.task import splits as splits_lib

EMBEDDED = "digits"
_DIGITS_TRAIN = 1437  # of 1,797: 80 %
_DECODE_CHUNK = 4096


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Images and labels of one split.

    Attributes:
      images: uint8[N, H, W, channels].
      labels: int32[N] in [0, num_classes).
      num_classes: number of classes.

    Raises:
      InputError: a shape, a type or a label is different.

    Example:
      >>> len(Dataset(np.zeros((2, 8, 8, 1), np.uint8), np.array([0, 1], np.int32), num_classes=2))
      2
    """

    images: np.ndarray
    labels: np.ndarray
    num_classes: int

    def __post_init__(self):
        if self.images.ndim != 4 or self.images.dtype != np.uint8:
            raise InputError(f"images must be uint8[N, H, W, channels], got {self.images.dtype}{self.images.shape}")
        if self.labels.shape != self.images.shape[:1] or not len(self.labels):
            raise InputError(
                f"need one label an image, at least one; got {len(self.labels)} for {len(self.images)} images"
            )
        if self.labels.dtype != np.int32:
            raise InputError(f"labels must be int32[N], got {self.labels.dtype}: use labels.astype(np.int32)")
        low, high = self.labels.min(), self.labels.max()
        if low < 0 or high >= self.num_classes:
            raise InputError(f"labels must lie in [0, {self.num_classes}), got {low} to {high}: mend the data set")

    def __len__(self) -> int:
        return len(self.labels)


def load(name: str, split: str, data_dir: str | None = None, *, rows: tuple[int, int] | None = None) -> Dataset:
    """Loads a split of a data set, or a range of its rows.

    Args:
      name: `digits` (scikit-learn's 1,797 real 8x8 digits, grey levels 0 to 16: 1,437 `train`, 360 `test`, in a fixed
        random order) or any image classification data set of TFDS, prepared as array_record: read without TensorFlow,
        decoded once and cached under `~/.cache/issgd_jax`.
      split: as in TFDS: `train`, `train+extra`, `train[:10%]`, `test[1000:2000]`; of one example at least.
      data_dir: folder of TFDS, on this machine; `~` is expanded; None: its default ($TFDS_DATA_DIR).
      rows: (start, stop) of the rows to read; None: all.

    Raises:
      InputError: the name is unknown (names the nearest), the split is unknown, empty, reversed or beyond the data, the
        data is missing (names the command that downloads it), it is not images with class labels, or the split lacks
        the rows.

    Example:
      >>> digits = load("digits", "train[:100]")
      >>> digits.images.shape, digits.num_classes
      ((100, 8, 8, 1), 10)
    """
    if name == EMBEDDED:
        images, labels = _load_digits(split)
        _check_rows(rows, len(labels), name, split)
        chosen = slice(*rows) if rows else slice(None)
        return Dataset(images[chosen], labels[chosen], num_classes=10)
    return _with_tfds(_read_tfds, name, split, data_dir, rows)


def count(name: str, split: str, data_dir: str | None = None) -> int:
    """Returns the number of examples in a split; decodes none of them.

    Raises:
      InputError: as for `load`.

    Example:
      >>> count("digits", "train+test")
      1797
    """
    if name == EMBEDDED:
        return len(_load_digits(split)[1])
    return _with_tfds(lambda *args: len(_find_source(*args)[1]), name, split, data_dir)


def standardization(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean and standard deviation of every pixel and channel, f32[H, W, channels] each.

    Deviations are at least one grey level: border pixels that are black in all but a few images stay small instead of
    dozens of deviations large.

    Args:
      images: uint8[N, H, W, channels].

    Example:
      >>> mean, deviation = standardization(np.array([0, 4], np.uint8).reshape(2, 1, 1, 1))
      >>> mean.item(), deviation.item()
      (2.0, 2.0)
    """
    total, squares = (np.zeros(images.shape[1:]) for _ in range(2))
    for start in range(0, len(images), _DECODE_CHUNK):
        chunk = images[start : start + _DECODE_CHUNK].astype(np.float64)
        total += chunk.sum(0)
        squares += (chunk**2).sum(0)
    mean = total / len(images)
    variance = np.maximum(squares / len(images) - mean**2, 0)
    return mean.astype(np.float32), np.maximum(np.sqrt(variance), 1).astype(np.float32)


def _check_rows(rows: tuple[int, int] | None, available: int, name: str, split: str) -> None:
    if rows and not 0 <= rows[0] < rows[1] <= available:
        raise InputError(f"{name} {split} has {available} examples, but rows {rows[0]} to {rows[1]} were requested")


def _load_digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits  # takes half a second

    bunch = load_digits()
    order = np.random.default_rng(0).permutation(len(bunch.target))
    splits = {"train": order[:_DIGITS_TRAIN], "test": order[_DIGITS_TRAIN:]}
    parts = _parts(EMBEDDED, split, {name: [len(rows)] for name, rows in splits.items()})
    rows = np.concatenate([splits[name][part.start : part.stop] for name, part in parts])
    images = bunch.images[rows, :, :, None].astype(np.uint8)
    return images, bunch.target[rows].astype(np.int32)


def _parts(name: str, split: str, shards: dict[str, list[int]]) -> list[tuple[str, range]]:
    """Returns the parts of a split of a data set, see `splits.rows`; raises InputError."""
    try:
        return splits_lib.rows(split, shards)
    except ValueError as error:
        available = ", ".join(f"{key} ({sum(sizes):,})" for key, sizes in shards.items())
        raise InputError(
            f"split {split!r} of {name} cannot be read ({error}): use {available}, sums as train+test, or parts as "
            "train[:50%]"
        ) from error


def _with_tfds(read, name: str, split: str, data_dir: str | None, *args):
    """Returns `read(tfds, name, split, data_dir, *args)`, where data_dir is one that TFDS can read."""
    try:
        import tensorflow_datasets as tfds  # takes seconds
    except ImportError as error:
        raise InputError(
            f"data set {name!r} needs tensorflow-datasets ({error}): pip install tensorflow-datasets"
        ) from error

    data_dir = data_dir or os.environ.get("TFDS_DATA_DIR")
    with contextlib.ExitStack() as stack:
        stack.enter_context(_quiet())
        if data_dir:
            data_dir = str(stack.enter_context(plainly_named(local_path(data_dir, "data.dir"))))
        return read(tfds, name, split, data_dir, *args)


@contextlib.contextmanager
def _quiet():
    """Silences TFDS's warnings about folders that are empty and about OpenCV."""
    from absl import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _read_tfds(tfds, name: str, split: str, data_dir: str | None, rows: tuple[int, int] | None) -> Dataset:
    builder, source = _find_source(tfds, name, split, data_dir)
    _check_rows(rows, len(source), name, split)
    features = builder.info.features
    keys = {
        kind: [k for k, f in features.items() if isinstance(f, cls)]
        for kind, cls in (("image", tfds.features.Image), ("label", tfds.features.ClassLabel))
    }
    if any(len(names) != 1 for names in keys.values()):
        raise InputError(
            f"{name} has features {list(features)}: an image classification data set has one image, one label"
        )
    cache = _cache_file(builder, f"{split} {rows}" if rows else split)
    arrays = _read_cache(cache) if cache else None
    if arrays is None:
        arrays = _decode(
            source, range(*(rows or (0, len(source)))), keys["image"][0], keys["label"][0], name=f"{name} {split}"
        )
        if cache:
            _write_cache(cache, arrays)
    return Dataset(*arrays, num_classes=features[keys["label"][0]].num_classes)


def _find_source(tfds, name: str, split: str, data_dir: str | None):
    """Returns TFDS's builder, and a sequence of the records of the split."""
    builder = _find_builder(tfds, name, data_dir)
    _parts(name, split, {key: info.shard_lengths for key, info in builder.info.splits.items()})
    return builder, builder.as_data_source(split=split)


def _find_builder(tfds, name: str, data_dir: str | None):
    try:
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except tfds.core.registered.DatasetNotFoundError:
        known = [EMBEDDED, *tfds.list_builders(with_community_datasets=False)]
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "see `tfds.list_builders()`"
        raise InputError(f"unknown data set {name!r}: {hint}") from None
    except (ValueError, AssertionError) as error:  # not a name, or a version that does not exist
        raise InputError(
            f"data set {name!r} cannot be found ({error}): use a name as in `tfds.list_builders()`"
        ) from error
    if not builder.is_prepared():
        where = f", data_dir={os.path.realpath(data_dir)!r}" if data_dir else ""  # not the link of `plainly_named`
        folder = os.path.realpath(builder.data_path)
        raise InputError(
            f"{name} is not at {folder} as array_record. With a network (building needs TensorFlow):\n"
            f"  pip install 'issgd-jax[download]'\n"
            f'  python -c "import tensorflow_datasets as tfds; '
            f"tfds.builder({name!r}{where}, file_format='array_record').download_and_prepare()\"\n"
            f"or name the folder that has it with --config.data.dir=FOLDER"
        )
    return builder


def _decode(source, rows: range, image_key: str, label_key: str, *, name: str) -> tuple[np.ndarray, np.ndarray]:
    from tqdm import tqdm

    images, labels = [], []
    with tqdm(total=len(rows), desc=f"decoding {name}", unit="image", leave=False) as bar:
        for start in range(0, len(rows), _DECODE_CHUNK):
            records = source.__getitems__(rows[start : start + _DECODE_CHUNK])
            shapes = {record[image_key].shape for record in records} | {image.shape[1:] for image in images[:1]}
            if len(shapes) > 1:
                raise InputError(f"{name} has images of different sizes, {sorted(shapes)[:3]}: resize them to one")
            images.append(np.stack([record[image_key] for record in records]))
            labels.extend(int(record[label_key]) for record in records)
            bar.update(len(records))
    if not labels:
        raise InputError(f"{name} is empty: choose a larger split")
    return np.concatenate(images), np.asarray(labels, np.int32)


def _cache_file(builder, split: str) -> pathlib.Path | None:
    """Returns a file of its own for each data set, version, split and state of its files: a stale cache is not read.

    None, with a warning, for a user who has no cache folder, or one into which others could put data.
    """
    try:
        folder = private_folder(cache_folder())
    except (OSError, InputError) as error:
        warnings.warn(f"decoded data could not be cached ({error}): the next run decodes again", stacklevel=2)
        return None
    data = pathlib.Path(builder.data_path).resolve()
    files = sorted(data.iterdir())
    state = [str(data), split, *(f"{f.name} {f.stat().st_size} {f.stat().st_mtime_ns}" for f in files)]
    return folder / f"{builder.name}-{hashlib.sha256(os.fsencode(chr(10).join(state))).hexdigest()[:16]}.npz"


def _read_cache(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray] | None:
    try:
        with open(path, "rb") as file, np.load(file) as arrays:
            return arrays["images"], arrays["labels"]
    except Exception:  # missing or damaged, which raises many types: decode again
        return None


def _write_cache(path: pathlib.Path, arrays: tuple[np.ndarray, np.ndarray]) -> None:
    try:
        with replace_atomically(path) as new, open(new, "wb") as file:
            np.savez(file, images=arrays[0], labels=arrays[1])
    except OSError as error:
        warnings.warn(f"decoded data could not be cached at {path} ({error}): the next run decodes again", stacklevel=2)
