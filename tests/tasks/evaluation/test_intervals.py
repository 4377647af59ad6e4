"""Intervals: coverage by simulation, arithmetic against references that share no code, significance of many cells."""

import numpy as np
import pytest
from scipy import stats

from eclectus.tasks.evaluation.intervals import Estimate, _over_works, estimate, holm, strata_of

SIZES = {
    "1 to 30": lambda draw, shape: draw.integers(1, 31, shape),
    "few large": lambda draw, shape: np.clip(np.ceil(draw.pareto(1.0, shape)), 1, 30).astype(int),
    "independent": lambda draw, shape: np.ones(shape, int),
}
# Effects of mean 0 and standard deviation 1; the last is skewed, as where one model fails on some works.
EFFECTS = {
    "normal": lambda draw, shape: draw.normal(0, 1, shape),
    "heavy": lambda draw, shape: draw.standard_t(4, shape) / 2**0.5,
    "skewed": lambda draw, shape: draw.exponential(1, shape) - 1,
}


def simulate(works, sizes, effects, runs, draw):
    """(bits before, bytes, bits after) of two models: sums over pieces [runs, works], and the pieces [N].

    Pieces have lognormal lengths and difficulties; those of a work are alike in difficulty and in the difference.
    """
    count = SIZES[sizes](draw, runs * works)
    total = count.sum()
    size = np.exp(draw.normal(0, 0.8, total))
    rate = np.exp(np.repeat(draw.normal(0, 0.2, runs * works), count) + draw.normal(0, 0.15, total))
    difference = np.repeat(EFFECTS[effects](draw, runs * works), count) + draw.normal(0, 0.5, total)
    pieces = [size * rate, size, size * rate * np.exp(0.05 * difference)]
    starts = np.cumsum(count) - count
    return [np.add.reduceat(each, starts).reshape(runs, works) for each in pieces], pieces


def truth(sizes, effects):
    """The log ratio of the population, from 200,000 works."""
    (before, _, after), _ = simulate(200_000, sizes, effects, 1, np.random.default_rng(99))
    return np.log(after.sum() / before.sum())


def from_works(before, size, after):
    """The estimate from sums [runs, works], as tasks/evaluation/changes.py makes it."""
    totals = [each.sum(-1, keepdims=True) for each in (before, size, after)]
    value = np.log(totals[2] / totals[0])
    return estimate(value, (after / totals[2] - before / totals[0])[:, None], size / totals[1])


def coverage(found: Estimate, value):
    low, high = found.interval()
    return ((low <= value) & (value <= high)).mean()


