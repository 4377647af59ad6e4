"""Comparisons of two models: pairs of documents and seeds, works, and what an interval says that it covers."""

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eclectus.storage.artifact import Artifact
from eclectus.storage.errors import EclectusError
from eclectus.tasks.evaluation.changes import compare
from eclectus.tasks.evaluation.scores import Scores, read_trainings
from eclectus.tasks.evaluation.task_scores import Answers, compare_answers
from tests.support.made_up_scores import made_up


def trained(tmp_path, name, by_training, **more):
    """Scores of a model with one training for each row of bits per document."""
    first, *others = (
        made_up(tmp_path, f"{name} {number}", bits, **more) for number, bits in enumerate(np.atleast_2d(by_training))
    )
    return replace(first, name=name, repeats={number + 1: each for number, each in enumerate(others)})


def works_of(scores, works):
    return replace(scores, work=np.array(works, object))


def test_the_interval_is_that_of_numerical_derivatives_by_work(tmp_path):
    """A reference with other means: derivatives of the log ratio by each work's weight, over explicit loops."""
    draw = np.random.default_rng(0)
    works = [f"w{number}" for number in draw.integers(0, 8, 60)]
    hard = draw.uniform(2, 6, 60)
    before, after = made_up(tmp_path, "dense", hard), made_up(tmp_path, "lory", hard * draw.uniform(0.8, 1.1, 60))
    before = works_of(replace(before, bytes=draw.uniform(100, 900, 60)), works)
    after = replace(after, bytes=before.bytes)
    names = sorted(set(works))

    def log_ratio(weights):
        weight = np.array([weights[names.index(work)] for work in works])
        return np.log((weight * after.bits).sum() / (weight * before.bits).sum())

    influences, step = [], 1e-5
    for number in range(len(names)):
        bump = np.zeros(len(names))
        bump[number] = step
        influences.append((log_ratio(1 + bump) - log_ratio(1 - bump)) / (2 * step))
    shares = [before.bytes[[work == name for work in works]].sum() / before.bytes.sum() for name in names]
    squares = sum(share**2 for share in shares)
    variance = sum(d**2 / (1 - 2 * s + squares) for d, s in zip(influences, shares, strict=True))
    change = compare(before, after)
    assert (change.works, change.documents, change.trainings) == (len(names), 60, 1)
    assert change.bits == pytest.approx(np.expm1(log_ratio(np.ones(len(names)))))
    low, high = np.log1p(change.bits_interval)
    from scipy import stats

    # At least Student's interval with the most degrees of freedom that there could be, on both sides.
    least = stats.t.ppf(0.975, len(names) - 1) * variance**0.5
    assert np.log1p(change.bits) - low >= least and high - np.log1p(change.bits) >= least
    assert high - low < 6 * least


def test_pieces_of_one_work_count_once(tmp_path):
    draw = np.random.default_rng(1)
    effect = np.repeat(draw.normal(0, 0.3, 8), 25)
    before, after = made_up(tmp_path, "dense", np.full(200, 4.0)), made_up(tmp_path, "lory", 4 + effect)
    works = np.repeat([f"w{number}" for number in range(8)], 25)
    alone, together = compare(before, after), compare(works_of(before, works), after)
    assert (alone.works, together.works, together.documents) == (200, 8, 200)
    assert np.ptp(together.bits_interval) > 4 * np.ptp(alone.bits_interval)
    # 25 equal pieces tell what one of them tells.
    ones = compare(made_up(tmp_path, "a", np.full(8, 4.0)), made_up(tmp_path, "b", 4 + effect[::25]))
    assert together.bits_interval == pytest.approx(ones.bits_interval)
    assert together.perplexity_interval == pytest.approx(ones.perplexity_interval)


def test_one_work_has_no_interval_and_is_never_clear(tmp_path):
    before, after = made_up(tmp_path, "dense", [4.0, 5.0, 6.0]), made_up(tmp_path, "lory", [3.0, 4.0, 5.0])
    change = compare(works_of(before, ["w"] * 3), after)
    assert change.bits == pytest.approx(-0.2) and change.works == 1
    assert change.bits_interval is change.perplexity_interval is change.p is None
    assert change.retention_interval is change.gain_interval is None and not change.clear


def test_trainings_are_paired_by_seed_and_their_spread_widens_the_interval(tmp_path):
    draw = np.random.default_rng(2)
    hard = draw.uniform(3, 5, 40)
    luck = np.array([[1.0], [1.05], [0.94]])
    # Each seed moves both models alike: as pairs they differ by 10% and 1% of luck.
    before = trained(tmp_path, "dense", hard * luck)
    after = trained(tmp_path, "lory", hard * luck * np.array([[0.9], [0.91], [0.89]]) * draw.uniform(0.99, 1.01, 40))
    change = compare(before, after)
    assert (change.trainings, change.single, change.of_method) == (3, "", True)
    assert change.covers == "over 40 works and 3 trainings"
    assert change.bits == pytest.approx(0.9 - 1, abs=0.01) and change.clear
    assert change.spread == pytest.approx(np.std(np.log([0.9, 0.91, 0.89]), ddof=1), rel=0.1)
    crossed = replace(after, repeats={2: after.repeats[1], 1: after.repeats[2]})
    assert np.ptp(compare(before, crossed).bits_interval) > 3 * np.ptp(change.bits_interval)
    one = compare(before.first, after.first)
    assert one.covers == "on these documents, one training" and one.spread is None and not one.of_method
    assert np.ptp(one.bits_interval) < np.ptp(change.bits_interval)


