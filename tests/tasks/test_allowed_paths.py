"""Paths from parameters cannot leave their roots, and what the run itself puts into settings need not lie there."""

import json
import os
import threading
from pathlib import Path

import pytest

from eclectus.flows.parameters import CurateParameters, MainParameters, RetrainParameters
from eclectus.flows.run import open_run
from eclectus.storage.errors import EclectusError
from eclectus.tasks.allowed_paths import check_path, check_roots, check_tree, copy_allowed, open_allowed
from eclectus.tasks.documents.ingest import IngestSettings, ingest
from eclectus.tasks.documents.sources import find_sources
from eclectus.tasks.evaluation.benchmark_tasks import files_of, local_questions, wanted_tasks
from eclectus.tasks.grouping.encoder import EmbedSettings
from eclectus.tasks.packing.tokenizer import TokenizerSettings, fingerprint
from eclectus.tasks.promotion.gate import read_gates
from eclectus.tasks.training import fetch_model
from eclectus.tasks.training.check_base import check_base, check_files


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
        "{0}/ROOT/a.jsonl", "file:///etc/passwd", "dataset:file:///etc", " /etc/passwd",
        "documents/*/../../../secret.jsonl",
        "../root/../secret.jsonl", "linked.jsonl/", "{0}", "..", "./..",
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


# Everything below opens files that a permitted folder links to.
@pytest.fixture
def linked(places):
    """(the root, the folder outside): the root's `model` holds real files, and a link to a file outside."""
    outside = places / "outside"
    (outside / "folder").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "tokenizer.json", "a.gguf", "gate.yaml", "t.jsonl", "t.yaml"):
        (outside / name).write_text('{"secret": 1}\n')
        (outside / "folder" / name).write_text('{"secret": 1}\n')
    model = places / "root" / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    return places / "root", outside


LINKS = {
    "a file": ("tokenizer.json", "tokenizer.json"),
    "weights": ("model.safetensors", "model.safetensors"),
    "a shard": ("model-00001-of-00002.safetensors", "model.safetensors"),
    "a side file": ("LICENSE.txt", "config.json"),
    "a folder of templates": ("additional_chat_templates", "folder"),
    "a missing file": ("special_tokens_map.json", "absent"),
}


@pytest.mark.parametrize("how", LINKS)
@pytest.mark.parametrize("setting", ["base model", "tokenizer", "embedding_model"])
def test_a_link_in_a_folder_of_a_model_is_refused_whatever_it_is_of(linked, how, setting):
    (root, outside), (name, target) = linked, LINKS[how]
    (root / "model" / name).symlink_to(outside / target)
    with pytest.raises(EclectusError, match=rf"{setting}.*{name}, a link, which leads outside .*root \(ECLECTUS_ROOTS"):
        if setting == "tokenizer":
            fingerprint(TokenizerSettings(tokenizer="model"))
        elif setting == "base model":
            check_base("model")
        else:
            EmbedSettings(embedding_model="model").check_together()


def test_a_chain_of_links_and_a_link_to_a_folder_that_links_out_are_refused(linked):
    root, outside = linked
    (root / "one").symlink_to("two")
    (root / "two").symlink_to(outside / "t.jsonl")
    (root / "inner").mkdir()
    (root / "inner" / "deep").symlink_to("../model")
    check_tree("inner", "it")
    (root / "model" / "more").symlink_to(outside)
    for path in ("one", "inner", "inner/deep/more/folder", "model/../two"):
        with pytest.raises(EclectusError, match=r"leads outside|is outside"):
            check_tree(path, "it")


def test_a_loop_of_links_ends(linked):
    root, _ = linked
    (root / "model" / "self").symlink_to(root / "model")
    (root / "model" / "round").symlink_to("round")
    check_tree(root / "model", "it")


