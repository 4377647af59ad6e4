"""`eclectus forget`: who saw a document and when, and a training without it with the bits of one that never had it."""

import json

import pytest

from eclectus.storage.errors import EclectusError
from eclectus.storage.home import Home
from eclectus.storage.lineage.connection import query
from eclectus.tasks.rights.exposure import exposures, find_documents
from eclectus.tasks.rights.forgotten import forgotten, remember_forgotten
from tests.support.command_line import run_command
from tests.support.history import write_history

SMALL = {
    "original_languages": ["en"], "expanded_languages": ["el"], "tokenizer_vocabulary": 400, "embedding_steps": 5,
    "instance_tokens": 64, "lory_segment": 16, "lory_experts": 2, "model_width": 16, "model_layers": 1,
    "model_heads": 2, "model_key_value_heads": 2, "model_feed_forward": 16, "pretrain_steps": 8,
    "pretrain_warmup_steps": 1, "lory_rewarm_steps": 1, "pretrain_batch": 2, "post_pretrain_steps": 4,
    "review_steps": 2, "training_workers": 0, "language_detector": "field", "training_forecast": "never",
    "pack_remainder": "pad",
}  # fmt: skip


@pytest.fixture
def eclectus(capsys):
    return lambda home, *words: run_command(capsys, "--home", home, *words)


def write_corpus(path):
    words = ["ship harbour sail wind deck", "court judge law appeal claim", "leaf root tree forest seed"]
    rows = []
    for number in range(90):
        language = "el" if number % 3 == 2 else "en"
        text = " ".join(f"{words[number % 3]} {language} {number} {k}" for k in range(12))
        rows.append({"text": text, "language": language, "id": f"{language}-{number}", "licence": f"of {number}"})
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")


def exposed_as_noted(home, eclectus):
    """What every training read, by the order of its instances, is what it noted first losses of."""
    _, said, _ = eclectus(home, "forget", "--language", "en", "--json")
    found = {row["label"]: row["documents"] for row in map(json.loads, said.splitlines()) if "label" in row}
    noted = query(
        "select label, count(distinct document) from first_losses join steps using (step) where language = 'en' "
        "group by label",
        Home.existing(home),
    )[1]
    assert found == dict(noted) and {"train dense warm-up", "train dense", "train lory"} <= found.keys()


@pytest.mark.slow
def test_a_training_without_a_document_is_that_of_a_home_that_never_trained_on_it(tmp_path, eclectus):
    write_corpus(tmp_path / "all.jsonl")
    (tmp_path / "config.yaml").write_text(json.dumps(SMALL | {"sources": [str(tmp_path / "all.jsonl")]}))
    home, other = tmp_path / "home", tmp_path / "other"
    words = ["extend", "--config", str(tmp_path / "config.yaml")]
    code, _, error = eclectus(home, *words)
    assert code == 0, error
    sql = (
        "select name, min(instance) as first from documents where language = 'el' and instances in (select artifact "
        "from step_outputs join steps using (step) where label = 'pack expanded') group by name order by first"
    )
    name = next(name for name, first in query(sql, Home.existing(home))[1] if first >= 4)

    code, said, _ = eclectus(home, "forget", name, "--json")
    rows = [json.loads(line) for line in said.splitlines()]
    *rows, price = rows
    assert "train stage 1" in price["run_steps"] and len(price["run_steps"]) < price["steps"] and price["took"] > 0
    assert "train stage 1" in {row["label"] for row in rows} and "train lory" not in {row["label"] for row in rows}
    stage_1 = next(row for row in rows if row["label"] == "train stage 1")
    assert 1 <= stage_1["first_step"] < stage_1["steps"] == 4 and stage_1["last_before"].startswith("checkpoint-")
    licence = ["--licence", f"of {name.partition('-')[2]}", "--licence-field", "licence"]
    assert eclectus(home, "forget", *licence, "--json")[1] == said
    exposed_as_noted(home, eclectus)
    code, said, _ = eclectus(home, "forget", name)
    assert code == 0 and "+ pack expanded" in said and "+ train stage 1" in said and "train lory" not in said
    assert forgotten(Home.existing(home)) == {}, "only shown"

    code, said, error = eclectus(home, "forget", name, "--reason", "asked for", "--by", "ana", "--yes")
    assert code == 0, error
    assert "= train lory" in said and "+ train stage 1" in said and "+ pack expanded" in said
    (document,) = forgotten(Home.existing(home))
    assert forgotten(Home.existing(home))[document]["by"] == "ana"

    (tmp_path / "never.yaml").write_text(
        json.dumps(SMALL | {"sources": [str(tmp_path / "all.jsonl")], "pack_left_out": [document]})
    )
    code, _, error = eclectus(other, "extend", "--config", str(tmp_path / "never.yaml"))
    assert code == 0, error
    made = (
        "select o.artifact from step_outputs o join steps s using (step) join runs r on s.run = r.run "
        "where label = 'train stage 2' order by r.started desc limit 1"
    )
    assert query(made, Home.existing(home))[1] == query(made, Home.existing(other))[1]
    code, said, _ = eclectus(home, *words)
    assert code == 0 and "= train stage 2" in said, "a later run leaves it out too"
    code, said, _ = eclectus(home, "forget", name, "--json")
    *left, price = map(json.loads, said.splitlines())
    assert {row["run"] for row in left} == {rows[0]["run"]}


def test_the_list_only_grows_and_is_in_the_journal(home):
    remember_forgotten(home, ["aa" * 16], "asked for", "ana")
    remember_forgotten(home, ["aa" * 16, "bb" * 16], "again", "ben")
    assert {name: each["by"] for name, each in forgotten(home).items()} == {"aa" * 16: "ana", "bb" * 16: "ben"}
    rows = query("select name, \"by\", reason from events where event = 'forgotten' order by logged", home)[1]
    assert rows == [("aa" * 16, "ana", "asked for"), ("bb" * 16, "ben", "again")]
    (home.keys / "forgotten.json").write_text("{")
    with pytest.raises(EclectusError, match=r"the list of forgotten documents .* cannot be read .* put it back"):
        forgotten(home)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "forget needs documents, or one of --source, --language, --domain and --licence"),
        (["--licence", "gpl"], "every run of this home has no sources, of which a licence could be read"),
        (["nobody"], "no document that is kept here is called 'nobody'"),
        (
            ["--source", "elsewhere"],
            "no packed document has source 'elsewhere'; there are (source, language, domain): ",
        ),
        (["mine", "aa" * 16], f"no document that is kept here is called '{'aa' * 16}'"),
    ],
)
def test_what_cannot_be_forgotten_is_one_line_and_changes_nothing(home, eclectus, words, message):
    write_history(home)
    code, _, error = eclectus(home.root, "forget", *words, "--yes")
    assert code == 2 and message in error and error.count("\n") == 1
    assert forgotten(home) == {}


def test_documents_are_found_by_id_by_name_and_by_what_they_are(home):
    write_history(home)
    assert find_documents(home, ["mine"], {}) == find_documents(home, ["d1"], {}) == ["d1"]
    assert find_documents(home, [], {"source": "books", "language": "en"}) == ["d1"]
    assert exposures(home, ["d1"]) == [], "its checkpoints were made by no training"
