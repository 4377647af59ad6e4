"""A local deployment as a user meets it: `eclectus up`, the form, a run that is cancelled, one that ends, `down`.

A real server, worker and Ray, and real mouse and keys in headless Chromium. Screenshots of the pages, 1440 pixels
wide and some 390, go to $ECLECTUS_SCREENSHOTS if that names a folder, else to pytest's temporary folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from playwright.sync_api import Error, JSHandle, Page, TimeoutError

from eclectus.flows.parameters import MORE_FIELD, PARAMETERS
from eclectus.flows.services.ports import free_port
from eclectus.storage.home import Home
from eclectus.storage.lineage.connection import query
from tests.support.browser import BROWSER, HEIGHT, open_browser
from tests.support.small_world import LENGTH, make_world, texts

ROOT = Path(__file__).parents[3]
# Seconds to wait for a page: a busy machine may take long. A page that never comes is kept as a screenshot, lost.png.
PATIENCE = 150
CANCELLED_WITHIN = 30
# Ray Train's coordinator is one for the whole cluster and outlives runs by design; it ends with `down`.
OF_THE_CLUSTER = ("ray::_AutoscalingCoordinatorActor",)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.alone,
    pytest.mark.timeout(600),
    pytest.mark.skipif(BROWSER is None, reason="there is no Chromium"),
]

# The form's fields: label, help, and what is in the field as a list of words.
FIELDS = """[...document.querySelectorAll('label')].map(label => {
  let box = label;
  while (box && !box.querySelector('fieldset')) box = box.parentElement;
  if (!box || [...box.querySelectorAll('label')].filter(each => each.innerText.trim()).length != 1) return null;
  const toggle = box.querySelector('[role=switch]'), choice = box.querySelector('.p-select-button__value');
  const values = toggle ? [toggle.getAttribute('aria-checked')]
    : choice ? [choice.innerText.trim()]
    : [...box.querySelectorAll('textarea, input')].map(each => each.value);
  const help = box.querySelector('article')?.innerText.trim();
  return {label: label.innerText.trim().replace(' (Optional)', ''), box, values, help};
}).filter(Boolean)"""
SHOWN = f"{FIELDS}.map(field => [field.label, field.help, field.values])"

PROGRESS = "document.body.innerText.match(/Progress: ([0-9.]+)/)?.[1]"
TWO_FRAMES = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"


def elements(kinds: str, text: str) -> str:
    """Those of these kinds that have a line which is just this text."""
    return (
        f"[...document.querySelectorAll({json.dumps(kinds)})].filter(each => "
        f"each.innerText.split('\\n').some(line => line.trim() == {json.dumps(text)}))"
    )


@dataclass
class User:
    """A user at a browser."""

    page: Page
    ui: str
    pictures: Path

    def goes_to(self, address: str, width: int = 1440) -> None:
        # A page of Prefect's may hang when its size changes.
        self.page.goto("about:blank")
        self.page.set_viewport_size({"width": width, "height": HEIGHT})
        self.page.goto(self.ui + address)

    def clicks(self, kinds: str, text: str) -> None:
        self._clicks(f"{elements(kinds, text)}[0]")

    def submits(self) -> None:
        """Until the form is left: while it takes in the last field, a click on its button may do nothing."""
        left = f"location.pathname !== {json.dumps(self.page.evaluate('location.pathname'))}"
        end = time.monotonic() + PATIENCE
        while not self.page.evaluate(left):
            assert time.monotonic() < end, "the form was not submitted"
            self.clicks("button", "Submit")
            with contextlib.suppress(TimeoutError):
                self.page.wait_for_function(left, timeout=20_000)

    def opens_run(self, name: str) -> None:
        """A list that is being filled may move under the mouse; the page that comes then lists the run too."""
        there, end = "location.pathname.includes('/flow-run/')", time.monotonic() + PATIENCE
        while not self.page.evaluate(there):
            assert time.monotonic() < end, f"the page of the run {name} never came"
            self.clicks("a", name)
            with contextlib.suppress(TimeoutError):
                self.page.wait_for_function(there, timeout=10_000)

    def sees(self, *texts: str) -> None:
        for text in texts:
            self.waits(f"document.body.innerText.includes({json.dumps(text)})")

    def waits(self, expression: str):
        """What the expression gives as soon as that is true; while a page is being built it may fail."""
        return self._finds(expression).json_value()

    def chooses_tab(self, name: str, until: str) -> None:
        """until: true when the tab shows what it should. A page that is still loading goes back to its first tab."""
        chosen = "document.querySelector('[role=tabpanel]')?.getAttribute('aria-labelledby')"
        end = time.monotonic() + PATIENCE
        while not self.page.evaluate(until):
            if self.page.evaluate(chosen) != name.lower().replace(" ", "-"):
                self.clicks("[role=tablist] li", name)
            with self._picture_when_lost():
                assert time.monotonic() < end, f"the page never came to: {until}"
            time.sleep(0.1)

    def opens_artifact(self, name: str) -> None:
        """The list draws only what is in view, so its end is brought there until the artifact is drawn."""
        card = elements(".flow-run-artifacts a", name)
        bottom = "document.querySelector('.flow-run-artifacts')?.lastElementChild"
        self.chooses_tab("Artifacts", f"{card}.length || ({bottom}?.scrollIntoView({{block: 'end'}}), false)")
        self.clicks(".flow-run-artifacts a", name)

    def names_the_run(self, name: str) -> None:
        self._types(f"{elements('label', 'Run Name')}[0]?.parentElement.parentElement.querySelector('input')", name)

    def fills(self, label: str, value: str) -> None:
        field = f"{FIELDS}.find(field => field.label == {json.dumps(label)})"
        self._types(f"{field}?.box.querySelector('textarea, input')", value)

    def _types(self, element: str, value: str) -> None:
        """Replaces what is in a field: all letters at once, and again if the page lost them while it was drawn anew."""
        there, end = f"{element}.value == {json.dumps(value)}", time.monotonic() + PATIENCE
        while True:
            self._clicks(element)
            self.page.keyboard.press("Control+a")
            self.page.keyboard.insert_text(value)
            with contextlib.suppress(TimeoutError):
                self.page.wait_for_function(there, timeout=10_000)
                return
            with self._picture_when_lost():
                assert time.monotonic() < end, f"the field never had: {value}"

    def strikes_out(self, label: str, value: str) -> None:
        """Removes one item of a list."""
        field = f"{FIELDS}.find(field => field.label == {json.dumps(label)})"
        item = f"[...{field}.box.querySelectorAll('textarea')].find(each => each.value == {json.dumps(value)})"
        self._clicks(f"{item}.parentElement.parentElement.querySelector('button')")
        self.waits(f"!{field}.values.includes({json.dumps(value)})")

    def keeps_picture(self, name: str) -> None:
        """Of what is in view, when it has been drawn."""
        self.page.evaluate(TWO_FRAMES)
        self.page.screenshot(path=self.pictures / f"{name}.png")

    def _finds(self, expression: str) -> JSHandle:
        with self._picture_when_lost():
            # Asked in every frame, a long expression would leave the page no time to build itself.
            return self.page.wait_for_function(
                f"() => {{ try {{ return {expression} }} catch {{ return null }} }}",
                timeout=PATIENCE * 1000,
                polling=200,
            )

    def _clicks(self, element: str) -> None:
        """Finds it anew when the page draws it anew under the mouse."""
        end = time.monotonic() + PATIENCE
        while True:
            try:
                return self._finds(element).as_element().click(timeout=10_000)
            except Error as error:
                # Prefect's note that its server was slow to answer lies over the buttons.
                self.page.evaluate("document.querySelectorAll('.p-toast__card').forEach(note => note.remove())")
                with self._picture_when_lost():
                    assert time.monotonic() < end, f"{element} could not be clicked: {error}"

    @contextlib.contextmanager
    def _picture_when_lost(self):
        try:
            yield
        except (AssertionError, TimeoutError):
            self.keeps_picture("lost")
            raise


@dataclass
class Services:
    home: Path
    printed: str
    notes: dict
    sources: Path
    base: str

    def processes(self) -> dict[int, str]:
        """Command lines of all processes that have this home in their environment, whoever their parents are."""
        found = {}
        for each in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if each.environ().get("ECLECTUS_HOME") == str(self.home) and each.status() != psutil.STATUS_ZOMBIE:
                    found[each.pid] = " ".join(each.cmdline())
        return found

    def runs(self) -> list[tuple[str, str]]:
        """(flow, state) of the runs in the lineage database, oldest first."""
        return query("select flow, state from runs order by started", Home.open(self.home))[1]


def eclectus(home: Path, *words: str) -> str:
    foreign = ("PREFECT_", "RAY_", "ECLECTUS_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    # Ray's own niceness (15) would leave its workers almost no CPU while other tests run.
    environment |= {"ECLECTUS_HOME": str(home), "RAY_worker_niceness": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "eclectus", *words], cwd=ROOT, env=environment,
        capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{words} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def services(tmp_path_factory):
    folder = tmp_path_factory.mktemp("services")
    world = make_world(folder / "world")
    sources = folder / "documents.jsonl"
    sources.write_text("\n".join(json.dumps(row) for row in texts()))
    home = folder / "home"
    try:
        printed = eclectus(home, "up")
        notes = json.loads((home / "prefect" / "services.json").read_text())
        yield Services(home, printed, notes, sources, world.models["dense"].path)
    finally:
        eclectus(home, "down")


@pytest.fixture(scope="module")
def user(services, tmp_path_factory):
    kept = os.environ.get("ECLECTUS_SCREENSHOTS")
    pictures = Path(kept) if kept else tmp_path_factory.mktemp("screenshots")
    pictures.mkdir(parents=True, exist_ok=True)
    with open_browser() as browser:
        page = browser.new_page(reduced_motion="reduce")
        # The printed address logs the browser in.
        page.goto(re.search(r"http://\S+", services.printed)[0])
        page.wait_for_url(f"{services.notes['ui']}/**")
        yield User(page, services.notes["ui"], pictures)


def test_up_prints_one_line_with_the_address_where_all_deployments_are(services, user):
    (line,) = services.printed.splitlines()
    assert f"{user.ui}/" in line
    user.goes_to("/deployments")
    user.sees(f"{len(PARAMETERS)} Deployments")
    for name in PARAMETERS:
        user.waits(f"{elements('a', name)}.length >= 1")
    user.keeps_picture("1-deployments")
    user.goes_to("/deployments", width=390)
    user.sees(f"{len(PARAMETERS)} Deployments")
    user.keeps_picture("1-deployments-390")


def test_every_field_of_the_form_explains_itself_and_has_a_working_default(user):
    model, names = PARAMETERS["extend"], basic_settings()
    opens_the_form(user)
    *shown, more = user.page.evaluate(SHOWN)
    assert [label for label, _, _ in shown] == [name.replace("_", " ").title() for name in names]
    assert [label for label, _, _ in shown][:2] == ["Sources", "Base Model"]
    assert more == [MORE_FIELD["title"], MORE_FIELD["description"], [""]]
    for name, (_, explained, values) in zip(names, shown, strict=True):
        field = model.model_fields[name]
        assert explained == field.description
        default = ["data/corpus"] if name == "sources" else field.default
        if isinstance(default, bool):
            assert values == [str(default).lower()], name
        elif isinstance(default, int | float):
            assert [float(value) for value in values] == [default], name
        else:
            assert values == (default if isinstance(default, list) else [default]), name
    user.keeps_picture("2-form")


def test_a_run_is_watched_and_cancelled_with_all_its_processes_within_30_seconds(services, user):
    before = services.processes()
    opens_the_form(user)
    user.names_the_run("Long")
    user.fills("Sources", str(services.sources))
    user.fills("Base Model", services.base)
    for language in ("hu", "tr"):
        user.strikes_out("Expanded Languages", language)
    user.fills("Post Pretrain Steps", "60000")
    user.fills("Review Steps", "20")
    user.fills("More Settings", "log_every: 2\nheldout_minimum: 10")
    user.fills("Instance Tokens", str(LENGTH))
    user.keeps_picture("3-filled-in")
    user.submits()
    user.opens_run("Long")
    user.chooses_tab("Task Runs", f"{elements('a', 'train stage 1')}.length")
    user.sees("fetch", "upcycle")
    user.keeps_picture("4-steps")
    page = user.page.evaluate("location.pathname")
    user.opens_artifact("train-stage-1-progress")
    first = float(user.waits(PROGRESS))
    # Prefect's page of an artifact does not renew itself; the ring in the run's graph does.
    end = time.monotonic() + PATIENCE
    while (later := float(user.waits(PROGRESS))) <= first:
        assert time.monotonic() < end, f"the progress stays at {first}"
        user.page.reload()
    assert later < 100
    user.keeps_picture("5-progress")

    user.goes_to(page, width=390)
    user.waits(f"{elements('header', 'Running')}.length && {elements('header a', 'extend')}.length")
    user.keeps_picture("4-steps-390")
    user.goes_to(page)
    user.waits(f"{elements('header', 'Running')}.length")
    assert any("ray::" in words for words in orphans(services, before).values())
    user.clicks("header button", "Cancel")
    user.keeps_picture("6-cancel")
    user.clicks(".p-modal button", "Confirm")
    clicked = time.monotonic()
    while left := orphans(services, before):
        assert time.monotonic() < clicked + CANCELLED_WITHIN, left
        time.sleep(0.1)
    print(f"nothing of the run lives {time.monotonic() - clicked:.1f} s after the click")
    user.waits(f"{elements('header', 'Cancelled')}.length")
    user.keeps_picture("7-cancelled")
    assert services.runs() == [("extend", "cancelled")]


def test_a_copy_of_it_with_fewer_steps_goes_on_and_ends_with_tables_pictures_and_a_report_that_opens(services, user):
    user.goes_to("/runs")
    user.opens_run("Long")
    user.waits(f"{elements('header', 'Cancelled')}.length")
    user.clicks("header .p-icon-button-menu button", "")
    user.clicks("button, a", "Copy to new run")
    waits_for_the_form(user)
    user.waits(f"{FIELDS}[1].values[0] == {json.dumps(services.base)}")
    user.names_the_run("Short")
    user.fills("Post Pretrain Steps", "30")
    user.submits()
    user.opens_run("Short")
    user.waits(f"{elements('header', 'Completed')}.length")
    page = user.page.evaluate("location.pathname")

    user.chooses_tab("Artifacts", f"{elements('a', 'ray-dashboard')}.length")
    user.keeps_picture("8-artifacts")
    user.opens_artifact("steps")
    user.sees("17 Items", "reused", "train stage 1")
    user.keeps_picture("9-table")
    user.goes_to(page)
    user.opens_artifact("train-stage-1-loss")
    user.waits("document.querySelector('main img, .artifact-data-image img')?.naturalWidth > 300")
    user.keeps_picture("10-picture")
    user.goes_to(page)
    user.opens_artifact("open-data-report")
    user.waits(f"{elements('a', 'open data_report')}.length")
    # The browser would open another tab, which this one does not see.
    user.page.evaluate(f"{elements('a', 'open data_report')}[0].removeAttribute('target')")
    user.clicks("a", "open data_report")
    user.sees(f"{len(texts())} records read")
    assert user.page.evaluate("location.pathname").endswith("/data.html")
    user.keeps_picture("11-report")
    assert services.runs() == [("extend", "cancelled"), ("extend", "completed")]


def test_down_leaves_no_process_and_frees_the_port(services, user):
    assert services.processes()
    assert "the Prefect server" in eclectus(services.home, "down")
    assert services.processes() == {}
    port = int(user.ui.rpartition(":")[2])
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0
    assert free_port(port) == port
    assert not Path(services.notes["ray"]).exists()


def orphans(services, before):
    """What runs now and did not run before, but for what belongs to the cluster."""
    now = services.processes()
    return {pid: words for pid, words in now.items() if pid not in before and not words.startswith(OF_THE_CLUSTER)}


def opens_the_form(user):
    user.goes_to("/deployments")
    user.clicks("a", "extend")
    user.clicks("button", "Run")
    user.clicks("a, button", "Custom run")
    waits_for_the_form(user)


def waits_for_the_form(user):
    """It is drawn piece by piece."""
    user.waits(f"{FIELDS}.length > {len(basic_settings())}")


def basic_settings():
    """Names of the settings of `extend` that have a field of their own, in the form's order."""
    model = PARAMETERS["extend"]
    return [name for names in model.grouped().values() for name in names if model.is_basic(name)]
