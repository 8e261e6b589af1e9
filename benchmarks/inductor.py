"""Where our ops gain on the code that Inductor makes of the formula, and what whole models gain.

    python benchmarks/inductor.py cells [--ops rms_norm,...] [--dtypes fp32,bf16]
                                        [--rows 1,16,...] [--columns 64,576,...]
                                        [--threads 1,2] [--json FILE]
    python benchmarks/inductor.py table FILE... [--out FILE]
    python benchmarks/inductor.py models [--models smollm2,qwen3] [--layers N] [--json FILE]

`cells` times one op in a compiled function, with the pass rmsnorm_cuda.integrations.inductor.fuse()
and without it. The function is the llama formula a few times, each between two narrow matrix
products: as in a model nothing but the residual addition (fused_add_...), or the quantization to
fp8 (..._quant), can be fused with it. With "training", forward and backward. Results are compared
first, then timed interleaved in one process. `table` makes of its files what the pass decides by:
of each cell the factor at the number of threads where that is least.

`models` compiles whole models that nobody changed, with and without the pass: SmolLM2-135M (the
weights of benchmarks/generate.py) and a small Qwen 3 of random weights; the decoding of one token,
a prefill and a training step. It prints what the pass took and why not, how far the logits are
apart, whether greedy tokens are the same, and the medians of interleaved calls.
"""

import argparse
import inspect
import json
import statistics
import sys
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch
from torch.utils._pytree import tree_leaves

from benchmarks.common import measure
from rmsnorm_cuda.bench.contenders import DTYPES, llama, quantize
from rmsnorm_cuda.bench.machine import machine
from rmsnorm_cuda.bench.timing import samples
from rmsnorm_cuda.integrations.inductor import GAINS, device_name, fuse

CHAIN = 3  # norms in a function: what one call of it costs counts less
NARROW = 8  # the inner dimension of the products
KINDS = {  # op and mode
    "rms_norm forward": (torch.float32, torch.bfloat16),
    "rms_norm training": (torch.float32, torch.bfloat16),
    "fused_add_rms_norm forward": (torch.float32, torch.bfloat16),
    "fused_add_rms_norm training": (torch.float32, torch.bfloat16),
    "rms_norm_quant forward": (torch.bfloat16,),
    "fused_add_rms_norm_quant forward": (torch.bfloat16,),
}


def chain(op, x, weight, down, up):
    """CHAIN norms, with what belongs to the op around each."""
    residual, outputs = x, []
    for _ in range(CHAIN):
        if op.startswith("fused_add"):
            x = residual = residual + x
        y = llama(x, weight)
        if op.endswith("quant"):
            outputs += quantize(y)
            x = x @ down @ up
        else:
            x = y @ down @ up
    return x, residual, *outputs


def distance(got, want):
    """Of two tensors, relative to the length of the second."""
    return ((got.float() - want.float()).norm() / want.float().norm()).item()


def contenders(kind, x_dtype, weight_dtype, rows, columns, device):
    op, mode = kind.split()
    torch.manual_seed(0)
    training = mode == "training"
    sizes = {"weight": (columns,), "down": (columns, NARROW), "up": (NARROW, columns)}
    made = {name: torch.randn(*size, device=device) for name, size in sizes.items()}
    made["down"] /= columns**0.5
    made["up"] /= NARROW**0.5
    dtypes = {"weight": weight_dtype}
    tensors = [t.to(dtypes.get(name, x_dtype)).requires_grad_(training) for name, t in made.items()]
    x = torch.randn(rows, columns, device=device).to(x_dtype).requires_grad_(training)
    dy = torch.randn_like(x)

    def run(compiled, x):
        with torch.set_grad_enabled(training):
            results = compiled(x, *tensors)
            if not training:
                return results
            return results[:2], torch.autograd.grad(results[0], [x, tensors[0]], dy)

    torch._dynamo.reset()
    taken, compiled = [], {}
    ours = {"pre_grad_custom_pass": fuse("everywhere", taken.append)}
    for name, options in {"inductor": None, "ours": ours}.items():
        function = partial(chain, op)
        compiled[name] = partial(run, torch.compile(function, dynamic=False, options=options))
    want, got = (f(x) for f in compiled.values())
    assert len(taken) == CHAIN and all(f": {op} of" in line for line in taken), taken
    # Inductor leaves out roundings between the steps: some units in the last place of 16 bits.
    limit = 1e-4 if x_dtype == torch.float32 else 0.1
    for result, expected in zip(tree_leaves(got), tree_leaves(want), strict=True):
        assert distance(result, expected) < limit, (kind, rows, columns)
    if device == "cuda":
        return {
            name: lambda x, f=f: (f(x), torch.cuda.synchronize()) for name, f in compiled.items()
        }, x
    return compiled, x


def cells(args):
    results = []
    for threads in map(int, args.threads.split(",")):
        torch.set_num_threads(threads)
        for kind in args.kinds.split(","):
            for name in args.dtypes.split(","):
                x_dtype, weight_dtype = DTYPES[name]
                if x_dtype not in KINDS[kind]:
                    continue
                for columns in map(int, args.columns.split(",")):
                    for rows in map(int, args.rows.split(",")):
                        shape = rows, columns
                        runs, x = contenders(kind, x_dtype, weight_dtype, *shape, args.device)
                        us = measure(runs, [x], args.seconds)
                        cell = {"kind": f"{kind} {name}", "shape": f"{rows}x{columns}"}
                        results.append(cell | {"threads": threads, "us": us})
                        times = "  ".join(f"{who} {us[who]:9.1f}" for who in us)
                        factor = us["inductor"] / us["ours"]
                        print(
                            f"{threads}  {cell['kind']:34} {cell['shape']:>10}  {times}", end="  "
                        )
                        print(f"{factor:.2f}", flush=True)
        save(args, {"device": device_name(torch.device(args.device)), "cells": results})


