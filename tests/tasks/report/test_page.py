"""The report: true to the numbers, whichever way they fall; one page that is whole offline; safe with any text."""

import json
import re
from html.parser import HTMLParser

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from eclectus.storage.errors import EclectusError
from eclectus.storage.home import Home
from eclectus.storage.journal import Journal
from eclectus.storage.lineage.history import read_history
from eclectus.storage.step_keys import KnownKeys
from eclectus.tasks.documents.ingest import IngestSettings, ingest
from eclectus.tasks.documents.languages import LanguageSettings, languages
from eclectus.tasks.documents.split import SplitSettings, split
from eclectus.tasks.evaluation.benchmark_rows import FIELDS, SCORE_FIELDS
from eclectus.tasks.evaluation.contamination import SHARE_FIELDS
from eclectus.tasks.evaluation.evaluate import EvaluateSettings, evaluate
from eclectus.tasks.packing.pack import PackSettings, pack
from eclectus.tasks.packing.tokenizer import TokenizerSettings, tokenizer
from eclectus.tasks.report.figures import loss_curves
from eclectus.tasks.report.report import ReportSettings, report
from eclectus.tasks.run import Run, activate
from eclectus.tasks.training.extend import extend
from eclectus.tasks.training.extend_settings import ExtendStageSettings
from eclectus.tasks.training.pretrain import pretrain
from eclectus.tasks.training.pretrain_settings import PretrainStageSettings
from eclectus.tasks.training.upcycle import UpcycleSettings, upcycle
from tests.support.browser import BROWSER, FilePage, open_browser
from tests.support.small_world import LENGTH, SEGMENT, texts

HOSTILE = "<script>alert(1)</script>|<b>docs</b>"
HOSTILE_TEXT = "{{ 7 * 7 }} <img src=x onerror=alert(2)> [a](javascript:alert(3)) </script>"


def in_run(home, name, work):
    """Calls `work` in a run of its own; (what it gave, what became of each step)."""
    with Journal(home.journal, name) as journal:
        journal.event(
            "run_started", flow="main", code_version="abc", python="3.11", packages={"torch": "2"}, parameters={}
        )
        run = Run(name, home, journal, KnownKeys(home.keys, home.store), flow="main")
        with activate(run):
            return work(), run.states


def whole_job(sources):
    """The real steps, on a corpus of a minute, in this process."""
    training = {
        "model_width": 16, "model_layers": 2, "model_heads": 2, "model_key_value_heads": 2, "model_feed_forward": 24,
        "lory_experts": 4, "lory_segment": SEGMENT, "pretrain_steps": 8, "pretrain_batch": 4, "dense_warmup": 0.25,
        "post_pretrain_steps": 4, "post_pretrain_batch": 4, "review_steps": 3, "review_batch": 4, "training_workers": 0,
        "log_every": 1, "lory_rewarm_steps": 2,
    }  # fmt: skip
    documents = ingest(settings=IngestSettings(sources=[str(sources)]))
    documents = languages(
        documents=documents, settings=LanguageSettings(language_detector="field", expanded_languages=["el"])
    )
    documents = split(documents=documents, settings=SplitSettings(heldout_fraction=0.2, heldout_minimum=2))
    tokens = tokenizer(documents=documents, settings=TokenizerSettings(tokenizer_vocabulary=400))
    instances = {
        name: pack(
            label=f"pack {name}", documents=documents, tokenizer=tokens,
            settings=PackSettings(pack_group=group, instance_tokens=LENGTH),
        )
        for name, group in {"original": "original", "expanded": "expanded", "review": "all"}.items()
    }  # fmt: skip

    def stage(name, start):
        settings = PretrainStageSettings(
            pretrain_stage=name, **{k: v for k, v in training.items() if k in PretrainStageSettings.model_fields}
        )
        return pretrain(
            label=f"train {name}", instances=instances["original"], tokenizer=tokens, start=start, settings=settings
        )

    def extension(name, of, start):
        chosen = {k: v for k, v in training.items() if k in ExtendStageSettings.model_fields}
        settings = ExtendStageSettings(extend_stage=name, original_languages=["en"], **chosen)
        return extend(label=f"train {name}", instances=instances[of], checkpoint=start, settings=settings)

    warm = stage("warmup", None)
    dense, lory = stage("dense", warm), stage("lory", warm)
    first = extension("post_pretrain", "expanded", upcycle(checkpoint=dense, settings=UpcycleSettings()))
    models = {"dense": dense, "lory": lory, "stage 1": first, "stage 2": extension("review", "review", first)}
    settings = EvaluateSettings(
        evaluation_context=SEGMENT, evaluation_prompt_tokens=58, evaluation_sample_tokens=4, training_workers=0
    )
    evaluations = {
        name: evaluate(label=name, documents=documents, tokenizer=tokens, checkpoint=model, settings=settings)
        for name, model in models.items()
    }
    given = {"checkpoints": models, "evaluations": evaluations, "documents": documents, "instances": instances}
    return given | {"page": report(**given, settings=ReportSettings(report_title=f"A report on {HOSTILE}"))}


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("job")
    rows = [
        {**row, "domain": HOSTILE, "text": HOSTILE_TEXT + row["text"]} if row["domain"] == "docs" else row
        for row in texts()
    ]
    lines = [json.dumps({key: row[key] for key in ("text", "language", "domain")}) for row in rows]
    (place / "corpus.jsonl").write_text("\n".join([*lines, lines[0], "this is no JSON"]))
    home = Home.open(place / "home")
    result, _ = in_run(home, "first", lambda: whole_job(place / "corpus.jsonl"))
    return result | {"home": home, "sources": place / "corpus.jsonl"}


