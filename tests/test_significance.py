"""Signed-rank tests and Holm's correction against their definitions."""

import itertools
import math

import numpy as np
import pytest

from aldm.significance import MIN_SUBJECTS, holm, holm_texts, signed_rank_p


def naive_signed_rank(differences: np.ndarray) -> float:
    """Share of all sign patterns whose rank sum is at least as far from the middle as the observed one."""
    ranks = np.argsort(np.argsort(np.abs(differences))) + 1
    middle = ranks.sum() / 2
    observed = abs(ranks[differences > 0].sum() - middle)
    patterns = np.array(list(itertools.product((0, 1), repeat=len(ranks))))
    return float(np.mean(np.abs(patterns @ ranks - middle) >= observed))


def naive_holm(p_values: list[float]) -> list[float]:
    """The smallest level at which the step-down procedure rejects each hypothesis, from its definition."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    factors = {index: len(p_values) - place for place, index in enumerate(order)}
    return [
        min(1.0, max(factors[other] * p_values[other] for other in order[: order.index(index) + 1]))
        for index in range(len(p_values))
    ]


@pytest.mark.parametrize("shift", [0.0, 0.5, 2.0])
def test_the_p_value_counts_sign_patterns(shift: float) -> None:
    differences = np.random.default_rng(3).normal(shift, 1, 9)
    assert signed_rank_p(differences) == pytest.approx(naive_signed_rank(differences))
    assert signed_rank_p(-differences) == pytest.approx(signed_rank_p(differences))


def test_holm_is_its_definition_in_any_order() -> None:
    rng = np.random.default_rng(0)
    for size in (1, 2, 7):
        for _ in range(20):
            values = list(rng.uniform(0, 0.4, size) ** 2)
            np.testing.assert_allclose(holm(values), naive_holm(values))
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])  # by hand
    assert holm([]).size == 0


def test_equal_columns_are_no_win() -> None:
    assert signed_rank_p([0.0] * 20) == 1.0
    assert holm_texts({"same": signed_rank_p([0.0] * 20)}) == ({"same": "1.000"}, "p (Holm, 1 comparison)")


def test_too_few_subjects_have_no_number() -> None:
    assert next(n for n in range(1, 20) if naive_signed_rank(np.arange(1.0, n + 1)) < 0.05) == MIN_SUBJECTS
    assert math.isnan(signed_rank_p([1.0] * 5))
    assert signed_rank_p(np.arange(1.0, 7.0)) == pytest.approx(2 / 2**6)
    texts, heading = holm_texts({"few": math.nan, "a": 0.0002, "b": 0.03})
    assert texts == {"few": "cannot be significant (fewer than 6 subjects)", "a": "< 0.001", "b": "0.030"}
    assert heading == "p (Holm, 2 comparisons)"
    assert holm_texts({"few": math.nan})[1] == "p"
