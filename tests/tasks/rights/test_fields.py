"""Documents by a field that only the sources hold."""

import hashlib
import json

import pytest

from eclectus.storage.errors import EclectusError
from eclectus.tasks.documents.intake.settings import IngestSettings
from eclectus.tasks.rights.fields import documents_with_field


def id_of(text):
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@pytest.fixture
def settings(tmp_path):
    rows = [
        {"body": "first", "license": "cc-by", "language": "en"}, {"body": "second", "license": "gpl"},
        {"body": "third", "license": "cc-by"}, {"body": "fourth"}, {"body": "first", "license": "gpl"},
    ]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return IngestSettings(sources=[str(tmp_path / "rows.jsonl")], text_field="body")


def test_documents_are_found_by_what_their_records_hold(settings):
    assert documents_with_field(settings, "license", "cc-by") == {id_of("first"), id_of("third")}
    assert documents_with_field(settings, "license", "gpl") == {id_of("second")}, "a text has the first record's field"
    assert documents_with_field(settings, "language", "en") == {id_of("first")}


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("license", r"no record of the sources has 'mit' in field 'license'; there are 'cc-by' \(2\), 'gpl' \(1\)"),
        ("licence", "no record of the sources has a field 'licence'; name the field with --licence-field"),
    ],
)
def test_what_no_record_holds_is_named_with_what_there_is(settings, field, message):
    with pytest.raises(EclectusError, match=message):
        documents_with_field(settings, field, "mit")


def test_sources_that_are_gone_are_named(settings, tmp_path):
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(EclectusError, match=r"rows\.jsonl"):
        documents_with_field(settings, "license", "cc-by")