@pytest.fixture(scope="module")
def page(job):
    return job["page"].file("report.html").read_text("utf-8")


class Elements(HTMLParser):
    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.texts, self.parts, self._inside, self._attributes = [], [], [], "", {}
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self._inside, self._attributes = tag, dict(attributes)
        self.tags.append((tag, self._attributes))
        self.parts.append((tag, self._attributes, ""))

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside not in ("script", "style"):
            self.texts.append(data)
            self.parts.append((self._inside, self._attributes, data))


def visible(page):
    return " ".join(" ".join(Elements(page).texts).split())


def test_the_page_reaches_for_nothing_outside_itself(page):
    elements = Elements(page).tags
    assert not [
        tag
        for tag, _ in elements
        if tag in ("link", "img", "iframe", "object", "embed", "base", "form", "audio", "video")
    ]
    addresses = [
        value for _, attributes in elements for key, value in attributes.items() if key in ("src", "href", "action")
    ]
    assert addresses and all(address.startswith("#") for address in addresses)
    policy = next(a["content"] for tag, a in elements if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "http" not in policy
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)[1]
    assert "url(" not in style and "@import" not in style and "prefers-color-scheme: dark" in style


def test_the_page_is_small(page):
    assert len(page.encode()) < 400_000


def charts(page):
    """By chart: the values that it shows on hover."""
    found, name = {}, None
    for tag, attributes, text in Elements(page).parts:
        if tag == "figure":
            name = attributes["id"]
        elif tag == "title" and name:
            found.setdefault(name, []).append(text)
    return found


