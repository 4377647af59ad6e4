import numpy as np
import pytest

from eclectus.tasks.documents.digest_set import distinct, positions_of


@pytest.mark.parametrize(
    "values",
    [
        np.empty(0, np.int32),
        np.array([7]),
        np.array([[3, 1, 3], [2, 2, 1]], np.uint64),
        np.random.default_rng(0).integers(-50, 50, 1000),
        np.array([b"b", b"a", b"b"]),
    ],
)
def test_distinct_values_are_those_of_numpy(values):
    found = distinct(values)
    assert np.array_equal(found, np.unique(values)) and found.dtype == values.dtype


def test_positions_are_found_in_any_order_and_missing_ids_said():
    ids = np.array([b"c", b"a", b"d"])
    assert positions_of(np.array([b"d", b"b", b"c", b"a"]), ids).tolist() == [2, -1, 0, 1]
    assert positions_of(np.array([b"d", b"b"]), np.sort(ids), ascending=True).tolist() == [2, -1]
    assert positions_of(ids, ids[:0]).tolist() == [-1, -1, -1]