def test_a_model_without_repeats_stands_in_every_pair_and_is_named(tmp_path):
    hard = np.linspace(3, 5, 30)
    base = trained(tmp_path, "dense", hard)
    after = trained(tmp_path, "stage 2", hard * np.array([[0.7], [0.72], [0.71]]))
    change = compare(base, after)
    assert change.trainings == 3 and not change.of_method
    assert change.covers == "over 30 works and 3 trainings (one of dense)"
    others = replace(after, repeats={7: after.repeats[1], 8: after.repeats[2]})
    assert compare(after, others).trainings == 1  # no seed in common but the first


def test_the_same_method_with_two_seeds_is_clear_in_one_training_and_not_over_several(tmp_path):
    """Five trainings of one method: of the pairs of single ones most look clear; of two groups of them none is."""
    draw, clear, many = np.random.default_rng(4), 0, 0
    for number in range(40):
        place = tmp_path / str(number)
        place.mkdir()
        hard = draw.uniform(3, 5, 100)
        seeds = np.exp(draw.normal(0, 0.008, (6, 1)) + draw.normal(0, 0.01, (6, 100)))
        one, two = (trained(place, name, hard * seeds[at : at + 3]) for name, at in (("one", 0), ("two", 3)))
        clear += compare(one.first, two.first).clear
        many += compare(one, two).clear
    assert clear >= 20 and many <= 5


def written(tmp_path, name, bits, work=None):
    place = tmp_path / name
    place.mkdir()
    columns = {
        "document": [f"d{number}" for number in range(len(bits))], "language": ["en"] * len(bits),
        "domain": ["law"] * len(bits), "group": ["original"] * len(bits), "bits": bits, "bytes": [4.0] * len(bits),
        "tokens": [1] * len(bits),
    }  # fmt: skip
    pq.write_table(pa.table(columns | ({"work": work} if work else {})), place / "documents.parquet")
    return Artifact("evaluation", name.replace(" ", "-"), str(place))


def test_further_trainings_are_read_by_name_and_evaluations_without_works_fall_back_to_documents(tmp_path):
    new = written(tmp_path, "new", [2.0, 4.0], ["w", "w"])
    old = written(tmp_path, "old", [2.2, 4.4])
    scores = read_trainings({"lory": new, "dense seed 1": new}, {"lory seed 1": old, "lory seed -2": new})
    assert list(scores["lory"].trainings) == [None, 1, -2] and list(scores["dense seed 1"].trainings) == [None]
    assert scores["lory"].bits_per_byte() == pytest.approx(np.mean([0.75, 0.825, 0.75]))
    assert scores["lory"].spread() == pytest.approx(np.std(np.log([1, 1.1, 1]), ddof=1))
    assert scores["lory"].first.spread() is None and scores["lory"].perplexity() > scores["lory"].first.perplexity()
    assert list(scores["lory"].works) == ["w", "w"] and list(Scores.read("old", old).works) == ["d0", "d1"]
    with pytest.raises(EclectusError, match="'lory again' names no training; expected a model and its seed"):
        read_trainings({"lory": new}, {"lory again": old})


def answers(tmp_path, name, values):
    place = tmp_path / name
    place.mkdir()
    rows = {"task": "t", "metric": "acc", "item": range(len(values)), "value": values}
    pq.write_table(
        pa.table(rows | {each: [rows[each]] * len(values) for each in ("task", "metric")}), place / "items.parquet"
    )
    score = {"task": ["t"], "metric": ["acc"], "score": [float(np.mean(values))], "items": [len(values)]}
    score |= {"missing": [0], "shots": [0], "version": ["1"]}
    pq.write_table(pa.table(score), place / "scores.parquet")
    (place / "about.json").write_text(json.dumps({}))
    return Answers(name, Artifact("evaluation", name, str(place)))


def test_answers_are_compared_over_questions_with_few_questions_wide(tmp_path):
    right = np.array([1.0, 0, 0, 1, 0, 0, 1, 0])
    one, two = answers(tmp_path, "one", right), answers(tmp_path, "two", np.array([1.0, 1, 0, 1, 1, 0, 1, 0]))
    found = compare_answers(one, two, "t")
    assert found.change == pytest.approx(0.25) and found.items == 8
    assert found.interval[0] < 0 < found.interval[1] and not found.clear and found.p > 0.05
    assert compare_answers(answers(tmp_path, "x", [1.0]), answers(tmp_path, "y", [0.0]), "t").interval is None
