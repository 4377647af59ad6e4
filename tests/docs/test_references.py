"""What must hold of README and docs as text: what they point at exists, and lines fit a screen."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob(".github/**/*.md")])
FOLDERS = ("flows", "tasks", "models", "storage", "tests", "benchmarks", "configs", "constraints", "deploy", "docs")
CODE = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*")) if path.suffix in (".py", ".md")]
WIDTH = 120

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def outside_fences(text):
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(page):
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.*)$", outside_fences(page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_reference_to_a_section_of_the_methods_points_at_a_heading():
    sections = set(re.findall(r"^#+ (\d(?:\.\d)?)\.? ", (ROOT / "docs/methods.md").read_text(), re.MULTILINE))
    missing = []
    for path in CODE:
        for reference in re.finditer(r"docs/methods\.md\s+(\d(?:\.\d)?(?:(?:, | and )\d\.\d)*)", path.read_text()):
            numbers = re.findall(r"\d(?:\.\d)?", reference[1])
            missing += [f"{path.relative_to(ROOT)}: {number}" for number in numbers if number not in sections]
    assert not missing


@pages
def test_links_lead_to_files_and_headings_that_exist(page):
    missing = []
    for target in re.findall(r"\]\(([^)\s]+)\)", outside_fences(page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        linked = (page.parent / name).resolve() if name else page
        if not linked.exists() or (anchor and anchor not in anchors(linked)):
            missing.append(target)
    assert not missing


@pages
def test_files_named_in_text_exist(page):
    missing = []
    for name in re.findall(r"`([\w./-]+)`", outside_fences(page.read_text())):
        # The example of a new step names the file that it would be.
        if name == "tasks/documents/count_words.py" or not name.startswith(tuple(f"{folder}/" for folder in FOLDERS)):
            continue
        if not (ROOT / name).exists():
            missing.append(name)
    assert not missing


@pages
def test_prose_is_at_most_120_columns_wide(page):
    lines = outside_fences(page.read_text()).split("\n")
    assert not [line for line in lines if len(line) > WIDTH and not line.lstrip().startswith(("|", "[!["))]
