"""95 % confidence intervals: of a mean, by Student's distribution, and of a median, by ranks."""

import math
import statistics


def student_t(degrees, probability=0.975):
    """The quantile of Student's distribution.

    With t = sqrt(degrees) tan(u) its density is a power of cos(u).
    """

    def area(t):
        n, end = 400, math.atan(t / math.sqrt(degrees))
        weights = [1, *([4, 2] * (n // 2 - 1)), 4, 1]  # Simpson's
        total = (
            sum(weight * math.cos(end * i / n) ** (degrees - 1) for i, weight in enumerate(weights))
            * end
            / n
            / 3
        )
        return total * math.gamma((degrees + 1) / 2) / math.gamma(degrees / 2) / math.sqrt(math.pi)

    low, high = 0.0, 1e3
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if area(middle) < probability - 0.5 else (low, middle)
    return low


def interval(differences):
    """Mean and half the width of its 95 % confidence interval, which one value does not have."""
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return mean, math.inf
    return mean, student_t(len(differences) - 1) * statistics.stdev(differences) / math.sqrt(
        len(differences)
    )


def median_interval(values):
    """The median with the ends of its 95 % confidence interval, by ranks: no outlier matters."""
    values, rank, tail = sorted(values), 0, 0.0
    while (tail := tail + math.comb(len(values), rank) / 2 ** len(values)) <= 0.025:
        rank += 1
    ends = (values[rank - 1], values[-rank]) if rank else (0.0, math.inf)
    return ends[0], statistics.median(values), ends[1]
