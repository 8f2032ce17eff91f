"""Pictures of training examples."""

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
    times = max(1, _LEAST_SIDE // min(images.shape[1:3]))
    large = stretched(images).repeat(times, axis=1).repeat(times, axis=2)
    padded = np.pad(
        large, ((0, -len(large) % min(PER_LINE, len(large))), (0, _GAP), (0, _GAP), (0, 0)), constant_values=128
    )
    lines = [np.concatenate(line, axis=1) for line in padded.reshape(-1, min(PER_LINE, len(large)), *padded.shape[1:])]
    return _encoded(Image.fromarray(_without_grey_axis(np.concatenate(lines, axis=0))))


def stretched(images: np.ndarray) -> np.ndarray:
    """Returns images uint8[m, H, W, C], each from its darkest to its brightest value, of numbers of any kind."""
    images = images.astype(np.float32)
    low, high = (pick(images, axis=(1, 2, 3), keepdims=True) for pick in (np.min, np.max))
    return (255 * (images - low) / np.where(high > low, high - low, 1)).astype(np.uint8)


def thumbnail(image: np.ndarray, most_pixels: int) -> bytes:
    """Returns one image [H, W, 1 or 3] as PNG, stretched, with at most so many pixels a side."""
    picture = Image.fromarray(_without_grey_axis(stretched(image[None])[0]))
    picture.thumbnail((most_pixels, most_pixels))
    return _encoded(picture)


def _encoded(picture: Image.Image) -> bytes:
    """Returns a picture as PNG."""
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return file.getvalue()


def _without_grey_axis(picture: np.ndarray) -> np.ndarray:
    return picture[..., 0] if picture.shape[2] == 1 else picture
