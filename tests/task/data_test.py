"""Data sets: a wrong image, label or split, or a stale cache, turns these red."""

import os
import subprocess
import sys

import numpy as np
import pytest
from sklearn.datasets import load_digits

from issgd_jax import InputError
from issgd_jax.task import data, splits
from tests.helpers import SVHN, soak, soak_seed

TFDS_DIR = os.environ.get("TFDS_DATA_DIR", SVHN)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def need_svhn():
    if not (SVHN / "svhn_cropped").is_dir():
        pytest.skip(f"svhn_cropped is not at {SVHN}")


def test_digits_are_scikit_learns_and_every_one_is_in_one_split():
    train, test = data.load("digits", "train"), data.load("digits", "test")
    assert train.images.shape == (1437, 8, 8, 1) and test.images.shape == (360, 8, 8, 1)
    assert train.images.dtype == np.uint8 and train.labels.dtype == np.int32
    both = np.concatenate([train.images, test.images])[..., 0].astype(float)
    original = load_digits().images
    assert sorted(map(bytes, both.reshape(-1, 64))) == sorted(map(bytes, original.reshape(-1, 64)))
    label_of = {bytes(image): label for image, label in zip(original, load_digits().target, strict=True)}
    assert all(
        label_of[bytes(image.astype(float)[..., 0])] == label for image, label in zip(*vars_of(train), strict=True)
    )


def vars_of(dataset):
    return dataset.images, dataset.labels


@pytest.mark.parametrize(
    ("split", "size"),
    [
        ("train+test", 1797),
        ("train[:50%]", 718),
        ("train[10:20]+test[-5:]", 15),
        ("test[25%:]", 270),
        ("train[:1%] + test", 374),
    ],
)
def test_parts_of_splits(split, size):
    assert len(data.load("digits", split)) == size


def test_parts_do_not_overlap():
    halves = [data.load("digits", split).images for split in ("train[:700]", "train[700:]")]
    np.testing.assert_array_equal(np.concatenate(halves), data.load("digits", "train").images)


@pytest.mark.parametrize("split", ["", "training", "train[", "train[:x]", "train[:5%", "train++test"])
def test_a_split_that_is_not_there(split):
    with pytest.raises(InputError, match=r"split .* of digits cannot be read .*: use train \(1,437\), test \(360\)"):
        data.load("digits", split)


NUMBERS = [
    "", "0", "5", "-5", "10", "11", "99", "-99", "100", "101", "999999", "1_0", "1__0", "-0", "1.5", "+5", "--5", "1e3",
    "x", "50%", "-50%", "33%", "12.5%", ".5%", "0.001%", "100%", "-100%", "100.001%", "200%", "-0%", "%", "5%%", "1_0%",
    "0shard", "1shard", "-1shard", "9shard", "pct1_dropremainder", "9" * 5000,
]  # fmt: skip
PARTS = [f"{name}[{start}:{stop}]" for name in ("train", "test") for start in NUMBERS for stop in NUMBERS]
PARTS += [f"{name}[{number}]" for name in ("train", "all") for number in NUMBERS]
PARTS += [
    "train", "test", "all", "all[:5]", "Train", "", " train", "train ", "train[", "train]", "train[]", "train[:",
    "train[1:2:3]", "train[:5][:3]", "train[:10%](pct1_dropremainder)", "tes-t", "+train", "train+", "train++test",
    "train-test",
]  # fmt: skip


def rows_of_tfds(split, shards):
    """What TFDS itself reads; None where it raises, at once or when it makes a data source of it."""
    from tensorflow_datasets.core import splits as tfds_splits

    infos = [tfds_splits.SplitInfo(name=name, shard_lengths=sizes, num_bytes=0) for name, sizes in shards.items()]
    try:
        parts = tfds_splits._make_absolute_instructions(infos, split)
    except (ValueError, NotImplementedError):
        return None
    sizes = {name: sum(sizes) for name, sizes in shards.items()}
    rows = [(p.splitname, p.from_ or 0, sizes[p.splitname] if p.to is None else p.to) for p in parts]
    if any(start > stop for _, start, stop in rows) or not any(start < stop for _, start, stop in rows):
        return None
    return [(name, range(start, stop)) for name, start, stop in rows]


