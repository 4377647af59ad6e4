"""Eclectus from Python: flows as functions with the settings of the command line, results as objects, tables as frames.

    import eclectus

    data = eclectus.curate(sources="my-documents.jsonl", expanded_languages=["el"])
    made = eclectus.extend(base_model="path/to/model", sources="my-documents.jsonl", expanded_languages=["el"])
    eclectus.tag(made.models["stage 2"], "greek")
    scores = eclectus.evaluate("greek@latest", sources="my-documents.jsonl", expanded_languages=["el"])
    scores.df()                                                      # pandas
    eclectus.sql("from runs order by started desc limit 5").df()

Each call is a run of the home, with reuse, lineage and recovery as on the command line; errors are EclectusError.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eclectus.storage.artifact import Artifact
from eclectus.storage.errors import EclectusError
from eclectus.storage.home import Home

if TYPE_CHECKING:
    import pandas
    import pyarrow

_METRICS = """
    select label, metrics.name, at_step, value, tags from metrics join steps using (step)
    where steps.run = $1 or step in (
        select made_by from artifacts a join step_outputs o using (artifact) where o.run = $1 and a.kind = 'checkpoint')
    order by label, metrics.name, at_step, metrics.logged"""
_DOCUMENTS = """
    select d.* from documents d where d.instances in (
        select artifact from step_outputs where run = $1 and kind = 'instances')
    order by d.instances, d.instance, d.instance_offset"""


@dataclass(frozen=True)
class Rows:
    """The rows of a query. table: Arrow."""

    table: pyarrow.Table

    def df(self) -> pandas.DataFrame:
        """As a pandas data frame."""
        return self.table.to_pandas()

    def __iter__(self) -> Any:
        """Each row as a dict."""
        return iter(self.table.to_pylist())

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __repr__(self) -> str:
        return repr(self.df())


@dataclass(frozen=True)
class Result:
    """What a flow made. run: its id in the lineage. states: `completed` or `reused`, by step. value: what the flow
    returned (flows/*.py). artifacts: all of it by name, `checkpoint stage 2`, `evaluation dense` ...
    """

    flow: str
    run: str
    home: str
    states: dict[str, str]
    value: Any = field(repr=False)
    artifacts: dict[str, Artifact] = field(default_factory=dict, repr=False)

    @property
    def models(self) -> dict[str, Path]:
        """Folders of the checkpoints, by the models' names."""
        return {name: Path(each.path) for name, each in self.artifacts.items() if each.kind == "checkpoint"}

    @property
    def report(self) -> Path | None:
        """The page of the run, where it wrote one."""
        pages = [each.file(page) for page in ("report.html", "data.html") for each in self.artifacts.values()]
        return next((page for page in pages if page.exists()), None)

    def rows(self) -> Rows:
        """What the flow is about: scores of models, metrics of trainings, documents in instances, or similarities."""
        scores = list(_scores(self.value))
        if scores:
            return _rows_of(scores)
        if hasattr(self.value, "similarity"):
            found = self.value.similarity.statistics
            pairs = zip(found["similarity"], found["new_experts"], strict=True)
            return _rows_of([{"layer": n, "similarity": a, "new_experts": b} for n, (a, b) in enumerate(pairs)])
        return self.sql(_DOCUMENTS if hasattr(self.value, "grouping") else _METRICS, [self.run])

    def df(self) -> pandas.DataFrame:
        """`rows` as a pandas data frame."""
        return self.rows().df()

    def sql(self, query: str, values: list[Any] | None = None) -> Rows:
        """A query over the lineage of the home that the run was in."""
        return sql(query, values, self.home)


def run(config: str | Path | None = None, *, home: Any = None, show: bool = True, **settings: Any) -> Result:
    """The whole job: curate, pre-train, extend, evaluate, report. Arguments: as of `call`."""
    return call("main", config, home=home, show=show, **settings)


def curate(config: str | Path | None = None, *, home: Any = None, show: bool = True, **settings: Any) -> Result:
    """Sources to training instances, grouped by similarity. Its rows: documents and where they are in the instances."""
    return call("curate", config, home=home, show=show, **settings)


def pretrain(config: str | Path | None = None, *, home: Any = None, show: bool = True, **settings: Any) -> Result:
    """A Lory model and its dense twin. Its rows: metrics of the trainings."""
    return call("pretrain", config, home=home, show=show, **settings)


def extend(config: str | Path | None = None, *, home: Any = None, show: bool = True, **settings: Any) -> Result:
    """A model taught new languages by MoE-LPR or a baseline. Its rows: metrics of the trainings."""
    return call("extend", config, home=home, show=show, **settings)


def similarity(config: str | Path | None = None, *, home: Any = None, show: bool = True, **settings: Any) -> Result:
    """Similarity of languages by layer of a model. Its rows: layers, with the experts proposed for each."""
    return call("similarity", config, home=home, show=show, **settings)


def evaluate(
    *models: str | Path, config: str | Path | None = None, home: Any = None, show: bool = True, **settings: Any
) -> Result:
    """Scores of models on held-out documents and tasks. models: artifacts, tags, folders, .gguf files or names on the
    hub; none: those of the settings. Its rows: a score each, by model, kind, name and measure."""
    if models:
        settings["evaluate_checkpoints"] = [str(each) for each in models]
    return call("evaluate", config, home=home, show=show, **settings)


def retrain(config: str | Path | None = None, *, home: Any = None, show: bool = True, **settings: Any) -> Result:
    """Trains on from the champion where enough documents are new. Its rows: scores, or none where it did not train."""
    return call("retrain", config, home=home, show=show, **settings)


def call(
    flow: str, config: str | Path | None = None, *, home: Any = None, show: bool = True, **settings: Any
) -> Result:
    """Runs a flow in a run of its own.

    config: a YAML file of settings, over which `settings` win; their names are those of `eclectus COMMAND --help-all`
    with `_`. A single value stands for a list of one. home: a folder or URL (default: $ECLECTUS_HOME or ./home).
    show: print a line for each step. Raises EclectusError for a wrong setting, and for what would end the command.
    """
    from eclectus.flows.cli.options import read_config
    from eclectus.flows.cli.terminal import Terminal
    from eclectus.flows.flow import flow_named, run_flow
    from eclectus.flows.parameters import PARAMETERS
    from eclectus.flows.run import served_run

    model = PARAMETERS[flow]
    given = {name: _listed(value, name, model) for name, value in settings.items()}
    model.read(given, f"the arguments of {flow}")
    parameters = model.read({**read_config(config, model), **given}, str(config or f"the arguments of {flow}"))
    parameters.check_together()
    opened = home if isinstance(home, Home) else Home.open(home)
    with contextlib.ExitStack() as shown:
        displays: list[Any] = [shown.enter_context(Terminal())] if show else []
        with served_run(flow, parameters, opened, displays) as active:
            value = run_flow(active, flow_named(flow), parameters)
    value = getattr(value, "evaluated", value)
    return Result(flow, active.id, opened.name, dict(active.states), value, dict(_artifacts(value)))


def sql(query: str, values: list[Any] | None = None, home: Any = None) -> Rows:
    """The rows of a query over the lineage (docs/lineage.md). values: of its `?`. Nothing that runs is disturbed."""
    import duckdb

    from eclectus.storage.lineage.connection import connect

    opened = home if isinstance(home, Home) else Home.existing(home)
    with connect(opened) as connection:
        try:
            found = connection.sql(query, params=values or [])
            if found is None:
                raise EclectusError(f"the query '{query}' asks for nothing; write one, as 'from runs'")
            return Rows(found.to_arrow_table())
        except duckdb.Error as error:
            raise EclectusError(f"the query failed: {str(error).strip()}") from error


def tag(artifact: str | Path | Artifact, name: str, reason: str = "", home: Any = None) -> str:
    """Names an artifact (or its name or folder) `greek` or `greek@2`; returns the tag with its version."""
    from eclectus.tasks.adoption import tag as named

    opened = home if isinstance(home, Home) else Home.existing(home, reading=False)
    return named(opened, artifact.path if isinstance(artifact, Artifact) else str(artifact), name, reason)[0]


def _listed(value: Any, name: str, model: Any) -> Any:
    """A path as text, and a single value of a setting that is a list as a list of one."""
    import typing

    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, list | tuple):
        return [str(each) if isinstance(each, Path) else each for each in value]
    known = model.model_fields.get(name)
    return [value] if known and typing.get_origin(known.annotation) is list and isinstance(value, str) else value


def _artifacts(value: Any, prefix: str = "") -> Any:
    """(name, artifact) of everything in a flow's result, nested results included; models by their own names."""
    for each in fields(value) if is_dataclass(value) else ():
        found = getattr(value, each.name)
        if isinstance(found, Artifact):
            yield each.name if found.kind == "checkpoint" else f"{prefix}{each.name}", found
        elif isinstance(found, dict):
            for name, one in found.items():
                if isinstance(one, Artifact):
                    yield name if one.kind == "checkpoint" else f"{each.name} {name}", one
        elif is_dataclass(found) and not isinstance(found, type):
            yield from _artifacts(found, f"{each.name} ")


def _scores(value: Any) -> Any:
    """A dict for each score of each model."""
    for model, artifact in {**getattr(value, "evaluations", {}), **getattr(value, "repeats", {})}.items():
        for kind, found in artifact.statistics["bits_per_byte"].items():
            for name, number in (found if isinstance(found, dict) else {"": found}).items():
                yield {"model": model, "kind": kind, "name": name, "measure": "bits_per_byte", "value": number}
    from eclectus.tasks.evaluation.task_scores import scores_by_task

    asked = scores_by_task(getattr(value, "benchmarks", {}), getattr(value, "imported", {}))
    for model, scores in asked.items():
        for row, number in scores.items():
            name, _, measure = row.rpartition(" ")
            yield {"model": model, "kind": "task", "name": name, "measure": measure, "value": number}


def _rows_of(rows: list[dict[str, Any]]) -> Rows:
    import pyarrow

    return Rows(pyarrow.Table.from_pylist(rows))
