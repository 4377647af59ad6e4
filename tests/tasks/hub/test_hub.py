"""Checkpoints go to a hub and come back as they were, with their lineage, and refusals are sentences."""

import hashlib
import json
import shutil
import time

import duckdb
import huggingface_hub.constants
import pytest
import torch

from eclectus.flows.run import open_run
from eclectus.flows.services.ports import free_port
from eclectus.models.mixture.upcycle import upcycle
from eclectus.storage.home import Home
from eclectus.storage.lineage.bundle import bundle
from eclectus.storage.lineage.connection import query, walk
from eclectus.storage.lineage.imported import import_bundle
from eclectus.tasks.hub import hub as talking
from eclectus.tasks.tracking import TrackerSettings
from eclectus.tasks.training.fetch_model import FetchSettings, fetch
from tests.support.command_line import run_command
from tests.support.dense_bases import logits, tokens, write_base
from tests.support.fake_hub import TOKEN, Repository, serve_hub

NAME = "anna/greek-moe"


@pytest.fixture(autouse=True)
def hub(monkeypatch):
    """A hub that this process talks to as the owner of its token."""
    with serve_hub() as (served, address):
        monkeypatch.setenv("HF_ENDPOINT", address)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        yield served


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A home with a fetched model: a checkpoint with lineage."""
    folder = tmp_path_factory.mktemp("made")
    home = Home.open(folder / "home")
    write_base(folder / "base", "qwen2")
    with open_run("test", TrackerSettings(), home):
        artifact = fetch(settings=FetchSettings(base_model=str(folder / "base")))
    return home, artifact


def eclectus(capsys, home, *words):
    return run_command(capsys, "--home", home.root, *words)


def test_a_checkpoint_comes_back_with_the_same_digest_and_its_lineage(made, hub, tmp_path, capsys):
    home, artifact = made
    code, said, error = eclectus(capsys, home, "push", artifact.name, NAME)
    assert code == 0, error
    assert f"pushed to {NAME}, private" in said and hub.repositories[NAME].private
    ((commit, files),) = hub.repositories[NAME].commits
    card = files["README.md"].decode()
    assert f'from_pretrained("{NAME}")' in card and f"checkpoint-{artifact.digest}" in card
    digest = hashlib.sha256(files["model.safetensors"]).hexdigest()
    assert digest in card and f"{digest}  model.safetensors\n" in files["eclectus/SHA256SUMS"].decode()

    other = Home.open(tmp_path / "other")
    code, said, error = eclectus(capsys, other, "pull", f"{NAME}@{commit}")
    assert code == 0, error
    pulled = other.store.find_whole(artifact.name)
    assert pulled.digest == artifact.digest and commit[:12] in said
    torch.testing.assert_close(logits(pulled.path, tokens()), logits(artifact.path, tokens()), rtol=0, atol=0)
    ((maker, run),) = query(
        "select s.name, s.run from artifacts a join steps s on a.made_by = s.step "
        f"where a.artifact = '{artifact.digest}'",
        other,
    )[1]
    assert (maker,) == ("fetch",) and f"its lineage was added: {run}" in said
    above = {row["kind"]: row["steps_away"] for row in walk(artifact.name, other)}
    assert above["checkpoint"] == 0 and len(above) > 1
    assert query("select flow, state from runs order by started", other)[1] == [
        ("test", "completed"),
        ("pull", "completed"),
    ]

    requests = len(hub.requests)
    code, said, _ = eclectus(capsys, other, "pull", NAME)
    assert code == 0 and "reused" in said and "its lineage is known here" in said
    assert not [path for _, path in hub.requests[requests:] if path.endswith("model.safetensors")]


def test_a_dry_run_lists_files_and_sizes_and_asks_nobody(made, hub, capsys, monkeypatch):
    home, artifact = made
    monkeypatch.delenv("HF_TOKEN")
    code, said, _ = eclectus(capsys, home, "push", artifact.name, NAME, "--dry-run")
    rows = dict(reversed(line.split(None, 1)) for line in said.splitlines() if line.startswith("   "))
    assert code == 0 and "nothing was pushed" in said and hub.requests == []
    assert int(rows["model.safetensors"].replace(",", "")) == artifact.file("model.safetensors").stat().st_size
    assert {"README.md", "eclectus/lineage.duckdb", "eclectus/manifest.json", "eclectus/SHA256SUMS"} <= rows.keys()


def test_an_export_is_pushed_with_its_own_card_and_pulled_as_a_model(made, hub, tmp_path, capsys):
    home, artifact = made
    upcycle(artifact.path, tmp_path / "moe", experts=3)
    assert eclectus(capsys, home, "export", tmp_path / "moe", tmp_path / "out")[0] == 0
    (tmp_path / "out" / "README.md").write_text("---\ntags: []\n---\n# By hand\n")
    code, said, error = eclectus(capsys, home, "push", tmp_path / "out", NAME, "--public")
    assert code == 0, error
    assert "does not know how the checkpoint was made" in said and not hub.repositories[NAME].private
    ((_, files),) = hub.repositories[NAME].commits
    assert "# By hand" in files["README.md"].decode() and "export.json" in files
    hub.commit(NAME, {"pytorch_model.bin": b"pickle", "run.py": b"code"})
    code, said, error = eclectus(capsys, home, "pull", NAME)
    assert code == 0, error
    assert "left out: pytorch_model.bin, run.py\n" in said
    pulled = home.store.find(said.splitlines()[-1].split(":")[0])
    assert not list(pulled.file(".").glob("*.py")) and not pulled.file("pytorch_model.bin").exists()
    torch.testing.assert_close(logits(pulled.path, tokens()), logits(artifact.path, tokens()), rtol=0, atol=1e-5)


def test_without_a_token_and_with_a_wrong_one_nothing_is_pushed(made, hub, capsys, monkeypatch):
    home, artifact = made
    monkeypatch.delenv("HF_TOKEN")
    code, _, error = eclectus(capsys, home, "push", artifact.name, NAME)
    assert code == 2 and "there is none; set HF_TOKEN, or run: hf auth login" in error
    monkeypatch.setenv("HF_TOKEN", "hf_" + "b" * 30)
    code, _, error = eclectus(capsys, home, "push", artifact.name, NAME)
    assert code == 2 and "(401)" in error and "b" * 30 not in error and hub.repositories == {}
    hub.repositories[NAME] = Repository(private=True)
    code, _, error = eclectus(capsys, home, "pull", NAME)
    assert code == 2 and "(401)" in error and "is private" in error


def test_a_hub_with_too_many_requests_is_asked_again_and_then_named(made, hub, capsys, monkeypatch):
    home, artifact = made
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    hub.refuse("POST", "/api/repos/create", 429, times=2, headers={"Retry-After": "7"})
    code, said, error = eclectus(capsys, home, "push", artifact.name, NAME)
    assert code == 0, error
    assert waits[:2] == [7, 7] and said.count("too many requests (429); asking again in 7 s") == 2
    waits.clear()
    hub.refuse("GET", f"/api/models/{NAME}", 429, times=100, headers={"Retry-After": "3"})
    code, _, error = eclectus(capsys, home, "pull", NAME)
    assert code == 2 and "too many requests (429); try again in 3 s" in error and waits == [3] * (talking.TRIES - 1)
    hub.refusals.clear()
    waits.clear()
    hub.refuse("GET", f"/api/models/{NAME}", 429, times=100, headers={"Retry-After": "3600"})
    code, _, error = eclectus(capsys, home, "pull", NAME)
    assert code == 2 and "try again in 3600 s" in error and waits == []


def test_no_network_and_strange_names_are_sentences(made, capsys, monkeypatch):
    home, artifact = made
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    code, _, error = eclectus(capsys, home, "push", artifact.name, NAME)
    assert code == 2 and "cannot be reached" in error and "check the network, HF_ENDPOINT" in error
    code, _, error = eclectus(capsys, home, "pull", NAME)
    assert code == 2 and "cannot be reached" in error
    for name in ("greek", "a/b/c", "../x", "anna/"):
        code, _, error = eclectus(capsys, home, "push", artifact.name, name)
        assert code == 2 and f"'{name}' is no repository of a hub; expected OWNER/NAME" in error
        assert eclectus(capsys, home, "pull", name)[0] == 2


def test_what_is_not_ours_to_write_or_not_there_is_named(made, hub, capsys):
    home, artifact = made
    code, _, error = eclectus(capsys, home, "push", artifact.name, "others/moe")
    assert code == 2 and "(403); take one with write access" in error
    code, _, error = eclectus(capsys, home, "pull", "anna/nothing")
    assert code == 2 and "no such repository, revision or file" in error
    hub.repositories[NAME] = Repository(private=False)
    code, _, error = eclectus(capsys, home, "push", artifact.name, NAME)
    assert code == 2 and f"{NAME} is public, so everyone would see the checkpoint; add --public" in error
    code, _, error = eclectus(capsys, home, "pull", f"{NAME}@v2")
    assert code == 2 and "(404)" in error
    hub.commit(NAME, {"pytorch_model.bin": b"pickle", "config.json": b"{}"})
    code, _, error = eclectus(capsys, home, "pull", NAME)
    assert code == 2 and "pickled weights are never opened" in error


def test_a_file_that_was_changed_on_the_hub_is_named_and_nothing_is_kept(made, hub, tmp_path, capsys):
    home, artifact = made
    assert eclectus(capsys, home, "push", artifact.name, NAME)[0] == 0
    files = hub.repositories[NAME].commits[-1][1]
    changed = bytes([files["model.safetensors"][0] ^ 1]) + files["model.safetensors"][1:]
    manifest = json.loads(files["eclectus/manifest.json"])
    evil = {**manifest, "files": [{**each, "name": f"../{each['name']}"} for each in manifest["files"]]}
    cases = [
        ({"model.safetensors": changed}, "model.safetensors of anna/greek-moe@"),
        ({"eclectus/manifest.json": b'{"kind": "checkpoint"}'}, "cannot be used"),
        ({"eclectus/manifest.json": json.dumps(evil).encode()}, "it was changed"),
    ]
    for number, (change, complaint) in enumerate(cases):
        hub.commit(NAME, {**files, **change})
        other = Home.open(tmp_path / str(number))
        code, _, error = eclectus(capsys, other, "pull", NAME)
        assert code == 2 and complaint in error, error
        assert not list(other.store.all())


def test_a_bundle_that_is_none_is_left_out_and_the_checkpoint_kept(made, hub, tmp_path, capsys):
    home, artifact = made
    assert eclectus(capsys, home, "push", artifact.name, NAME)[0] == 0
    whole = tmp_path / "whole.duckdb"
    whole.write_bytes(hub.repositories[NAME].commits[-1][1]["eclectus/lineage.duckdb"])
    secret = tmp_path / "secret.txt"
    secret.write_text("mine")
    evil = tmp_path / "evil.duckdb"
    for number, sql in enumerate(
        (
            f"drop table runs; create view runs as select content as run, * from read_text('{secret}')",
            "update runs set run = '../../away'",
            "drop table steps",
        )
    ):
        shutil.copy(whole, evil)
        with duckdb.connect(str(evil)) as connection:
            connection.execute(sql)
        hub.commit(NAME, {"eclectus/lineage.duckdb": evil.read_bytes()})
        other = Home.open(tmp_path / f"home{number}")
        code, said, error = eclectus(capsys, other, "pull", NAME)
        assert code == 0 and "its lineage was left out" in said and "mine" not in said + error, said + error
        assert other.store.find_whole(artifact.name)
        assert query("select flow from runs", other)[1] == [("pull",)]


def test_lineage_that_is_imported_is_that_of_the_home_it_comes_from(made, tmp_path):
    home, _ = made
    ((run,),) = query("select run from runs where flow = 'test'", home)[1]
    file = bundle(home, run, tmp_path / "run.duckdb")
    other = Home.open(tmp_path / "other")
    assert import_bundle(other, file) == [run] and import_bundle(other, file) == []
    for sql in ("from runs", "from steps", "from step_inputs", "from step_outputs", "from settings order by name",
                "select * exclude (path) from artifacts"):  # fmt: skip
        where = f" where run = '{run}'" if sql in ("from runs", "from steps") else ""
        ours, theirs = query(sql + where, other)[1], query(sql + where, home)[1]
        assert set(map(str, ours)) <= set(map(str, theirs)) and ours
