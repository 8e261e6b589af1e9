"""Where teams look: Prometheus, OpenTelemetry, transformers' Trainer, Lightning.

Each library is imported where it is asked for. TensorBoard, W&B and MLflow need nothing here: see
`Monitor.log`.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .signals import SIGNALS
from .watch import Monitor

if TYPE_CHECKING:
    from lightning.pytorch import Callback
    from opentelemetry.metrics import Meter
    from prometheus_client.registry import Collector, CollectorRegistry
    from transformers import Trainer, TrainerCallback

GRAFANA_DASHBOARD = Path(__file__).with_name("grafana.json")  # for Grafana's "Import dashboard"


def _library(package: str, *modules: str) -> ModuleType:
    """The first of the modules that is there.

    Raises:
        ImportError: none is; it names the package to install.
    """
    for module in modules:
        try:
            return import_module(module)
        except ModuleNotFoundError as error:
            if not module.startswith(str(error.name)):
                raise  # it is there, and lacks something
    raise ImportError(f"monitor: {modules[0]} is not installed; `pip install {package}`")


def prometheus(
    monitor: Monitor,
    registry: CollectorRegistry | None = None,
    **labels: str,
) -> Collector:
    """Registers a collector of `monitor`, which asks it anew for each scrape; returns it.

        exporters.prometheus(m, model="smollm2")
        prometheus_client.start_http_server(9400)

    Args:
        registry: None: that of prometheus_client. One holds one monitor, until
            `registry.unregister(collector)`.
        labels: more labels of each sample.
    """
    core = _library("prometheus_client", "prometheus_client.core")
    library = _library("prometheus_client", "prometheus_client.registry")
    families = {"gauge": core.GaugeMetricFamily, "counter": core.CounterMetricFamily}

    class RMSNormCollector(library.Collector):
        def describe(self):  # so that registering reads no values
            return [families[s.kind](s.prometheus, s.meaning) for s in SIGNALS]

        def collect(self):
            for signal in SIGNALS:
                names = [*labels, *signal.labels]
                family = families[signal.kind](signal.prometheus, signal.meaning, labels=names)
                for of_value, value in signal.samples(monitor):
                    family.add_metric([*labels.values(), *of_value.values()], value)
                yield family

    collector = RMSNormCollector()
    (library.REGISTRY if registry is None else registry).register(collector)
    return collector


def opentelemetry(monitor: Monitor, meter: Meter | None = None, **attributes: str) -> None:
    """Creates an observable instrument for each signal.

    Args:
        meter: None: one of the global MeterProvider.
        attributes: more attributes of each observation.
    """
    metrics = _library("opentelemetry-sdk", "opentelemetry.metrics")
    meter = metrics.get_meter("rmsnorm_cuda") if meter is None else meter
    for signal in SIGNALS:
        create = getattr(meter, f"create_observable_{signal.kind}")

        def observe(_, signal=signal):
            samples = signal.samples(monitor)
            return [metrics.Observation(value, attributes | labels) for labels, value in samples]

        create(signal.opentelemetry, [observe], signal.unit, signal.meaning)


class _Watching:
    """A callback's monitor, from the beginning of training to its end."""

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        self._options = options
        self.monitor: Monitor | None = None  # the latest one; there once training began
        self._is_open = False

    def _open(self, model: Any) -> None:
        self.monitor = Monitor(model, **self._options).__enter__()
        self._is_open = True

    def close(self, kind: type | None = None) -> None:
        """Ends it: for a training of the Trainer's that failed, which tells nobody."""
        if self._is_open:
            self._is_open = False
            self.monitor.__exit__(kind)


def watch_trainer(trainer: Trainer, **options: Any) -> TrainerCallback:
    """Adds a TrainerCallback that monitors training; returns it, and `.monitor` is in it.

    What the Trainer logs holds `Monitor.scalars()` then, for all that `report_to` names. So the
    callback stands in front of theirs. `state.log_history` and the console do not have them.

        replace_rms_norm(model)
        trainer = Trainer(model, ...)
        callback = exporters.watch_trainer(trainer, on_alarm=print)

    Args:
        options: those of `monitor`.
    """
    library = _library("transformers", "transformers")

    class RMSNormCallback(_Watching, library.TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **_):
            self.close()  # where the last one failed
            called = trainer.model_wrapped
            self._open(called if type(called).__name__ == "OptimizedModule" else model)

        def on_log(self, args, state, control, logs=None, **_):
            if self._is_open and logs is not None:
                logs.update(self.monitor.scalars())

        def on_train_end(self, args, state, control, **_):
            self.close()

    class ForTheConsole(library.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):
            for key in [key for key in logs or () if key.startswith("rmsnorm_")]:
                del logs[key]

    callback, callbacks = RMSNormCallback(options), trainer.callback_handler.callbacks
    kinds = [type(other).__name__ for other in callbacks]
    to_console = [i for i, kind in enumerate(kinds) if "Printer" in kind or "Progress" in kind]
    callbacks.insert(min(to_console, default=len(callbacks)), ForTheConsole())
    callbacks.insert(0, callback)
    return callback


def lightning_callback(**options: Any) -> Callback:
    """A Callback that monitors training; `.monitor` is in it.

    It logs `Monitor.scalars()` to the Trainer's loggers every `log_every_n_steps`.

        callback = exporters.lightning_callback(on_alarm=print)
        lightning.Trainer(callbacks=[callback], ...)

    Args:
        options: those of `monitor`.
    """
    library = _library("lightning", "lightning.pytorch", "pytorch_lightning")

    class RMSNormCallback(_Watching, library.Callback):
        def on_train_start(self, trainer, pl_module):
            self._open(pl_module)

        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step % trainer.log_every_n_steps == 0:
                for logger in trainer.loggers:
                    self.monitor.log(logger, trainer.global_step)

        def on_exception(self, trainer, pl_module, exception):
            self.close(type(exception))

        def on_train_end(self, trainer, pl_module):
            self.close()

    return RMSNormCallback(options)
