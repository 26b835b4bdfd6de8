"""Metrics in our namespace, from samples that are at hand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

Samples = Iterable[tuple[Sequence[str], float]]
"""Label values and the value."""


def by_label(counters: Counter[str], names: Mapping[str, str]) -> Samples:
    """One sample for each label value, of the counter of that name."""
    return [([value], counters[name]) for value, name in names.items()]


def counter(name: str, help_: str, samples: Samples, labels: Sequence[str] = ()) -> Metric:
    return _filled(CounterMetricFamily(f"neuroscope_{name}", help_, labels=labels), samples)


def gauge(name: str, help_: str, samples: Samples, labels: Sequence[str] = ()) -> Metric:
    return _filled(GaugeMetricFamily(f"neuroscope_{name}", help_, labels=labels), samples)


def _filled(
    family: CounterMetricFamily | GaugeMetricFamily, samples: Samples
) -> CounterMetricFamily | GaugeMetricFamily:
    for values, value in samples:
        family.add_metric(values, value)
    return family