@pytest.mark.parametrize(
    "shards", [{"train": [1437], "test": [360]}, {"test": [10], "train": [9, 40, 0, 50]}], ids=["digits", "shards"]
)
def test_parts_are_those_of_tfds(shards):
    """Red if a slice is read that TFDS refuses, if one is refused that it reads, or other rows are read."""
    pairs = np.random.default_rng(soak_seed()).choice(PARTS, (soak(500, 20_000), 2))
    for split in [*PARTS, *map("+".join, pairs), *map(" + ".join, pairs[:100])]:
        try:
            rows = splits.rows(split, shards)
        except ValueError:
            rows = None
        assert rows == rows_of_tfds(split, shards), split[:80]


BAD_PARTS = [
    "train[:200%]", "train[-101%:]", "train[999999:]", "train[:999999]", "train[-999999:]", "train[50:10]",
    "train[-5:-10]", "train[50%:10%]", "train[5:5]", "train[:0]", "train[:0%]", "train[:0.0001%]", "train[5]",
    "train[:]", "train[1:2:3]", "train[pct1_dropremainder]", "train[:10%](pct1_dropremainder)", "train[:1.5]",
    "all[:5]", "train+", "train+extra", "",
]  # fmt: skip
BOTH = [("digits", None, 360), *([("svhn_cropped", str(SVHN), 10_000)] if SVHN.is_dir() else [])]


@pytest.mark.parametrize("split", [*BAD_PARTS, None, 5, ("train",)], ids=str)
def test_a_part_that_is_not_there_is_one_error_of_digits_and_tfds(split):
    for name, folder, _ in BOTH:
        for read in (data.load, data.count):
            with pytest.raises(InputError) as error:
                read(name, split, folder)
            message = str(error.value)
            assert message.startswith(f"split {split!r} of {name} cannot be read (") and "\n" not in message
            assert "): use train (" in message and len(message) < 400


def test_parts_of_one_row_and_up_to_the_end():
    for name, folder, size in BOTH:
        labels = data.load(name, "test[-20:]", folder).labels
        for split, expected in {
            f"test[{size - 10}:{size - 9}]": labels[10:11],
            "test[-1:]": labels[-1:],
            f"test[-5:{size}]": labels[-5:],
            f"test[{size - 1}:]+test[-2:-1]": labels[[-1, -2]],
            f"test[5:5]+test[{size - 3}:]": labels[-3:],
        }.items():
            np.testing.assert_array_equal(data.load(name, split, folder).labels, expected)


def test_standardization_is_that_of_the_split_and_leaves_constant_pixels_finite():
    images = data.load("digits", "train").images
    mean, std = data.standardization(images)
    standardized = (images - mean) / std
    np.testing.assert_allclose(standardized.mean(0), 0, atol=1e-5)
    varying = images.std(0) > 1
    np.testing.assert_allclose(standardized.std(0)[varying], 1, rtol=1e-5)
    assert np.all(standardized[:, images.std(0) == 0] == 0) and np.abs(standardized).max() <= 16


def test_standardization_in_chunks_equals_that_of_the_whole():
    images = np.random.default_rng(0).integers(0, 256, (10_000, 2, 3, 1), np.uint8)
    mean, std = data.standardization(images)
    np.testing.assert_allclose(mean, images.mean(0), rtol=1e-6)
    np.testing.assert_allclose(std, images.std(0), rtol=1e-6)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((3, 2, 2, 1), np.float32), np.zeros(3, np.int32), "images must be uint8"),
        (np.zeros((3, 2, 2), np.uint8), np.zeros(3, np.int32), "images must be uint8"),
        (np.zeros((3, 2, 2, 1), np.uint8), np.zeros(2, np.int32), "one label an image"),
        (np.zeros((3, 2, 2, 1), np.uint8), np.array([0, 1, np.nan]), r"labels must be int32\[N\], got float64: use"),
        (np.zeros((3, 2, 2, 1), np.uint8), np.arange(3), "labels must be int32"),
        (np.zeros((3, 2, 2, 1), np.uint8), np.array([0, 1, -1], np.int32), r"labels must lie in \[0, 2\), got -1 to 1"),
    ],
)
def test_data_that_is_no_image_classification(images, labels, message):
    with pytest.raises(InputError, match=message):
        data.Dataset(images, labels, num_classes=2)


