"""Token buckets: how many requests each principal may make."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

BUCKETS_MAX = 10_000


@dataclass
class RateLimit:
    """A bucket for each name that fills at ``rate`` a second up to ``burst``; a rate of 0 is no limit.

    ``clock`` counts seconds. The bucket not used for longest is forgotten beyond a number; it was full again anyway.
    """

    rate: int
    burst: int
    clock: Callable[[], float]
    _buckets: "OrderedDict[str, tuple[float, float]]" = field(default_factory=OrderedDict)

    def wait(self, name: str) -> float:
        """Take one request out of a bucket; returns 0, or the seconds until there is one."""
        if not self.rate:
            return 0.0
        now = self.clock()
        left, at = self._buckets.get(name, (float(self.burst), now))
        left = min(float(self.burst), left + (now - at) * self.rate)
        wait = 0.0 if left >= 1 else (1 - left) / self.rate
        self._buckets[name] = (left - 1 if not wait else left, now)
        self._buckets.move_to_end(name)
        if len(self._buckets) > BUCKETS_MAX:
            self._buckets.popitem(last=False)
        return wait
