"""Whatever decides an output is in the step's key: every field of every step's settings, or it is listed here."""

import importlib
import inspect
import pkgutil
import typing

import pytest

import eclectus.tasks
from eclectus.tasks.grouping import embed as embedding
from eclectus.tasks.grouping.encoder import EmbedSettings
from eclectus.tasks.settings import Settings
from eclectus.tasks.step import Step

WHERE_IT_TRAINS = "where and how workers run; sums over workers are exact or differ in last bits"
NOT_IN_THE_KEY = {
    "sources": "paths; the files count by content, in the fingerprint",
    "imported_results": "a path; the files count by content, in the fingerprint",
    "language_workers": "each document is detected alone",
    "language_model": "a path; the file counts by content, in the fingerprint",
    "embedding_batch": "last bits; a document keeps those that it got first",
    "embedding_workers": "last bits; a document keeps those that it got first",
    "embedding_device": "last bits; a document keeps those that it got first",
    "embedding_missing_share": "decides whether the run stops, not what is embedded",
    "curation_workers": "work is cut by content (tasks/over_parts.py)",
    "neighbors_threads": "similarities are recomputed one by one; cells are searched by one thread each",
    "neighbors_device": "last bits of similarities",
    "group_threads": "partitions are chained alone",
    "training_gpus": WHERE_IT_TRAINS,
    "training_worker_cpus": WHERE_IT_TRAINS,
    "training_placement": WHERE_IT_TRAINS,
    "training_workers_min": WHERE_IT_TRAINS,
    "training_restarts": WHERE_IT_TRAINS,
    "training_shard_replicas": "last bits of sums over workers",
    "training_shard_keep": "the same weights are gathered once or twice",
    "training_shard_ahead": "the same weights are gathered earlier",
    "training_shard_reduce": "last bits of sums over micro-batches",
    "training_recompute": "the same numbers are computed again",
    "training_recompute_every": "the same numbers are computed again",
    "training_attention": "last bits",
    "training_forecast": "a probe has weights and random numbers of its own",
    "checkpoint_every": "resuming is exact",
    "log_every": "what is logged, not what is trained",
    "evaluation_batch": "sums are rounded",
    "benchmark_batch": "sums are rounded",
    "report_resamples": "ignored since intervals are over works",
}
# Only where the step rounds what its workers sum; training divides its batches by them.
ROUNDED = {"evaluate": {"training_workers"}, "benchmark": {"training_workers"}}
LEFT_OUT_BY_VALUE = {
    "ConversationPackSettings": "documents that are no conversations, as before there were any",
    "PretrainStageSettings": "settings of other stages",
    "ExtendStageSettings": "settings of other stages and methods",
    "BenchmarkSettings": "new tokens that are not closed, as before they could be",
    "TrainingSettings": "with sums in a fixed order the number of workers changes no bit",
}
LEFT_OUT_AT_THEIR_DEFAULT = {
    "conversations": "documents that are no conversations, as before there were any",
    "pack_left_out": "no document is left out, as before one could be",
    "pack_document_mask": "documents that see each other, as before there was a choice",
    "begin_of_document": "the tokenizer decides, and its digest is in the key",
    "training_precision": "an unset precision is float32 on a CPU, as before there was a choice",
    "training_fixed_sums": "sums have no fixed order, as before there was a choice",
    "reordered": "the first epoch is read as packed, as before there was a choice",
    "new_words": "no vocabulary is extended, as before one could be",
}
# Settings that name a file, folder or model outside the artifacts, and so need a fingerprint.
NAMES_CONTENT = {"sources", "language_model", "embedding_model", "tokenizer", "base_model", "benchmark_files"}


def all_steps():
    found = {}
    for module in pkgutil.walk_packages(eclectus.tasks.__path__, "eclectus.tasks."):
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, Step):
                found[value.name] = value
    return found


STEPS = all_steps()


def settings_of(step):
    hints = typing.get_type_hints(step.function).values()
    return [each for each in hints if inspect.isclass(each) and issubclass(each, Settings)]


def test_all_steps_are_found():
    assert {"ingest", "languages", "split", "embed", "group", "pack", "pretrain", "extend", "gate", "report"} <= set(
        STEPS
    )
    assert all(settings_of(step) for step in STEPS.values())


@pytest.mark.parametrize("name", STEPS)
def test_every_setting_is_in_the_key_or_listed_with_a_reason(name):
    for settings in settings_of(STEPS[name]):
        outside = {field for field in settings.model_fields if not settings._matters(field)}
        assert outside <= NOT_IN_THE_KEY.keys() | ROUNDED.get(name, set())


def test_nothing_is_listed_that_is_in_every_key():
    classes = {settings for step in STEPS.values() for settings in settings_of(step)}
    outside = {field for each in classes for field in each.model_fields if not each._matters(field)}
    assert outside == NOT_IN_THE_KEY.keys() | {"training_workers"}


def test_only_these_settings_leave_fields_out_by_their_values():
    classes = {settings for step in STEPS.values() for settings in settings_of(step)}
    owners = {base.__name__ for each in classes for base in each.__mro__ if "key_values" in vars(base)}
    assert owners == {"Settings", *LEFT_OUT_BY_VALUE}
    later = {field for each in classes for field in each.model_fields if each.is_later(field)}
    assert later == LEFT_OUT_AT_THEIR_DEFAULT.keys()


@pytest.mark.parametrize("name", STEPS)
def test_a_step_whose_settings_name_content_hashes_it(name):
    fields = {field for settings in settings_of(STEPS[name]) for field in settings.model_fields}
    assert not fields & NAMES_CONTENT or STEPS[name].fingerprint


def test_a_model_that_changes_on_the_hub_is_a_changed_input(monkeypatch):
    class Hub:
        commit = "a" * 40

        def model_info(self, name):
            assert name == "sentence-transformers/mini"
            return self

        @property
        def sha(self):
            return self.commit

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    before = embedding.model_fingerprint(EmbedSettings(embedding_model="mini"))
    monkeypatch.setattr(Hub, "commit", "b" * 40)
    after = embedding.model_fingerprint(EmbedSettings(embedding_model="mini"))
    assert before == {"embedding_model": "commit-" + "a" * 40} != after


def test_without_the_hub_the_commit_downloaded_last_counts(monkeypatch, tmp_path):
    def no_connection(*_, **__):
        raise ConnectionError

    folder = tmp_path / "models--some--model"
    (folder / "snapshots" / ("c" * 40)).mkdir(parents=True)
    (folder / "snapshots" / ("c" * 40) / "modules.json").write_text("[]")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("c" * 40)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", no_connection)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    settings = EmbedSettings(embedding_model="some/model")
    assert embedding.model_fingerprint(settings) == {"embedding_model": "commit-" + "c" * 40}
    assert embedding.model_fingerprint(EmbedSettings(embedding_model="other/model")) == {}