def test_links_to_other_permitted_folders_are_followed(linked, monkeypatch):
    """As in a cache of the hub: names in snapshots are links to blobs, several levels up."""
    root, outside = linked
    blobs, snapshot = root / "hub" / "blobs", root / "hub" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (blobs / "1f").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/1f")
    check_tree(snapshot, "it", depth=2)
    (snapshot / "tokenizer.json").symlink_to(outside / "tokenizer.json")
    with pytest.raises(EclectusError):
        check_tree(snapshot, "it", depth=2)
    monkeypatch.setenv("ECLECTUS_ROOTS", f"{root}:{outside}/")
    check_tree(snapshot, "it", depth=2)


def test_roots_may_be_links_relative_begin_with_a_tilde_and_end_with_a_slash(linked, monkeypatch):
    root, outside = linked
    (root.parent / "door").symlink_to(root)
    monkeypatch.setenv("HOME", str(root.parent))
    for roots in (f"{root.parent}/door", f"{root.parent}/door/", "../root", "~/root", f"/nowhere:{root}", f":{root}:"):
        monkeypatch.setenv("ECLECTUS_ROOTS", roots)
        check_path("model/config.json", "it")
        check_path(root.parent / "door" / "model", "it")
        with pytest.raises(EclectusError):
            check_path(outside / "t.jsonl", "it")


def test_what_is_opened_is_checked_and_not_what_was_there_when_it_was_named(linked, monkeypatch):
    root, outside = linked
    path = root / "a.jsonl"
    path.write_text("inside")
    real = os.path.realpath

    def swapped(name, **rest):
        """A link takes the file's place right after the first look at it."""
        found = real(name, **rest)
        if str(name) == str(path) and not path.is_symlink():
            path.unlink()
            path.symlink_to(outside / "t.jsonl")
        return found

    monkeypatch.setattr(os.path, "realpath", swapped)
    with pytest.raises(EclectusError, match="leads outside"):
        open_allowed(path, "it")
    with pytest.raises(EclectusError, match="leads outside"):
        copy_allowed(path, root / "copy", "it")
    assert not (root / "copy").exists()


def test_a_link_that_is_swapped_all_the_time_never_gives_what_lies_outside(linked):
    root, outside = linked
    (root / "inside").write_text("inside")
    path, stop = root / "a", threading.Event()

    def swap():
        while not stop.is_set():
            for target in (root / "inside", outside / "t.jsonl"):
                (root / "new").symlink_to(target)
                os.replace(root / "new", path)

    path.symlink_to(root / "inside")
    swapping = threading.Thread(target=swap)
    swapping.start()
    refused = 0
    try:
        for _ in range(300):
            try:
                with open_allowed(path, "it") as file:
                    assert file.read() == b"inside"
            except EclectusError:
                refused += 1
    finally:
        stop.set()
        swapping.join()
    assert refused


@pytest.mark.parametrize("how", ["file", "folder", "glob", "folder in the glob", "parquet", "gzip", "data set"])
def test_no_source_is_read_through_a_link(linked, store, how):
    root, outside = linked
    entry = "documents/*" if "glob" in how else "documents"
    if how == "folder in the glob":
        (root / "documents" / "more").symlink_to(outside)
        entry = "documents/m*/*.jsonl"
    elif how == "data set":
        (root / "documents" / "state.json").symlink_to(outside / "t.jsonl")
        entry = "dataset:documents"
    else:
        suffix = {"parquet": "b.parquet", "gzip": "b.jsonl.gz"}.get(how, "b.jsonl")
        (root / "documents" / suffix).symlink_to(outside / "t.jsonl")
        entry = f"documents/{suffix}" if how == "file" else entry
    with pytest.raises(EclectusError, match=r"source '.*' leads to"), store.draft("documents") as draft:
        ingest.function(IngestSettings(sources=[entry]), draft)


