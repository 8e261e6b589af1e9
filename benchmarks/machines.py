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


def machine_of(file):
    machine = read(file)["machine"]
    link = f"[{name_of(machine)}](results/machines/{file.name})"
    return f"{link},\n   {machine['threads']} threads, torch {machine['torch']}"


def row(number, file):
    report, cells = read(file), [str(number)]
    for mode in NAMES:
        both = (ratios(report, mode, name) for name in ("F.rms_norm", COMPILED))
        means = (f"{statistics.geometric_mean(of):.1f}x" if of else "-" for of in both)
        cells.append(", ".join(means))
    return f"| {' | '.join(cells)} |"


def table(folder=FOLDER):
    """Markdown: geometric means of F.rms_norm's and torch.compile's times over ours; and whose."""
    files = list(enumerate(sorted(folder.glob("*.json")), 1))
    if not files:
        return "No report is there yet.\n"
    head = ["", *NAMES.values()]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    lines += [row(*numbered) for numbered in files]
    return "\n".join([*lines, "", *(f"{n}. {machine_of(file)}" for n, file in files)]) + "\n"


if __name__ == "__main__":
    print(table(), end="")
