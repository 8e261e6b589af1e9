"""What a monitor tells others: names, values, and the real libraries where they are installed.

Tried with prometheus_client 0.26.0, opentelemetry-sdk 1.45.2, tensorboard 2.21.0, wandb 0.31.0,
mlflow 3.17.2, transformers 5.24.0 and lightning 2.6.6. benchmarks/dashboards.py has the servers.
"""

import builtins
import copy
import json
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from rmsnorm_cuda import RMSNorm, monitor, replace_rms_norm
from rmsnorm_cuda.monitoring import SIGNALS, Thresholds, exporters, signals

PAGE = Path(exporters.__file__).with_name("README.md")
WIDTH = 8


class Model(nn.Module):
    """Two norms; the weight of the second is three times as large from the second step on."""

    def __init__(self):
        super().__init__()
        self.a, self.linear, self.b = RMSNorm(WIDTH), nn.Linear(WIDTH, WIDTH), RMSNorm(WIDTH)

    def forward(self, x):
        return self.b(x + self.linear(self.a(x)))


def watched(limits=Thresholds(weight=2.0)):  # noqa: B008
    """Four steps of four rows: of RMS 1, 2, 4 and 8; then with one NaN, two Inf, one of zeros."""
    torch.manual_seed(0)
    model, x = Model(), torch.ones(4, WIDTH) * torch.tensor([1.0, 2.0, 4.0, 8.0])[:, None]
    broken = x.clone()
    broken[0, 1], broken[1:3, 2], broken[3] = torch.nan, torch.inf, 0
    with torch.no_grad(), monitor(model, thresholds=limits) as m:
        for step in range(3):
            model(x)
            if step == 0:
                model.b.weight.data = torch.full((WIDTH,), 3.0)
                m._meter._weights._sizes = None  # it looks again
        model(broken)
    return m


WANT = {
    "rmsnorm_steps": 4,
    "rmsnorm_rows/a": 16,
    "rmsnorm_nan_rows/a": 1,
    "rmsnorm_inf_rows/a": 2,
    "rmsnorm_small_rows/a": 1,
    # Of the third step: in the fourth no row had an RMS to speak of.
    "rmsnorm_row_rms_0/a": 1,
    "rmsnorm_row_rms_0.5/a": 2,
    "rmsnorm_row_rms_0.99/a": 8,
    "rmsnorm_row_rms_1/a": 8,
    "rmsnorm_weight_rms/a": 1,
    "rmsnorm_weight_rms/b": 3,
    "rmsnorm_weight_growth/a": 1,
    "rmsnorm_weight_growth/b": 3,
    "rmsnorm_alarms_weight/b": 3,  # in each step from the second on, though it is told once
    "rmsnorm_alarms_non_finite/a": 1,
}


def subset(values, keys=WANT):
    return {key: values[key] for key in keys}


def test_scalars():
    m = watched()
    values = m.scalars()
    assert subset(values) == pytest.approx(WANT, rel=1e-6)
    assert all(type(v) is float and v == v for v in values.values())
    assert [a.kind for a in m.alarms].count("weight") == 1
    assert not [key for key in values if "alarms" in key and not values[key]]
    with monitor(Model()) as m:
        assert m.scalars()["rmsnorm_rows/a"] == 0 and "rmsnorm_row_rms_1/a" not in m.scalars()


def test_norm_without_a_weight_has_no_growth():
    with monitor(nn.Sequential(RMSNorm(WIDTH, elementwise_affine=False))) as m:
        m.model(torch.ones(2, WIDTH))
    assert not [key for key in m.scalars() if "weight_" in key]


def test_names_are_those_of_the_pages():
    assert signals.names_table() in PAGE.read_text()
    assert len({s.name for s in SIGNALS}) == len(SIGNALS)
    known = {s.prometheus for s in SIGNALS} | {f"rmsnorm_{s.name}" for s in SIGNALS}
    known |= {f"rmsnorm_alarms_{kind}" for kind in Thresholds._fields}
    for page in (PAGE, PAGE.with_name("RUNBOOK.md")):
        named = re.findall(r"\brmsnorm_(?!cuda\b)[a-z_]+[a-z]", page.read_text())
        assert named and {*named} <= known


