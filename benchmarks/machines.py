"""The table of what `python -m rmsnorm_cuda bench --json FILE` gave on each machine.

    python benchmarks/machines.py   # prints it; benchmarks/README.md has it

Reports lie in results/machines/, under the name that the command gives them. It measures nothing.
"""

import json
import statistics
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

from rmsnorm_cuda.bench.cells import COMPILED, MODES
from rmsnorm_cuda.bench.command import file_name, is_busy, name_of, problems

FOLDER = Path(__file__).parent / "results" / "machines"
NAMES = {
    "forward": "norm",
    "training": "with backward",
    "fused": "fused add",
    "quantized": "fp8",
    "rope": "q/k + RoPE",
}
assert list(NAMES) == list(MODES)


def read(file):
    """A report, or an exit that names the file and what is wrong with it."""
    report = json.loads(file.read_text())
    wrong = problems(report)
    if not wrong and file.name != file_name(report["machine"]):
        wrong = [f"it should be called {file_name(report['machine'])}"]
    if not wrong and is_busy(report["machine"]):
        wrong = [f"other processes were busy: a load of {report['machine']['load']}"]
    if wrong:
        sys.exit(f"{file}: {'; '.join(wrong)}")
    return report


def ratios(report, mode, name):
    """Their median over ours, of each cell that has both."""
    found = (cell["us"] for cell in report["cells"] if cell["mode"] == mode)
    return [us[name]["median"] / us["ours"]["median"] for us in found if name in us]


def row(file):
    report = read(file)
    machine = report["machine"]
    link = f"[{name_of(machine)}](results/machines/{file.name})"
    cells = [link, str(machine["threads"]), machine["torch"]]
    for mode in NAMES:
        both = (ratios(report, mode, name) for name in ("F.rms_norm", COMPILED))
        means = (f"{statistics.geometric_mean(of):.1f}x" if of else "-" for of in both)
        cells.append(", ".join(means))
    return f"| {' | '.join(cells)} |"


def table(folder=FOLDER):
    """Markdown: geometric means of F.rms_norm's and torch.compile's times over ours."""
    head = ["machine", "threads", "torch", *NAMES.values()]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    rows = [row(file) for file in sorted(folder.glob("*.json"))]
    return "\n".join([*lines, *rows]) + "\n" if rows else "No report is there yet.\n"


if __name__ == "__main__":
    print(table(), end="")
