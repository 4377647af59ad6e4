"""Files are whole or absent, a file that somebody else wrote meanwhile stays, and no temporary file is left."""

import os
import threading

import pytest

from eclectus.storage.atomic_write import creating, replacing, temporary_path, write_atomically


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("linking", [True, False])
def test_a_new_file_does_not_replace_one_that_appeared_meanwhile(tmp_path, monkeypatch, linking):
    if not linking:

        def refuse(*_):
            raise OSError(95, "Operation not supported")

        monkeypatch.setattr(os, "link", refuse)
    with creating(tmp_path / "ours") as temporary:
        temporary.write_text("ours")
    with pytest.raises(FileExistsError), creating(tmp_path / "theirs") as temporary:
        temporary.write_text("ours")
        (tmp_path / "theirs").write_text("theirs")
    assert names(tmp_path) == ["ours", "theirs"]
    assert (tmp_path / "ours").read_text() == "ours" and (tmp_path / "theirs").read_text() == "theirs"


@pytest.mark.parametrize("how", [creating, replacing])
def test_a_block_that_raises_leaves_what_was_there(tmp_path, how):
    (tmp_path / "file").write_text("before")
    with pytest.raises(KeyboardInterrupt), how(tmp_path / "file") as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert names(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "before"


def test_many_writers_of_one_file_leave_one_whole_content_and_nothing_else(tmp_path):
    (tmp_path / ".file.partial").write_text("mine")
    contents = [str(digit) * 100_000 for digit in range(8)]
    threads = [threading.Thread(target=write_atomically, args=(tmp_path / "file", content)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "file").read_text() in contents
    assert names(tmp_path) == [".file.partial", "file"] and (tmp_path / ".file.partial").read_text() == "mine"


def test_temporary_paths_differ_and_folders_are_removed_too(tmp_path):
    with temporary_path(tmp_path / "a") as first, temporary_path(tmp_path / "a") as second:
        assert first != second
        first.mkdir()
        (first / "file").write_text("")
    assert names(tmp_path) == []
