"""The loss of a document when it was first trained on: against the model itself, cut and resumed in every way."""

import json

import numpy as np
import pytest
import torch

from eclectus.models.losses.objectives import next_token
from eclectus.models.training.first_losses import NAME, FirstLosses
from eclectus.models.training.instances import IGNORED, Instances
from eclectus.models.training.loop import train
from eclectus.models.training.process import Process
from tests.support.tiny_training import plan, tiny_dense, write_instances


def silent(*_, **__):
    pass


def trained(folder, work, model=None, **changed):
    """Losses [S] of a training whose rate is 0, so that the model stays what it is."""
    model = model or tiny_dense()
    train(model, Instances(folder), next_token(), plan(learning_rate=0.0, **changed), Process(), work, silent)
    return np.fromfile(work / NAME, np.float32)


def expected(folder, rows):
    """Mean loss of each span in these instances, by the model's own logits; NaN for the others."""
    data, model = Instances(folder), tiny_dense().eval()
    batch = data.batch(np.arange(len(data)))
    with torch.no_grad():
        logits = model(input_ids=batch.tokens).logits[:, :-1]
    targets = batch.labels[:, 1:]
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=IGNORED
    )
    losses, found = losses.view(targets.shape).numpy(), []
    for start, length, *_ in np.asarray(data.spans):
        row, offset = divmod(int(start), data.length)
        own = losses[row, max(0, offset - 1) : offset + length - 1]
        found.append(own.mean() if row in rows and len(own) else np.nan)
    return np.array(found, np.float32)


@pytest.fixture
def folder(tmp_path):
    return write_instances(tmp_path / "data")


def test_each_span_has_the_loss_of_its_own_targets(folder, tmp_path):
    data = Instances(folder)
    steps = len(data) // 2
    found = trained(folder, tmp_path / "work", stop=steps, total=steps, batch=2, micro_batch=1)
    assert len(found) == len(data.spans)
    np.testing.assert_allclose(found, expected(folder, range(2 * steps)), rtol=1e-4)


def test_what_is_not_reached_has_none_and_a_second_epoch_changes_nothing(folder, tmp_path):
    part = trained(folder, tmp_path / "part", stop=1, total=9, batch=2, micro_batch=2)
    np.testing.assert_allclose(part, expected(folder, range(2)), rtol=1e-4)
    count = len(Instances(folder))
    steps = count // 2 + 3
    more = trained(folder, tmp_path / "more", stop=steps, total=steps, batch=2, micro_batch=2)
    np.testing.assert_allclose(more, expected(folder, range(count)), rtol=1e-4)


def test_the_last_step_of_the_first_epoch_may_begin_the_second(folder, tmp_path):
    count = len(Instances(folder))
    batch = next(size for size in (3, 4, 5, 7) if count % size)
    steps = count // batch + 2
    found = trained(folder, tmp_path / "work", stop=steps, total=steps, batch=batch, micro_batch=batch)
    np.testing.assert_allclose(found, expected(folder, range(count)), rtol=1e-4)


def test_a_training_that_resumes_writes_the_same(folder, tmp_path):
    model = tiny_dense()
    whole = trained(folder, tmp_path / "whole", stop=4, total=4, batch=2, micro_batch=1, log_every=1)

    def killed(step):
        if step == 2:
            raise KeyboardInterrupt

    data, chosen = (
        Instances(folder),
        plan(learning_rate=0.0, stop=4, total=4, batch=2, micro_batch=1, checkpoint_every=1, log_every=3),
    )
    with pytest.raises(KeyboardInterrupt):
        train(model, data, next_token(), chosen, Process(), tmp_path / "cut", silent, check=killed)
    train(tiny_dense(), data, next_token(), chosen, Process(), tmp_path / "cut", silent)
    assert np.array_equal(np.fromfile(tmp_path / "cut" / NAME, np.float32), whole, equal_nan=True)


def test_every_process_writes_its_own_spans(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(Process, "barrier", lambda self: None)
    data, chosen = Instances(folder), plan(batch=4, micro_batch=1)
    for rank in (0, 1):
        noted = FirstLosses(data, chosen, Process(rank=rank, world=2), tmp_path)
        for number in range(2):
            rows = data.rows_of_step(0, 4, chosen.seed)[2 * rank + number :][:1]
            labels = data.batch(rows).labels
            at = torch.nonzero(labels[0, 1:] != IGNORED)[:, 0]
            noted.note(0, number, (at, torch.full((len(at),), 10.0 * rank + number)))
        noted.write(sync=True)
    found = np.fromfile(tmp_path / NAME, np.float32)
    spans = np.asarray(data.spans)
    for row, value in enumerate((0.0, 1.0, 10.0, 11.0)):
        here = found[spans[:, 0] // data.length == row]
        assert (here[~np.isnan(here)] == value).all() and (~np.isnan(here)).any()
    assert np.isnan(found[spans[:, 0] // data.length > 3]).all()


def test_instances_in_several_parts_have_the_same_losses(folder, tmp_path):
    whole = trained(folder, tmp_path / "whole", stop=2, total=2, batch=2, micro_batch=2)
    parted = tmp_path / "parted"
    parted.mkdir()
    about = json.loads((folder / "instances.json").read_text())
    data = Instances(folder)
    tokens, spans, cut = np.asarray(data.tokens), np.asarray(data.spans), 3
    pieces = [tokens[:cut], tokens[cut:]]
    for number, piece in enumerate(pieces):
        piece.tofile(parted / f"tokens{number}")
    at = int(np.searchsorted(spans[:, 0], cut * data.length))
    np.save(parted / "spans-0.npy", spans[:at])
    np.save(parted / "spans-1.npy", spans[at:])
    about["matrices"]["input_ids"] = [
        {"file": f"tokens{n}", "dtype": tokens.dtype.name, "offset": 0, "rows": len(p), "columns": data.length}
        for n, p in enumerate(pieces)
    ]
    about["spans"] = ["spans-0.npy", "spans-1.npy"]
    (parted / "instances.json").write_text(json.dumps(about))
    found = trained(parted, tmp_path / "work", stop=2, total=2, batch=2, micro_batch=2)
    assert np.array_equal(found, whole, equal_nan=True) and (~np.isnan(found)).any()