def test_log():
    m, got = watched(), []
    want = m.scalars()
    m.log(lambda step, values: got.append((step, values)))
    m.log(SimpleNamespace(log=lambda values, step: got.append((step, values))), 5)
    m.log(SimpleNamespace(log_metrics=lambda values, step: got.append((step, values))), 6)
    tags = {}
    writer = SimpleNamespace(add_scalar=lambda tag, value, step: tags.update({(tag, step): value}))
    assert m.log(writer, 7) == want
    assert got == [(3, want), (5, want), (6, want)]
    assert tags == {(tag, 7): value for tag, value in want.items()}
    with pytest.raises(TypeError, match="log_metrics, add_scalar or log, got int"):
        m.log(3)


@pytest.mark.parametrize(
    "call, package",
    [
        (lambda m: exporters.prometheus(m), "prometheus_client"),
        (lambda m: exporters.opentelemetry(m), "opentelemetry-sdk"),
        (lambda m: exporters.watch_trainer(None), "transformers"),
        (lambda m: exporters.lightning_callback(), "lightning"),
    ],
)
def test_library_that_is_missing(call, package, monkeypatch):
    def missing(name, *args):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name.partition(".")[0])

    monkeypatch.setattr(exporters, "import_module", missing)
    with pytest.raises(ImportError, match=f"is not installed; `pip install {package}`"):
        call(None)

    def broken(name, *args):
        raise ModuleNotFoundError("No module named 'what_it_needs'", name="what_it_needs")

    monkeypatch.setattr(exporters, "import_module", broken)
    with pytest.raises(ModuleNotFoundError, match="what_it_needs"):
        call(None)


