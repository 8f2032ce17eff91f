"""Pictures of training examples, for TensorBoard."""

import io

import numpy as np
from PIL import Image

from issgd_jax.errors import InputError
from issgd_jax.loading.source import Source, arguments
from issgd_jax.task.problem import Problem

PER_LINE = 8
_GAP, _LEAST_SIDE = 2, 64  # pixels


def check(problem: Problem) -> None:
    """Checks that the first argument of the loss is an image.

    Raises:
      InputError: it is none.
    """
    image = problem.first("train")[0]
    if not _are_images(image):
        found = f"{image.dtype}{list(image.shape[1:])}" if hasattr(image, "dtype") else f"a {type(image).__name__}"
        raise InputError(
            f"log.tensorboard_images shows the first argument of the loss, which must be an image, numbers "
            f"[height, width], [height, width, 1] or [height, width, 3], and is {found}: set it to 0"
        )


def _are_images(images) -> bool:
    shape: tuple[int, ...] = getattr(images, "shape", ())
    return (len(shape) == 3 or (len(shape) == 4 and shape[3] in (1, 3))) and images.dtype.kind in "uifb"


def png(source: Source, indices: list[int]) -> bytes:
    """Returns examples side by side as PNG, each from its darkest to its brightest value.

    Args:
      source: training examples, whose first argument is an image.
      indices: of at least one example; eight stand in a line.

    Raises:
      InputError: there is no such example.

    Example:
      >>> from issgd_jax.loading.source import as_source
      >>> picture = png(as_source((np.arange(2 * 64).reshape(2, 8, 8), np.zeros(2))), [1, 0, 1])
      >>> Image.open(io.BytesIO(picture)).size
      (198, 66)
    """
    if max(indices) >= source.num_examples:
        raise InputError(f"example {max(indices)} cannot be shown: there are {source.num_examples:,} training examples")
    images = np.asarray(arguments(source.gather(np.asarray(indices)))[0], np.float32)
    images = images.reshape(*images.shape[:3], -1)
    low, high = (pick(images, axis=(1, 2, 3), keepdims=True) for pick in (np.min, np.max))
    scaled = 255 * (images - low) / np.where(high > low, high - low, 1)
    times = max(1, _LEAST_SIDE // min(scaled.shape[1:3]))
    large = scaled.astype(np.uint8).repeat(times, axis=1).repeat(times, axis=2)
    padded = np.pad(
        large, ((0, -len(large) % min(PER_LINE, len(large))), (0, _GAP), (0, _GAP), (0, 0)), constant_values=128
    )
    lines = [np.concatenate(line, axis=1) for line in padded.reshape(-1, min(PER_LINE, len(large)), *padded.shape[1:])]
    picture = np.concatenate(lines, axis=0)
    file = io.BytesIO()
    Image.fromarray(picture[..., 0] if picture.shape[2] == 1 else picture).save(file, "PNG")
    return file.getvalue()