def test_every_chart_is_on_the_page_with_its_values(page):
    shown = charts(page)
    assert {"by-domain", "by-language", "by-position", "loss-pretrain", "loss-extend", "expert-0"} <= set(shown)
    assert {"routing-0-0", "routing-0-1"} <= set(shown)
    assert all(shown.values()) and page.count('<svg class="chart"') == len(shown)
    ids = [attributes["id"] for _, attributes in Elements(page).tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_every_section_is_there_and_the_links_lead_to_them(page):
    elements = Elements(page).tags
    anchors = {attributes["id"] for tag, attributes in elements if tag == "h2"}
    assert anchors == {"scores", "training", "routing", "samples", "data", "lineage", "settings"}
    assert {a["href"][1:] for tag, a in elements if tag == "a"} == anchors


def test_texts_and_names_of_documents_and_settings_are_shown_and_never_obeyed(page):
    tags = [tag for tag, _ in Elements(page).tags]
    assert tags.count("script") == 1 and "img" not in tags
    assert "<script>alert(1)" not in page and "onerror=alert(2)>" not in page.replace("&gt;", "")
    shown = visible(page)
    assert f"A report on {HOSTILE}" in shown
    assert "<img src=x onerror=alert(2)>" in shown
    assert "{{ 7 * 7 }}" in shown


def test_the_markdown_twin_says_the_same_and_obeys_no_text_either(job):
    twin = job["page"].file("report.md").read_text("utf-8")
    plain = twin.replace("\\", "")
    for sentence in job["page"].statistics["verdict"]:
        assert sentence.replace("<", "&lt;").replace(">", "&gt;") in plain
    assert "<script" not in twin and "<img" not in twin and not re.search(r"(?<!\\)\]\(javascript", twin)
    table = next(line for line in twin.splitlines() if "script" in line and line.startswith("|"))
    assert len(re.findall(r"(?<!\\)\|", table)) == 7  # the bar in the domain's name opens no column


def test_pictures_lie_beside_the_page(job):
    for name in ("scores", "loss", "routing"):
        assert job["page"].file(f"pictures/{name}.png").read_bytes().startswith(b"\x89PNG")


def test_loss_curves_are_those_that_training_journalled(job, page):
    models = {name: checkpoint.digest for name, checkpoint in job["checkpoints"].items()}
    history = read_history(job["home"], "first", list(job["checkpoints"].values()))
    pretrain, extend = loss_curves(history, models)
    series = {each.name: each for each in pretrain.series}
    assert set(series) == {"dense", "lory", "train warmup"}
    assert series["train warmup"].x == (1, 2) and series["train warmup"].dash == "dotted"
    assert series["dense"].x == series["lory"].x == (3, 4, 5, 6, 7, 8)
    journalled = history.curves[models["lory"]]["loss"]
    assert list(zip(series["lory"].x, series["lory"].y, strict=True)) == journalled
    assert [each.name for each in extend.series] == ["stage 1", "stage 2"]
    shown = charts(page)["loss-pretrain"]
    assert all(f"lory, step {step}: {value:.3f}" in shown for step, value in journalled)


def test_a_later_run_reuses_everything_and_finds_the_same_history(job):
    again, states = in_run(job["home"], "second", lambda: whole_job(job["sources"]))
    assert set(states.values()) == {"reused"}
    assert again["page"] == job["page"]
    first, second = (read_history(job["home"], run, list(job["checkpoints"].values())) for run in ("first", "second"))
    assert second.made == first.made
    assert second.curves == first.curves


def test_the_same_report_written_twice_is_the_same_artifact(job):
    settings = ReportSettings(report_title=f"A report on {HOSTILE}")
    given = {name: job[name] for name in ("evaluations", "checkpoints", "documents", "instances")}

    def write():
        with job["home"].store.draft("report") as draft:
            report.function(**given, settings=settings, out=draft)
            return job["home"].store.commit(draft)

    assert in_run(job["home"], "first", write)[0].digest == job["page"].digest


def test_the_lineage_leads_from_the_models_to_the_sources(job):
    made = read_history(job["home"], "first", list(job["checkpoints"].values())).made
    assert next(iter(made.values())).step == "ingest"
    assert {each.label for each in made.values()} >= {
        "split",
        "pack original",
        "train warmup",
        "upcycle",
        "train review",
    }
    order = list(made)
    assert all(order.index(source) < order.index(each) for each in made for source in made[each].inputs.values())


def test_data_settings_and_versions_are_told(page):
    shown = visible(page)
    assert "rejected 1" in shown and "duplicates 1" in shown
    assert "rejected: not JSON 1" in shown or re.search(r"rejected: [\w ,]+ 1", shown)
    assert "largest logit difference at step 0" in shown
    assert "Every original weight is bit-identical after the extension." in shown
    assert "lory_segment" in shown and "torch" in shown


def test_further_trainings_of_a_model_are_in_its_means_and_in_what_intervals_cover(job):
    repeats = {
        f"{name} seed {seed}": job["evaluations"][other]
        for name, others in {"dense": ("dense", "stage 1"), "lory": ("lory", "stage 2")}.items()
        for seed, other in enumerate(others, 1)
    }
    given = {kind: {name: job[kind][name] for name in ("dense", "lory")} for kind in ("evaluations", "checkpoints")}
    with job["home"].store.draft("report") as draft:
        report.function(**given, documents=job["documents"], settings=ReportSettings(), out=draft, repeats=repeats)
        text = (draft.path / "report.md").read_text("utf-8")
        assert " works and 3 trainings" in draft.statistics["verdict"][0]
        assert draft.statistics["models"] == ["dense", "lory"]
    assert "±" in text and "over works and 3 trainings" in text


@pytest.mark.parametrize(
    "names", [["dense"], ["dense", "lory"], ["dense", "stage 1", "stage 2"], ["stage 2", "lory"], ["lory", "my model"]]
)
def test_any_models_make_a_report_and_outside_a_run_too(job, names, tmp_path):
    order = dict(zip(names, ["dense", "lory", "stage 1"], strict=False))
    with job["home"].store.draft("report") as draft:
        report.function(
            {name: job["evaluations"][other] for name, other in order.items()},
            {name: job["checkpoints"][other] for name, other in order.items()},
            job["documents"],
            ReportSettings(),
            draft,
        )
        page = (draft.path / "report.html").read_text("utf-8")
        assert draft.statistics["verdict"]
    assert ">Lineage</h2>" not in page
    shown = visible(page)
    assert all(name in shown for name in names)


def answered(job, right, left_out=None):
    """A made-up benchmark of 40 questions, of which the model knew the first `right`."""
    items = [
        {
            "task": "arc_easy",
            "language": "en",
            "item": n,
            "metric": "acc",
            "value": float(n < right),
            "answers": [],
            "cut": False,
        }
        for n in range(40)
    ]
    score = {
        "task": "arc_easy", "language": "en", "metric": "acc", "score": right / 40, "standard_error": 0.05, "items": 40,
        "missing": 0, "cut": 2, "shots": 5, "higher_is_better": True, "version": "1", "group": False,
    }  # fmt: skip
    with job["home"].store.draft("evaluation") as draft:
        for rows, fields, name in (([score], SCORE_FIELDS, "scores"), (items, FIELDS, "items")):
            table = pa.Table.from_pylist(rows, schema=pa.schema(list(fields.items())))
            pq.write_table(table, draft.file(f"{name}.parquet"))
        draft.file("about.json").write_text(json.dumps({"left_out": left_out or {}}))
        return job["home"].store.commit(draft)


def suspected(job, share):
    with job["home"].store.draft("evaluation") as draft:
        rows = [{"kind": "task", "name": "arc_easy", "items": 40, "seen": 4, "share": share, "score": 0.5}]
        rows.append({"kind": "language", "name": "el", "items": 9, "seen": 0, "share": 0.0, "score": 1.0})
        table = pa.Table.from_pylist(rows, schema=pa.schema(list(SHARE_FIELDS.items())))
        pq.write_table(table, draft.file("shares.parquet"))
        return job["home"].store.commit(draft)


def test_tasks_the_gate_and_what_was_seen_in_training_stand_on_the_page(job):
    names = ("dense", "stage 1", "stage 2")
    rules = [
        {"rule": "retention.en >= 0.99", "passed": False, "value": 0.9, "limit": 0.99, "reason": "0.9 is not >= 0.99"},
        {"rule": "collapsed_layers <= 0", "passed": True, "value": 0.0, "limit": 0.0, "reason": "0 is <= 0"},
    ]
    with job["home"].store.draft("evaluation") as draft:
        draft.statistics = {
            "line": "extended", "model": "stage 2", "passed": False, "rules": rules,
            "reason": "retention.en >= 0.99: 0.9 is not >= 0.99",
        }  # fmt: skip
        draft.file("decision.json").write_text(json.dumps(draft.statistics))
        decision = job["home"].store.commit(draft)
    benchmarks = {
        "dense": answered(job, 20, {"race": "no hub can be reached"}),
        "stage 1": answered(job, 10),
        "stage 2": answered(job, 21),
    }
    with job["home"].store.draft("report") as draft:
        report.function(
            {name: job["evaluations"][name] for name in names},
            {name: job["checkpoints"][name] for name in names},
            job["documents"],
            ReportSettings(report_left_out=["lory: its logits are not finite"]),
            draft,
            benchmarks=benchmarks,
            contaminations={"stage 2": suspected(job, 0.1)},
            gates={"extended": decision},
        )
        page = (draft.path / "report.html").read_text("utf-8")
        twin = (draft.path / "report.md").read_text("utf-8").replace("\\", "")
        tables = json.loads((draft.path / "tables.json").read_text("utf-8"))
    shown = visible(page)
    first = shown[: shown.index("Scores Training" if "Scores Training" in shown else "Scores Routing")]
    assert "stage 2 must not be promoted: retention.en >= 0.99: 0.9 is not >= 0.99." in first
    assert "1 of 2 rules hold" in first
    assert "Not evaluated: lory: its logits are not finite" in first and "task race: no hub can be reached" in first
    assert "−25.0 points" in shown and "50.0% kept" in shown and "+2.5 points" in shown
    assert "10.0%" in shown and "2 cut to fit" in shown and "5 examples" in shown
    assert "stage 2 must not be promoted" in twin and "Gained and forgotten" in twin
    gained = next(table for table in tables if table["title"] == "Gained and forgotten")
    assert any(row["stage 1"].startswith("−25.0 points") for row in gained["rows"])


def test_samples_and_routers_show_the_expert_weights_behind_them(page):
    assert "Routers of lory" in visible(page) and "specialisation, language" in visible(page)
    assert re.search(r"layer 0: 0\.\d\d 0\.\d\d 0\.\d\d 0\.\d\d", visible(page))


def test_no_evaluation_at_all_is_an_error(job):
    with job["home"].store.draft("report") as draft, pytest.raises(EclectusError, match="at least one evaluated model"):
        report.function({}, {}, job["documents"], ReportSettings(), draft)


@pytest.fixture(scope="module")
def browser():
    with open_browser() as opened:
        yield opened


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_real_browser_every_chart_is_drawn_and_nothing_leaves_the_page(job, browser, width, scheme):
    shown = FilePage(browser, job["page"].file("report.html"), width, scheme)
    sizes = shown.page.eval_on_selector_all(
        "svg.chart", "charts => charts.map(chart => [chart.clientWidth, chart.clientHeight])"
    )
    assert sizes and all(wide > 250 and high > 50 for wide, high in sizes)
    assert shown.fits_its_width()
    paper = shown.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(20, 24, 26)" if scheme == "dark" else "rgb(251, 251, 249)")
    label = shown.page.evaluate("getComputedStyle(document.querySelector('.chart text')).fill")
    assert label == shown.page.evaluate(
        "(() => { document.body.style.color = 'var(--soft)'; return getComputedStyle(document.body).color; })()"
    )
    assert shown.problems == [] and shown.outside_requests() == []


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_in_a_real_browser_a_value_is_shown_under_the_pointer(job, browser):
    shown = FilePage(browser, job["page"].file("report.html"), 1440)
    # Another model's curve may cover it; then both values are shown.
    shown.page.hover("#loss-pretrain .values circle >> nth=0", force=True)
    assert re.match(r"dense, step 3: \d\.\d{3}(\n|$)", shown.page.inner_text("output.value"))
    shown.page.hover("h1")
    assert shown.page.is_hidden("output.value")


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_without_javascript_the_charts_and_their_values_are_there(job, browser):
    shown = FilePage(browser, job["page"].file("report.html"), 390, script=False)
    assert shown.page.locator("svg.chart").count() == shown.page.locator("figure").count()
    assert shown.page.locator("#loss-pretrain .values title").first.text_content().startswith("dense, step 3: ")
