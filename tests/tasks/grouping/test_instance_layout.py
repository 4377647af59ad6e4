import numpy as np
import pytest

from eclectus.tasks.grouping.instance_layout import plan

SIZES = np.array([3, 0, 10, 4, 1, 7, 0, 2])


def placed(spans):
    """The shuffled stream, as (document, offset) per unit; None where no span lies."""
    stream = [None] * (spans.count * spans.length)
    for to, size, position, offset in zip(spans.to, spans.size, spans.position, spans.offset, strict=True):
        for i in range(size):
            assert stream[to + i] is None
            stream[to + i] = (int(position), int(offset) + i)
    return stream


@pytest.mark.parametrize("length", [1, 4, 5, 27, 100])
@pytest.mark.parametrize("keep_remainder", [True, False])
def test_instances_are_the_cut_stream_of_documents_in_another_order(length, keep_remainder):
    spans = plan(SIZES, length, keep_remainder, seed=1)
    units = [(document, offset) for document, size in enumerate(SIZES) for offset in range(size)]
    cut = [units[begin : begin + length] for begin in range(0, len(units), length)]
    if not keep_remainder:
        cut = [instance for instance in cut if len(instance) == length]
    stream = placed(spans)
    instances = [stream[begin : begin + length] for begin in range(0, len(stream), length)]
    assert sorted([unit for unit in instance if unit] for instance in instances) == sorted(cut)
    assert spans.total == len(units) and spans.count == len(cut)


def test_spans_are_in_the_order_of_the_stream_and_counted_by_instance():
    spans = plan(SIZES, 4, True, seed=2)
    assert (np.diff(spans.to) > 0).all()
    firsts = spans.firsts
    assert len(firsts) == spans.count + 1 and firsts[-1] == len(spans.to)
    for instance in range(spans.count):
        here = slice(firsts[instance], firsts[instance + 1])
        assert (spans.to[here] // 4 == instance).all() and 0 < spans.size[here].sum() <= 4


def test_the_seed_decides_the_order_and_nothing_else():
    one, same, other = (plan(np.full(50, 9), 16, True, seed) for seed in (0, 0, 1))
    assert placed(one) == placed(same) != placed(other)
    assert sorted(unit for unit in placed(one) if unit) == sorted(unit for unit in placed(other) if unit)


@pytest.mark.parametrize("sizes", [[], [0, 0], [3]])
def test_too_little_for_one_instance_is_a_plan_without_instances(sizes):
    spans = plan(np.array(sizes, np.int64), 4, False, seed=0)
    assert spans.count == 0 and len(spans.to) == 0 and spans.firsts.tolist() == [0]
