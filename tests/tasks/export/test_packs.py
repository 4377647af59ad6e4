"""Packs of similar conversations with loss masks, in the files of trainers, by the conventions of their own code."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import load_from_disk
from transformers import AutoTokenizer, DataCollatorForSeq2Seq, LlamaConfig, LlamaForCausalLM

from eclectus.flows.cli.main import main
from eclectus.flows.curate import curate
from eclectus.flows.parameters import CurateParameters, PretrainParameters, RetrainParameters, SimilarityParameters
from eclectus.models.training.instances import IGNORED, Instances
from eclectus.storage.errors import EclectusError
from eclectus.storage.home import Home
from eclectus.tasks.export.instances import TOKENS_ONLY, export_instances
from eclectus.tasks.export.packs import packs_of
from eclectus.tasks.packing import instance_plan
from eclectus.tasks.packing.pack import PackSettings
from eclectus.tasks.packing.pack import pack as pack_step
from tests.support.chats import chat, chat_tokenizer, chats
from tests.support.small_world import make_world

LENGTH, COUNT = 640, 90


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("packs")


@pytest.fixture(scope="module")
def curated(folder, tmp_path_factory):
    chat_tokenizer(folder / "model")
    rows = [{"id": f"{topic} {number}", "messages": each} for number, (topic, each) in enumerate(chats(COUNT))]
    rows += [{"id": "asks", "messages": [*chat("ships?", "ships"), {"role": "user", "content": "and?"}]}]
    rows += [{"id": "long", "messages": chat("bread " * 300, "long bread")}]
    rows += [{"id": "spells", "messages": chat("say <|im_end|> now", "<no>")}]
    (folder / "chats.jsonl").write_text("\n".join(json.dumps({"language": "en", **row}) for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ECLECTUS_HOME", str(folder / "home"))
        yield curate(parameters(folder))


def parameters(folder, **changes):
    return CurateParameters(
        **{
            "sources": [str(folder / "chats.jsonl")], "conversations": True, "tokenizer": str(folder / "model"),
            "language_detector": "field", "original_languages": ["en"], "expanded_languages": [],
            "heldout_minimum": 1, "duplicate_overlap": 1.0, "embedding_dimension": 16,
            "embedding_vocabulary": 500, "embedding_steps": 5, "instance_tokens": LENGTH,
        } | changes
    )  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder / "model")


@pytest.fixture(scope="module")
def packs(curated):
    return [pack for some in packs_of(Instances(curated.original.path)) for pack in some]


def conversations(packs, tokenizer):
    """(text of a conversation, texts that are learned) of all packs in order."""
    for pack in packs:
        for number in range(1, pack.numbers.max() + 1):
            here = pack.numbers == number
            learned = pack.labels[here] != IGNORED
            begins = np.flatnonzero(np.diff(learned.astype(int), prepend=0, append=0)).reshape(-1, 2)
            ids = pack.tokens[here]
            yield tokenizer.decode(ids), [tokenizer.decode(ids[first:last]) for first, last in begins]


def test_every_conversation_is_whole_and_only_the_assistant_is_learned(curated, packs, tokenizer):
    texts = {
        tokenizer.apply_chat_template(each, tokenize=False): [
            message["content"] + "<|im_end|>" for message in each if message["role"] == "assistant"
        ]
        for each in [*(each for _, each in chats(COUNT)), chat("ships?", "ships")]
    }
    found = list(conversations(packs, tokenizer))
    assert all(texts[text] == learned for text, learned in found)
    counts = curated.original.statistics["conversations"]
    assert counts.pop("too long") == counts.pop("control token in the text") == 1
    assert len(found) == len({text for text, _ in found}) == sum(counts.values()) > 0.9 * COUNT
    why = curated.original.statistics["conversations_why"]
    assert why["control token in the text"] == "a message spells <|im_end|>" and "tokens" in why["too long"]


def test_statistics_tell_what_is_learned_and_how_full_packs_are(curated, packs):
    about = curated.original.statistics
    assert about["tokens_learned"] == sum((pack.labels != IGNORED).sum() for pack in packs)
    assert about["tokens_padded"] == sum((pack.numbers == 0).sum() for pack in packs)
    assert about["documents_cut"] == 0 and about["tokens"] == len(packs) * LENGTH


def test_similar_conversations_share_a_pack(packs, curated):
    table = pq.read_table(curated.original.file("documents.parquet"))
    topics = [name.split()[0] for name in table["name"].to_pylist()]
    pairs = list(
        zip(topics, topics[1:], table["instance"].to_pylist(), table["instance"].to_pylist()[1:], strict=False)
    )
    same = [one == other for one, other, here, there in pairs if here == there]
    assert np.mean(same) > 0.6, "by chance a quarter"


def test_our_own_reader_masks_the_labels(curated):
    data = Instances(curated.original.path)
    batch = data.batch(np.arange(len(data)))
    mask = np.asarray(load_from_disk(curated.original.path)["loss_mask"])
    assert (batch.labels.numpy() != IGNORED).tolist() == (mask == 1).tolist()
    assert ((batch.documents.numpy() < 0) & (mask == 1)).sum() == 0


def export(curated, out, kind, **more):
    return export_instances(curated.original.path, out, kind, **more)


def test_llamafactory_gets_numbered_conversations_and_a_last_token_of_padding(curated, packs, tmp_path):
    export(curated, tmp_path / "out", "llamafactory")
    data = load_from_disk(str(tmp_path / "out"))["train"]
    assert data.column_names == ["input_ids", "labels", "attention_mask", "position_ids"] and len(data) == len(packs)
    for row, pack in zip(data, packs, strict=True):
        assert row["input_ids"][:LENGTH] == pack.tokens.tolist() and len(row["position_ids"]) == LENGTH + 8
        assert row["labels"] == [*pack.labels.tolist(), *[IGNORED] * 8]
        assert row["attention_mask"] == [*pack.numbers.tolist(), *[0] * 8]
        numbers, positions = np.array(row["attention_mask"]), np.array(row["position_ids"])
        for number in range(1, numbers.max() + 1):
            assert positions[numbers == number].tolist() == list(range((numbers == number).sum()))
        assert not positions[numbers == 0].any()


def test_the_numbers_keep_conversations_apart_as_in_llamafactory_s_mask(curated, tmp_path, tokenizer):
    export(curated, tmp_path / "out", "llamafactory")
    data = load_from_disk(str(tmp_path / "out"))["train"]
    tokenizer.pad_token = tokenizer.eos_token
    batch = DataCollatorForSeq2Seq(tokenizer, padding=True, pad_to_multiple_of=8)([data[n] for n in range(2)])
    numbers = batch["attention_mask"]
    assert numbers.shape == batch["position_ids"].shape == batch["input_ids"].shape == batch["labels"].shape
    # prepare_4d_attention_mask in llamafactory/data/collator.py.
    seen = (numbers[:, None] == numbers[:, :, None]) & (numbers[:, None] != 0)
    seen &= torch.ones(numbers.shape[1], numbers.shape[1]).tril().bool()
    for row, marks in zip(seen, numbers, strict=True):
        assert all(len(set(marks[mask].tolist())) <= 1 for mask in row)
        assert not row[marks == 0].any() and row[marks > 0].any(1).all()


def test_axolotl_and_trl_get_rows_without_padding(curated, packs, tmp_path):
    export(curated, tmp_path / "axolotl", "axolotl")
    export(curated, tmp_path / "trl", "trl")
    rows = zip(load_from_disk(str(tmp_path / "axolotl")), load_from_disk(str(tmp_path / "trl")), packs, strict=True)
    for one, other, pack in rows:
        there = pack.numbers > 0
        assert one["input_ids"] == other["input_ids"] == pack.tokens[there].tolist()
        assert one["labels"] == other["labels"] == pack.labels[there].tolist()
        assert one["attention_mask"] == [1] * there.sum() and set(other) == {"input_ids", "labels", "seq_lengths"}
        assert one["position_ids"] == [place for size in other["seq_lengths"] for place in range(size)]


def test_a_conversation_in_a_pack_gets_the_logits_that_it_gets_alone(curated, tokenizer, tmp_path):
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    export(curated, tmp_path / "out", "axolotl")
    row = load_from_disk(str(tmp_path / "out"))[0]
    ids, positions = torch.tensor([row["input_ids"]]), torch.tensor([row["position_ids"]])
    begins = [*torch.where(positions[0] == 0)[0].tolist(), ids.shape[1]]
    assert len(begins) > 2
    with torch.no_grad():
        # As attention sees a mask without a zero: none. With a cache positions do not part documents.
        packed = model(ids, position_ids=positions, use_cache=False).logits[0]
        alone = [model(ids[:, first:last]).logits[0] for first, last in pairwise(begins)]
    assert torch.allclose(packed, torch.cat(alone), atol=1e-5)
    assert not torch.allclose(packed, model(ids).logits[0], atol=1e-3)


def test_nemo_s_mask_says_of_a_token_whether_the_next_is_learned(curated, packs, tmp_path):
    export(curated, tmp_path / "out", "nemo")
    table = pq.read_table(tmp_path / "out/packs.idx.parquet")
    assert [str(field.type) for field in table.schema] == ["list<element: int32>"] * 2 + ["list<element: int8>"]
    for row, pack in zip(table.to_pylist(), packs, strict=True):
        ids, starts = row["input_ids"], row["seq_start_id"]
        ends, trained = [*starts[1:], len(ids)], []
        # GPTSFTPackedDataset.collate_fn and _build_loss_mask with answer_only_loss.
        for first, last in zip(starts, ends, strict=True):
            labels, mask = ids[first + 1 : last], row["loss_mask"][first : last - 1]
            trained += [label for label, learned in zip(labels, mask, strict=True) if learned]
        assert trained == pack.labels[pack.labels != IGNORED].tolist() and starts[0] == 0


def test_messages_come_in_the_order_of_the_packs(curated, packs, tokenizer, tmp_path, folder, capsys):
    words = ["export-instances", curated.original.path, str(tmp_path / "out"), "--format", "messages"]
    main(["--home", str(folder / "home"), *words])
    rows = [json.loads(line) for line in (tmp_path / "out/messages.jsonl").read_text().splitlines()]
    found = [text for text, _ in conversations(packs, tokenizer)]
    assert len(rows) == len(found)
    for row, text in zip(rows, found, strict=True):
        rendered = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        assert rendered.startswith(text), "the unanswered end is written too"
    assert [row["pack"] for row in rows] == sorted(row["pack"] for row in rows)
    assert all(row["place"] == 1 for row, before in zip(rows[1:], rows, strict=False) if row["pack"] != before["pack"])


@pytest.mark.parametrize("kind", TOKENS_ONLY)
def test_a_format_without_a_mask_is_refused_unless_told(curated, tmp_path, kind):
    with pytest.raises(EclectusError, match=f"format {kind} cannot hold the loss mask .* or give --without-loss-mask"):
        export(curated, tmp_path / "out", kind)
    if kind == "megatron":
        done = export(curated, tmp_path / "out", kind, without_loss_mask=True)
        assert done.lost[0].startswith("the loss mask")


def test_lines_of_json_have_the_mask_in_their_labels(curated, packs, tmp_path):
    export(curated, tmp_path / "out", "jsonl")
    rows = [json.loads(line) for line in (tmp_path / "out/instances.jsonl").read_text().splitlines()]
    assert [row["labels"] for row in rows] == [pack.labels.tolist() for pack in packs]
    assert [row["attention_mask"] for row in rows] == [(pack.numbers > 0).astype(int).tolist() for pack in packs]


def test_messages_of_other_documents_or_of_no_conversations_are_refused(curated, tmp_path, folder):
    with pytest.raises(EclectusError, match="holds no conversations; format messages is for those"):
        export(curated, tmp_path / "out", "messages")
    world = make_world(tmp_path / "world")
    with pytest.raises(EclectusError, match=r"holds no document [0-9a-f]{32}; give the documents that were packed"):
        export(curated, tmp_path / "out", "messages", documents=world.documents)


def test_the_data_report_shows_who_says_what(curated):
    page = curated.data_report.file("data.html").read_text()
    assert "user: What about" in page and not set(page) & set("\x1c\x1d\x1e\x1f")


def test_a_second_run_finds_everything(curated, folder):
    again = curate(parameters(folder))
    assert again.original == curated.original
    store = Home.open(folder / "home").store
    assert store.faults(curated.original) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": "train"}, "the tokenizer is trained here and has no chat template; set tokenizer to"),
        ({"instance_tokens": 16}, r"no conversation can be packed: .* too long \(\d+ tokens\).*raise instance_tokens"),
    ],
)
def test_what_cannot_be_packed_is_one_sentence(curated, folder, changes, message):
    with pytest.raises(EclectusError, match=message):
        curate(parameters(folder, **changes))


def test_a_tokenizer_without_a_template_is_refused_before_any_work(curated, folder, tmp_path):
    chat_tokenizer(tmp_path / "plain", "")
    with pytest.raises(EclectusError, match="conversations is true, but the tokenizer has no chat template"):
        curate(parameters(folder, tokenizer=str(tmp_path / "plain")))


def test_trl_s_own_collator_keeps_conversations_apart(curated, packs, tmp_path):
    trl = pytest.importorskip("trl.trainer.sft_trainer")
    export(curated, tmp_path / "out", "trl")
    data = load_from_disk(str(tmp_path / "out"))
    collate = trl.DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    batch = collate([data[number] for number in range(2)])
    positions, labels = (batch[name][0].tolist() for name in ("position_ids", "labels"))
    both = [pack.without_padding() for pack in packs[:2]]
    assert positions == [place for pack in both for place in pack.positions.tolist()]
    assert labels == [label for pack in both for label in pack.labels.tolist()]


@pytest.mark.parametrize("flow", [PretrainParameters, SimilarityParameters, RetrainParameters])
def test_flows_that_train_or_evaluate_refuse_conversations(flow, folder, curated):
    with pytest.raises(EclectusError, match="run eclectus curate, then eclectus export-instances"):
        named = {} if flow is SimilarityParameters else {"tokenizer": str(folder / "model")}
        flow(sources=[str(folder / "chats.jsonl")], conversations=True, **named).check_together()


def test_every_format_of_packs_takes_documents_that_are_no_conversations(tmp_path):
    world = make_world(tmp_path / "world")
    with world.store.draft("instances") as draft:
        settings = PackSettings(instance_tokens=32, pack_remainder="pad", pack_fit=8)
        pack_step.function(world.documents, world.tokenizer, settings, draft)
        packed = world.store.commit(draft)
    data = Instances(packed.path)
    assert data.loss_mask is None
    export_instances(packed.path, tmp_path / "out", "trl")
    rows = load_from_disk(str(tmp_path / "out"))
    batch = data.batch(np.arange(len(data)))
    for row, tokens, documents in zip(rows, batch.tokens.numpy(), batch.documents.numpy(), strict=True):
        assert row["input_ids"] == tokens[documents >= 0].tolist()
        begins = np.cumsum([0, *row["seq_lengths"][:-1]])
        learned = np.array(row["labels"]) != IGNORED
        assert not learned[begins].any() and learned.sum() == len(learned) - len(begins)


def test_masks_in_several_parts_are_read_as_one(curated, folder, monkeypatch, packs):
    monkeypatch.setattr(instance_plan, "PART_SPANS", 1)
    monkeypatch.setattr(instance_plan, "PART_BYTES", 8 * LENGTH)
    parted = curate(parameters(folder, instance_tokens=LENGTH + 16))
    data = Instances(parted.original.path)
    assert len(list(Path(parted.original.path).glob("data-*.arrow"))) > 1
    labels = data.batch(np.arange(len(data))).labels.numpy()
    assert (labels != IGNORED).sum() == parted.original.statistics["tokens_learned"]
    assert [row.tolist() for row in np.asarray(data.loss_mask)] == (labels != IGNORED).astype(int).tolist()
