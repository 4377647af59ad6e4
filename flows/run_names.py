"""Names of flow runs in the Prefect UI: what a run does, as `extend el,tr from smollm2`. Prefect is not imported."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Any

LONGEST = 120
# The end of the name of a retraining that has not counted the new documents yet.
SEARCHING = "looking for new documents"


def run_name(flow: str, parameters: Any) -> str:
    """The name of a run of this flow, one of `eclectus.flows.parameters.PARAMETERS`, with these parameters."""
    text = _NAMES[flow](parameters)
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def new_documents_name(news: dict[str, Any]) -> str:
    """The name of a retraining once the new documents are counted. news: statistics of the step `news`."""
    found = f"{news['new_documents']} new documents" if news.get("new_documents") else "nothing new"
    return f"retrain: {found}" if news["train"] else f"retrain: {found}, not trained"


def _main(given: Any) -> str:
    if given.evaluate_checkpoints:
        return f"main: {_evaluate(given)}"
    base = given.base_model or given.dense_start
    start = f" from {short_name(base)}" if base else ""
    return f"main {_languages(given)}{start}{_sources(given)}{_trainings(given)}"


def _curate(given: Any) -> str:
    return f"curate {_languages(given)}{_sources(given)}{' in random order' if given.grouping == 'random' else ''}"


def _pretrain(given: Any) -> str:
    models = ", ".join(("lory", "dense", *given.pretrain_baselines))
    start = f" from {short_name(given.dense_start)}" if given.dense_start else ""
    return f"pretrain {models} on {','.join(given.original_languages)}{start}{_trainings(given)}"


def _extend(given: Any) -> str:
    method = "" if given.extension_method == "moe_lpr" else f" by {given.extension_method}"
    base = short_name(given.base_model) if given.base_model else f"pre-trained {given.extension_base}"
    return f"extend {','.join(given.expanded_languages)} from {base}{method}{_trainings(given)}"


def _evaluate(given: Any) -> str:
    if models := given.evaluate_checkpoints:
        return f"evaluate {short_name(models[0])}" if len(models) == 1 else f"evaluate {len(models)} models"
    if given.expanded_languages:
        return f"evaluate: {_extend(given)}"
    return f"evaluate {short_name(given.base_model)}" if given.base_model else f"evaluate: {_pretrain(given)}"


def _retrain(given: Any) -> str:
    return f"retrain {given.retrain_line}: {SEARCHING}"


def _similarity(given: Any) -> str:
    new, known = ",".join(given.expanded_languages), ",".join(given.original_languages)
    return f"similarity of {new} to {known} in {short_name(given.base_model)}"


_NAMES = {
    "main": _main,
    "curate": _curate,
    "pretrain": _pretrain,
    "extend": _extend,
    "evaluate": _evaluate,
    "retrain": _retrain,
    "similarity": _similarity,
}


def _languages(given: Any) -> str:
    known, new = ",".join(given.original_languages), ",".join(given.expanded_languages)
    return f"{known} -> {new}" if new else known


def _trainings(given: Any) -> str:
    if given.seeds > 1:
        return f", {given.seeds} seeds"
    return f", seed {given.training_seed}" if given.training_seed >= 0 else ""


def _sources(given: Any) -> str:
    first, *others = [_last(each) for each in given.sources] or ["no sources"]
    return f", {first} and {len(others)} more" if others else f", {first}"


def short_name(name: str) -> str:
    """A short name of a model: of a folder or a name on the hub its last part, of an artifact's folder its name."""
    last = _last(name)
    if re.fullmatch("[0-9a-f]{32,64}", last):
        return f"{PurePosixPath(name).parent.name or 'checkpoint'}-{last[:12]}"
    return last or "no model"


def _last(path: str) -> str:
    """The last part of a path, a URL without its password and query, or a name on the hub."""
    return PurePosixPath(path.split("?")[0].split("#")[0].rstrip("/")).name
