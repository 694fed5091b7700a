"""The arithmetic of the measurements. Times are the broker's, in milliseconds since 1970."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

WARM_UP = 10  # one in so many results comes before the measured interval


def rate(times: Iterable[int]) -> float:
    """Return results a second, from the result that ends the first tenth to the last one.

    Raises:
        ValueError: there are too few results, or all came in one millisecond.
    """
    ordered = sorted(times)
    first = len(ordered) // WARM_UP
    if len(ordered) < 2 or ordered[-1] == ordered[first]:
        raise ValueError(f"no rate can be told from {len(ordered)} results")
    return 1000 * (len(ordered) - 1 - first) / (ordered[-1] - ordered[first])


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the smallest value that is not exceeded by ``percent`` of them (nearest rank)."""
    if not values:
        raise ValueError("no values")
    rank = math.ceil(len(values) * percent / 100)
    return sorted(values)[max(rank, 1) - 1]


def median(values: Sequence[float]) -> float:
    """Return the middle value, of an even number the lower one of the two: a figure that was really measured."""
    return percentile(values, 50)


def latencies(sent: Mapping[str, int], answered: Mapping[str, int]) -> list[int]:
    """Return the milliseconds from each command to its result, both by command id."""
    return [at - sent[command] for command, at in answered.items()]


@dataclass(frozen=True)
class Answers:
    """What the results say of the commands that were sent.

    Attributes:
        times: when each result was written, by command id.
        counts: how many results each command has.
        refused: error codes and how often they came.
    """

    times: Mapping[str, int]
    counts: Mapping[str, int]
    refused: Mapping[str, int]


def check(answers: Answers, sent: int) -> None:
    """See to it that every command was applied and has exactly one result.

    Raises:
        ValueError: what was measured is not worth a figure.
    """
    repeated = Counter(count for count in answers.counts.values() if count != 1)
    if repeated or answers.refused or len(answers.counts) != sent:
        raise ValueError(
            f"{sent} commands sent, {len(answers.counts)} answered, results more than once: {dict(repeated)}, "
            f"refused: {dict(answers.refused)}"
        )


def ratio(part: float, whole: float | None) -> float | None:
    """Return a ratio rounded to three places, None when there is nothing to compare with."""
    return round(part / whole, 3) if whole else None
