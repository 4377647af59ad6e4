"""The data report: what was ingested, where every record went, and chains of documents to read before training.

    accounting   records = kept + rejected + exact duplicates; kept = grouped + near-duplicates + held out + copies of
                 held-out documents + excluded
    held out     documents, works and shares by language, near-duplicates counted once; deviations from the setting
    contents     languages, domains, lengths; rejected records with reasons and examples; near-duplicates side by side
    grouping     its statistics and picture, the purity of instances, and some chains
    cost         of a sample (`documents_limit`): what the whole would take on this cluster (cost_estimate.py)

Files: `data.html` (one page, offline, no script) and `data.md`. Users' texts are escaped in both. Price: a second; only
the text of the shown documents is read.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field

from eclectus.storage.artifact import Artifact, Draft
from eclectus.storage.errors import EclectusError
from eclectus.tasks.documents.conversations import readable
from eclectus.tasks.documents.language_codes import language_name, shortened
from eclectus.tasks.documents.table import codes_of, parts, read_codes, read_part_table, read_rows
from eclectus.tasks.documents.text_reader import TextReader
from eclectus.tasks.report.cost_estimate import whole_cost
from eclectus.tasks.report.formatting import count, in_words, size
from eclectus.tasks.report.rendering import facts_markdown, render, safe, table_markdown
from eclectus.tasks.report.tables import Cell, Facts, Table, documents_table, instances_table
from eclectus.tasks.settings import SEED, Settings
from eclectus.tasks.step import step

QUANTILES = [0.1, 0.5, 0.9, 1.0]
SHOWN_CHARACTERS = 400
SHOWN_REJECTED = 8
SHOWN_FILES = 4
SHOWN_DUPLICATES = 3
SHOWN_PARTITIONS = 40
SHOWN_AS = {"set apart": "excluded"}


class DataReportSettings(Settings):
    """What the data report shows."""

    data_report_chains: int = Field(4, ge=0, description="Chains of documents that the data report shows.")
    data_report_documents: int = Field(5, ge=1, description="Documents of each chain that the data report shows.")
    seed: int = SEED


@dataclass(frozen=True)
class Excerpt:
    """The beginning of a document. about: its heading."""

    about: str
    text: str


@dataclass
class DataContents:
    """Everything that the page and its Markdown version show."""

    subtitle: str
    tables: list[Table]
    facts: list[Facts]
    chains: dict[str, list[Excerpt]] = field(default_factory=dict)
    duplicates: dict[str, list[Excerpt]] = field(default_factory=dict)
    picture: str = ""


@step(makes="report", version=4)
def data_report(
    ingested: Artifact,
    documents: Artifact,
    grouping: Artifact,
    instances: dict[str, Artifact | None],
    settings: DataReportSettings,
    out: Draft,
    replayed: Artifact | None = None,
    divided: Artifact | None = None,
) -> None:
    """Writes the report. ingested: as read; documents: with languages and split; instances: by training stage.

    replayed: the documents of the review. divided: the documents as `split` made them, before budgets.
    """

    given = {name: each for name, each in instances.items() if each is not None}
    divided = divided or documents
    accounts = account(ingested, documents, grouping, divided)
    contents = DataContents(
        subtitle=_subtitle(accounts),
        tables=[_accounts_table(accounts), documents_table(documents), _lengths_table(documents)],
        facts=_facts(grouping, given, replayed),
        chains=_chains(documents, grouping, settings),
        duplicates=_duplicates(documents, grouping),
        picture=base64.b64encode(grouping.file("quality.png").read_bytes()).decode(),
    )
    more = (_shares_table(divided), _rejected_table(ingested), _passed_over_table(ingested), instances_table(given))
    contents.tables += [table for table in (*more, whole_cost(ingested)) if table]
    out.file("data.html").write_text(_page(contents), "utf-8")
    out.file("data.md").write_text(_markdown(contents), "utf-8")
    out.rows = accounts["records"]
    out.statistics = {"accounts": accounts}


def account(
    ingested: Artifact, documents: Artifact, grouping: Artifact, divided: Artifact | None = None
) -> dict[str, int]:
    """Where every record went: `records` is the sum of all other counts. Raises EclectusError if it is not.

    divided: the documents as `split` made them. Excluded are documents of other or uncertain languages, or over their
    language's budget.
    """
    copies = (divided or documents).statistics.get("copies_excluded", 0)
    statistics = ingested.statistics
    codes, names = read_codes(documents, "split")
    split = dict(zip(names, np.bincount(codes, minlength=len(names)).tolist(), strict=True))
    train = codes == (names.index("train") if "train" in names else -1)
    order = pq.read_table(grouping.file("order.parquet"), columns=["row"])["row"].to_numpy()
    near = pq.read_table(grouping.file("duplicates.parquet"), columns=["row"])["row"].to_numpy()
    accounts = {
        "records": statistics["documents"] + statistics["rejected"] + statistics["duplicates"],
        "rejected": statistics["rejected"],
        "exact duplicates": statistics["duplicates"],
        "near-duplicates": int(train[near].sum()),
        "grouped for training": int(train[order].sum()),
        "held out": split.get("heldout", 0),
        "copies across the split": copies,
        "set apart": split.get("apart", 0) - copies,
    }
    if sum(accounts.values()) != 2 * accounts["records"]:
        raise EclectusError(f"the counts of {documents.name} and {grouping.name} do not add up: {accounts}")
    return accounts


def _subtitle(accounts: dict[str, int]) -> str:
    kept, total = accounts["grouped for training"], accounts["records"]
    return f"{count(total)} records read, {count(kept)} grouped for training ({100 * kept / max(1, total):.1f}%)."


def _accounts_table(accounts: dict[str, int]) -> Table:
    total = max(1, accounts["records"])
    rows = [
        [Cell(SHOWN_AS.get(name, name)), Cell(count(number)), Cell(f"{100 * number / total:.1f}%")]
        for name, number in [*list(accounts.items())[1:], ("all records", accounts["records"])]
    ]
    note = (
        "Copies across the split are in neither: near-duplicates of held-out documents, or of training documents in "
        "held-out works. Excluded: of another or an uncertain language, or over a language's budget."
    )
    return Table("Where every record went", ["", "records", "share"], rows, last=True, note=note)


def _lengths_table(documents: Artifact) -> Table:
    language, languages = read_codes(documents, "language")
    group, groups = read_codes(documents, "group")
    size_N = np.concatenate([read_part_table(path, ["bytes"])["bytes"].fill_null(0) for path in parts(documents)])
    language[np.array([name in ("", "other") for name in groups] or [False])[group]] = -1
    rows = []
    for number, name in enumerate(languages):
        here = size_N[language == number]
        if len(here):
            spread = np.quantile(here, QUANTILES, method="lower")
            rows.append([Cell(language_name(name)), Cell(count(len(here))), *(Cell(size(each)) for each in spread)])
    head = ["language", "documents", "shortest tenth", "median", "longest tenth", "longest"]
    return Table("Lengths", head, rows, note="Of documents in the chosen languages, held-out ones included.")


def _shares_table(divided: Artifact) -> Table | None:
    """What is held out of each language, and the deviations from the setting."""
    shares = divided.statistics.get("shares")
    if not shares:
        return None
    rows = [
        [
            Cell(language_name(language)),
            *(Cell(count(each[name])) for name in ("documents", "pages", "works", "heldout")),
            Cell(f"{100 * each['share']:.1f}%"),
        ]
        for language, each in shares.items()
    ]
    head = ["language", "documents", "near-duplicates once", "works", "held out", "share"]
    deviations = divided.statistics["deviations"]
    note = "Deviating from the setting: " + "; ".join(deviations) if deviations else "As set, to a document or two"
    return Table("Held out", head, rows, note=f"{note}. Works are held out whole, and near-duplicates once.")


def _rejected_table(ingested: Artifact) -> Table | None:
    rejected = pq.read_table(ingested.file("rejected.parquet"))
    if len(rejected) == 0:
        return None
    rows = [
        [
            Cell(f"{each['file']}, line {each['line']}" if each["line"] else each["file"]),
            Cell(each["reason"], each["detail"]),
        ]
        for each in rejected.slice(0, SHOWN_REJECTED).to_pylist()
    ]
    reasons = ", ".join(f"{reason} {count(n)}" for reason, n in ingested.statistics["rejected_by_reason"].items())
    return Table("Rejected", ["where", "why"], rows, note=f"The first of {count(len(rejected))}: {reasons}.")


def _passed_over_table(ingested: Artifact) -> Table | None:
    """Files of the sources' folders that were not read, by reason; earlier artifacts do not know them."""
    passed = ingested.statistics.get("passed_over", {})
    if not passed.get("counts"):
        return None
    rows = []
    for why, number in passed["counts"].items():
        names = [name for name, reason in passed["files"].items() if reason == why]
        rows.append([Cell(why), Cell(count(number), ", ".join(names[:SHOWN_FILES]) + " ..." * (number > SHOWN_FILES))])
    return Table("Files that are not read", ["why", "files"], rows)


