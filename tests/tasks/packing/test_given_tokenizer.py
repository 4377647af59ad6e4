"""A wrong `tokenizer` is one line before any work, from the settings alone: no server, no document, no transformers."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from eclectus.flows.cli.main import main
from eclectus.flows.parameters import PARAMETERS
from eclectus.storage.errors import EclectusError
from eclectus.tasks.packing import tokenizer as module
from eclectus.tasks.packing.tokenizer import TokenizerSettings
from tests.support.tokenizers import byte_level

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return byte_level(tmp_path_factory.mktemp("tokenizer"))


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def without(folder):
    (folder / "tokenizer.json").unlink()


def cut(folder):
    path = folder / "tokenizer.json"
    path.write_text(path.read_text()[:500])


def binary(folder):
    (folder / "tokenizer.json").write_bytes(b"\xff\xfe\0")


def no_object(folder):
    (folder / "tokenizer.json").write_text("[]")


def no_model(folder):
    about = json.loads((folder / "tokenizer.json").read_text())
    del about["model"]
    (folder / "tokenizer.json").write_text(json.dumps(about))


def damaged_config(folder):
    (folder / "tokenizer_config.json").write_text("{'single': 1}")


def wrong_config(folder):
    (folder / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"x": 1}}')


def other_path(folder):
    (folder.parent / "vocab.txt").write_text("a\n")
    (folder / "tokenizer_config.json").write_text('{"vocab_file": "../vocab.txt"}')


def broken_link(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to("gone.json")


WRONG = {
    empty: "an empty folder", without: "a folder without a tokenizer", cut: "tokenizer.json is not JSON",
    binary: "tokenizer.json is not JSON", no_object: "holds a JSON list", no_model: "tokenizer.json lacks",
    damaged_config: "tokenizer_config.json is not JSON", wrong_config: "added_tokens_decoder",
    other_path: "vocab_file names .* outside its folder", broken_link: "a folder without a tokenizer",
}  # fmt: skip


@pytest.mark.parametrize("damage", WRONG, ids=lambda each: each.__name__)
def test_a_damaged_folder_is_named_with_what_is_wrong(good, tmp_path, damage):
    folder = shutil.copytree(good, tmp_path / "mine")
    damage(folder)
    with pytest.raises(EclectusError, match=f"setting 'tokenizer' is '.*mine'.*{WRONG[damage]}") as caught:
        TokenizerSettings(tokenizer=str(folder)).check_together()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("{0}/absent", "which does not exist"), ("./absent", "which does not exist"), ("~/absent", "does not exist"),
        ("~nobody-of-this-name/x", "which"), ("{0}/file.json", "which is a file"),
        ("https://host/owner/name", "which is a URL"), ("file:///etc", "which is a URL"), ("s3://bucket/x", "a URL"),
        ("two words", "neither a folder nor a name"), ("a\0b", "neither"), ("-x", "which"),
        ("", "without a tokenizer"),
        ("x" * 5000, "which"), ("a/b/c", "which does not exist"), ("{0}/tokenizer.json/", "which"),
    ],
)  # fmt: skip
def test_what_is_no_folder_is_named(tmp_path, monkeypatch, name, expected):
    monkeypatch.setattr(module, "_commit", lambda name: pytest.fail(f"{name} is no name on the hub"))
    (tmp_path / "file.json").write_text("{}")
    if name in ("-x", "x" * 5000):
        # As names on the hub these are possible.
        monkeypatch.setattr(module, "_commit", lambda name: (_ for _ in ()).throw(EclectusError(f"'{name}', which")))
    with pytest.raises(EclectusError, match=expected):
        TokenizerSettings(tokenizer=name.format(tmp_path)).check_together()


def test_a_folder_that_may_not_be_read_is_named(good, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(EclectusError, match=r"which cannot be read \(Permission denied\)"):
        TokenizerSettings(tokenizer=str(good)).check_together()


def test_a_name_on_the_hub_that_is_out_of_reach_is_one_line(monkeypatch, tmp_path):
    import huggingface_hub

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(EclectusError, match="'owner/name', which is no tokenizer here or on the hub") as caught:
        TokenizerSettings(tokenizer="owner/name").check_together()
    assert "\n" not in str(caught.value)


def test_a_good_one_passes_and_is_parsed_once(good, monkeypatch):
    TokenizerSettings(tokenizer=str(good)).check_together()
    monkeypatch.setattr(module, "without_torch", lambda name: pytest.fail("parsed again"))
    TokenizerSettings(tokenizer=str(good)).check_together()
    TokenizerSettings(tokenizer="train").check_together()


@pytest.mark.parametrize("command", ["curate", "run"])
def test_the_command_ends_with_one_line_and_makes_no_home(tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ECLECTUS_HOME", str(tmp_path / "home"))
    Path("d.jsonl").write_text('{"text": "one document"}\n')
    with pytest.raises(SystemExit) as end:
        main([command, "--sources", "d.jsonl", "--tokenizer", "./tokenizers"])
    output = capsys.readouterr()
    assert end.value.code == 2 and output.out == ""
    assert output.err.startswith(
        "eclectus: setting 'tokenizer' is './tokenizers', which does not exist; give 'train', a"
    )
    assert len(output.err.splitlines()) == 1 and not Path("home").exists()


def test_every_flow_with_a_tokenizer_checks_it(tmp_path):
    source = tmp_path / "d.jsonl"
    source.write_text('{"text": "one document"}\n')
    given = {"sources": [str(source)], "expanded_languages": ["tr"], "tokenizer": "./absent"}
    for flow, parameters in PARAMETERS.items():
        if "tokenizer" in parameters.model_fields:
            with pytest.raises(EclectusError, match=r"setting 'tokenizer' is './absent'"):
                parameters(**given).check_together()
        else:
            assert flow == "similarity"


def test_the_check_needs_neither_torch_nor_transformers(good):
    code = (
        "import sys; from eclectus.tasks.packing.tokenizer import check_given; check_given(sys.argv[1]);"
        "assert not {'torch', 'transformers', 'tokenizers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code, str(good)], cwd=ROOT, check=True)
