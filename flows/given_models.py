"""Models that exist already, as `evaluate_checkpoints` names them: found or fetched, checked, and named for the report.

A model is an artifact's name or tag, an artifact's folder in this home or another one, any checkpoint folder, a .gguf
file or a name on the hub; the last three are fetched (tasks/training/fetch_model.py). In tables and pictures it has the
name of the step that made it and of the languages that it was trained on, as far as the lineage of its home knows them.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from eclectus.flows.run import current_home
from eclectus.flows.run_names import short_name
from eclectus.storage.artifact import KINDS, MANIFEST, Artifact
from eclectus.storage.errors import EclectusError
from eclectus.storage.home import Home
from eclectus.storage.lineage.history import Made, made_upstream, read_makers
from eclectus.storage.tags import is_tag
from eclectus.tasks.lookup import check_before_work
from eclectus.tasks.packing.tokenizer import no_tokenizer
from eclectus.tasks.plan import Planned
from eclectus.tasks.run import require_run
from eclectus.tasks.training.check_base import check_to_evaluate
from eclectus.tasks.training.fetch_model import FetchSettings, fetch, listing

# Languages of a model that its name shows.
SHOWN_LANGUAGES = 4
_ARTIFACT = re.compile(rf"(?:(?:{'|'.join(KINDS)})-)?[0-9a-f]{{1,64}}", re.IGNORECASE)


def find_models(given: list[str], tokens: int, with_tokenizer: bool) -> dict[str, Artifact]:
    """The checkpoints that a user names, by their names in the report, in this order.

    tokens: of the windows that they must have positions for; 0 for any. with_tokenizer: whether one is given for those
    that bring none. Raises EclectusError for what is no checkpoint, and for two that are the same.
    """
    found: dict[str, Artifact] = {}
    named_by: dict[str, str] = {}
    for each in given:
        model = _find(each, tokens, with_tokenizer)
        if model.digest in named_by:
            raise EclectusError(
                f"evaluate_checkpoints names one model twice, '{named_by[model.digest]}' and '{each}'; leave out one"
            )
        named_by[model.digest] = each
        found[each] = model
    names = {each: _model_name(each, model) for each, model in found.items()}
    taken = list(names.values())
    return {
        names[each] if taken.count(names[each]) == 1 else f"{names[each]} ({model.digest[:6]})": model
        for each, model in found.items()
    }


def segment(model: Artifact) -> int:
    """Tokens of a Lory model's segment; 0 for other models, and for one that is not there yet."""
    if isinstance(model, Planned):
        return 0
    try:
        config = json.loads(model.file("config.json").read_text("utf-8"))
        return int(config.get("segment_length", 0)) if int(config.get("num_experts", 0)) > 1 else 0
    except (OSError, ValueError, TypeError, AttributeError):
        # Whoever opens the model says what is wrong with it.
        return 0


def _find(name: str, tokens: int, with_tokenizer: bool) -> Artifact:
    store, path = current_home().store, Path(name)
    is_artifact = (path / MANIFEST).is_file() if path.exists() else _is_named(name)
    if not is_artifact:
        check_before_work(check_to_evaluate, name, name, tokens)
        if path.is_dir():
            check_before_work(_check_tokenizer, name, path, with_tokenizer)
        return fetch(label=f"fetch {short_name(name)}", settings=FetchSettings(base_model=name))
    model = store.find_whole(name)
    if model.kind != "checkpoint":
        raise EclectusError(
            f"'{name}' is {model.name}, which is no checkpoint; see: eclectus sql \"from artifacts where kind = "
            "'checkpoint'\""
        )
    check_before_work(check_to_evaluate, name, model.path, tokens)
    check_before_work(_check_tokenizer, name, Path(model.path), with_tokenizer)
    return model


def _is_named(name: str) -> bool:
    return is_tag(name) or _ARTIFACT.fullmatch(name) is not None


def _check_tokenizer(name: str, folder: Path, with_tokenizer: bool) -> None:
    if not with_tokenizer and not listing().has_tokenizer(folder) and not any(folder.glob("*.gguf")):
        raise EclectusError(no_tokenizer(name))


def _model_name(given: str, model: Artifact) -> str:
    made = _made(given, model)
    maker = made.get(model.digest)
    if maker is None or maker.step == "fetch":
        return short_name(str(maker.settings.get("base_model") or given) if maker else given)
    title = maker.label.removeprefix("train ")
    languages = _languages(maker, made)
    # Bare titles are models of the run that writes the report, of which it tells the story.
    return f"{title} {','.join(languages)}" if languages else f"{title} ({model.digest[:6]})"


def _made(given: str, model: Artifact) -> dict[str, Made]:
    """The history of a model: in this home, else in the home that its folder lies in, else nothing."""
    if isinstance(model, Planned):
        return {}
    made = require_run("evaluate").upstream([model])
    own = Path(model.path).absolute().parents[2]
    if model.digest not in made and own != current_home().root and (own / "journal").is_dir():
        made = made_upstream(read_makers(Home.existing(own), writes=False), [model.digest])
    return made


def _languages(maker: Made, made: dict[str, Made]) -> list[str]:
    """What the step trained on: the new languages of an extension, else those of the corpus."""
    corpus = [each.settings for each in made.values() if each.step == "languages"]
    if not corpus:
        return []
    new = corpus[-1].get("expanded_languages") if maker.step != "pretrain" else None
    languages = list(new or corpus[-1].get("original_languages") or [])
    more = [f"+{len(languages) - SHOWN_LANGUAGES}"] if len(languages) > SHOWN_LANGUAGES else []
    return [*languages[:SHOWN_LANGUAGES], *more]
