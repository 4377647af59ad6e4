import numpy as np
import pytest

from eclectus.tasks.disk_matrix import PartMatrix, mapped


@pytest.fixture
def parts(tmp_path):
    """A matrix in four parts, one of them empty, and what it must be equal to."""
    random, arrays = np.random.default_rng(0), []
    for number, rows in enumerate((50, 0, 70, 1)):
        arrays.append(random.standard_normal((rows, 3)).astype(np.float32))
        np.save(tmp_path / f"{number}.npy", arrays[-1])
    return PartMatrix([tmp_path / f"{number}.npy" for number in range(4)]), np.concatenate(arrays)


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [3],
        [120, 0, 5, 5, -1, 49, 50],
        [[1, 2], [110, 3]],
        np.arange(121),
        np.random.default_rng(1).integers(-121, 121, (40, 9)),
        slice(20, 90),
        slice(None, None, 7),
    ],
)
def test_rows_in_any_order_are_those_of_the_whole_matrix(parts, rows):
    matrix, whole = parts
    rows = rows if isinstance(rows, slice) else np.array(rows, np.int64)
    assert np.array_equal(matrix[rows], whole[rows])


@pytest.mark.parametrize("row", [121, -122])
def test_a_row_that_is_not_there_is_an_error(parts, row):
    with pytest.raises(IndexError, match="of 121"):
        parts[0][np.array([0, row, 3])]


@pytest.mark.parametrize(
    "array",
    [
        np.arange(12, dtype=np.int32).reshape(3, 4),
        np.asfortranarray(np.arange(12.0).reshape(3, 4)),
        np.arange(5) > 2,
        np.empty((0, 7), np.float16),
        np.array(b"an id"),
        np.zeros(3, [(f"column {number} of a long header", "f4") for number in range(2000)])[
            "column 1 of a long header"
        ],
    ],
)
def test_a_mapped_file_is_what_numpy_loads(tmp_path, array):
    np.save(tmp_path / "a.npy", array)
    found, wanted = mapped(tmp_path / "a.npy"), np.load(tmp_path / "a.npy")
    assert np.array_equal(found, wanted) and (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
    assert found.flags.f_contiguous == wanted.flags.f_contiguous
    assert not found.size or not found.flags.writeable


def test_a_file_with_a_wide_header_is_mapped(tmp_path):
    with open(tmp_path / "a.npy", "wb") as file:
        np.lib.format.write_array(file, np.arange(7), version=(2, 0))
    assert mapped(tmp_path / "a.npy").tolist() == list(range(7))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "no .npy file"),
        (b"PAR1" * 50, "no .npy file"),
        (b"\x93NUMPY\1\0\xff\xff" + b"x" * 100, "header"),
        (b"\x93NUMPY\2\0\xff\xff\xff\xff" + b"x" * 100, "header"),
        (b"\x93NUMPY\7\0v\0" + b" " * 200, "version|header"),
        ("cut", "16 bytes are missing"),
        ("objects", "Python objects"),
    ],
)
def test_a_file_that_cannot_be_mapped_is_an_error_that_names_it(tmp_path, content, why):
    path = tmp_path / "a.npy"
    np.save(path, np.array([{}, {}]) if content == "objects" else np.arange(10), allow_pickle=True)
    if content == "cut":
        path.write_bytes(path.read_bytes()[:-16])
    elif isinstance(content, bytes):
        path.write_bytes(content)
    with pytest.raises(ValueError, match=why):
        mapped(path)
