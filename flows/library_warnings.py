"""Warnings and reminders of libraries go to `warnings.log` in the home instead of the terminal; their errors to both.

Their loggers get handlers for the time of a run. torch, transformers, datasets and the client of the hub print by
handlers of their own, which their own environment variables limit to errors.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from eclectus.storage.secrets import scrub

LOG = "warnings.log"
# Python's own warnings, and libraries that log without a handler: Python prints those from WARNING up.
LOGGERS = (
    "py.warnings", "ray", "faiss", "accelerate", "peft", "sentence_transformers", "safetensors", "tokenizers",
    "numba", "matplotlib", "fsspec", "urllib3", "filelock", "botocore", "pyarrow", "gguf",
)  # fmt: skip
VERBOSITY = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "DATASETS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
    "TORCH_LOGS": "-all",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}


class _Scrubbed(logging.Formatter):
    converter = staticmethod(time.gmtime)  # type: ignore[assignment]  # as the class's own documentation does

    def format(self, record: logging.LogRecord) -> str:
        return scrub(super().format(record))


@contextlib.contextmanager
def library_warnings_logged(folder: Path) -> Iterator[None]:
    """Writes warnings of libraries into `folder`/warnings.log for the block; that file is made by the first of them."""
    into_file = logging.FileHandler(folder / LOG, encoding="utf-8", delay=True)
    into_file.setLevel(logging.WARNING)
    into_file.setFormatter(_Scrubbed("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    shown = logging.StreamHandler(sys.stderr)
    shown.setLevel(logging.ERROR)
    shown.setFormatter(_Scrubbed("%(name)s: %(message)s"))
    loggers = [logging.getLogger(name) for name in LOGGERS]
    propagated = [logger.propagate for logger in loggers]
    logging.captureWarnings(True)
    try:
        for logger in loggers:
            # A worker's root logger prints as well.
            logger.propagate = False
            logger.addHandler(into_file)
            logger.addHandler(shown)
        yield
    finally:
        logging.captureWarnings(False)
        for logger, propagates in zip(loggers, propagated, strict=True):
            logger.propagate = propagates
            logger.removeHandler(into_file)
            logger.removeHandler(shown)
        into_file.close()


def limit_verbosity() -> None:
    """Defaults for the libraries of this process and of those that it starts; what a user has set counts."""
    for name, value in VERBOSITY.items():
        os.environ.setdefault(name, value)
