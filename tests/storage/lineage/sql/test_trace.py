"""Documents and artifacts by whole digest, by the start of one, and by name: wherever a name is taken."""

import hashlib
import shutil

import pytest

from eclectus.flows.cli.main import main
from eclectus.storage.errors import EclectusError
from eclectus.storage.home import Home
from eclectus.storage.lineage.connection import connect
from eclectus.storage.lineage.garbage import _keep_documents
from tests.support.history import write_history, write_table

TEXT = hashlib.sha256(b"a document").hexdigest()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = Home.open(tmp_path_factory.mktemp("trace") / "home")
    write_history(home, document=TEXT[:32])
    connect(home).close()
    return home


@pytest.mark.parametrize("asked", [TEXT, TEXT[:32], TEXT[:8], TEXT[:40], TEXT.upper(), "mine"])
def test_a_document_is_found_by_digest_start_or_name(home, asked):
    with connect(home) as connection:
        relations = {row[0] for row in connection.execute("select relation from trace(?)", [asked]).fetchall()}
    assert {"holds it", "read it", "learned from it"} <= relations


@pytest.mark.parametrize("asked", [TEXT[:7], TEXT[1:9], "%", "d", TEXT[:8] + "g", ""])
def test_nothing_else_is_taken_for_one(home, asked):
    with connect(home) as connection:
        assert connection.execute("select * from trace(?)", [asked]).fetchall() == []


def test_the_start_of_two_documents_is_refused_with_both(tmp_path, monkeypatch, capsys):
    home = Home.open(tmp_path / "home")
    ids = [TEXT[:8] + digit * 24 for digit in "ab"]
    for each in ids:
        write_history(home, document=each)
    monkeypatch.setenv("ECLECTUS_HOME", str(home.root))
    with pytest.raises(SystemExit):
        main(["trace", TEXT[:8]])
    said = capsys.readouterr().err
    assert all(each in said for each in ids)
    main(["trace", ids[0][:9]])
    assert "holds it" in capsys.readouterr().out


def test_an_artifact_is_found_by_digest_start_name_or_path_and_only_in_its_home(home):
    artifact = next(iter(home.store.all()))
    digest = artifact.digest
    asked = [digest, digest.upper(), digest[:8], digest[:40], f"{artifact.kind}-{digest[:12]}", artifact.path]
    assert {home.store.find(each).digest for each in asked} == {digest}
    wrong = [
        digest[:40] + "0" * 24,
        f"../artifacts/{artifact.kind}-{digest[:12]}",
        f"[a-z]*-{digest[:12]}",
        "*",
        "",
        "-",
    ]
    for each in wrong:
        with pytest.raises(EclectusError):
            home.store.find(each)
    with connect(home) as connection:
        for each in asked[:-1]:
            assert connection.execute("select count(*) from upstream(?)", [each]).fetchone()[0] >= 1


def test_the_documents_of_instances_in_parts_are_found_in_every_part_also_when_the_artifact_is_freed(tmp_path):
    home, other = Home.open(tmp_path / "home"), "f" * 32
    write_history(home, document=TEXT[:32])
    questions = [f"from trace('{TEXT[:32]}')", f"from trace('{other}')", "from documents order by all"]
    for table in home.store.root.glob("instances/*/documents.parquet"):
        first, second = (table.with_name(f"documents-{part:05d}-of-00002.parquet") for part in (0, 1))
        table.rename(first)
        write_table(home, second, f"select * replace ('{other}' as document) from read_parquet('{first}')")
    with connect(home) as connection:
        answers = [connection.execute(question).fetchall() for question in questions]
    assert all(any("learned from it" in map(str, row) for row in answer) for answer in answers[:2])
    assert len(answers[2]) == 4
    for instances in list(home.store.root.glob("instances/[0-9a-f]*")):
        _keep_documents(home, instances)
        shutil.rmtree(instances)
    with connect(home) as connection:
        assert [connection.execute(question).fetchall() for question in questions[2:]] == answers[2:]
