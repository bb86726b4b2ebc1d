"""Shows a prometheus-client registry on Triton's own metrics endpoint."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry

_COUNTED = ("_total", "_bucket", "_count", "_sum")


class TritonMirror:
    """Keeps Triton's metrics in step with a registry.

    A histogram becomes three families of counters, ``_bucket``, ``_sum`` and ``_count``: queries see what they would
    see of a histogram, and Triton offers no way to set one.

    Args:
      pb_utils: Triton's ``triton_python_backend_utils``.
      registry: what is shown.
      labels: added to every metric: ``model`` and ``version``.
    """

    def __init__(self, pb_utils: Any, registry: CollectorRegistry, labels: dict[str, str]) -> None:
        self._pb, self._registry, self._labels = pb_utils, registry, labels
        self._families = dict[str, Any]()
        self._metrics = dict[tuple[str, tuple[tuple[str, str], ...]], Any]()
        self._shown = dict[tuple[str, tuple[tuple[str, str], ...]], float]()

    def update(self) -> None:
        """Brings every metric up to date; new ones appear."""
        for family in self._registry.collect():
            for sample in family.samples:
                key = (sample.name, tuple(sorted(sample.labels.items())))
                counts = family.type in ("counter", "histogram") and sample.name.endswith(_COUNTED)
                if key not in self._metrics:
                    self._add(key, family.documentation, counts)
                if not counts:
                    self._metrics[key].set(sample.value)
                elif sample.value > self._shown.get(key, 0.0):
                    self._metrics[key].increment(sample.value - self._shown.get(key, 0.0))
                    self._shown[key] = sample.value

    def close(self) -> None:
        """Metrics go before their families, as Triton wants it."""
        self._metrics.clear()
        self._families.clear()

    def _add(self, key: tuple[str, tuple[tuple[str, str], ...]], description: str, counts: bool) -> None:
        name, labels = key
        if name not in self._families:
            kind = self._pb.MetricFamily.COUNTER if counts else self._pb.MetricFamily.GAUGE
            self._families[name] = self._pb.MetricFamily(name=name, description=description, kind=kind)
        self._metrics[key] = self._families[name].Metric(labels={**self._labels, **dict(labels)})
