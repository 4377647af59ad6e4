"""An export under examination: what servers are asked about it, and what the training model answers."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eclectus.storage.artifact import MANIFEST, read_manifest
from eclectus.tasks.certify.compare import Comparison, Expected, compare, tolerance_in
from eclectus.tasks.certify.environments import UnavailableError
from eclectus.tasks.certify.measure import Question, ask
from eclectus.tasks.certify.prompts import held_out_texts, make_prompts

if TYPE_CHECKING:
    from collections.abc import Callable

    from eclectus.storage.home import Home
    from eclectus.tasks.certify.servers import Server

GREEDY = 16
# Of the type that weights are stored in, which some CPUs compute slowly.
NARROW_PROMPTS, NARROW_GREEDY = 3, 8
# Bytes of weights from which a server gets all cores.
MANY_THREADS = 100_000_000
# `general.file_type` of GGUF files that are not quantized.
_FILE_TYPES = {0: "float32", 1: "float16", 32: "bfloat16"}


@dataclass(frozen=True)
class _Asked:
    """What a server is asked, with the training model's answers and tokens (None: no tokenizer)."""

    question: Question
    expected: list[Expected]
    tokens: list[list[int]] | None


class Examination:
    """An export and the training model.

    served: the export's folder, or its GGUF file. training: the checkpoint to compare with, a folder. Raises
    CheckpointError, UnsupportedModelError.
    """

    def __init__(self, served: Path, training: Path, home: Home) -> None:
        from eclectus.models.checkpoints.door import check_checkpoint
        from eclectus.models.checkpoints.own_code import brings_our_code
        from eclectus.models.checkpoints.side_files import has_tokenizer
        from eclectus.models.checkpoints.tokenizer_files import open_tokenizer

        # Absolute: servers run elsewhere.
        self.served, self.is_gguf, self._training = served.absolute(), served.is_file(), training
        # A GGUF file is the checkpoint that it was made of, in another format.
        described = training if self.is_gguf else served
        self._config: dict[str, Any] = check_checkpoint(described, trust_remote_code=True).config
        self._own_code = brings_our_code(described, self._config)
        # The training's: an export with another one reads other tokens.
        taught = training if has_tokenizer(training) else described
        self._tokenizer = open_tokenizer(taught) if has_tokenizer(taught) else None
        manifest = training / MANIFEST
        self._texts = held_out_texts(home, read_manifest(training)["digest"]) if manifest.is_file() else {}
        self._by_limit: dict[int, _Asked] = {}

    @cached_property
    def stored(self) -> str:
        """The type of the weights; float32 for weights of several types, which are compared as they are."""
        from eclectus.models.checkpoints.config_file import CheckpointError
        from eclectus.models.checkpoints.gguf.header import read_header
        from eclectus.models.checkpoints.tensor_files import CheckpointReader

        if self.is_gguf:
            kind = read_header(self.served)[0].get("general.file_type")
            if kind not in _FILE_TYPES:
                raise CheckpointError(
                    f"{self.served} is quantized (file type {kind}): nothing says how exact it must be"
                )
            return _FILE_TYPES[kind]
        with CheckpointReader(self.served) as reader:
            types = {spec.dtype for spec in reader.specs.values() if spec.dtype.is_floating_point}
        return str(types.pop()).removeprefix("torch.") if len(types) == 1 else "float32"

    def file_for(self, server: Server, dtype: str, work: Path) -> Path:
        """What the server opens; a GGUF file is written for it in `work`. Raises UnavailableError if it cannot be."""
        import torch

        from eclectus.models.checkpoints.gguf.export import export_gguf
        from eclectus.models.checkpoints.proof import StepZeroError

        if self.is_gguf or not server.gguf:
            return self.served
        path = work / f"{dtype}.gguf"
        try:
            export_gguf(self.served, path, getattr(torch, dtype))
        except (ValueError, OSError, StepZeroError) as error:
            raise UnavailableError(f"no GGUF file was written: {error}") from error
        return path

    def compared(
        self,
        server: Server,
        model: Path,
        dtype: str,
        tolerances: tuple[float, float],
        environments: Path,
        report: Callable[[str], None],
    ) -> Comparison:
        """A server's answer, compared with the training model's. tolerances: in float32, and in 16 bits.

        Raises UnavailableError.
        """
        asked = self._asked(server)
        question = asked.question
        if dtype != "float32":
            question = replace(
                question, prompts=question.prompts[:NARROW_PROMPTS], greedy=min(question.greedy, NARROW_GREEDY)
            )
        answer, seconds = ask(server, environments, question.request(model, dtype), report)
        names = [prompt.name for prompt in question.prompts]
        tokens = asked.tokens[: len(names)] if asked.tokens else None
        expected = asked.expected[: len(names)]
        tolerance = tolerance_in(dtype, *tolerances, expected)
        return compare(answer, expected, tokens, names, (server.name, dtype, tolerance, seconds))

    def _asked(self, server: Server) -> _Asked:
        """The same for all servers, but that llama.cpp has no sliding window: its context ends with the window."""
        limit = self._config["max_position_embeddings"]
        if server.gguf:
            limit = min(limit, self._config.get("sliding_window") or limit)
        if limit not in self._by_limit:
            self._by_limit[limit] = self._within(limit)
        return self._by_limit[limit]

    def _within(self, limit: int) -> _Asked:
        from eclectus.tasks.certify.expected import expected_answers

        greedy = max(1, min(GREEDY, limit // 4))
        prompts = make_prompts(self._tokenizer, self._config["vocab_size"], limit - greedy - 1, self._texts)
        context = min(limit, max(len(prompt.ids) for prompt in prompts) + greedy + 1)
        question = Question(prompts, greedy, self._own_code, context, self._threads)
        expected = expected_answers(self._training, self.stored, prompts, greedy)
        read = self._tokenizer
        return _Asked(question, expected, [list(read(each.text)["input_ids"]) for each in prompts] if read else None)

    @cached_property
    def _threads(self) -> int:
        files = [self.served] if self.is_gguf else self.served.glob("*.safetensors")
        large = sum(path.stat().st_size for path in files) > MANY_THREADS
        return len(os.sched_getaffinity(0)) if large else 1
