"""Rows of every kind of data against plain indexing: a wrong order, dtype or copy turns these red."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from issgd_jax.loading.source import arguments, as_source

Pair = collections.namedtuple("Pair", ["x", "y"])
INDICES = np.array([3, 1, 1, 4])  # neither sorted nor unique
X = np.arange(20, dtype=np.float32).reshape(5, 4)
Y = np.array([10, 20, 30, 40, 50], np.uint8)


class Examples:
    """Data set with nothing but examples."""

    def __init__(self, examples):
        self.examples = examples

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, index):
        return self.examples[index]


class Batched(Examples):
    """Data set that gathers; red if it is read one by one."""

    def __getitem__(self, index):
        raise AssertionError(f"example {index} was read alone")

    def __getitems__(self, indices):
        return [self.examples[index] for index in indices]


def assert_rows(source, expected, indices=INDICES):
    """Compares a batch with arrays of all rows: values, types and structure."""
    batch = source.gather(indices)
    jax.tree.map(np.testing.assert_array_equal, batch, jax.tree.map(lambda x: np.asarray(x)[indices], expected))
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(batch))
    assert jax.tree.map(lambda x: x.dtype, batch) == jax.tree.map(lambda x: x.dtype, expected)


@pytest.mark.parametrize(
    "data",
    [X, jnp.asarray(X), X.astype(jnp.bfloat16), X.T.copy().T, (X, Y), {"x": X, "rest": (Y, [Y > 20])}, Pair(X, Y)],
    ids=["numpy", "jax", "bfloat16", "strided", "tuple", "nested", "named"],
)
def test_pytrees_of_arrays(data):
    source = as_source(data)
    assert source.num_examples == 5 and as_source(source) is source
    assert_rows(source, data)
    assert all(a is b for a, b in zip(jax.tree.leaves(source.all_rows()), jax.tree.leaves(data)))


@pytest.mark.parametrize("seed", range(5))
def test_random_shapes_and_indices(seed):
    rng = np.random.default_rng(seed)
    num_examples, shape = rng.integers(1, 40), rng.integers(0, 4, rng.integers(0, 3))
    data = rng.normal(size=(num_examples, *shape)), rng.integers(0, 9, num_examples)
    assert_rows(as_source(data), data, rng.integers(0, num_examples, rng.integers(1, 80)))


def test_a_batch_is_the_callers_own():
    """Red if a batch is a view of the data, which the device would then share."""
    for indices in (np.arange(5), np.array([2])):
        assert not np.shares_memory(as_source(X).gather(indices), X)


def test_a_memmap_stays_on_disk(tmp_path):
    X.tofile(tmp_path / "x")
    data = np.memmap(tmp_path / "x", np.float32, "r", shape=X.shape)
    assert_rows(as_source((data,)), (X,))


@pytest.mark.parametrize("kind", [list, Examples, Batched])
def test_examples_are_stacked_leaf_by_leaf(kind):
    source = as_source(kind([{"x": x, "y": (y, 3)} for x, y in zip(X, Y)]))
    assert_rows(source, {"x": X, "y": (Y, np.full(5, 3))})
    assert source.arrays is None


@pytest.mark.parametrize("kind", [list, Examples, Batched])
def test_collate_gets_the_examples_and_may_reuse_its_memory(kind):
    """Red if a batch is still in memory that the next one overwrites."""
    buffer = np.zeros((2, 3), np.int32)

    def pad(examples):
        buffer[:] = 0
        for row, example in zip(buffer, examples):
            row[: len(example)] = example
        return {"tokens": buffer}

    source = as_source(kind([[1], [2, 3], [4, 5, 6]]), pad)
    first = source.gather(np.array([2, 0]))
    source.gather(np.array([1, 1]))
    assert first["tokens"].tolist() == [[4, 5, 6], [1, 0, 0]]


def test_collate_of_arrays_gets_a_list_of_rows():
    source = as_source({"x": X, "y": Y}, lambda examples: np.stack([e["x"] * e["y"] for e in examples]))
    np.testing.assert_array_equal(source.gather(INDICES), (X * Y[:, None])[INDICES])
    assert source.arrays is None


def test_a_tuple_is_several_arguments():
    assert arguments((X, Y)) == (X, Y) and arguments(Pair(1, 2)) == (1, 2)
    assert [argument is X for argument in arguments(X)] == [True] and arguments({"x": 1}) == ({"x": 1},)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ((X, Y[:3]), ValueError, r"all arrays must have as many rows, got 5 of source\[0\], 3 of source\[1\]"),
        (X[:0], ValueError, "source has no examples"),
        ([], ValueError, "source has no examples"),
        ((), ValueError, "source has no examples"),
        ({"x": np.float32(1)}, ValueError, r"source\['x'\] has shape \(\), but its first axis"),
        (([1, 2], [3, 4]), TypeError, r"source\[0\]\[0\] is of type int, but a tuple or dict must hold arrays"),
        ({"t": np.array(["a", "b"])}, TypeError, r"source\['t'\] has dtype <U1, but a batch must be of numbers"),
        ({"t": np.array([{}, None])}, TypeError, r"source\['t'\] has dtype object, but a batch must be of numbers"),
        ((example for example in X), TypeError, "must have __len__ and __getitem__, got generator"),
        ({1, 2}, TypeError, "must have __len__ and __getitem__, got set"),
        (None, TypeError, "must have __len__ and __getitem__, got NoneType"),
    ],
)
def test_data_that_cannot_be_read(data, error, message):
    with pytest.raises(error, match=message):
        as_source(data)


@pytest.mark.parametrize(
    ("examples", "error", "message"),
    [
        ([[1], [1, 2]], ValueError, "examples differ in structure.*pass collate="),
        (
            [{"x": np.ones(2)}, {"x": np.ones(3)}],
            ValueError,
            r"source\['x'\] has examples of different shapes, \(2,\), \(3,\): pass collate=",
        ),
        ([None, 1], ValueError, "an example is None: remove those that are filtered out"),
        (["a", "b"], TypeError, "source has dtype <U1, but a batch must be of numbers"),
    ],
)
def test_examples_that_cannot_be_stacked(examples, error, message):
    with pytest.raises(error, match=message):
        as_source(examples).gather(np.array([0, 1]))


@pytest.mark.parametrize("wrong", [np.ones(3), np.float32(1), [np.ones(2), np.ones(1)]])
def test_collate_must_return_as_many_examples(wrong):
    with pytest.raises(ValueError, match="in a batch of 2 examples: the first axis of what collate"):
        as_source([1, 2, 3], lambda examples: wrong).gather(np.array([0, 1]))


def test_pandas():
    pandas = pytest.importorskip("pandas", reason="reads data frames: pip install pandas")
    frame = pandas.DataFrame({"y": Y, "x": X[:, 0], "big": Y > 20})
    columns = {name: frame[name].to_numpy() for name in frame}
    assert_rows(as_source(frame), columns)
    assert_rows(as_source(frame["y"]), Y)
    assert_rows(as_source((frame[["x"]], frame["y"])), ({"x": X[:, 0]}, Y))
    for column in (list("abcde"), pandas.Categorical(list("abcde")), pandas.date_range("2020", periods=5)):
        with pytest.raises(TypeError, match=r"source\['t'\] has dtype .*, but a batch must be of numbers"):
            as_source(frame.assign(t=column))


@pytest.mark.parametrize("stop_step", [(5, 1), (4, 2), (1, 1)])
def test_h5py(tmp_path, stop_step):
    """h5py takes increasing indices alone; red if rows come back in the order of the file."""
    h5py = pytest.importorskip("h5py", reason="reads HDF5 files: pip install h5py")
    with h5py.File(tmp_path / "data.h5", "w") as file:
        file["x"], file["y"] = X, Y
        source = as_source((file["x"], file["y"]))
        assert_rows(source, (X, Y))
        assert_rows(source, (X, Y), np.arange(0, *stop_step))
        jax.tree.map(np.testing.assert_array_equal, source.all_rows(), (X, Y))


def test_zarr():
    zarr = pytest.importorskip("zarr", reason="reads Zarr arrays: pip install zarr")
    assert_rows(as_source({"x": zarr.array(X)}), {"x": X})


def test_grain():
    grain = pytest.importorskip("grain", reason="reads Grain data sets: pip install grain")
    examples = grain.MapDataset.source([{"x": x, "y": y} for x, y in zip(X, Y)])
    assert_rows(as_source(examples), {"x": X, "y": Y})
    assert_rows(as_source(examples.map(lambda example: (example["x"], example["y"]))), (X, Y))
    assert_rows(as_source(grain.sources.RangeDataSource(10, 15, 1)), np.arange(10, 15))
    with pytest.raises(ValueError, match="an example is None: remove those that are filtered out"):
        as_source(examples.filter(lambda example: example["y"] < 20)).gather(INDICES)
    with pytest.raises(TypeError, match="must have __len__ and __getitem__"):
        as_source(examples.to_iter_dataset())


def test_torch():
    torch = pytest.importorskip("torch", reason="reads tensors and map-style data sets: pip install torch")
    tensors = torch.utils.data.TensorDataset(torch.tensor(X), torch.tensor(Y))
    assert_rows(as_source(tensors), (X, Y))
    assert_rows(as_source({"x": torch.tensor(X, requires_grad=True)}), {"x": X})
    assert_rows(as_source(torch.utils.data.Subset(tensors, [4, 3, 2, 1, 0])), (X[::-1], Y[::-1]))
    x, _ = as_source(tensors, torch.utils.data.default_collate).gather(INDICES)
    np.testing.assert_array_equal(x, X[INDICES])

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from X

    with pytest.raises(TypeError, match="must have __len__ and __getitem__, got Stream"):
        as_source(Stream())


def test_hugging_face():
    datasets = pytest.importorskip("datasets", reason="reads data sets of Hugging Face: pip install datasets")
    data = datasets.Dataset.from_dict({"x": X.tolist(), "y": Y.tolist()})
    assert_rows(as_source(data), {"x": X, "y": Y.astype(np.int64)})
    assert_rows(as_source(data.with_format("numpy", columns=["y"], dtype=np.int8)), {"y": Y.astype(np.int8)})
    assert_rows(as_source(data.with_transform(lambda b: {"z": np.array(b["y"]) + 1})), {"z": Y.astype(np.int64) + 1})
    ragged = datasets.Dataset.from_dict({"ids": [[1], [1, 2], [3], [4, 5, 6], [7]]})
    with pytest.raises(ValueError, match=r"source\['ids'\] has examples of different shapes"):
        as_source(ragged).gather(INDICES)
    lengths = as_source(ragged, lambda examples: np.array([len(example["ids"]) for example in examples]))
    assert lengths.gather(INDICES).tolist() == [3, 2, 2, 1]
    with pytest.raises(TypeError, match="DatasetDict of splits train: choose one"):
        as_source(datasets.DatasetDict(train=data))
    with pytest.raises(TypeError, match="must have __len__ and __getitem__, got IterableDataset"):
        as_source(data.to_iterable_dataset())
    with pytest.raises(TypeError, match=r"source\['t'\] has dtype <U1"):
        as_source(data.add_column("t", list("abcde"))).gather(INDICES)
