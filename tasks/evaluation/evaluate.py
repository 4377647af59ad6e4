"""Evaluation of one model on held-out documents: bits per byte and perplexity, routing, generated samples.

Documents of one language and domain, in the order of their ids, form a token stream that is read in overlapping windows
(models/evaluation/scoring.py): models with one tokenizer score exactly the same tokens, and none of them with
look-ahead. The main measure is bits per byte, because perplexity per token cannot be compared across languages or
tokenizers. A model reads with its own tokenizer. The context before the first document of a stream is that of a
training document (tasks/evaluation/held_out.py), so every chosen document is scored whole, whatever the tokenizer:
models with several score the same bytes of the same documents. Where a corpus has no such document, the first tokens of
a stream are context, and a document's bytes count in proportion to its scored tokens. The tokens that begin and end a
document (BeginSettings) are read but not scored. Every window begins with the former, in place of its first context,
and so does every prompt. A tokenizer that has no token for a piece of text (`unknown_tokens` in about.json) loses it:
its bits per byte are too low.

Files:
    documents.parquet   work, bits, bytes and tokens per document, for paired comparisons; for Lory also
                        `bits_by_prompt` (routed once per window, by its context alone)
    scores.parquet      by language, by domain, by both, over all
    positions.parquet   by position in the window; `scored` is false for context
    routing.parquet     share of each expert in each layer, by language and domain
    samples.json, about.json (model, window, what could not be scored)
    chat.json           answers to ten instructions, of models with a chat template (tasks/evaluation/chat.py)
Cost: a forward pass over the held-out tokens, on the run's training workers.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from eclectus.storage.artifact import Artifact, Draft
from eclectus.storage.errors import EclectusError
from eclectus.tasks.disk_matrix import mapped
from eclectus.tasks.evaluation.chat import read_chat, write_chat
from eclectus.tasks.evaluation.held_out import HeldOut, choose_prompts, read_held_out
from eclectus.tasks.evaluation.result_files import (
    scores_by,
    write_documents,
    write_positions,
    write_routing,
    write_samples,
    write_scores,
)
from eclectus.tasks.packing.tokenizer import BeginSettings, load_tokenizer, tokenizer_of
from eclectus.tasks.settings import SEED, RuntimeSetting, Settings
from eclectus.tasks.step import step
from eclectus.tasks.training.check_base import open_checked
from eclectus.tasks.training.run_training import (
    WORKERS,
    DocumentMaskSettings,
    WorkerSettings,
    resume_directory,
    run_training,
)

if TYPE_CHECKING:
    from eclectus.models.training.loop import Report
    from eclectus.models.training.process import Process

LONGEST_WINDOW = 2048
CONTEXT = 64


class VocabularySettings(Settings):
    """Which tokens a model may use that has more than its base."""

    original_vocabulary_only: bool = Field(
        False,
        description="Close the tokens that extension_vocabulary added: text and questions without any of them are "
        "scored, and continued, with the base's own tokens only.",
    )


class EvaluateSettings(DocumentMaskSettings, WorkerSettings, BeginSettings, VocabularySettings):
    """How held-out text is scored; the same settings make models comparable."""

    evaluation_tokens: int = Field(
        0,
        ge=0,
        description=f"Tokens in a window; 0 takes the model's longest context, at most {LONGEST_WINDOW}.",
    )
    evaluation_context: int = Field(
        0,
        ge=0,
        description="Tokens at the start of a window that are read but not scored. Flows take the larger of it, "
        f"lory_segment and the segments of given Lory models, so that no score has look-ahead; 0 alone is {CONTEXT}.",
    )
    evaluation_documents: int = Field(
        100, ge=1, description="At most this many held-out documents of each language and domain, chosen by their ids."
    )
    evaluation_samples: int = Field(
        2, ge=0, description="Held-out documents per language whose beginnings every model continues."
    )
    evaluation_prompt_tokens: int = Field(
        32, ge=1, description="Tokens of a document that a model is given to continue."
    )
    evaluation_sample_tokens: int = Field(48, ge=1, description="Tokens that a model generates per sample.")
    evaluation_temperature: float = Field(
        0.0, ge=0, description="Sampling temperature; 0 always takes the most likely token."
    )
    evaluation_chat_tokens: int = Field(
        64,
        ge=0,
        description="Tokens that a model with a chat template generates for each of ten fixed instructions, which the "
        "report shows side by side; 0: none.",
    )
    evaluation_batch: int = RuntimeSetting(
        8, ge=1, description="Windows that a worker scores at once; more cost memory."
    )
    training_workers: int = RuntimeSetting(2, ge=0, description=WORKERS, basic=True)
    seed: int = SEED

    @property
    def context(self) -> int:
        return self.evaluation_context or CONTEXT


@step(makes="evaluation", version=5)
def evaluate(
    documents: Artifact, tokenizer: Artifact | None, checkpoint: Artifact, settings: EvaluateSettings, out: Draft
) -> None:
    """Scores a checkpoint on the held-out documents, by language and by domain, with its own tokenizer.

    tokenizer: of a checkpoint that brings none.
    """
    tokens = load_tokenizer(tokenizer_of(checkpoint, tokenizer))
    length = _window(checkpoint, tokens, settings)
    begin = settings.begin(tokens)
    if len(begin) > settings.context:
        raise EclectusError(
            f"evaluation_context is {settings.context}, less than the {len(begin)} tokens that begin a "
            "document; raise it"
        )
    held = read_held_out(documents, tokens, settings.evaluation_documents, len(begin) + 1, settings.context)
    prompts = choose_prompts(held, settings.evaluation_prompt_tokens, settings.evaluation_samples)
    chat = read_chat(checkpoint, tokens, settings.evaluation_chat_tokens, _positions(checkpoint))
    kept_as = ("evaluate", documents, tokenizer, checkpoint, settings.key_values())
    with (
        tempfile.TemporaryDirectory(dir=out.path.parent, prefix="streams-") as scratch,
        resume_directory(*kept_as) as kept,
    ):
        _write_streams(held, begin, tokens.eos_token_id, length, settings.context, Path(scratch))
        result = run_training(
            settings,
            evaluate_here,
            {
                "checkpoint": checkpoint.path,
                "name": checkpoint.name,
                "streams": scratch,
                "kept": str(kept),
                "length": length,
                "documents": held.documents,
                "prompts": [begin + held.tokens[number][: settings.evaluation_prompt_tokens] for number in prompts],
                "begin": begin,
                "end": tokens.eos_token_id,
                "chat": chat.prompts,
                "ends": chat.ends,
                "settings": settings.model_dump(),
            },
            what="evaluating",
        )
    sums = result["sums"]
    if not sums.tokens.any():
        raise EclectusError(
            f"no stream of held-out documents in {documents.name} is longer than evaluation_context, "
            f"{settings.context} tokens, so nothing can be scored; hold out more documents, or lower "
            "evaluation_context"
        )
    table = write_documents(held, sums, result["by_prompt"], out)
    scores = write_scores(table, out)
    write_positions(held, sums, result["bucket"], settings.context, out)
    write_routing(held, sums, out)
    given = settings.evaluation_prompt_tokens
    write_samples(held, tokens, prompts, result["written"], given, given + settings.evaluation_sample_tokens, out)
    out.rows = int((sums.tokens > 0).sum())
    out.statistics = _statistics(held, table, scores, result, length)
    out.statistics |= {"vocabulary": len(tokens), "unknown_tokens": _unknown(held, tokens)}
    write_chat(chat, result["answers"], tokens, out.file("chat.json"))
    out.statistics |= {"chat": bool(chat.prompts)} | ({"chat_problem": chat.problem} if chat.problem else {})
    # about.json lists what could not be scored, so evaluations with equal scores of other documents have other digests.
    out.file("about.json").write_text(json.dumps(out.statistics, indent=1, ensure_ascii=False), "utf-8")


def evaluate_here(
    process: Process,
    report: Report,
    checkpoint: str,
    name: str,
    streams: str,
    kept: str,
    length: int,
    documents: list[str],
    prompts: list[list[int]],
    begin: list[int],
    end: int,
    chat: list[list[int]],
    ends: list[int],
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Runs on every worker: scores its windows and generates its samples; every worker returns the sums of all."""
    from eclectus.models.evaluation.scoring import NotFinite, Windows, generate, routes_by_prompt, score
    from eclectus.models.extension.split_vocabulary import original_rows

    chosen, work = EvaluateSettings(**settings), Path(streams)
    model = load_model(checkpoint, name, chosen.context)
    tokens, owners, table, ratio, lengths = (
        mapped(work / f"{each}.npy") for each in ("tokens", "owners", "table", "ratio", "lengths")
    )
    first = original_rows(model.config) if chosen.original_vocabulary_only else None
    apart = mapped(work / "numbers.npy") if chosen.pack_document_mask else None
    windows = Windows(tokens, owners, table, chosen.context, length, ratio, tuple(begin), apart)

    def report_progress(done: int, total: int) -> None:
        report("progress", done=done, total=total)

    given = (model, windows, len(lengths), process, chosen.evaluation_batch, report_progress, Path(kept))
    try:
        sums = score(*given, closed_from=first)
        # The context of a window, which is the prompt, is of other documents.
        prompted = routes_by_prompt(model) and apart is None
        by_prompt = score(*given, by_prompt=True).bits if prompted else None
    except NotFinite as error:
        raise EclectusError(
            f"{name} gives logits that are not finite on document {documents[error.document]}; it cannot be evaluated: "
            "train it again with a lower learning rate, or leave it out"
        ) from error
    written = generate(
        model,
        prompts,
        chosen.evaluation_sample_tokens,
        chosen.evaluation_temperature,
        [end],
        chosen.seed,
        process,
        first,
    )
    answers = generate(model, chat, chosen.evaluation_chat_tokens, 0.0, ends, chosen.seed, process, first)
    return {
        "sums": sums,
        "by_prompt": by_prompt,
        "written": written,
        "answers": [ids for ids, _ in answers],
        "bucket": windows.bucket,
        "windows": len(table),
        "model": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def load_model(checkpoint: str, name: str, context: int) -> Any:
    """The model in a directory, in fp32, for scoring. Raises EclectusError naming the checkpoint."""
    from eclectus.models.lory.model import LoryForCausalLM

    model = open_checked(checkpoint, name)
    if isinstance(model, LoryForCausalLM) and model.config.num_experts > 1:
        segment, rule = model.config.segment_length, model.config.first_segment
        if segment > context and rule == "stop_gradient" and model.config.routing != "dense":
            raise EclectusError(
                f"evaluation_context is {context}, shorter than the segment of {segment} tokens of {name}, whose first "
                f"segment looks ahead; set evaluation_context to {segment} or more for every model that is compared"
            )
    return model


def read_model_config(checkpoint: Artifact) -> dict[str, Any]:
    """config.json of a checkpoint, that of its text part on top. Raises EclectusError."""
    try:
        config = json.loads(checkpoint.file("config.json").read_text())
    except (OSError, ValueError) as error:
        raise EclectusError(f"{checkpoint.name} is not a model: its config.json cannot be read ({error})") from error
    return {**config, **config.get("text_config", {})}


def check_vocabulary(checkpoint: Artifact, config: dict[str, Any], tokenizer: Any) -> None:
    """Raises EclectusError for a tokenizer that yields ids beyond the model's embeddings."""
    from eclectus.models.checkpoints.tokenizer_files import usable_size

    known, needed = config.get("vocab_size", 0), usable_size(tokenizer)
    if known < needed:
        raise EclectusError(
            f"{checkpoint.name} has a vocabulary of {known} tokens, but the tokenizer for it yields ids up to "
            f"{needed - 1}; use the tokenizer that it was trained with"
        )


def _window(checkpoint: Artifact, tokenizer: Any, settings: EvaluateSettings) -> int:
    """Tokens in a window. Raises EclectusError when the checkpoint does not fit the tokenizer or the settings."""
    config = read_model_config(checkpoint)
    check_vocabulary(checkpoint, config, tokenizer)
    longest = _positions(checkpoint)
    length = settings.evaluation_tokens or min(longest, LONGEST_WINDOW)
    if length > longest:
        raise EclectusError(f"evaluation_tokens is {length}, but {checkpoint.name} has {longest} positions; lower it")
    if length <= settings.context:
        raise EclectusError(
            f"evaluation_context (in flows the larger of it and lory_segment) is {settings.context}, which leaves "
            f"nothing to score in windows of {length} tokens for {checkpoint.name}; lower it, or raise "
            "evaluation_tokens"
        )
    return length


def _positions(checkpoint: Artifact) -> int:
    return read_model_config(checkpoint).get("max_position_embeddings") or LONGEST_WINDOW


def _write_streams(held: HeldOut, begin: list[int], end: int, length: int, context: int, scratch: Path) -> None:
    """Writes the streams as arrays that every worker maps into memory (models/evaluation/scoring.py, Windows)."""
    from eclectus.models.evaluation.scoring import NO_DOCUMENT, plan_windows

    total = sum(held.lengths)
    tokens, owners, numbers = np.empty(total, np.uint32), np.empty(total, np.int32), np.empty(total, np.int32)
    at, before = 0, len(begin)
    owners[:] = NO_DOCUMENT
    leads = iter(held.leads)
    for number, ids in enumerate(held.tokens):
        if number == 0 or held.stream_of(number) != held.stream_of(number - 1):
            lead = next(leads)
            tokens[at : at + len(lead)], numbers[at : at + len(lead)] = lead, NO_DOCUMENT
            at += len(lead)
        tokens[at : at + before + len(ids) + 1] = [*begin, *ids, end]
        owners[at + before : at + before + len(ids)] = number
        numbers[at : at + before + len(ids) + 1] = number
        at += before + len(ids) + 1
    np.save(scratch / "tokens.npy", tokens)
    np.save(scratch / "owners.npy", owners)
    np.save(scratch / "numbers.npy", numbers)
    np.save(scratch / "table.npy", plan_windows(held.lengths, length, context, [bool(lead) for lead in held.leads]))
    np.save(scratch / "ratio.npy", np.array(held.bytes) / np.array([len(ids) for ids in held.tokens]))
    np.save(scratch / "lengths.npy", np.array(held.lengths))


def _unknown(held: HeldOut, tokenizer: Any) -> int:
    """Tokens of the scored documents that stand for text of which the tokenizer has none."""
    unknown = tokenizer.unk_token_id
    if unknown is None or unknown == tokenizer.eos_token_id:
        return 0
    return sum(ids.count(unknown) for ids in held.tokens)


def _statistics(
    held: HeldOut, table: pa.Table, scores: pa.Table, result: dict[str, Any], length: int
) -> dict[str, Any]:
    """Bits per byte over all, by language, and by domain of the original languages; and what was not scored."""
    rows = scores.to_pylist()
    total = next(row for row in rows if row["level"] == "all")
    scored = {(row["language"], row["domain"]) for row in rows if row["level"] == "language+domain"}
    domains = scores_by(table.filter(pc.equal(table["group"], "original")), "domain", ["domain"]).to_pylist()
    return {
        "model": result["model"],
        "parameters": result["parameters"],
        "bits_per_byte": {
            "all": round(total["bits_per_byte"], 4),
            "language": {r["language"]: round(r["bits_per_byte"], 4) for r in rows if r["level"] == "language"},
            "domain": {r["domain"]: round(r["bits_per_byte"], 4) for r in domains},
        },
        "perplexity": round(total["perplexity"], 2),
        "documents": total["documents"],
        "tokens": total["tokens"],
        "bytes": round(total["bytes"]),
        "window": length,
        "languages_without_held_out_text": sorted(held.known - {language for language, _ in scored}),
        "too_short_to_score": sorted(f"{language}, {domain}" for language, domain in set(held.streams) - scored),
    }