def _facts(grouping: Artifact, instances: dict[str, Artifact], replayed: Artifact | None) -> list[Facts]:
    def numbers(title: str, statistics: dict[str, Any]) -> Facts:
        facts = Facts(title)
        for name, value in statistics.items():
            if isinstance(value, int | float | str):
                facts.pairs.append((in_words(name), f"{value:.4g}" if isinstance(value, float) else str(value)))
        return facts

    facts = [numbers("Grouping", grouping.statistics)]
    facts += [numbers(f"Partition {shortened(each['partition'])}", each) for each in _largest(grouping)]
    for name, each in instances.items():
        quality = {key: value for key, value in each.statistics.items() if "similarity" in key or "purity" in key}
        facts.append(numbers(f"Instances, {name}", quality))
    if replayed is not None:
        facts.append(numbers("Replay for the review", replayed.statistics))
    return [each for each in facts if each.pairs]


def _largest(grouping: Artifact) -> list[dict[str, Any]]:
    """What is known of the partitions of the most documents, in their order."""
    partitions = grouping.statistics.get("partitions", [])
    least = sorted((each["grouped"] for each in partitions), reverse=True)[:SHOWN_PARTITIONS][-1:]
    return [each for each in partitions if least and each["grouped"] >= least[0]][:SHOWN_PARTITIONS]


