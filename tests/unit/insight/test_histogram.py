"""Histograms: exact counts, percentiles within a bucket, a bounded number of buckets, a moving window."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_infra_core.insight.rates import RecentHistogram
from agent_infra_core.protocol import Histogram

durations = st.floats(min_value=0, max_value=1e12, allow_nan=False)


def filled(values: list[float]) -> Histogram:
    histogram = Histogram()
    for value in values:
        histogram.add(value)
    return histogram


def test_an_empty_histogram_knows_nothing() -> None:
    histogram = Histogram()
    assert (histogram.count, histogram.mean_ms, histogram.percentile(0.5)) == (0, None, None)


@given(st.lists(st.floats(min_value=0.02, max_value=1e9), min_size=1), st.floats(min_value=0, max_value=1))
def test_a_percentile_is_off_by_half_a_bucket_at_most(values: list[float], q: float) -> None:
    exact = sorted(values)[max(0, math.ceil(q * len(values)) - 1)]
    assert filled(values).percentile(q) == pytest.approx(exact, rel=0.0452)


@given(st.lists(durations), st.lists(durations))
def test_merging_is_counting_everything_in_one(left: list[float], right: list[float]) -> None:
    merged = filled(left)
    merged.merge(filled(right))
    together = filled(left + right)
    assert merged.count == together.count
    assert merged.sum_ms == pytest.approx(together.sum_ms)
    assert [merged.percentile(q) for q in (0.0, 0.5, 1.0)] == [together.percentile(q) for q in (0.0, 0.5, 1.0)]


def test_the_number_of_buckets_is_bounded_whatever_comes() -> None:
    histogram = filled([10 ** (exponent / 50) for exponent in range(-1000, 600)])
    assert histogram.percentile(0.5) is not None
    assert len(histogram._buckets) + len(histogram._new) <= 295


def test_bucket_counts_of_another_process_are_added_as_they_are() -> None:
    histogram = Histogram()
    histogram.add_buckets({"-54": 1, "32": 3, "240": 1})
    assert histogram.count == 5
    assert histogram.percentile(0.5) == pytest.approx(2 ** (32.5 / 8))


def test_a_recent_histogram_forgets_what_is_older_than_its_window() -> None:
    now = [1000.0]
    recent = RecentHistogram(lambda: now[0], window_s=100)
    for second in range(300):
        now[0] = 1000.0 + second
        recent.slice().add(5.0)
    assert recent.read().count == 100  # nine whole slices and the one that is being filled
    now[0] += 100
    assert recent.read().count == 0


def test_a_recent_histogram_survives_a_clock_that_is_set_back() -> None:
    now = [10_000.0]
    recent = RecentHistogram(lambda: now[0], window_s=100)
    recent.slice().add(5.0)
    now[0] = 10.0
    recent.slice().add(7.0)
    assert recent.read().count == 1
