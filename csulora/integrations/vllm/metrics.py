"""What the guards of all processes have counted, beside vLLM's own metrics."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from weakref import WeakSet

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from csulora.integrations.hooks import Function, Hook
from csulora.serving import counters

REGISTRY = Hook(
    "vllm.entrypoints.serve.instrumentator.metrics", "get_prometheus_registry", parameters=()
)
# Several API servers: a registry is made anew for each request, and this puts vLLM's own metrics in it.
MANY = Hook(
    "prometheus_client.multiprocess", "MultiProcessCollector.__init__", ("self", "registry", "path")
)


class Counted(Collector):
    """`csulora_guard` says that a guard stands, and how; each counter is one `csulora_..._total`."""

    def __init__(self, mode: str) -> None:
        self._mode = mode

    def collect(self) -> Iterator[Metric]:
        stands = GaugeMetricFamily("csulora_guard", "The guard stands.", labels=["mode"])
        stands.add_metric([self._mode], 1)
        yield stands
        families: dict[str, CounterMetricFamily] = {}
        for (name, reason), value in sorted(counters.collect().items()):
            labels = ["reason"] if reason else []
            if name not in families:
                families[name] = CounterMetricFamily(
                    f"csulora_{name}", f"Adapters: {name}.", labels=labels
                )
            families[name].add_metric([reason] if reason else [], value)
        yield from families.values()


def install(mode: str) -> None:
    """Show the counters at /metrics. Raises CsuloraError if vLLM is not one that this knows."""
    shown = Shown(mode)
    REGISTRY.wrap(lambda function: with_counters(function, shown))
    MANY.wrap(lambda function: beside_counters(function, shown))


class Shown:
    """Puts the counters into registries, once into each."""

    def __init__(self, mode: str) -> None:
        self._collector = Counted(mode)
        self._registries: WeakSet[Any] = WeakSet()

    def within(self, registry: Any) -> None:
        """Have a registry show the counters."""
        if registry not in self._registries:
            registry.register(self._collector)
            self._registries.add(registry)


def with_counters(function: Function, shown: Shown) -> Function:
    """`get_prometheus_registry`: the registry with csulora's counters."""

    def get_prometheus_registry() -> Any:
        registry = function()
        shown.within(registry)
        return registry

    return get_prometheus_registry


def beside_counters(function: Function, shown: Shown) -> Function:
    """`MultiProcessCollector.__init__`: csulora's counters go where the metrics of all processes go."""

    def start(self: Any, registry: Any, path: Any = None) -> None:
        function(self, registry, path)
        if registry:
            shown.within(registry)

    return start
