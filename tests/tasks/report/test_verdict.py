"""The verdict on made-up scores: changes, their intervals, sentences; the lineage graph."""

import re
from dataclasses import replace

import numpy as np
import pytest

from eclectus.storage.lineage.history import Made
from eclectus.tasks.evaluation.changes import compare
from eclectus.tasks.evaluation.scores import divergence
from eclectus.tasks.report.forgetting import forgetting_table
from eclectus.tasks.report.graph import draw_lineage
from eclectus.tasks.report.tables import scores_by_domain, scores_by_language, seen_table
from eclectus.tasks.report.verdict import Comparer, make_verdict
from tests.support.made_up_scores import made_up


def test_a_change_is_relative_and_its_interval_is_that_of_the_difference(tmp_path):
    hard = np.linspace(2, 8, 60)
    before, after = made_up(tmp_path, "dense", hard), made_up(tmp_path, "lory", hard * 0.9)
    change = compare(before, after)
    assert change.bits == pytest.approx(-0.1)
    assert change.bits_interval == pytest.approx((-0.1, -0.1))  # paired: documents differ, the difference does not
    assert change.perplexity == pytest.approx(2 ** (-0.1 * hard.mean()) - 1)
    assert change == compare(before, after)


@pytest.mark.parametrize(
    ("factor", "word", "tone"),
    [
        (0.9, "scores better than", "good"),
        (1.1, "scores worse than", "bad"),
        (1.0, "does not differ clearly from", "even"),
    ],
)
def test_the_verdict_on_lory_follows_the_numbers(tmp_path, factor, word, tone):
    nats = np.linspace(3, 5, 40)
    scores = {"dense": made_up(tmp_path, "dense", nats), "lory": made_up(tmp_path, "lory", nats * factor)}
    verdict = make_verdict(Comparer(scores))
    assert f"This training of Lory {word} its dense twin on held-out English text" in verdict.sentences[0]
    assert [tile.tone for tile in verdict.tiles] == [tone]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ({}, "English text: "),
        ({"dense": (0, 0.004), "lory": (0, 0.002)}, "text that neither was trained on (0.4% of its passages"),
        ({"dense": (0, 0.0), "lory": (1, 0.2)}, "of which they were trained on some (20% of its passages"),
        ({"dense": (0, 0.0)}, "English text: "),
    ],
)
def test_text_counts_as_not_trained_on_only_where_it_was_compared_and_not_seen(tmp_path, rows, words):
    nats = np.linspace(3, 5, 40)
    scores = {name: made_up(tmp_path, name, nats) for name in ("dense", "lory")}
    overlap = {
        name: {
            ("group", "original"): {
                "items": 40, "seen": seen, "mean_passages": passages, "score": 5.0, "score_unseen": 5.1
            }
        }
        for name, (seen, passages) in rows.items()
    }  # fmt: skip
    unknown = [name for name in scores if name not in rows]
    verdict = make_verdict(Comparer(scores, overlap=overlap, uncompared=unknown))
    assert words in verdict.sentences[0]
    assert any("is not in the lineage" in note for note in verdict.notes) == bool(unknown)
    table = seen_table(Comparer(scores, overlap=overlap))
    assert (table is None) == (not rows)
    if table:
        cells = [cell.text for cell in table.rows[0]]
        assert cells[0] == "original languages" and table.rows[0][4].small == "all: 5.000"


def test_the_verdict_on_an_extension_says_what_was_learned_and_what_was_kept(tmp_path):
    group = ["original"] * 20 + ["expanded"] * 20
    nats = {"dense": [4.0] * 20 + [8.0] * 20, "stage 1": [5.0] * 20 + [4.0] * 20, "stage 2": [4.1] * 20 + [4.2] * 20}
    scores = {name: made_up(tmp_path, name, values, group, ["hu"]) for name, values in nats.items()}
    verdict = make_verdict(Comparer(scores), frozen=False)
    assert (
        "This extension learned Greek: bits per byte went 2.000 (dense base) → 1.000 (stage 1) → 1.050 (stage 2)"
        in verdict.sentences[0]
    )
    assert "Of English, 97.6% is kept after stage 2" in verdict.sentences[1]
    assert "after stage 1 it was 80.0%, so the review recovered 17.6 points" in verdict.sentences[1]
    assert "NOT those of the dense base" in verdict.sentences[2]
    assert [tile.tone for tile in verdict.tiles] == ["good", "bad"]
    assert verdict.notes[0] == "No held-out text in Hungarian is long enough to be scored."
    assert "train with several seeds" in verdict.notes[1] and len(verdict.notes) == 2


def test_divergence_is_zero_for_equal_routing_and_one_for_disjoint():
    assert divergence({"a": [0.5, 0.5], "b": [0.5, 0.5]}) == 0
    assert divergence({"a": [1.0, 0.0], "b": [0.0, 1.0]}) == pytest.approx(1)
    assert divergence({"a": [1.0, 0.0]}) == 0


def test_the_graph_leaves_out_lines_that_others_imply_and_escapes_labels():
    def make(name, inputs):
        return Made(name, "checkpoint", "s", f"<{name}>", {}, {i: i for i in inputs}, {})

    made = {"a": make("a", []), "b": make("b", ["a"]), "c": make("c", ["a", "b"])}
    drawn = str(draw_lineage(made, {"c": "the model"}))
    assert drawn.count("<path") == 2
    assert drawn.count("<rect") == 3
    assert "&lt;a&gt;" in drawn and "<a>" not in drawn
    assert 'class="checkpoint model"' in drawn
    assert str(draw_lineage({}, {})) == ""


