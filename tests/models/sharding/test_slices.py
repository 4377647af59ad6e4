"""Blocks of tensors that are stored, cut, joined, stacked, repeated, transposed and scaled: equal to torch's."""

import random

import pytest
import torch
from safetensors.torch import save_file

from eclectus.models.checkpoints.tensor_files import CheckpointError, CheckpointReader
from eclectus.models.sharding.slices import (
    Cut,
    InMemory,
    Joined,
    Repeated,
    Scaled,
    Stacked,
    Stored,
    Transposed,
    Zeros,
    whole_of,
)

A, B = torch.randn(6, 4), torch.randn(3, 4)


def stored(folder, **tensors):
    save_file(tensors, folder / "model.safetensors")
    return CheckpointReader(folder)


MADE = {
    "cut rows": (lambda a, b: Cut(a, 2, 5), A[2:5]),
    "cut columns": (lambda a, b: Cut(a, 1, 3, dim=1), A[:, 1:3]),
    "joined": (lambda a, b: Joined([a, b, a]), torch.cat([A, B, A])),
    "joined columns": (lambda a, b: Joined([a, a, Zeros((6, 2))], dim=1), torch.cat([A, A, torch.zeros(6, 2)], 1)),
    "stacked": (lambda a, b: Stacked([a, a, Scaled(a, 0.5)]), torch.stack([A, A, A * 0.5])),
    "stack of joined, cut": (
        lambda a, b: Cut(Stacked([Joined([a, b])] * 3), 1, 3),
        torch.stack([torch.cat([A, B])] * 2),
    ),
    "repeated": (lambda a, b: Repeated(Joined([a, b]), 5), torch.cat([A, B]).expand(5, -1, -1)),
    "transposed": (lambda a, b: Transposed(Joined([a, b])), torch.cat([A, B]).t()),
    "in memory": (lambda a, b: Joined([InMemory(B), a]), torch.cat([B, A])),
}


@pytest.mark.parametrize("name", MADE)
def test_any_block_is_that_of_the_whole_tensor(tmp_path, name):
    make, expected = MADE[name]
    with stored(tmp_path, a=A, b=B) as reader:
        values = make(Stored(reader, "a"), Stored(reader, "b"))
        assert values.shape == tuple(expected.shape)
        assert torch.equal(whole_of(values), expected)
        draw = random.Random(0)
        for _ in range(60):
            bounds = [tuple(sorted(draw.choices(range(size + 1), k=2))) for size in expected.shape]
            block = values.read(bounds)
            assert torch.equal(block, expected[tuple(slice(*each) for each in bounds)]), bounds


def test_a_block_reads_its_rows_and_no_others(tmp_path):
    with stored(tmp_path, a=torch.arange(4000.0).view(1000, 4), b=torch.tensor(7.0)) as reader:
        file = reader._offsets["a"][0]
        before = file.raw.tell()
        assert torch.equal(reader.block("a", [(500, 502), (1, 3)]), torch.tensor([[2001.0, 2002], [2005, 2006]]))
        assert file.tell() - reader._offsets["a"][1] == 502 * 16 and before < 20_000
        assert reader.block("b", []).item() == 7.0
        with pytest.raises(CheckpointError, match="has no tensor c"):
            Stored(reader, "c").read([(0, 1)])


def test_a_value_that_is_not_finite_is_named_with_its_row_of_the_whole_tensor(tmp_path):
    bad = A.clone()
    bad[4, 1] = float("nan")
    with stored(tmp_path, a=bad) as reader:
        Stored(reader, "a").read([(0, 4), (0, 4)])
        with pytest.raises(CheckpointError, match="a holds NaN in row 4"):
            Stored(reader, "a").read([(3, 6), (0, 4)])