def test_monitoring_imports_none_of_them(monkeypatch):
    libraries = {"prometheus_client", "opentelemetry", "transformers", "lightning", "tensorboard"}
    real = builtins.__import__

    def checked(name, *args, **kwargs):
        assert name.partition(".")[0] not in libraries
        return real(name, *args, **kwargs)

    for name in [n for n in sys.modules if n.startswith("rmsnorm_cuda.monitoring")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", checked)
    __import__("rmsnorm_cuda.monitoring")


# ---------------------------------------------------------------- Prometheus, Grafana


def test_prometheus():
    client = pytest.importorskip("prometheus_client")
    registry, m = client.CollectorRegistry(), watched()
    collector = exporters.prometheus(m, registry, model="tiny")
    from prometheus_client.parser import text_string_to_metric_families

    def scrape():
        families = text_string_to_metric_families(client.generate_latest(registry).decode())
        return {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in families
            for sample in family.samples
        }

    def of(name, **labels):
        return values[name, frozenset({"model": "tiny", **labels}.items())]

    values = scrape()
    assert {name for name, _ in values} == {s.prometheus for s in SIGNALS}
    assert of("rmsnorm_steps_total") == 4 and of("rmsnorm_nan_rows_total", norm="a") == 1
    assert of("rmsnorm_alarms_total", norm="b", kind="weight") == 3
    assert of("rmsnorm_alarms_total", norm="b", kind="settings") == 0  # there before it rises
    assert of("rmsnorm_row_rms", norm="a", quantile="0.5") == 2
    with torch.no_grad(), monitor(m.model) as other:  # asked anew for each scrape
        exporters.prometheus(other, second := client.CollectorRegistry())
        for want in (4, 8):
            m.model(torch.ones(4, WIDTH))
            assert second.get_sample_value("rmsnorm_rows_total", {"norm": "a"}) == want
    registry.unregister(collector)
    assert not scrape()


def expressions():
    dashboard = json.loads(exporters.GRAFANA_DASHBOARD.read_text())
    variables = [v for v in dashboard["templating"]["list"] if v["type"] == "query"]
    targets = [t["expr"] for panel in dashboard["panels"] for t in panel["targets"]]
    return [*targets, *(v["definition"] for v in variables)], {v["name"] for v in variables}


def test_dashboard_asks_for_what_the_collector_has():
    """Every name, with labels that it has; no signal is missing; no label is out of the air."""
    found, variables = expressions()
    by_name = {s.prometheus: {*s.labels, "instance"} for s in SIGNALS}
    asked = set()
    for expression in found:
        names = re.findall(r"\brmsnorm_\w+", expression)
        assert names, expression
        asked.update(names)
        labels = re.findall(r'(\w+)=~?"', expression)
        for grouped in re.findall(r"by \(([\w, ]+)\)", expression):
            labels += grouped.split(", ")
        labels += re.findall(r"label_values\(\w+, (\w+)\)", expression)
        for name in names:
            assert {*labels} <= by_name[name], expression
        assert {*re.findall(r"\$(\w+)", expression)} - {"__rate_interval"} <= variables
        for name in re.findall(r"rate\((\w+)", expression):
            assert name.endswith("_total"), expression
    assert asked == by_name.keys()


def test_dashboard_is_one_of_grafana():
    models = pytest.importorskip("grafana_foundation_sdk.models.dashboard")
    data = json.loads(exporters.GRAFANA_DASHBOARD.read_text())
    dashboard = models.Dashboard.from_json(data)
    assert dashboard.title == "RMSNorm" and len(dashboard.panels) == len(data["panels"]) == 8
    places = [(p.grid_pos.y, p.grid_pos.x, p.grid_pos.w) for p in dashboard.panels]
    assert places == sorted(places) and all(x + w <= 24 for _, x, w in places)


def test_opentelemetry():
    sdk = pytest.importorskip("opentelemetry.sdk.metrics")
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader

    reader = InMemoryMetricReader()
    meter = sdk.MeterProvider([reader]).get_meter("test")
    exporters.opentelemetry(watched(), meter, model="tiny")
    (resource,) = reader.get_metrics_data().resource_metrics
    metrics = {metric.name: metric for metric in resource.scope_metrics[0].metrics}
    assert {n: (m.unit, m.description) for n, m in metrics.items()} == {
        s.opentelemetry: (s.unit, s.meaning) for s in SIGNALS
    }
    for s in SIGNALS:
        data = metrics[s.opentelemetry].data
        assert getattr(data, "is_monotonic", False) == (s.kind == "counter")
        for point in data.data_points:
            assert point.attributes["model"] == "tiny" and {*s.labels, "model"} == {
                *point.attributes
            }
    points = {p.attributes["norm"]: p.value for p in metrics["rmsnorm.nan_rows"].data.data_points}
    assert points == {"a": 1, "b": 3}  # NaN - Inf, and what a matrix makes of Inf, are NaN


# ---------------------------------------------------------------- logs


def read_events(folder):
    """{tag: [(step, value)]} of TensorBoard's files."""
    module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    tags = {}
    for file in sorted(Path(folder).rglob("events.out.tfevents.*")):
        events = module.EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()
        for tag in events.Tags()["scalars"]:
            tags.setdefault(tag, []).extend((e.step, e.value) for e in events.Scalars(tag))
    return tags


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    m = watched()
    with SummaryWriter(tmp_path) as writer:
        m.log(writer, 2), m.log(writer)
    assert {tag: got for tag, got in read_events(tmp_path).items() if tag in WANT} == {
        tag: [(2, pytest.approx(v)), (3, pytest.approx(v))] for tag, v in WANT.items()
    }


@pytest.mark.slow
def test_wandb(tmp_path):
    wandb = pytest.importorskip("wandb")
    m = watched()
    with wandb.init(mode="offline", dir=tmp_path, project="test") as run:
        m.log(run, 2), m.log(wandb, 3)
    (file,) = tmp_path.rglob("*.wandb")  # its format is wandb's own; the names stand in it
    for _ in range(60):  # a process of wandb's writes it
        data = file.read_bytes()
        if told := all(data.count(name.encode()) >= 2 for name in WANT):
            break
        time.sleep(1)
    assert told


@pytest.mark.slow
def test_mlflow(tmp_path):
    mlflow = pytest.importorskip("mlflow")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/runs.db")
    m = watched()
    with mlflow.start_run() as run:
        m.log(mlflow, 2)
    client = mlflow.MlflowClient()
    for key, want in WANT.items():
        (metric,) = client.get_metric_history(run.info.run_id, key)
        assert (metric.step, metric.value) == (2, pytest.approx(want))


# ---------------------------------------------------------------- trainers


@pytest.fixture
def llama():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=32, vocab_size=64)
    layers = dict(num_hidden_layers=2, num_attention_heads=2)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **layers))
    replace_rms_norm(model)
    return model


