"""Gains and forgetting: each model against the base, for every language and task, with 95% intervals.

Languages are compared in bits per byte on the documents that both models scored, tasks in their main metric on the
items that both answered; both by a paired bootstrap. *Kept* is 100% if nothing was lost; *saved* is the relative
reduction in bits.
"""

from __future__ import annotations

from eclectus.tasks.documents.language_codes import language_name
from eclectus.tasks.evaluation.task_scores import Answers, compare_answers
from eclectus.tasks.report.formatting import count, interval, number, percent
from eclectus.tasks.report.tables import Cell, Table
from eclectus.tasks.report.verdict import RETAINED, Comparer


def forgetting_table(comparer: Comparer, answers: dict[str, Answers]) -> Table | None:
    """One row per language and per task, one column per model; None if there is no model besides the base."""
    base = comparer.base.name
    others = [name for name in comparer.scores if name != base]
    if not others:
        return None
    rows = [
        _language_row(comparer, others, group, code)
        for group in ("original", "expanded")
        for code in comparer.base.values("language", group=group)
    ]
    rows += [_task_row(comparer, answers, others, task) for task in _tasks(answers.get(base))]
    note = (
        f"Against {base}. Original languages: how much is kept ({base}'s bits per byte divided by the model's). "
        "Expanded languages: relative reduction in bits. Tasks: difference in points. Below each value: the 95% "
        "interval of a paired bootstrap over documents or items. Coloured if the change is significant (for what is "
        f"kept: good from {RETAINED}% on)."
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
        cells += [_score_cell(each, task) for each in answers.values()]
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
        "Measured with lm-evaluation-harness. Below each score: its standard error. Seen in training: the share of "
        "questions whose words occur in training documents, for the model with the largest share. Items that a model "
        "could not answer do not count in its score."
    )
    return Table("Tasks", ["task", *answers, "seen in training", "items"], rows, False, note)


def _score_cell(answers: Answers, task: str) -> Cell:
    row = answers.scores.get(task)
    if row is None:
        return Cell("not run", answers.about["left_out"].get(task, ""))
    spread = f"± {row['standard_error']:.3f}" if row["standard_error"] is not None else ""
    return Cell(number(row["score"]) or "none", spread)


def _tasks(answers: Answers | None) -> list[str]:
    return list(answers.scores) if answers else []


def _language_row(comparer: Comparer, others: list[str], group: str, code: str) -> list[Cell]:
    base = comparer.base.bits_per_byte(language=code)
    cells = [Cell(language_name(code), group), Cell(number(base), "bits per byte")]
    for name in others:
        change = comparer.change(name, language=code)
        if change is None:
            cells.append(Cell("no text"))
            continue
        if group == "original":
            kept, ends = 100 * change.retention, [100 * end for end in change.retention_interval]
            tint = "even" if not change.clear else "good" if kept >= RETAINED else "bad"
            cells.append(Cell(f"{kept:.1f}% kept", f"{ends[0]:.1f}% to {ends[1]:.1f}%", number(change.after), tint))
        else:
            tint = "even" if not change.clear else "good" if change.bits < 0 else "bad"
            word = "saved" if change.bits <= 0 else "lost"
            cells.append(
                Cell(
                    f"{abs(100 * change.bits):.1f}% {word}", interval(change.bits_interval), number(change.after), tint
                )
            )
    return [*cells, Cell(count(int(comparer.base.where(language=code).sum())))]


def _task_row(comparer: Comparer, answers: dict[str, Answers], others: list[str], task: str) -> list[Cell]:
    row = answers[comparer.base.name].scores[task]
    cells = [Cell(task, row["metric"]), Cell(number(row["score"]) or "none")]
    for name in others:
        found = (
            compare_answers(answers[comparer.base.name], answers[name], task, comparer.resamples, comparer.seed)
            if name in answers
            else None
        )
        if found is None:
            cells.append(Cell("not known"))
            continue
        better = (found.change > 0) == row["higher_is_better"]
        tint = "even" if not found.clear else "good" if better else "bad"
        kept = f"{found.kept:.1f}% kept" if found.kept is not None else ""
        points = percent(found.change).removesuffix("%")
        low, high = (percent(end).removesuffix("%") for end in found.interval)
        cells.append(Cell(f"{points} points", f"{low} to {high}", kept, tint))
    return [*cells, Cell(count(row["items"]))]
