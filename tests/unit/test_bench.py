"""The arithmetic of the measurements. Nothing is timed here."""

import itertools
import json
from collections import Counter

import pytest

from bench.figures import Answers, check, latencies, median, percentile, rate, ratio
from bench.generator import Spec, load
from bench.report import line, targets
from bench.scenarios import SCENARIOS, TRACE_USERS, operations, zipf_user
from bench.service import Served


def test_a_rate_leaves_out_the_first_tenth_of_the_results() -> None:
    slow_start = [0, *range(5_000, 5_099)]  # one a millisecond after a wait
    assert rate(slow_start) == pytest.approx(1000)


def test_a_rate_does_not_depend_on_the_order_of_the_results() -> None:
    times = [7, 3, 9, 1, 5]
    assert rate(times) == rate(sorted(times)) == pytest.approx(4 / 0.008)


@pytest.mark.parametrize("times", [[], [1], [1, 1, 1]])
def test_no_rate_is_told_from_results_without_a_span(times: list[int]) -> None:
    with pytest.raises(ValueError, match="no rate"):
        rate(times)


def test_a_percentile_is_a_value_that_was_measured() -> None:
    values = list(range(1, 101))
    assert percentile(values, 50) == 50
    assert percentile(values, 99) == 99
    assert percentile([5], 99) == percentile([5], 0) == 5
    assert median([3, 1]) == 1
    assert median([3, 1, 2]) == 2


def test_no_percentile_of_nothing() -> None:
    with pytest.raises(ValueError, match="no values"):
        percentile([], 50)


def test_a_latency_is_from_a_command_to_its_own_result() -> None:
    assert sorted(latencies({"a": 10, "b": 20}, {"b": 23, "a": 50})) == [3, 40]


def test_every_command_must_be_applied_and_answered_once() -> None:
    check(Answers({}, {"a": 1, "b": 1}, {}), 2)
    for counts, refused in (({"a": 1}, {}), ({"a": 1, "b": 2}, {}), ({"a": 1, "b": 1}, {"insufficient_balance": 1})):
        with pytest.raises(ValueError, match="2 commands sent"):
            check(Answers({}, counts, refused), 2)


def test_a_ratio_to_nothing_is_none() -> None:
    assert ratio(3, 2) == 1.5
    assert ratio(3, None) is None
    assert ratio(3, 0) is None


def test_the_median_repetition_is_what_is_reported_and_compared() -> None:
    one = line(Served(commands=10, rates=[90.0, 120.0, 100.0], p99_ms=7), plain=5.0, plain_parallel=10.0, limit=200.0)
    assert (one["commands_per_second"], one["commands_per_second_min"]) == (100, 90)
    assert (one["ratio_to_baseline"], one["ratio_to_parallel_baseline"], one["ratio_to_postgres_limit"]) == (
        20,
        10,
        0.5,
    )
    assert json.loads(json.dumps(one)) == one


def test_a_target_is_told_only_of_what_was_measured() -> None:
    slow = line(Served(commands=10, rates=[4_999.0]), None, None, None)
    fast = line(Served(commands=10, rates=[5_000.0]), None, None, None)
    assert [met for what, _, met in targets({"hot_user": slow}) if "hot" in what] == [False]
    assert [met for what, _, met in targets({"hot_user": fast}) if "hot" in what] == [True]
    assert targets({}) == []


@pytest.mark.parametrize("name", sorted(set(SCENARIOS) - {"real_trace"}))
def test_a_load_has_as_many_commands_as_asked_for_and_no_id_twice(name: str) -> None:
    scenario = SCENARIOS[name]
    merchants = [f"m{number}" for number in range(scenario.merchants)]
    sent = list(load(Spec("", name, merchants, 1_000, "r")))
    assert len(sent) == 1_000
    assert len({(topic, command.id) for topic, _, command in sent}) == 1_000
    assert {topic.split(".")[1] for topic, _, _ in sent} == set(merchants)
    assert all(partition < scenario.partitions for _, partition, _ in sent)


def test_an_operation_is_closed_after_it_was_opened_in_the_same_partition() -> None:
    sent = list(load(Spec("", "many_users", ["m"], 200, "r")))
    places: dict[str, list[tuple[str, int]]] = {}
    for _, partition, command in sent:
        places.setdefault(json.loads(command.value)["operation_id"], []).append((command.type, partition))
    for opened, closed in places.values():
        assert (opened[0], closed[0]) == ("Operation.Open", "Operation.RecordAndClose")
        assert opened[1] == closed[1]


def test_loads_of_different_runs_share_no_command() -> None:
    scenario = SCENARIOS["many_users"]
    first, second = ({c.id for c in itertools.islice(operations(scenario, run, 0), 100)} for run in ("a", "b"))
    assert not first & second


def test_the_users_of_the_trace_are_the_same_each_time_and_a_few_are_most_active() -> None:
    counts = Counter(zipf_user(number) for number in range(10_000))
    assert counts == Counter(zipf_user(number) for number in range(10_000))
    assert max(counts) < TRACE_USERS
    top = sum(count for _, count in counts.most_common(20))
    assert 3_000 < top < 7_000
    assert counts.most_common(1)[0][0] == 0