TEXTS = [{"input_ids": torch.arange(i, i + 8), "labels": torch.arange(i, i + 8)} for i in range(40)]


def test_trainer(llama, tmp_path, monkeypatch, capsys):
    """Its own reporter has the signals; the training is the one without."""
    pytest.importorskip("accelerate"), pytest.importorskip("tensorboard")
    from transformers import Trainer, TrainingArguments

    def train(model, folder, **options):
        monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / folder))
        arguments = TrainingArguments(
            str(tmp_path / folder),
            max_steps=6,
            logging_steps=2,
            per_device_train_batch_size=4,
            report_to=["tensorboard"],
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, train_dataset=TEXTS)
        callback = exporters.watch_trainer(trainer, **options) if options else None
        trainer.train()
        return trainer, callback

    twin, plain = copy.deepcopy(llama), type(llama.model.norm)
    train(twin, "without")
    told = []
    trainer, callback = train(llama, "with", on_alarm=told.append)
    assert all(map(torch.equal, twin.parameters(), llama.parameters()))
    m = callback.monitor
    assert m.steps == list(range(6)) and not told and len(m.norms) == 5
    assert type(llama.model.norm) is plain  # the monitor is off
    tags = read_events(tmp_path / "with")
    name = "train/rmsnorm_rows/model.norm"
    assert tags[name][:3] == [(2, 64), (4, 128), (6, 192)] and "train/loss" in tags
    last = m.scalars()["rmsnorm_row_rms_0.5/model.norm"]
    assert tags["train/rmsnorm_row_rms_0.5/model.norm"][-1] == (6, pytest.approx(last))
    printed = capsys.readouterr().out
    assert "'loss'" in printed and "rmsnorm" not in printed
    assert not any("rmsnorm" in key for log in trainer.state.log_history for key in log)
    # A run that fails leaves its monitor on; the next one takes it off.
    trainer.args.max_steps = 8
    handle = llama.model.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    handle.remove()
    trainer.train()
    assert callback.monitor is not m and callback.monitor.steps == list(range(8))


def test_lightning(llama, tmp_path):
    plain, lightning = type(llama.model.norm), pytest.importorskip("lightning.pytorch")
    from lightning.pytorch.loggers import CSVLogger

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.llama = llama

        def training_step(self, batch):
            return self.llama(**batch).loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    def fit(module):
        logger, callback = CSVLogger(tmp_path, name="", version=""), exporters.lightning_callback()
        trainer = lightning.Trainer(
            max_steps=4,
            log_every_n_steps=2,
            accelerator="cpu",
            logger=logger,
            callbacks=[callback],
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        trainer.fit(module, torch.utils.data.DataLoader(TEXTS, batch_size=4))
        return callback, logger

    callback, logger = fit(Module())
    assert callback.monitor.steps == [0, 1, 2, 3] and not callback.monitor.alarms
    head, *rows = (line.split(",") for line in (tmp_path / "metrics.csv").read_text().splitlines())
    at = head.index("rmsnorm_rows/llama.model.norm")
    assert [(row[head.index("step")], row[at]) for row in rows] == [("2", "64.0"), ("4", "128.0")]
    assert type(llama.model.norm) is plain

    class Fails(Module):
        def training_step(self, batch):
            super().training_step(batch)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fit(Fails())
    assert type(llama.model.norm) is plain
