"""Output folders appear whole or not at all, and nobody's files are removed but one's own."""

import errno
import threading

import pytest

from eclectus.models.staged_folder import left_behind, staged_folder


def test_the_folder_appears_whole_at_the_end(tmp_path):
    with staged_folder(tmp_path / "deep" / "er" / "out") as partial:
        (partial / "file").write_text("content")
        assert not (tmp_path / "deep" / "er" / "out").exists()
    assert (tmp_path / "deep" / "er" / "out" / "file").read_text() == "content"
    assert [path.name for path in (tmp_path / "deep" / "er").iterdir()] == ["out"]


@pytest.mark.parametrize("error", [RuntimeError("fault"), KeyboardInterrupt()])
def test_a_block_that_raises_leaves_nothing_and_not_even_new_parents(tmp_path, error):
    with pytest.raises(type(error)), staged_folder(tmp_path / "deep" / "er" / "out") as partial:
        (partial / "file").write_text("content")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_folders_of_similar_names_stay(tmp_path):
    kept = [tmp_path / name for name in ("out.partial", ".out.partial", ".out.000000000000.partial", "out.tmp")]
    for folder in kept:
        folder.mkdir()
        (folder / "mine").write_text("kept")
    with staged_folder(tmp_path / "out") as partial:
        (partial / "file").write_text("content")
    with pytest.raises(RuntimeError), staged_folder(tmp_path / "other"):
        raise RuntimeError
    assert all((folder / "mine").read_text() == "kept" for folder in kept)
    assert left_behind(tmp_path / "out") == [tmp_path / ".out.000000000000.partial"]


def test_of_two_writers_at_once_the_second_is_refused_and_the_first_keeps_all(tmp_path):
    began, done, refused = threading.Event(), threading.Event(), []

    def second():
        try:
            with staged_folder(tmp_path / "out") as partial:
                (partial / "second").write_text("2")
                began.set()
                done.wait(10)
        except ValueError as error:
            refused.append(str(error))

    thread = threading.Thread(target=second)
    thread.start()
    assert began.wait(10)
    with staged_folder(tmp_path / "out") as partial:
        (partial / "first").write_text("1")
    done.set()
    thread.join(10)
    assert "written by another process meanwhile" in refused[0]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["first"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("kind", ["file", "full folder", "link to a full folder"])
def test_what_is_there_already_or_appears_meanwhile_stays(tmp_path, kind):
    def appear(path):
        if kind == "file":
            path.write_text("mine")
            return
        folder = path if kind == "full folder" else path.with_name("elsewhere")
        folder.mkdir()
        (folder / "mine").write_text("mine")
        if folder != path:
            path.symlink_to(folder)

    appear(tmp_path / "out")
    with pytest.raises(ValueError, match="exists already"), staged_folder(tmp_path / "out"):
        pytest.fail("began")
    (tmp_path / "later").mkdir()
    with (
        pytest.raises(ValueError, match="it stays as it is"),
        staged_folder(tmp_path / "later" / "out") as partial,
    ):
        (partial / "file").write_text("lost")
        appear(tmp_path / "later" / "out")
    for out in (tmp_path / "out", tmp_path / "later" / "out"):
        assert (out if out.is_file() else out / "mine").read_text() == "mine"
    assert not list((tmp_path / "later").glob(".*"))


def test_a_link_is_followed(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "empty").mkdir()
    for name, target in (("out", "empty"), ("dangling", "new")):
        (tmp_path / name).symlink_to(tmp_path / "disk" / target)
        with staged_folder(tmp_path / name) as partial:
            assert partial.parent == tmp_path / "disk"
            (partial / "file").write_text(name)
        assert (tmp_path / name).is_symlink() and (tmp_path / "disk" / target / "file").read_text() == name


def test_a_parent_that_is_a_file_and_a_full_disk_are_named(tmp_path):
    (tmp_path / "file").write_text("mine")
    with (
        pytest.raises(ValueError, match=r"out cannot be created \(.*Not a directory"),
        staged_folder(tmp_path / "file" / "out"),
    ):
        pytest.fail("began")
    with pytest.raises(ValueError, match=r"disk of .*out is full"), staged_folder(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_letters_that_a_pattern_would_read_otherwise_are_part_of_a_name(tmp_path):
    (tmp_path / ".a[1]*.0123456789ab.partial").mkdir()
    (tmp_path / ".a1x.0123456789ab.partial").mkdir()
    assert left_behind(tmp_path / "a[1]*") == [tmp_path / ".a[1]*.0123456789ab.partial"]
