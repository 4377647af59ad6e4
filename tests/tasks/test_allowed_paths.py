"""Paths from parameters cannot leave their roots."""

import pytest

from eclectus.flows.parameters import CurateParameters
from eclectus.flows.run import open_run
from eclectus.storage.errors import EclectusError
from eclectus.tasks.allowed_paths import check_roots
from eclectus.tasks.documents.sources import find_sources


@pytest.fixture
def places(tmp_path, monkeypatch):
    """A root with documents in it, and a file beside it."""
    inside = tmp_path / "root" / "documents"
    inside.mkdir(parents=True)
    (inside / "a.jsonl").write_text('{"text": "a document"}\n')
    (tmp_path / "secret.jsonl").write_text('{"text": "not for you"}\n')
    (tmp_path / "root-beside").mkdir()
    monkeypatch.setenv("ECLECTUS_ROOTS", str(tmp_path / "root"))
    monkeypatch.chdir(tmp_path / "root")
    return tmp_path


@pytest.mark.parametrize(
    "source",
    [
        "/etc/passwd", "../secret.jsonl", "documents/../../secret.jsonl", "{0}/secret.jsonl", "../*.jsonl", "{0}/s*",
        "~/x.jsonl", "dataset:../data", "dataset:/etc:config", "{0}/root-beside", "linked.jsonl", "/*/passwd",
    ],
)  # fmt: skip
def test_a_path_that_leads_out_is_refused_before_any_work(places, home, source):
    (places / "root" / "linked.jsonl").symlink_to(places / "secret.jsonl")
    parameters = CurateParameters(sources=["documents", source.format(places)])
    with (
        pytest.raises(EclectusError, match=r"setting 'sources' leads to .* outside .*root \(ECLECTUS_ROOTS\)"),
        open_run("curate", parameters, home),
    ):
        pass
    assert list(home.journal.glob("events/*.ndjson")) == []


@pytest.mark.parametrize("source", ["{0}/absent.jsonl", "{0}/secret.jsonl", "{0}/root-beside", "/etc/passwd"])
def test_what_is_said_of_a_path_outside_does_not_tell_whether_it_is_there(places, source):
    with pytest.raises(EclectusError, match=r"leads to .* outside"):
        CurateParameters(sources=[source.format(places)], original_languages=["en"]).check_together()


def test_a_link_in_a_folder_that_leads_out_is_refused(places):
    (places / "root" / "documents" / "b.jsonl").symlink_to(places / "secret.jsonl")
    with pytest.raises(EclectusError, match="source 'documents' leads to"):
        find_sources(["documents"], [])


@pytest.mark.parametrize(
    "source", ["documents", "documents/*.jsonl", "{0}/root/documents/a.jsonl", "dataset:owner/name"]
)
def test_what_lies_inside_and_what_is_no_path_is_let_through(places, source):
    check_roots(CurateParameters(sources=[source.format(places)], original_languages=["en"]))


def test_without_roots_any_path_will_do(places, monkeypatch):
    monkeypatch.delenv("ECLECTUS_ROOTS")
    check_roots(CurateParameters(sources=["../secret.jsonl"]))
    assert len(find_sources(["../secret.jsonl"], []).sources) == 1
