"""`prefect/services.json`: whose services it is about, in every order of copies, moves and damage."""

from __future__ import annotations

import json
import os
import shutil
import time

import pytest

from eclectus.flows.services.background import Background, start_of
from eclectus.flows.services.supervisor import note as notes
from eclectus.flows.services.supervisor.note import BEAT, NOTE, UpNote, beat_age, read_up_note, up_lock
from eclectus.storage.errors import EclectusError


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "home" / "prefect"
    made.mkdir(parents=True)
    note = UpNote.new(made)
    shutil.rmtree(note.ray)
    me = Background("the worker", os.getpid(), start_of(os.getpid()), "")
    note.services = [vars(me), vars(Background("Ray", os.getpid(), "another start", ""))]
    note.write(made)
    return made


def test_a_note_is_private_and_names_what_runs(folder):
    assert (folder / NOTE).stat().st_mode & 0o077 == 0
    note = read_up_note(folder)
    assert [service.name for service in note.running()] == ["the worker"]
    assert [service.name for service in note.noted()] == ["the worker", "Ray"]


def test_a_moved_home_keeps_its_services_and_a_copy_has_none(folder, tmp_path):
    shutil.copytree(tmp_path / "home", tmp_path / "copy")
    assert read_up_note(tmp_path / "copy" / "prefect") is None
    assert read_up_note(folder) is not None
    os.rename(tmp_path / "home", tmp_path / "moved")
    assert read_up_note(tmp_path / "moved" / "prefect").path == str(folder)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "7", '{"services": 3}', '{"services": [{"name": "x"}]}', '{"services": [3]}', "\0"]
)
def test_a_damaged_note_is_none(folder, text):
    (folder / NOTE).write_text(text)
    assert read_up_note(folder) is None


def test_a_note_of_an_earlier_version_is_read_and_has_no_token(folder):
    (folder / NOTE).write_text(json.dumps({"ui": "http://127.0.0.1:4200", "api": "a", "ray": "r", "services": []}))
    note = read_up_note(folder)
    assert note.token == "" and note.api == "a" and note.supervisor_running() is None


def test_up_and_down_wait_for_each_other_and_say_whom_they_wait_for(folder, monkeypatch):
    monkeypatch.setattr(notes, "LOCK_SECONDS", 0.3)
    refused = pytest.raises(EclectusError, match=r"another `eclectus up` or `down` holds .*up.lock")
    with up_lock(folder), refused, up_lock(folder):
        pass
    with up_lock(folder):
        pass


def test_the_age_of_a_beat(folder):
    assert beat_age(folder) == float("inf")
    (folder / BEAT).touch()
    os.utime(folder / BEAT, (time.time() - 100, time.time() - 100))
    assert 99 < beat_age(folder) < 110
