"""What rmsnorm_cuda.monitor() costs, and what it shows: SmolLM2-135M with our norms.

    python benchmarks/monitor.py [--tokens 1,16,128,512] [--threads 1] [--rounds 30]
                                 [--json FILE] [--png FILE]
    python benchmarks/monitor.py --from FILE --png FILE   # draws the chart again, measures nothing

Forwards of so many tokens without and with the monitor take turns in one process; logits are
compared bit by bit. Then 64 tokens are generated while the monitor looks on: the chart. Needs the
demo's weights (`make demo`) and, for the chart, matplotlib.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

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
    """Milliseconds of a forward without and with the monitor, and how much more with it.

    The latter of the minima, and as the median of the rounds.
    """
    times, monitor = {"plain": [], "monitored": []}, rmsnorm_cuda.monitor(model)

    def forwards(name):
        """The second to fourth forward: the first finds the caches cold."""
        logits = model(ids, use_cache=False).logits
        times[name].append([timed(lambda: model(ids, use_cache=False)) for _ in range(3)])
        return logits

    for _ in range(rounds):
        ids = torch.randint(0, model.config.vocab_size, (1, tokens))
        want = forwards("plain")
        with monitor:
            assert torch.equal(forwards("monitored"), want)
    least, middle = (
        {name: pick(sum(rounds, [])) for name, rounds in times.items()}
        for pick in (min, statistics.median)
    )
    ratios = [
        statistics.median(b) / statistics.median(a) for a, b in zip(*times.values(), strict=True)
    ]
    return {
        "tokens": tokens,
        "min ms": least,
        "median ms": middle,
        "more, minima": least["monitored"] / least["plain"] - 1,
        "more, median of rounds": statistics.median(ratios) - 1,
    }


def measure(args):
    torch.set_num_threads(args.threads)
    tokenizer, weights = generate.load()
    model = generate.build(weights, torch.float32, torch.device("cpu"))
    rmsnorm_cuda.replace_rms_norm(model)
    times = []
    for tokens in map(int, args.tokens.split(",")):
        times.append(cell := overhead(model, tokens, args.rounds))
        more = f"{cell['more, minima']:.1%} more (minima), "
        more += f"{cell['more, median of rounds']:.1%} (median of rounds)"
        print(
            f"{tokens:5} tokens: {cell['median ms']['plain']:8.2f} ms, with the monitor {more}",
            flush=True,
        )
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", default="1,16,128,512")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=30)
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