def test_svhn_is_read_without_tensorflow_and_the_cache_gives_the_same():
    need_svhn()
    first = data.load("svhn_cropped", "train[:700]", str(SVHN))
    assert first.images.shape == (700, 32, 32, 3) and first.num_classes == 10
    assert set(first.labels) == set(range(10)) and 50 < first.images.mean() < 200
    again = data.load("svhn_cropped", "train[:700]", str(SVHN))
    np.testing.assert_array_equal(again.images, first.images)
    np.testing.assert_array_equal(again.labels, first.labels)
    both = data.load("svhn_cropped", "train[:350]+train[350:700]", str(SVHN))
    np.testing.assert_array_equal(both.labels, first.labels)
    assert "tensorflow" not in sys.modules


def test_a_truncated_or_foreign_cache_is_rebuilt(tmp_path):
    need_svhn()
    first = data.load("svhn_cropped", "test[:50]", str(SVHN))
    (file,) = (tmp_path / "cache" / "issgd_jax").iterdir()
    whole = file.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    for content in (whole[:5000], b"", b"not a zip file at all", flipped, whole[:40] + bytes(100) + whole[140:]):
        file.write_bytes(content)
        np.testing.assert_array_equal(data.load("svhn_cropped", "test[:50]", str(SVHN)).images, first.images)


def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch):
    need_svhn()
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="could not be cached"):
        assert len(data.load("svhn_cropped", "test[:50]", str(SVHN))) == 50
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o777)  # where others could put data
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "shared"))
    with pytest.warns(UserWarning, match="could not be cached .other users can write"):
        assert len(data.load("svhn_cropped", "test[:50]", str(SVHN))) == 50


def test_a_split_that_svhn_does_not_have():
    need_svhn()
    with pytest.raises(
        InputError, match=r"split 'extra' of svhn_cropped cannot be read \(there is no 'extra'\): use train"
    ):
        data.load("svhn_cropped", "extra", str(SVHN))


def test_an_unknown_data_set_gives_the_nearest():
    with pytest.raises(InputError, match=r"unknown data set 'fashion_mnst': did you mean fashion_mnist"):
        data.load("fashion_mnst", "train")


def test_data_that_is_not_there_says_how_to_get_it(tmp_path):
    with pytest.raises(InputError) as error:
        data.load("cifar10", "train", str(tmp_path / "nothing"))
    message = str(error.value)
    assert "is not at" in message and "issgd-jax[download]" in message and "--config.data.dir" in message
    command = message.split('python -c "')[1].split('"\n', maxsplit=1)[0]
    compile(command, "command", "exec")  # what is printed can be pasted
    assert not (tmp_path / "nothing").exists()


def test_data_that_is_not_images_with_labels(tmp_path):
    """A real TFDS data set with two images a record, written here."""
    code = f"""
import numpy as np, tensorflow_datasets as tfds
class TwoImages(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    pkg_dir_path = None
    def _info(self):
        pixels = tfds.features.Tensor(shape=(2,), dtype=np.uint8)
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({{"a": pixels}}))
    def _split_generators(self, dl): return {{"train": [(0, {{"a": np.zeros(2, np.uint8)}})]}}
    def _generate_examples(self): pass
TwoImages(data_dir={str(tmp_path)!r}, file_format="array_record").download_and_prepare()
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    with pytest.raises(
        InputError, match=r"has features \['a'\]: an image classification data set has one image, one label"
    ):
        data.load("two_images", "train", str(tmp_path))


@pytest.mark.parametrize("rows", [(0, 5), (17, 40), (30, 60)])
def test_rows_are_those_of_the_whole_split(rows):
    """Red if a worker that loads its shard gets other examples than the learner has under these numbers."""
    need_svhn()
    for name, split, folder in (("digits", "test[:60]", None), ("svhn_cropped", "test[10:50]+test[:20]", str(SVHN))):
        whole, part = data.load(name, split, folder), data.load(name, split, folder, rows=rows)
        assert data.count(name, split, folder) == 60
        np.testing.assert_array_equal(part.images, whole.images[slice(*rows)])
        np.testing.assert_array_equal(part.labels, whole.labels[slice(*rows)])


@pytest.mark.parametrize("rows", [(0, 61), (5, 5), (-1, 4)])
def test_rows_that_a_split_does_not_have(rows):
    with pytest.raises(InputError, match=f"test.* has 60 examples, but rows {rows[0]} to {rows[1]} were requested"):
        data.load("digits", "test[:60]", rows=rows)
