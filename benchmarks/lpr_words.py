"""The base of `lpr_real.py` with new words, made by the steps of `eclectus extend` (extension_vocabulary).

The words are learned on the training text alone: nothing of a held-out work is read. Steps are kept in a home, and
reused. Needs the whole project, Prefect and DuckDB included; where only torch and transformers are, bring the result.
"""

from __future__ import annotations

import json
from pathlib import Path

from lpr_data import Mixture, read_documents


def with_new_words(base: str, mixture: Mixture, count: int, home: Path) -> str:
    """The folder of the base with `count` new tokens for the expanded languages."""
    from new_words import made

    from eclectus.flows.parameters import ExtendParameters
    from eclectus.storage.home import Home

    home.mkdir(parents=True, exist_ok=True)
    text = home / "training-text.jsonl"
    with text.open("w", encoding="utf-8") as out:
        for each in read_documents(mixture):
            if each["split"] == "train":
                out.write(json.dumps({"text": each["text"], "language": each["language"]}, ensure_ascii=False) + "\n")
    parameters = ExtendParameters(
        base_model=str(Path(base).resolve()),
        sources=[str(text.resolve())],
        original_languages=list(mixture.original),
        expanded_languages=list(mixture.expanded),
        extension_vocabulary=count,
        language_detector="field",
    )
    return made(parameters, Home.open(home))[-1].path
