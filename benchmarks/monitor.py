"""What rmsnorm_cuda.monitor() costs, and what it shows: SmolLM2-135M, whose norms are replaced by ours.

    python benchmarks/monitor.py [--tokens 1,16,128,512] [--threads 1] [--rounds 40] [--json FILE] [--png FILE]
    python benchmarks/monitor.py --from FILE --png FILE    draws the chart again, and measures nothing

Forwards of so many tokens without and with the monitor take turns in one process; minimum and median of both. Logits are
compared first, bit by bit. Then 64 tokens are generated while the monitor looks on: the chart. Needs the demo's weights
(`make demo`) and, for the chart, matplotlib.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

# Not this folder: torch would take its cuda.py for NVIDIA's package of that name.
sys.path = [*sys.path[1:], str(Path(__file__).resolve().parents[1])]

import torch

import rmsnorm_cuda
from benchmarks import generate
from rmsnorm_cuda.monitoring import heat_map


def timed(function):
    begin = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - begin)


@torch.inference_mode()
def overhead(model, tokens, rounds):
    """Milliseconds of a forward, without and with the monitor."""
    plain, watched, monitor = [], [], rmsnorm_cuda.monitor(model)
    for _ in range(rounds):
        ids = torch.randint(0, model.config.vocab_size, (1, tokens))
        want = model(ids, use_cache=False).logits
        plain.append(timed(lambda: model(ids, use_cache=False)))  # noqa: B023
        with monitor:
            assert torch.equal(model(ids, use_cache=False).logits, want)
            watched.append(timed(lambda: model(ids, use_cache=False)))  # noqa: B023
    return {"tokens": tokens} | {
        f"{what}, {name}": pick(times)
        for name, times in (("plain", plain), ("monitored", watched))
        for what, pick in (("min", min), ("median", statistics.median))
    }


def measure(args):
    torch.set_num_threads(args.threads)
    tokenizer, weights = generate.load()
    model = generate.build(weights, torch.float32, torch.device("cpu"))
    rmsnorm_cuda.replace_rms_norm(model)
    times = []
    for tokens in map(int, args.tokens.split(",")):
        times.append(cell := overhead(model, tokens, args.rounds))
        more = [f"{100 * (cell[f'{what}, monitored'] / cell[f'{what}, plain'] - 1):.1f} %" for what in ("min", "median")]
        print(f"{tokens:5} tokens: {cell['median, plain']:8.2f} ms, with the monitor {more[0]} more (minima), {more[1]} (medians)", flush=True)
    with rmsnorm_cuda.monitor(model) as monitor:
        generate.generate(model, generate.encode(tokenizer, generate.PROMPT), 64)
    print(monitor.report())
    figures = monitor.figures()[:, :, 5]
    return {
        "torch": torch.__version__,
        "threads": args.threads,
        "times": times,
        "norms": list(monitor.norms),
        "steps": monitor.steps,
        "log2 of RMS, mean": [[round(v, 3) for v in step] for step in figures.tolist()],
        "alarms": [list(alarm) for alarm in monitor.alarms],
    }


def draw(result, file):
    values = torch.tensor(result["log2 of RMS, mean"])
    alarms = [(step, norm) for step, norm, *_ in result["alarms"]]
    heat_map(result["norms"], result["steps"], values, alarms).savefig(file, dpi=90)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="1,16,128,512")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--json")
    parser.add_argument("--png")
    parser.add_argument("--from", dest="source", metavar="FILE", help="a JSON to draw again")
    args = parser.parse_args()
    result = json.loads(Path(args.source).read_text()) if args.source else measure(args)
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
    if args.png:
        draw(result, args.png)


if __name__ == "__main__":
    main()