def test_a_data_set_that_names_files_outside_its_folder_is_refused_with_roots_or_without(linked, store, monkeypatch):
    root, outside = linked
    for folder in ("readme", "saved"):
        (root / folder).mkdir()
    about = "---\nconfigs:\n- config_name: default\n  data_files: ../../outside/t.jsonl\n---\n"
    (root / "readme" / "README.md").write_text(about)
    for name in ("../../outside/t.jsonl", str(outside / "t.jsonl")):
        (root / "saved" / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
        for roots in (str(root), ""):
            monkeypatch.setenv("ECLECTUS_ROOTS", roots)
            for folder in ("readme", "saved"):
                with (
                    pytest.raises(EclectusError, match=r"names .*t.jsonl.*; expected"),
                    store.draft("documents") as draft,
                ):
                    ingest.function(IngestSettings(sources=[f"dataset:{folder}"], text_field="secret"), draft)


def test_shards_and_side_files_beside_a_gguf_file_are_opened_and_checked(linked):
    root, outside = linked
    first = root / "m-00001-of-00002.gguf"
    first.write_text("GGUF")
    (root / "unrelated").symlink_to(outside)
    check_files(first, "base model m")
    second = root / "m-00002-of-00002.gguf"
    second.symlink_to(outside / "a.gguf")
    with pytest.raises(EclectusError, match=r"base model .* leads to .*m-00002-of-00002.gguf, a link"):
        check_base(str(first))
    second.unlink()
    (root / "tokenizer_config.json").symlink_to(outside / "config.json")
    with pytest.raises(EclectusError, match=r"tokenizer_config.json, a link"):
        check_files(first, "base model m")


@pytest.mark.parametrize("name", ["../../outside/model.safetensors", "/etc/passwd", "..", "a/b.safetensors", "", 3])
@pytest.mark.parametrize("roots", ["set", "unset"])
def test_an_index_that_names_a_file_elsewhere_is_refused_always(linked, monkeypatch, name, roots):
    root, _ = linked
    if roots == "unset":
        monkeypatch.delenv("ECLECTUS_ROOTS")
    index = root / "model" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    with pytest.raises(ValueError, match=r"weight_map names .*; expected a file in the same directory"):
        fetch_model.listing().checkpoint_files(root / "model")
    with pytest.raises(EclectusError):
        fetch_model.fingerprint(fetch_model.FetchSettings(base_model=str(root / "model")))


def test_rules_and_questions_are_not_read_through_links(linked):
    root, outside = linked
    (root / "gate.yaml").symlink_to(outside / "gate.yaml")
    with pytest.raises(EclectusError, match=r"gate file gate.yaml leads to"):
        read_gates("gate.yaml")
    (root / "t.jsonl").symlink_to(outside / "t.jsonl")
    (root / "questions").symlink_to(outside)
    for name in ("t.jsonl", "questions"):
        with pytest.raises(EclectusError, match=r"benchmark_files names .* leads to"):
            local_questions([name])
    (root / "t.yaml").symlink_to(outside / "t.yaml")
    with pytest.raises(EclectusError, match=r"benchmark_tasks names t.yaml, which leads to"):
        wanted_tasks(["t.yaml"], "", [], [])


@pytest.mark.parametrize("line", ["include: ../../outside/t.yaml", "dataset_path: {0}/folder", "x: [{0}/t.jsonl]"])
def test_a_task_that_names_files_outside_is_refused(linked, line):
    root, outside = linked
    tasks = root / "tasks"
    tasks.mkdir()
    task = tasks / "mine.yaml"
    task.write_text("task: mine\n" + line.format(outside) + "\n")
    with pytest.raises(EclectusError, match=r"task .*mine\.yaml leads to"):
        files_of(task)
    task.write_text("task: mine\ndoc_to_text: '{{question}} .. / ...'\n")
    assert files_of(task) == [task]


@pytest.mark.parametrize("name", ["../x", "/etc", "1_Pooling/../../x"])
def test_an_embedding_model_that_names_folders_outside_is_refused_always(linked, monkeypatch, name):
    root, _ = linked
    monkeypatch.delenv("ECLECTUS_ROOTS")
    (root / "model" / "modules.json").write_text(json.dumps([{"idx": 0, "path": name, "type": "x.Pooling"}]))
    with pytest.raises(
        EclectusError, match=r"embedding_model '.*model': modules.json names '.*'; expected a name below"
    ):
        EmbedSettings(embedding_model=str(root / "model")).check_together()


def test_what_a_run_puts_into_settings_itself_is_not_subject_to_the_roots(linked, run, monkeypatch, tmp_path):
    """Artifacts of its home, the hub's cache, the shipped corpus and rules: none of them lies in the roots here."""
    root, _ = linked
    made = Path(run.home.store.root) / "checkpoint" / "ab"
    cached = tmp_path / "hub" / "models--a--b" / "snapshots" / "c"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for folder in (made, cached):
        folder.mkdir(parents=True)
        (folder / "tokenizer.json").write_text("{}")
        assert list(fingerprint(TokenizerSettings(tokenizer=str(folder)))) == ["tokenizer tokenizer.json"]
    check_roots(CurateParameters(tokenizer=str(made)))
    shipped = tmp_path / "product" / "data" / "corpus"
    shipped.mkdir(parents=True)
    (shipped / "en.jsonl").write_text('{"text": "shipped"}\n')
    (tmp_path / "product" / "configs").mkdir()
    monkeypatch.chdir(tmp_path / "product")
    assert len(find_sources(["data/corpus", "data/corpus/en.jsonl"], []).sources) == 1
    (root / "way").symlink_to(made)
    (root / "corpus").symlink_to(shipped)
    for link in ("way", "corpus"):
        with pytest.raises(EclectusError, match="a link, which leads outside"):
            check_tree(root / link, "it")


def test_the_door_lets_defaults_and_what_deployments_name_through_and_a_users_path_into_the_home_not(
    places, home, monkeypatch
):
    product = places / "product"
    (product / "data" / "corpus").mkdir(parents=True)
    (product / "configs").mkdir()
    monkeypatch.chdir(product)
    given = {"original_languages": ["en"], "expanded_languages": ["tr"]}
    check_roots(RetrainParameters(**given, sources=["data/corpus"]))
    check_roots(RetrainParameters(**given, sources=["data/corpus/en.legal.jsonl"], text_suffixes=[".txt", ".py"]))
    check_roots(RetrainParameters(**given, report_title="... and more"))
    (product / "data" / "corpus" / "way").symlink_to(places / "secret.jsonl")
    for wrong in (home.root / "artifacts", "data", "data/corpus/../../x", "prefect.yaml/../..", "data/corpus/way"):
        with pytest.raises(EclectusError, match="setting 'sources'"):
            check_roots(RetrainParameters(**given, sources=[str(wrong)]))


def test_every_setting_that_takes_a_path_is_checked_at_the_door(places):
    fields = {
        "base_model", "dense_start", "tokenizer", "embedding_model", "benchmark_tasks", "benchmark_files",
        "evaluate_checkpoints", "gate", "sources",
    }  # fmt: skip
    for name in fields:
        several = MainParameters.model_fields[name].annotation is not str
        value = str(places / "secret.jsonl")
        with pytest.raises(EclectusError, match=f"setting '{name}' leads to"):
            check_roots(MainParameters(**{name: [value] if several else value}))


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../b", ""])
def test_an_artifact_whose_manifest_names_a_file_outside_is_damaged(store, name):
    with store.draft("report") as draft:
        draft.file("a").write_text("a")
        made = store.commit(draft)
    manifest = made.file("manifest.json")
    about = json.loads(manifest.read_text())
    about["files"][0]["name"] = name
    manifest.write_text(json.dumps(about))
    with pytest.raises(EclectusError, match="outside the artifact"):
        made.manifest()
    assert "damaged" in store.faults(made)
