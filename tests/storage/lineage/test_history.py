"""Which step an artifact is said to come from, where several wrote it."""

from types import SimpleNamespace

from eclectus.storage.journal import Journal
from eclectus.storage.lineage.history import read_history
from tests.support.history import digest, write_step


def test_a_checkpoint_that_was_given_as_a_base_too_is_still_of_what_trained_it(home):
    trained, instances = digest(2), digest(1)
    with Journal(home.journal, "20260101-000000-aaaaaa", home.mirror) as journal:
        journal.event("run_started", flow="main", parameters={}, packages={"torch": "2"})
        write_step(journal, "pack", instances, kind="instances")
        write_step(journal, "train", trained, [f"instances-{instances}"], kind="checkpoint", name="pretrain")
        write_step(journal, "again", trained, kind="checkpoint", name="fetch")
        journal.event("run_ended", state="completed", seconds=1.0)
    history = read_history(home, "20260101-000000-aaaaaa", [SimpleNamespace(digest=trained)])
    assert history.made[trained].label == "label train"
    assert instances in history.made, "so its training data is known"