def save(args, results):
    if args.json:
        text = json.dumps(machine(args.device) | results, indent=1)
        Path(args.json).write_text(text + "\n", encoding="utf-8")


def table(files):
    """gains.json: {device: {kind: {shape: the least factor}}}."""
    gains = defaultdict(lambda: defaultdict(dict))
    for file in files:
        results = json.loads(Path(file).read_text(encoding="utf-8"))
        for cell in results["cells"]:
            factor = cell["us"]["inductor"] / cell["us"]["ours"]
            shapes = gains[results["device"]][cell["kind"]]
            shape = cell["shape"]
            shapes[shape] = min(round(factor, 2), shapes.get(shape, float("inf")))
    return json.dumps(gains, indent=1, sort_keys=True) + "\n"


# ---------------------------------------------------------------- whole models

PROMPT = 128  # tokens
PASSES = {"inductor": None, "measured": "measured", "everywhere": "everywhere"}


def smollm2(dtype):
    from benchmarks.generate import build, load

    tokenizer, weights = load()
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    return build(weights, dtype, "cpu"), tokenizer(text, return_tensors="pt").input_ids


def qwen3(dtype):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}
    model = Qwen3ForCausalLM(Qwen3Config(**sizes, **heads, vocab_size=4096)).to(dtype).eval()
    return model, torch.randint(4096, (1, PROMPT + 1))


MODELS = {"smollm2": smollm2, "qwen3": qwen3}


def uses(model, tokens):
    """Name: what is run of a compiled model; it gives the logits, or the loss and a gradient."""
    prompt, token = tokens[:, :PROMPT], tokens[:, PROMPT : PROMPT + 1]
    with torch.no_grad():
        cache = model(prompt, use_cache=True).past_key_values
    (embedding, *_) = model.parameters()
    # transformers 5.24 calls it by another name.
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"

    def decode(compiled):
        with torch.no_grad():
            logits = compiled(token, **{name: cache}, use_cache=True).logits
        cache.crop(-1)
        return logits

    def prefill(compiled):
        with torch.no_grad():
            return compiled(prompt, use_cache=False).logits

    def training(compiled):
        loss = compiled(prompt, labels=prompt, use_cache=False).loss
        loss.backward()
        gradient, embedding.grad = embedding.grad, None
        model.zero_grad()
        return gradient

    return {"decode": decode, "prefill": prefill, "training": training}


def models(args):
    results = []
    for name in args.models.split(","):
        for dtype in args.dtypes.split(","):
            model, tokens = MODELS[name](DTYPES[dtype][0])
            del model.model.layers[args.layers or len(model.model.layers) :]
            for use, run in uses(model, tokens).items():
                print(f"\n{name} {dtype}, {len(model.model.layers)} layers, {use}", flush=True)
                results.append({"model": name, "dtype": dtype, "use": use} | compare(model, run))
                save(args, {"layers": len(model.model.layers), "models": results})


def compare(model, run):
    runs, lines, first = {}, defaultdict(list), {"eager": run(model)}
    for name, where in PASSES.items():
        torch._dynamo.reset_code_caches()
        options = where and {"pre_grad_custom_pass": fuse(where, lines[name].append)}
        runs[name] = partial(run, torch.compile(model, dynamic=False, options=options))
        first[name] = runs[name]()
    told = {}
    for name in ("measured", "everywhere"):
        said = Counter(line.partition(": ")[2] for line in lines[name])
        told[name] = dict(said)
        print(name, *(f"{count:4} {text}" for text, count in said.most_common()), sep="\n  ")
    for name in runs:
        error = distance(first[name], first["eager"])
        same = (first[name].argmax(-1) == first["eager"].argmax(-1)).double().mean().item()
        told[f"{name} beside eager"] = {"distance": error, "same": same}
        print(f"{name} beside eager: distance {error:.2e}, same tokens {same:.2%}")
    times = samples({name: lambda _, f=f: f() for name, f in runs.items()}, [None], 10)
    ms = {name: statistics.median(values) / 1e3 for name, values in times.items()}
    for name in ("measured", "everywhere"):
        ratios = [a / b for a, b in zip(times["inductor"], times[name])]
        low, middle, high = statistics.quantiles(ratios, n=4)
        told[f"inductor over {name}"] = middle
        print(f"inductor {ms['inductor']:.2f} ms, {name} {ms[name]:.2f} ms: ", end="")
        print(f"{middle:.3f} times as fast, quartiles {low:.3f} to {high:.3f}", flush=True)
    return {"ms": ms} | told


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("cells")
    one.add_argument("--kinds", default=",".join(KINDS), help='"op mode", several by commas')
    one.add_argument("--dtypes", default="fp32,bf16")
    one.add_argument("--rows", default="1,16,256,2048")
    one.add_argument("--columns", default="64,576,2048,4096")
    one.add_argument("--threads", default="1,2")
    one.add_argument("--seconds", type=float, default=0.2, help="for each contender in a cell")
    two = commands.add_parser("table")
    two.add_argument("files", nargs="+")
    two.add_argument("--out", default=GAINS)
    three = commands.add_parser("models")
    three.add_argument("--models", default=",".join(MODELS))
    three.add_argument("--dtypes", default="fp32,bf16")
    three.add_argument("--layers", type=int, help="the first ones alone")
    for command in (one, three):
        command.add_argument("--device", default="cpu")
        command.add_argument("--json")
    args = parser.parse_args()
    if args.command == "cells":
        cells(args)
    elif args.command == "models":
        models(args)
    else:
        Path(args.out).write_text(table(args.files), encoding="utf-8")


if __name__ == "__main__":
    main()