def test_a_collapsed_router_raises_an_alarm(tmp_path):
    scores = made_up(tmp_path, "stage 2", [3.0] * 8)
    dead = [
        {"layer": 1, "language": "en", "domain": domain, "expert": e, "share": 0.97 if e == 2 else 0.01, "routed": 5}
        for domain in ("code", "law")
        for e in range(4)
    ]
    scores.__dict__["routing"] = dead
    verdict = make_verdict(Comparer({"stage 2": scores}))
    assert verdict.notes[0].startswith("Router collapse: stage 2 sends nearly all tokens to one expert in layer 1")


def with_repeats(tmp_path, name, bits, factors):
    """Scores of a model with one training for each factor on its bits."""
    first, *others = (made_up(tmp_path, f"{name} {number}", bits * by) for number, by in enumerate(factors))
    return replace(first, name=name, repeats=dict(enumerate(others, 1)))


def test_words_claim_a_method_only_from_several_trainings_of_both_models(tmp_path):
    hard = np.linspace(3, 5, 40)
    dense = with_repeats(tmp_path, "dense", hard, (1, 1.01, 0.99))
    lory = with_repeats(tmp_path, "lory", hard * np.linspace(0.89, 0.91, 40), (1, 1.012, 0.992))
    one = make_verdict(Comparer({"dense": dense.first, "lory": lory.first}))
    assert one.sentences[0].startswith("This training of Lory scores better than its dense twin")
    assert re.search(r"\(95% interval \S+ to \S+ on these documents, one training\)", one.sentences[0])
    assert one.tiles[0].detail.endswith("on these documents, one training")
    several = make_verdict(Comparer({"dense": dense, "lory": lory}))
    assert several.sentences[0].startswith("Lory scores better than its dense twin")
    assert "over 40 works and 3 trainings; standard deviation between trainings 0." in several.sentences[0]
    assert not any("several seeds" in note for note in several.notes)
    mixed = make_verdict(Comparer({"dense": dense.first, "lory": lory}))
    assert mixed.sentences[0].startswith("This training of Lory") and "3 trainings (one of dense)" in mixed.sentences[0]


def test_a_difference_within_the_spread_of_the_trainings_is_no_finding(tmp_path):
    hard = np.linspace(3, 5, 40)
    dense = with_repeats(tmp_path, "dense", hard, (1, 1.03, 0.98))
    lory = with_repeats(tmp_path, "lory", hard * 0.98, (0.99, 0.98, 1.04))
    alone = make_verdict(Comparer({"dense": dense.first, "lory": lory.first}))
    together = make_verdict(Comparer({"dense": dense, "lory": lory}))
    assert alone.tiles[0].tone == "good" and together.tiles[0].tone == "even"
    assert together.sentences[0].startswith("Lory does not differ clearly from its dense twin")


def test_pieces_of_few_works_are_said_to_be_and_one_work_gives_no_interval(tmp_path):
    scores = {
        "dense": made_up(tmp_path, "dense", np.full(20, 4.0)),
        "lory": made_up(tmp_path, "lory", np.full(20, 3.9)),
    }
    works = {name: replace(each, work=np.array(["a", "b"] * 10, object)) for name, each in scores.items()}
    verdict = make_verdict(Comparer(works))
    assert "The 20 documents are pieces of 2 works; intervals are over works." in verdict.notes
    one = {name: replace(each, work=np.array(["a"] * 20, object)) for name, each in scores.items()}
    verdict = make_verdict(Comparer(one))
    assert "(no interval: all text is of one work)" in verdict.sentences[0] and verdict.tiles[0].tone == "even"
    assert forgetting_table(Comparer(one), {}).rows[0][2].small == "one work: no interval"


def test_cells_of_a_table_are_coloured_by_holm_over_all_of_them(tmp_path):
    """Each of 20 models differs by luck alone: some are clear one by one, none is coloured in the table."""
    draw = np.random.default_rng(8)
    scores = {"dense": made_up(tmp_path, "dense", np.full(30, 4.0))}
    for number in range(20):
        scores[f"m{number}"] = made_up(tmp_path, f"m{number}", 4 + draw.normal(0, 0.2, 30))
    comparer = Comparer(scores)
    assert any(comparer.change(name).clear for name in scores if name != "dense")
    tables = [scores_by_language(comparer), scores_by_domain(comparer), forgetting_table(comparer, {})]
    for table, comparisons in zip(tables, (20, 60, 20), strict=True):
        assert {cell.tone for row in table.rows for cell in row} <= {"", "even"}
        assert f"significant at 5% by Holm over {comparisons} comparisons" in table.note
        assert "on these documents, one training" in table.note
    verdict = make_verdict(comparer)
    assert {tile.tone for tile in verdict.tiles} == {"even"}


def test_a_table_shows_the_mean_over_trainings_beside_their_spread(tmp_path):
    hard = np.linspace(3, 5, 40)
    dense = with_repeats(tmp_path, "dense", hard, (1, 1.02, 0.98))
    table = scores_by_language(Comparer({"dense": dense, "lory": made_up(tmp_path, "lory", hard)}))
    assert table.rows[0][1].text == f"1.000 ± {np.std(np.log([1, 1.02, 0.98]), ddof=1):.3f}"
    assert table.rows[0][2].text == "1.000"
    assert "over works and 3 trainings" in table.note and "mean ± their standard deviation" in table.note
