"""The monitor in real instances: a served model, Prometheus that scrapes it, TensorBoard.

    python benchmarks/dashboards.py [--seconds 60] [--png FOLDER]

SmolLM2-135M goes on with a text while Prometheus scrapes it every second. After half of the time a
matrix of layer 12 begins to grow, until fp32 overflows. Then every query of the Grafana dashboard
is put to Prometheus, and TensorBoard shows what was logged. FOLDER gets screenshots of both.

Takes the demo's weights (`make demo`), prometheus_client, tensorboard, and the program
`prometheus`; for screenshots `chromium` and the package playwright. Exit status 1: a query had no
answer.
"""

import argparse
import contextlib
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch

import rmsnorm_cuda
from benchmarks import generate
from rmsnorm_cuda.monitoring import exporters

# As root, and asking nobody else.
BROWSER = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
BROWSER += " --disable-background-networking --disable-component-update"
CONFIG = """\
global: {{scrape_interval: 1s}}
scrape_configs:
  - job_name: smollm2
    static_configs: [{{targets: ["localhost:{port}"]}}]
"""
TEXT = Path(__file__).resolve().parents[1] / "LICENSE"
SOME = 'norm=~"model.layers.(8|12|13|20).input_layernorm"'
SHOWN = (  # three panels of the dashboard, on Prometheus' own page
    f'log2(max by (norm) (rmsnorm_row_rms{{quantile="0.5", {SOME}}}))',
    f"sum by (norm) (rate(rmsnorm_nan_rows_total{{{SOME}}}[5s])) / "
    f"sum by (norm) (rate(rmsnorm_rows_total{{{SOME}}}[5s]))",
    "sum by (kind) (rate(rmsnorm_alarms_total[5s])) > 0",
)


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def server(command, url):
    """Runs it; its page answers."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(120):
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                urllib.request.urlopen(url).read()
                break
            time.sleep(0.5)
        else:
            sys.exit(f"{command[0]} does not answer at {url}")
        yield
    finally:
        process.terminate()
        process.wait()


def serve(model, prompts, seconds, log):
    """Prompts of 16 tokens and 4 more each; returns when a matrix began to grow."""
    begin, grows, step = time.time(), None, 0
    while time.time() < begin + seconds:
        if time.time() > begin + seconds / 2:
            grows = grows or time.time()
            model.model.layers[12].mlp.down_proj.weight.data.mul_(4096)
        ids = prompts[step % len(prompts)]
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
        log(step)
        step += 1
    return grows


def ask(prometheus, path, **query):
    url = f"{prometheus}/api/v1/{path}?{urllib.parse.urlencode(query)}"
    return json.load(urllib.request.urlopen(url))["data"]["result"]


def check_queries(prometheus):
    """Those of the dashboard, as Grafana would put them; false if one has no answer."""
    dashboard, answered = json.loads(exporters.GRAFANA_DASHBOARD.read_text()), True
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            expression = target["expr"].replace("$__rate_interval", "10s")
            expression = expression.replace("$__range", "60s")
            for variable in ("instance", "norm", "quantile"):
                expression = expression.replace(f"${variable}", ".*")
            series = ask(prometheus, "query", query=expression)
            print(f"{len(series):5} series  {panel['title']}: {target['expr']}")
            answered &= bool(series)
    return answered


def screenshot(url, file, height, click=None):
    """Of the page when it has drawn its charts."""
    from PIL import Image
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        path = shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=path, args=BROWSER.split())
        page = browser.new_page(viewport={"width": 1000, "height": height})
        page.goto(url)
        page.wait_for_timeout(15_000)
        if click:
            page.get_by_role("button", name=click).first.click()
            page.wait_for_timeout(10_000)
        page.evaluate("scrollTo(0, 0)")
        page.screenshot(path=file, full_page=True)
        browser.close()
    Image.open(file).quantize(64).save(file, optimize=True)
    print(f"{file}: {file.stat().st_size / 1e3:.0f} KB")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--png", type=Path)
    args = parser.parse_args()
    import prometheus_client
    from torch.utils.tensorboard import SummaryWriter

    torch.set_num_threads(1)
    tokenizer, weights = generate.load()
    prompts = tokenizer(TEXT.read_text(), return_tensors="pt").input_ids.split(16, 1)
    model = generate.build(weights, torch.float32, torch.device("cpu"))
    rmsnorm_cuda.replace_rms_norm(model)
    ports = [free_port() for _ in range(3)]
    metrics, prometheus, tensorboard = (f"http://localhost:{port}" for port in ports)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        config = Path(folder, "prometheus.yml")
        config.write_text(CONFIG.format(port=ports[0]))
        command = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder}/data"]
        command.append(f"--web.listen-address=localhost:{ports[1]}")
        prometheus_client.start_http_server(ports[0], "localhost")
        writer = stack.enter_context(SummaryWriter(f"{folder}/events"))
        m = stack.enter_context(rmsnorm_cuda.monitor(model))
        exporters.prometheus(m)
        stack.enter_context(server(command, f"{prometheus}/-/ready"))
        begin = time.time()
        with torch.inference_mode():
            grows = serve(model, prompts, args.seconds, lambda step: m.log(writer, step))
        clock = time.perf_counter()
        size = len(urllib.request.urlopen(metrics).read())
        took = 1e3 * (time.perf_counter() - clock)
        print(f"{len(m.steps)} steps; a scrape of {size / 1e3:.0f} KB took {took:.0f} ms")
        for kind in dict.fromkeys(a.kind for a in m.alarms):
            alarm = next(a for a in m.alarms if a.kind == kind)
            query = f'rmsnorm_alarms_total{{kind="{kind}", norm="{alarm.norm}"}} > 0'
            times = ask(
                prometheus, "query_range", query=query, start=begin, end=time.time(), step=1
            )
            (seen,) = times  # Prometheus has it, of the same norm
            late = float(seen["values"][0][0]) - grows
            print(
                f"{kind}: {alarm.norm}: {alarm.message}; in Prometheus {late:.0f} s after it began"
            )
        answered = check_queries(prometheus)
        writer.flush()
        if args.png:
            pages = {
                f"g{i}.{key}": value
                for i, expr in enumerate(SHOWN)
                for key, value in {"expr": expr, "tab": 0, "range_input": "1m"}.items()
            }
            url = f"{prometheus}/graph?{urllib.parse.urlencode(pages)}"
            screenshot(url, args.png / "screenshot-prometheus.png", 1200)
            command = [sys.executable, "-m", "tensorboard.main", f"--logdir={folder}/events"]
            command += [f"--port={ports[2]}", "--reload_interval=1"]
            stack.enter_context(server(command, tensorboard))
            time.sleep(5)
            url = f"{tensorboard}/?smoothing=0&tagFilter=row_rms_0.5.*layers.(8|12|13|20).input"
            file = args.png / "screenshot-tensorboard.png"
            screenshot(f"{url}#timeseries", file, 1040, click="Settings")
    return 0 if answered else 1


if __name__ == "__main__":
    sys.exit(main())