@pytest.mark.parametrize("effects", EFFECTS)
@pytest.mark.parametrize("sizes", SIZES)
def test_a_95_percent_interval_covers_the_truth_with_few_and_uneven_works(sizes, effects):
    value, draw = truth(sizes, effects), np.random.default_rng(0)
    covered = {}
    for works in (5, 6, 10, 20, 50):
        sums, _ = simulate(works, sizes, effects, 40_000 // works, draw)
        covered[works] = coverage(from_works(*sums), value)
    assert min(covered.values()) >= 0.93, covered


@pytest.mark.parametrize("effects", EFFECTS)
def test_what_differs_between_languages_and_domains_is_no_chance(effects):
    """Four strata of 2 to 12 works, with effects of 0 to -50%: covered, by intervals a third as wide as pooled."""
    draw, counts, shifts = np.random.default_rng(7), (2, 4, 8, 12), (0.0, -0.1, -0.3, -0.7)
    strata, runs, sums, population = np.repeat(range(4), counts), 2000, [], []
    for works, shift in zip(counts, shifts, strict=True):
        (before, size, after), _ = simulate(works, "1 to 30", effects, runs, draw)
        sums.append((before, size, after * np.exp(shift)))
        (before, size, after), _ = simulate(50_000, "1 to 30", effects, 1, np.random.default_rng(8))
        population.append(works * np.array([before.mean(), (after * np.exp(shift)).mean()]))
    before, after = np.sum(population, axis=0)
    before_R, size_R, after_R = (np.concatenate(each, axis=1) for each in zip(*sums, strict=True))
    totals = [each.sum(-1, keepdims=True) for each in (before_R, size_R, after_R)]
    given = np.log(totals[2] / totals[0]), (after_R / totals[2] - before_R / totals[0])[:, None], size_R / totals[1]
    # The truth for the text at hand: every stratum's own effect at its share of this text.
    part = np.stack([before_R[:, strata == each].sum(-1) for each in range(4)], axis=1) / totals[0]
    effect = np.log([two / one for one, two in population])
    truth_R = np.log((part * np.exp(effect)).sum(-1))
    found = estimate(*given, strata)
    low, high = found.interval()
    assert ((low <= truth_R) & (truth_R <= high)).mean() >= 0.93
    wide = estimate(*given).interval()
    assert np.median(high - low) < np.median(wide[1] - wide[0]) / 3


def test_strata_of_one_work_are_joined_within_their_language_first():
    languages = ["en", "en", "en", "en", "el", "el", "tr"]
    domains = ["law", "law", "code", "novels", "help", "law", "help"]
    found = strata_of(languages, domains)
    assert found[0] == found[1] and found[2] == found[3] != found[0]
    assert found[4] == found[5] == found[6], "one Turkish work: with the smallest other stratum"
    assert min(np.bincount(found)) >= 2
    assert len(set(strata_of(["en"] * 3, ["a", "b", "b"]))) == 1
    assert strata_of(["en"], ["a"]).tolist() == [0]


def test_pieces_taken_for_independent_documents_cover_far_too_little():
    value, draw, hits = truth("1 to 30", "normal"), np.random.default_rng(1), 0
    for _ in range(200):
        _, pieces = simulate(10, "1 to 30", "normal", 1, draw)
        hits += coverage(from_works(*(each[None] for each in pieces)), value)
    assert hits / 200 < 0.8


@pytest.mark.parametrize("trainings", [2, 3, 5])
@pytest.mark.parametrize("works", [10, 50])
def test_an_interval_over_several_trainings_covers_the_methods_difference(trainings, works):
    """Seeds move whole models, by 1.2% in bits, and what they do to single works."""
    draw, value = np.random.default_rng(trainings), truth("1 to 30", "heavy")
    for of_model, of_work in ((0.012, 0.0), (0.012, 0.02), (0.001, 0.02)):
        (before, size, after), _ = simulate(works, "1 to 30", "heavy", 1000, draw)
        shares, moved = size / size.sum(-1, keepdims=True), []
        for each in (before, after):
            luck = draw.normal(0, of_model, (1000, trainings, 1)) + draw.normal(0, of_work, (1000, trainings, works))
            moved.append(each[:, None] * np.exp(luck))
        totals = [each.sum(-1, keepdims=True) for each in moved]
        influences, values = moved[1] / totals[1] - moved[0] / totals[0], np.log(totals[1] / totals[0])[..., 0]
        assert coverage(estimate(values, influences, shares), value) >= 0.93, (of_model, of_work)
        if of_model > 0.01 and works == 50:
            alone = estimate(values[:, :1], influences[:, :1], shares)
            assert coverage(alone, value) < 0.9  # one training does not tell what another would give


def test_variance_freedom_and_ends_are_those_of_a_reference_with_matrices_and_loops():
    draw = np.random.default_rng(3)
    for works in (2, 3, 7, 40):
        shares = draw.pareto(0.7, works) + 0.01
        shares /= shares.sum()
        influences = shares * draw.normal(0, 1, works)
        influences -= shares * influences.sum()
        found = estimate(np.array([0.3]), influences[None], shares)
        # Effects u with variance 1: the estimated variance is u' A u; Satterthwaite: trace(A)^2 / trace(A A).
        centre = np.eye(works) - np.outer(np.ones(works), shares)
        left = np.diag(centre @ centre.T)
        quadratic = centre.T @ np.diag(shares**2 / left) @ centre
        freedom = np.trace(quadratic) ** 2 / np.trace(quadratic @ quadratic)
        assert np.trace(quadratic) == pytest.approx((shares**2).sum())  # unbiased
        assert found.freedom == pytest.approx(freedom, rel=1e-6)
        effects = influences / shares
        assert found.error**2 == pytest.approx(effects @ quadratic @ effects)
        error = (effects @ quadratic @ effects) ** 0.5
        skewness = 1.5 * sum(d**3 / h**1.5 for d, h in zip(influences, left, strict=True)) / error**3
        student, normal = stats.t.ppf(0.975, freedom), stats.norm.ppf(0.975)
        cubic = [skewness**2 / 27, skewness / 3, 1, skewness / 6]
        roots = [
            next(root.real for root in np.roots([*cubic[:3], cubic[3] - at]) if abs(root.imag) < 1e-9)
            for at in (normal, -normal)
        ]
        low, high = found.interval()
        assert low == pytest.approx(0.3 - error * student * max(1, roots[0] / normal))
        assert high == pytest.approx(0.3 + error * student * max(1, -roots[1] / normal))


def test_equal_works_give_students_interval_and_p_of_the_paired_t_test():
    change = np.array([-0.3, -0.1, 0.2, 0.5, 0.7])  # symmetric about 0.2: without skewness
    shares = np.full(5, 0.2)
    found = estimate(change.mean(keepdims=True), ((change - change.mean()) * shares)[None], shares)
    expected = stats.ttest_1samp(change, 0)
    assert found.freedom == pytest.approx(4)
    assert found.interval() == pytest.approx(expected.confidence_interval(0.95))
    assert found.p() == pytest.approx(expected.pvalue)


def test_p_is_the_level_at_which_the_interval_touches_zero():
    shares, draw = np.array([0.5, 0.2, 0.2, 0.1]), np.random.default_rng(0)
    influences = draw.normal(0, 0.02, (3, 4))
    influences -= influences.mean(1, keepdims=True)
    found = estimate(np.array([0.02, 0.05, 0.04]), influences, shares)
    low, high = found.interval(float(found.p()))
    assert min(abs(low), abs(high)) < 1e-9


def test_two_works_one_of_which_is_nearly_everything_have_one_degree_of_freedom():
    for largest in (0.5, 0.9, 1 - 1e-6):
        shares = np.array([largest, 1 - largest])
        assert _over_works(np.zeros(2), shares)[1] == pytest.approx(1)
    assert _over_works(np.zeros(3), np.array([1 - 2e-6, 1e-6, 1e-6]))[1] == pytest.approx(1)


def test_equal_models_differ_by_nothing_and_equal_ratios_have_a_point_as_interval():
    shares = np.full(6, 1 / 6)
    same = estimate(np.zeros(1), np.zeros((1, 6)), shares)
    assert same.p() == pytest.approx(1) and same.interval() == pytest.approx((0, 0), abs=1e-10)
    shifted = estimate(np.full(3, -0.1), np.zeros((3, 6)), shares)
    assert shifted.p() < 1e-10 and shifted.interval() == pytest.approx((-0.1, -0.1))


def test_holm_is_the_step_down_procedure_and_skips_what_was_not_tested():
    assert holm([0.01, None, 0.04, 0.03]) == [True, False, False, False]
    assert holm([0.001, 0.02, 0.04]) == [True, True, True]
    assert holm([0.049]) == [True] and holm([]) == [] and holm([None]) == [False]
    draw = np.random.default_rng(5)
    wrong = sum(any(holm(list(draw.uniform(0, 1, 30)))) for _ in range(1000))
    assert 25 <= wrong <= 75  # of tables without any difference one in twenty has a coloured cell
