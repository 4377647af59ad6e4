import json
import os
import shutil
import time

import pytest

from eclectus.storage import artifact as artifact_module
from eclectus.storage.artifact import MANIFEST
from eclectus.storage.errors import EclectusError


def made(store, text="text", kind="documents"):
    with store.draft(kind) as draft:
        draft.file("folder/a.txt").write_text(text)
        draft.file("b.txt").write_text("b")
        draft.rows = 2
        return store.commit(draft)


def test_equal_content_has_one_name_and_one_place(home):
    first, second = made(home.store), made(home.store)
    assert first == second
    assert made(home.store, "other").digest != first.digest
    assert made(home.store, kind="report").digest != first.digest


def test_manifest_lists_every_file_with_its_digest(home):
    manifest = made(home.store).manifest()
    assert [file["name"] for file in manifest["files"]] == ["b.txt", "folder/a.txt"]
    assert manifest["rows"] == 2 and manifest["bytes"] == 5


@pytest.mark.parametrize("name", ["folder/a.txt", MANIFEST])
def test_one_changed_byte_is_found(home, name):
    artifact = made(home.store)
    path = artifact.file(name)
    path.write_text(path.read_text().replace("t", "T", 1))
    assert home.store.faults(artifact).startswith(f"{artifact.name} is")


def test_a_lost_file_and_a_lost_directory_are_found(home):
    artifact = made(home.store)
    artifact.file("b.txt").unlink()
    assert "b.txt is gone" in home.store.faults(artifact)
    shutil.rmtree(artifact.path)
    assert home.store.faults(artifact) == f"{artifact.name} is gone"


def test_a_damaged_artifact_is_quarantined_and_made_again(home):
    artifact = made(home.store)
    artifact.file("b.txt").write_text("x")
    assert made(home.store) == artifact
    assert home.store.faults(artifact) is None
    assert len(list((home.store.root / ".damaged").iterdir())) == 1


def test_a_draft_that_fails_leaves_nothing(home):
    with pytest.raises(RuntimeError), home.store.draft("documents") as draft:
        draft.file("a.txt").write_text("half")
        raise RuntimeError
    assert list(home.store.all()) == []
    assert list((home.store.root / ".drafts").iterdir()) == []


def test_an_empty_draft_and_an_unknown_kind_are_refused(home):
    with pytest.raises(EclectusError, match="wrote no file"), home.store.draft("documents") as draft:
        home.store.commit(draft)
    with pytest.raises(EclectusError, match="'model' is unknown"), home.store.draft("model"):
        pass


def test_an_artifact_is_found_by_name_digest_start_and_path(home):
    artifact = made(home.store)
    for name in (artifact.name, f"documents-{artifact.digest}", artifact.path):
        assert home.store.find(name) == artifact
    with pytest.raises(EclectusError, match="no artifact under"):
        home.store.find("documents-ffff")
    with pytest.raises(EclectusError, match="names no artifact"):
        home.store.find("../../etc/passwd")


def test_the_manifest_is_plain_json(home):
    assert json.loads(made(home.store).file(MANIFEST).read_text())["kind"] == "documents"


def test_a_file_that_gets_another_name_is_not_read_again_and_a_change_through_any_name_is_seen(tmp_path, monkeypatch):
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(b"one" * 1000)
    os.utime(source, (1, 1))
    read, real = [], artifact_module.hash_file
    monkeypatch.setattr(artifact_module, "hash_file", lambda path: read.append(path) or real(path))
    artifact_module.link(source, target)
    digest = real(source)
    assert [artifact_module.hash_unchanged(path) for path in (target, source, target)] == [digest] * 3
    assert read == [source]
    time.sleep(0.02)
    with open(source, "r+b") as handle:
        handle.write(b"two")
    os.utime(source, (1, 1))
    assert artifact_module.hash_unchanged(target) == real(source) != digest
    with pytest.raises(FileExistsError):
        artifact_module.link(source, target)
