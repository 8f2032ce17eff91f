"""TensorBoard shows the hardest examples and histograms, also of the part of a run before it was resumed."""

import functools
import io

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import issgd_jax
from issgd_jax import InputError
from issgd_jax.loading.source import as_source
from issgd_jax.run import histograms, metrics, pictures
from tests.helpers import smoke


def test_every_measurement_shows_the_hardest_examples_also_after_a_resumption(tmp_path):
    """Red if a picture is of other examples, is lost when the events are written again, or a row cannot be read."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    images = np.zeros((3, 64, 64), np.uint8)
    images[:, 0] = 50  # each image has its own bright columns
    images[1, :, 10], images[2, :, 20] = 200, 200
    picture = functools.partial(pictures.png, as_source((images, np.arange(3))))
    position = 0
    for row in (
        {"step": 0, "scores/hardest": []},
        {"step": 5, "scores/hardest": [2, 1]},
        {"step": 9, "scores/hardest": [1]},
    ):
        with metrics.MetricsWriter(tmp_path, tensorboard=True, picture=picture, position=position) as writer:
            writer.write(row)
            position = writer.position
    assert [row["scores/hardest"] for row in metrics.read_metrics(writer.path)] == [[], [2, 1], [1]]
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    shown = events.Images("scores/hardest")
    assert [(event.step, event.width, event.height) for event in shown] == [(5, 132, 66), (9, 66, 66)]
    first = np.asarray(Image.open(io.BytesIO(shown[0].encoded_image_string)))
    assert np.flatnonzero(first[30] == 255).tolist() == [20, 66 + 10]


def test_lists_of_counts_are_histograms(tmp_path):
    """Red if TensorBoard gets counts as if they were values, at other bins, or a row of another version raises."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    counts = [0] * (len(histograms.STALENESS_EDGES) - 1)
    counts[1], counts[3] = 2, 5
    with metrics.MetricsWriter(tmp_path, tensorboard=True) as writer:
        writer.write({"step": 0, histograms.STALENESS: [0] * len(counts)})
        writer.write({"step": 1, histograms.STALENESS: [1, 2]})
        writer.write({"step": 2, histograms.STALENESS: counts})
    events = EventAccumulator(str(tmp_path), size_guidance={"histograms": 0})
    events.Reload()
    first, last = events.Histograms(histograms.STALENESS)
    assert (first.step, first.histogram_value.num) == (0, 0) and last.step == 2
    shown = last.histogram_value
    assert (shown.min, shown.max, shown.num) == (1, 8, 7)
    assert list(zip(shown.bucket_limit, shown.bucket)) == [(2, 2), (4, 0), (8, 5)]


def test_a_picture_of_an_example_that_there_is_not_stops_nothing(tmp_path, capsys):
    """Red if a row that was changed by hand ends a run that is resumed."""
    picture = functools.partial(pictures.png, as_source((np.zeros((3, 8, 8)), np.arange(3))))
    with metrics.MetricsWriter(tmp_path, tensorboard=True, picture=picture) as writer:
        writer.write({"step": 0, "scores/hardest": [3]})
    assert "example 3 cannot be shown: there are 3 training examples" in capsys.readouterr().err


def test_examples_that_are_no_images_are_refused_before_the_run(tmp_path):
    """Red if a run fails at its first measurement, or draws a row of numbers as a picture."""
    problem = issgd_jax.Problem(
        init=lambda key: jnp.zeros(3),
        loss_fn=lambda params, x, y: (x @ params - y) ** 2,
        train=(np.ones((40, 3), np.float32), np.ones(40, np.float32)),
        name="line",
    )
    with pytest.raises(InputError, match=r"must be an image, .* and is float32\[3\]: set it to 0"):
        issgd_jax.train(smoke(log__tensorboard_images=4, workers__chunk_size=10), tmp_path / "run", problem=problem)
    assert not (tmp_path / "run").exists()