def _chains(documents: Artifact, grouping: Artifact, settings: DataReportSettings) -> dict[str, list[Excerpt]]:
    """The first documents of some chains, drawn with the seed, as evenly over partitions as possible."""
    order = pq.read_table(
        grouping.file("order.parquet"),
        columns=["row", "chain", "partition", "similarity"],
        read_dictionary=["partition"],
    )
    chain = order["chain"].to_numpy()
    if len(chain) == 0:
        return {}
    starts = np.flatnonzero(np.diff(chain, prepend=-1))
    starts = starts[np.diff(np.append(starts, len(chain))) > 1]
    partitions = codes_of(order["partition"])[0][starts]
    draw = np.random.default_rng([settings.seed, 4]).permutation(len(starts))
    # The turn of each chain is its rank among the drawn ones of its partition.
    by_partition = np.argsort(partitions[draw], kind="stable")
    sizes = np.bincount(partitions)
    turn = np.zeros(len(starts), np.int64)
    turn[draw[by_partition]] = np.arange(len(draw)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    chosen = sorted(draw[np.argsort(turn[draw], kind="stable")][: settings.data_report_chains])
    shown = {}
    for start in starts[chosen]:
        part = order.slice(start, settings.data_report_documents)
        part = part.filter(pc.equal(part["chain"], part["chain"][0]))
        partition, documents_there = shortened(str(part["partition"][0])), int((chain == chain[start]).sum())
        title = f"Chain {part['chain'][0]}, {partition}, {documents_there} documents"
        similarities = [None, *part["similarity"].to_pylist()[1:]]
        shown[title] = _excerpts(documents, part["row"].to_numpy(), similarities)
    return shown


def _duplicates(documents: Artifact, grouping: Artifact) -> dict[str, list[Excerpt]]:
    """The near-duplicates that overlap least, which are the likeliest mistakes."""
    columns = ["row", "duplicate_of_row", "similarity", "overlap"]
    table = pq.read_table(grouping.file("duplicates.parquet"), columns=columns)
    table = table.sort_by([("overlap", "ascending"), ("row", "ascending")])
    return {
        f"cosine {each['similarity']:.3f}, overlap {each['overlap']:.3f}": _excerpts(
            documents, np.array([each["duplicate_of_row"], each["row"]]), [None, None], ["kept: ", "dropped: "]
        )
        for each in table.slice(0, SHOWN_DUPLICATES).to_pylist()
    }


def _excerpts(
    documents: Artifact, rows: np.ndarray, similarities: list[float | None], prefixes: list[str] | None = None
) -> list[Excerpt]:
    names = read_rows(documents, rows, ["document", "name", "domain"]).to_pylist()
    excerpts = []
    for number, (about, text) in enumerate(zip(names, TextReader(documents).read(rows), strict=True)):
        title = (prefixes[number] if prefixes else "") + ", ".join(
            shortened(each) for each in (about["name"] or about["document"], about["domain"] or "unknown")
        )
        if similarities[number] is not None:
            title += f", similarity to the previous {similarities[number]:.3f}"
        shown = readable(text).strip()
        excerpts.append(Excerpt(title, shown[:SHOWN_CHARACTERS] + ("…" if len(shown) > SHOWN_CHARACTERS else "")))
    return excerpts


def _page(contents: DataContents) -> str:
    return render("data.html.j2", contents=contents, colours={})


def _markdown(contents: DataContents) -> str:
    parts = [
        "# Data report",
        safe(contents.subtitle),
        *map(table_markdown, contents.tables),
        *map(facts_markdown, contents.facts),
    ]
    for title, groups in (("Chains to read", contents.chains), ("Near-duplicates to check", contents.duplicates)):
        if groups:
            parts.append(f"## {title}")
        for name, excerpts in groups.items():
            lines = [f"1. {safe(each.about)}: {safe(each.text)}" for each in excerpts]
            parts.append("\n".join([f"**{safe(name)}**", "", *lines]))
    return "\n\n".join(parts) + "\n"
