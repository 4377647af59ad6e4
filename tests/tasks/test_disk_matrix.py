import numpy as np
import pytest

from eclectus.tasks.disk_matrix import PartMatrix


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
