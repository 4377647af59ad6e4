"""Gains and forgetting: each model against the base, for every language and task, with 95% intervals.

Languages are compared in bits per byte on the documents that both models scored, tasks in their main metric on the
items that both answered. *Kept* is 100% if nothing was lost; *saved* is the relative reduction in bits.
"""

from __future__ import annotations

from eclectus.tasks.documents.language_codes import language_name
from eclectus.tasks.evaluation.changes import Change
from eclectus.tasks.evaluation.task_scores import Answers, Difference, compare_answers, incomparable
from eclectus.tasks.report.formatting import count, interval, number, percent
from eclectus.tasks.report.significance import colour_note, coverage, significant
from eclectus.tasks.report.tables import Cell, Table
from eclectus.tasks.report.verdict import RETAINED, Comparer

ONE_WORK = "one work: no interval"


def forgetting_table(comparer: Comparer, answers: dict[str, Answers]) -> Table | None:
    """One row per language and per task, one column per model; None if there is no model besides the base."""
    base = comparer.base.name
    others = [name for name in comparer.scores if name != base]
    if not others:
        return None
    base_answers = answers.get(base)
    texts = [
        (group, code) for group in ("original", "expanded") for code in comparer.base.values("language", group=group)
    ]
    tasks = list(base_answers.scores) if base_answers else []
    changes = {(code, name): comparer.change(name, language=code) for _, code in texts for name in others}
    differences = {
        (task, name): compare_answers(base_answers, answers[name], task) if base_answers and name in answers else None
        for task in tasks
        for name in others
    }
    # Languages and tasks are keys of one dictionary: a family of comparisons is a whole table.
    found: dict[tuple[str, str, str], Change | Difference | None] = {
        **{("text", *key): change for key, change in changes.items()},
        **{("task", *key): difference for key, difference in differences.items()},
    }
    clear = significant(found)
    rows = []
    for group, code in texts:
        cells = [_language_cell(group, changes[code, name], clear["text", code, name]) for name in others]
        head = [
            Cell(language_name(code), group),
            Cell(number(comparer.base.bits_per_byte(language=code)), "bits per byte"),
        ]
        rows.append([*head, *cells, Cell(count(int(comparer.base.where(language=code).sum())))])
    for task in tasks:
        row = base_answers.scores[task] if base_answers else {}
        cells = [
            _task_cell(
                differences[task, name],
                clear["task", task, name],
                row["higher_is_better"],
                incomparable(base_answers, answers[name], task, row["metric"])
                if base_answers and name in answers
                else "",
            )
            for name in others
        ]
        rows.append(
            [Cell(task, row["metric"]), Cell(number(row["score"]) or "none"), *cells, Cell(count(row["items"]))]
        )
    note = (
        f"Against {base}. Original languages: how much is kept ({base}'s bits per byte divided by the model's). "
        "Expanded languages: relative reduction in bits. Tasks: difference in points. Below each value: its 95% "
        f"interval, for text {coverage(changes.values())}"
        f"{', for tasks on these questions, one training' if tasks else ''}. {colour_note(found.values())} "
        f"What is kept is good from {RETAINED}% on."
    )
    return Table("Gained and forgotten", ["", base, *others, "documents or items"], rows, False, note)


def tasks_table(answers: dict[str, Answers], seen: dict[str, dict[tuple[str, str], float]]) -> Table | None:
    """Scores of every model on every task, and the share of its questions that were seen in training."""
    names = list(dict.fromkeys(task for each in answers.values() for task in each.scores))
    if not names:
        return None
    rows = []
    for task in names:
        found = [each.scores[task] for each in answers.values() if task in each.scores]
        one = found[0]
        cells = [Cell(task, f"{language_name(one['language'])}, {one['metric']}, {one['shots']} examples")]
        first = next(each for each in answers.values() if task in each.scores)
        cells += [_score_cell(each, task, first) for each in answers.values()]
        shares = [each["task", task] for each in seen.values() if ("task", task) in each]
        cells.append(
            Cell(
                f"{100 * max(shares):.1f}%" if shares else "not known", tone="bad" if shares and max(shares) > 0 else ""
            )
        )
        short = max(row["cut"] for row in found)
        lost = max(row["missing"] for row in found)
        small = ", ".join(
            words for words in (f"{short} cut to fit" if short else "", f"{lost} not answered" if lost else "") if words
        )
        rows.append([*cells, Cell(count(one["items"]), small)])
    note = (
        "Measured with lm-evaluation-harness. Below each score: its standard error over questions, one "
        "training. Seen in training: the share of "
        "questions whose words occur in training documents, for the model with the largest share. Items that a model "
        "could not answer do not count in its score."
    )
    if any(row["imported"] for each in answers.values() for row in each.scores.values()):
        note += " Imported: lm-evaluation-harness was run elsewhere, and its result files were taken over."
    return Table("Tasks", ["task", *answers, "seen in training", "items"], rows, False, note)


def _score_cell(answers: Answers, task: str, first: Answers) -> Cell:
    """first: the model whose metric and number of examples the row names."""
    row = answers.scores.get(task)
    if row is None:
        return Cell("not run", answers.left_out.get(task, ""))
    words = [f"± {row['standard_error']:.3f}"] if row["standard_error"] is not None else []
    words += ["imported"] if row["imported"] else []
    if why := incomparable(first, answers, task, row["metric"]):
        words.append(f"not comparable: {why}")
    return Cell(number(row["score"]) or "none", ", ".join(words))


def _language_cell(group: str, change: Change | None, clear: bool) -> Cell:
    if change is None:
        return Cell("no text")
    if group == "original":
        kept, ends = 100 * change.retention, change.retention_interval
        tint = "even" if not clear else "good" if kept >= RETAINED else "bad"
        around = f"{100 * ends[0]:.1f}% to {100 * ends[1]:.1f}%" if ends else ONE_WORK
        return Cell(f"{kept:.1f}% kept", around, number(change.after), tint)
    tint = "even" if not clear else "good" if change.bits < 0 else "bad"
    word = "saved" if change.bits <= 0 else "lost"
    around = interval(change.bits_interval) if change.bits_interval else ONE_WORK
    return Cell(f"{abs(100 * change.bits):.1f}% {word}", around, number(change.after), tint)


def _bits_cell(found: Difference, tint: str) -> Cell:
    """The change of what should be small, relative to the base, as that of bits per byte."""
    if found.before <= 0:
        return Cell("not known")
    ends = [percent(end / found.before) for end in found.interval or ()]
    return Cell(percent(found.change / found.before), " to ".join(ends), number(found.after), tint)


def _task_cell(found: Difference | None, clear: bool, higher_is_better: bool, incomparable: str = "") -> Cell:
    if found is None:
        return Cell("not comparable", incomparable) if incomparable else Cell("not known")
    better = (found.change > 0) == higher_is_better
    if not higher_is_better:
        return _bits_cell(found, "even" if not clear else "good" if better else "bad")
    tint = "even" if not clear else "good" if better else "bad"
    kept = f"{found.kept:.1f}% kept" if found.kept is not None else ""
    points = percent(found.change).removesuffix("%")
    ends = [percent(end).removesuffix("%") for end in found.interval or ()]
    return Cell(f"{points} points", " to ".join(ends), kept, tint)
