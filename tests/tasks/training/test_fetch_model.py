"""Bases come into the home whole, whatever form they have, and what cannot be read is named."""

import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from eclectus.models.mixture.upcycle import upcycle
from eclectus.storage.errors import EclectusError
from eclectus.tasks.training.fetch_model import FetchSettings, fetch, find_checkpoint
from tests.support.dense_bases import logits, tokens, write_base, write_gguf


def fetched(home, place):
    with home.store.draft("checkpoint") as draft:
        fetch.function(settings=FetchSettings(base_model=str(place)), out=draft)
        return home.store.commit(draft)


def test_a_gguf_file_becomes_a_stock_checkpoint_of_the_same_function(home, tmp_path):
    write_gguf(tmp_path / "tiny.gguf")
    artifact = fetched(home, tmp_path / "tiny.gguf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(logits(artifact.path, tokens()), model(tokens()).logits, rtol=0, atol=1e-6)
    assert AutoTokenizer.from_pretrained(artifact.path).vocab_size == 96
    assert artifact.statistics["base_model"] == "tiny.gguf"


def test_an_upcycled_folder_is_fetched_with_its_verification(home, tmp_path):
    upcycle(write_base(tmp_path / "base", "llama"), tmp_path / "moe", experts=3)
    assert fetched(home, tmp_path / "moe").file("upcycle.json").is_file()


def test_what_is_no_model_is_named(home, tmp_path):
    (tmp_path / "broken.gguf").write_bytes(b"GGUF but not really")
    with pytest.raises(EclectusError, match=r"broken\.gguf cannot be read as GGUF"):
        fetched(home, tmp_path / "broken.gguf")
    with pytest.raises(EclectusError, match=r"does not exist"):
        find_checkpoint(home.store, str(tmp_path / "nowhere"))
    # What cannot be a name on the hub is not looked for there.
    for mistyped in (str(tmp_path / "nowhere"), "./modles/tiny", "modles/llama/tiny", "~/tiny", "tiny.gguf"):
        with pytest.raises(EclectusError, match=re.escape(f"model '{mistyped}' does not exist; give a checkpoint's")):
            fetched(home, mistyped)
    (tmp_path / "empty").mkdir()
    with pytest.raises(EclectusError, match=r"empty is empty"):
        fetched(home, tmp_path / "empty")


def test_a_base_that_changes_before_it_is_copied_has_the_key_of_what_was_copied(run, tmp_path, monkeypatch):
    write_base(tmp_path / "base", "llama")
    card, function, left = tmp_path / "base" / "generation_config.json", fetch.function, ["changed"]
    card.write_text('{"temperature": 0.5}')

    def fetch_changed(**arguments):
        if left:
            left.pop()
            card.write_text('{"temperature": 0.7}')
        function(**arguments)

    monkeypatch.setattr(fetch, "function", fetch_changed)
    settings = FetchSettings(base_model=str(tmp_path / "base"))
    copied = fetch(settings=settings)
    assert "0.7" in copied.file("generation_config.json").read_text()
    card.write_text('{"temperature": 0.5}')
    assert fetch(settings=settings) != copied
