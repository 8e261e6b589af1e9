"""`make mutate`: is every operator and number of the CPU kernels and of the CUDA plans tested?

    python .ci/mutate.py [FILE[:LINE] ...] [--sample N] [--seed S] [--list]

Changes one operator or number at a time (a mutant) in a copy under build/mutate, and runs the tests
until one fails. A survivor fails the command. What tests/mutants.txt excuses, with a reason, is not
run.

What takes the time is compiling. So the kernels of one family are first compiled for one dtype
(tests/native/mutant.cpp puts them in place of the originals), then for others, at -O1. What
compiles to the bytes of the original is no mutant there. cpu_check.cpp comes first, and pytest sees
what survives it.
"""

from __future__ import annotations

import argparse
import collections
import functools
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "mutate"
ORIGINALS = BUILD / "originals"
REASONS = ROOT / "tests" / "mutants.txt"
CPU, PLAN = Path("csrc/cpu"), Path("csrc/cuda/plan.h")

FLAGS = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"]
FLAGS += ["-fno-math-errno", "-Wno-psabi"]
DTYPES = {"BFloat16": "bf16", "Half": "fp16", "float": "fp32"}
DTYPE_ENUM = {"BFloat16": "kBFloat16", "Half": "kFloat16", "float": "kFloat32"}
FAMILIES = "forward", "backward", "quant", "gated", "rope"
# What is compiled once, for all instruction sets.
SHARED = [p.stem for p in sorted((ROOT / CPU).glob("*.cpp")) if not p.stem.startswith("isa_")]
# What of an instruction set is compiled, the quickest first; None: for all dtypes.
STEPS = [("avx2", "BFloat16"), ("avx2", "float"), ("scalar", "float"), ("avx512", "BFloat16")]
STEPS += [("avx2", None)]
EMULATED = ["-include", ROOT / "tests/native/cpu_avx512_emulated.h"]
PYTEST = {
    "plan": ["tests/test_plan.py"],
    "cpu": ["tests/test_forward.py", "tests/test_backward.py", "tests/test_quant.py"]
    + ["tests/test_fused_add.py", "tests/test_invariance.py", "tests/test_gated.py"]
    + ["tests/fuzz", "--fuzz-seconds", "20", "--fuzz-seed", "1"],
}

# ---------------------------------------------------------------- mutants

OTHERS = {"+": "-", "-": "+", "*": "/", "/": "*", "%": "*", "<<": ">>", ">>": "<<", "&": "|"}
OTHERS |= {"|": "&", "^": "|", "<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "=="}
OTHERS |= {"&&": "||", "||": "&&", "+=": "-=", "-=": "+=", "*=": "/=", "/=": "*=", "|=": "&="}
OTHERS |= {"&=": "|=", "<<=": ">>=", ">>=": "<<=", "true": "false", "false": "true"}
SKIPPED = r'//[^\n]*|/\*.*?\*/|"[^"\n]*"|\'[^\'\n]*\'|^ *#(?:[^\n]*\\\n)*[^\n]*'
SKIPPED += r"|^ *(?:static_assert|VERB)\b[^;]*;"
SKIPPED = rf"^#ifdef RMSNORM_TUNING\n.*?^#(?:else|endif)|{SKIPPED}"  # of no build that is tested
OPERATOR = "|".join(re.escape(o) for o in sorted(OTHERS, key=len, reverse=True) if not o.isalpha())
# clang-format puts spaces around an operator of two operands, and not beside a bracket of templates
# or a star or ampersand of a type.
TOKEN = re.compile(
    rf"(?P<skipped>{SKIPPED})|(?P<binary>(?<=[ \n])(?:{OPERATOR})(?=[ \n]))"
    r"|(?P<unary>(?<=[ (\[{,])[-!~](?=[\w(.]))|(?P<word>[A-Za-z_]\w*)"
    r"|(?P<number>(?<![\w.])(?:0x[\da-fA-F.]+(?:p[-+]?\d+)?|\d[\d.]*(?:e[-+]?\d+)?)[a-zA-Z]*)",
    re.M | re.S,
)


class Mutant(NamedTuple):
    file: Path
    start: int
    before: str
    after: str
    line: int
    text: str  # of the line, without its comment
    turn: int  # which of the equal changes of a line

    @property
    def change(self):
        of_turn = f" #{self.turn}" if self.turn > 1 else ""
        return f"{self.before} -> {self.after or 'nothing'}{of_turn}"

    def __str__(self):
        return f"{self.file}:{self.line}: {self.change}: {self.text}"


def other_number(text):
    """One more; of a float the double."""
    number, suffix = re.fullmatch(r"(0x[\da-fA-F.]+(?:p[-+]?\d+)?|[\d.e+-]+)(.*)", text).groups()
    if "p" in number:
        significand, exponent = number.split("p")
        return f"{significand}p{int(exponent) + 1}{suffix}"
    if number.startswith("0x"):
        return f"{int(number, 16) + 1:#x}{suffix}"
    if re.search("[.e]", number):
        return f"{2 * float(number) or 1.0}{suffix}"
    return f"{int(number) + 1}{suffix}"


def mutants_of(file):
    source = (ROOT / file).read_text()
    lines = source.splitlines()
    result = []
    for match in TOKEN.finditer(source):
        kind, before, (start, end) = match.lastgroup, match[0], match.span()
        if kind == "skipped" or (kind == "word" and before not in OTHERS):
            continue
        if kind == "number" and (
            source[start - 1] == "<" or re.match(r"[>,\d ]*>(?! )", source[end:])
        ):
            continue  # an argument of a template
        after = (
            other_number(before) if kind == "number" else OTHERS[before] if kind != "unary" else ""
        )
        line = source.count("\n", 0, start)
        text = re.sub(r"\s*//.*", "", lines[line]).strip()
        turn = 1 + sum((m.line, m.before) == (line + 1, before) for m in result)
        result.append(Mutant(file, start, before, after, line + 1, text, turn))
    return result


# ---------------------------------------------------------------- building


class NotCompiled(Exception):
    pass


@functools.cache
def newest_source():
    paths = [*(ROOT / "csrc").rglob("*.*"), ROOT / "tests/native/mutant.cpp"]
    return max(path.stat().st_mtime for path in paths)


def is_kept(to):
    """Is it an original of an earlier run?"""
    return to.exists() and to.stat().st_mtime > newest_source()


def compiled(source, to, *options):
    if to.parent == ORIGINALS and is_kept(to):
        return to
    command = [os.environ.get("CXX", "g++"), *FLAGS, *options, "-c", source, "-o", to]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        raise NotCompiled(done.stderr)
    return to


def copy_sources(mutant, dtype):
    """The folder csrc/cpu of a copy with the mutant in it, and kernels for the one dtype only."""
    shutil.rmtree(BUILD / "csrc", ignore_errors=True)
    shutil.copytree(ROOT / "csrc", BUILD / "csrc")
    if mutant:
        path, m = BUILD / mutant.file, mutant
        source = path.read_text()
        path.write_text(source[: m.start] + m.after + source[m.start + len(m.before) :])
    if dtype:
        path = BUILD / CPU / "sum.inl"
        others = "|".join(name for name in DTYPES if name != dtype)
        path.write_text(re.sub(rf"return f\(({others})\(\)\);", "return;", path.read_text()))
    return BUILD / CPU


def compile_family(folder, isa, family, to):
    """One .inl of an instruction set, as `mutant_k...`, with nullptr for the other kernels."""
    path = folder / f"isa_{isa}.cpp"
    source = path.read_text()
    for other in set(FAMILIES) - {family}:
        source = source.replace(f'#include "{other}.inl"\n', "")
    members = {
        "forward": {"forward": r"\3"},
        "backward": {"backward": r"\4", "dweight": "dweight"},
        "quant": {"quantize": "quantize"},
        "gated": {"gate": "gate_rows", "gate_gradients": "gate_gradients"},
        "rope": {"rotate": "rotate", "rope_forward": r"\5"},
    }
    values = ", ".join(f".{name} = {value}" for name, value in members[family].items())
    kernels = r"const Kernels (\w+) = \{(.*), (forward<\w+>), (backward<\w+>),"
    kernels += r"\s+dweight,\s+quantize,\s+gate_rows,\s+gate_gradients,\s+rotate,"
    kernels += r"\s+(rope_forward<\w+>)\};"
    declared = (
        rf"extern const Kernels mutant_\1;\nconst Kernels mutant_\1 = {{.name = \2, {values}}};"
    )
    source, count = re.subn(kernels, declared, source)
    assert count, f"{path}: no Kernels"
    # Rows of 64 and 128 columns out of the general code: a third of the time.
    source = source.replace("kUnrollsHeads = true", "kUnrollsHeads = false")
    options = ["-include", intrinsics()]
    if isa == "avx512":  # as cpu_avx512_emulated.sh does
        source = re.sub(r'target\("avx512.*"\)', 'target("avx2,fma,f16c")', source)
        source = source.replace('asm("" : "+v"(v));', "")
        options += EMULATED
    path.write_text(source)
    return compiled(path, to, *options)


@functools.cache
def intrinsics():
    """The header, compiled."""
    header = ORIGINALS / "intrinsics.h"
    header.write_text("#include <immintrin.h>\n")
    command = ["g++", *FLAGS, "-x", "c++-header", str(header), "-o", f"{header}.gch"]
    subprocess.run(command, check=True)
    return header


KERNELS = {"scalar": ["kScalar"], "avx2": ["kAvx2"], "avx512": ["kAvx512", "kAvx512Bf16"]}
# What has the same bits.
LIKE = {"scalar": "avx2", "avx2": "scalar", "avx512": "avx2"}
NAMES = {"kScalar": "scalar", "kAvx2": "avx2", "kAvx512": "avx512", "kAvx512Bf16": "avx512_bf16"}


@functools.cache
def original(source, emulated=False):
    """The object of one of csrc/cpu/*.cpp as it is; isa_*.cpp have the kernels `original_k...`."""
    names = [f"-D{name}=original_{name}" for name in KERNELS.get(source[4:], ())]
    to = ORIGINALS / f"{source}{'_emulated' * emulated}.o"
    path = ROOT / (PLAN.with_suffix(".cpp") if source == "plan" else CPU / f"{source}.cpp")
    return compiled(path, to, *names, *supports(emulated))


def supports(emulated):
    """Of AVX-512 there is what is emulated."""
    return ["-D__builtin_cpu_supports(x)=" + ("1" if emulated else "((x)[3] != '5')")]


@functools.cache
def original_family(isa, family, dtype):
    to = ORIGINALS / f"{isa}_{family}_{dtype}.o"
    if is_kept(to):
        return to.read_bytes()
    return compile_family(copy_sources(None, dtype), isa, family, to).read_bytes()


@functools.cache
def choice(name, dtype, mutated):
    """tests/native/mutant.cpp: the Kernels `name`, with a mutant's for a dtype or without."""
    # AVX2 has the bits of AVX-512.
    like = name if name in ("kScalar", "kAvx2") else "kAvx2"
    options = {"ISA": name, "NAME": f'"{NAMES[name]}"', "ORIGINAL": f"original_{like}"}
    options |= {"MUTANT": f"mutant_{name}" if mutated else f"original_{like}"}
    options |= {"ALL": int(not dtype), "DTYPE": DTYPE_ENUM.get(dtype, "kFloat32")}
    to = ORIGINALS / f"{name}_{dtype}_{mutated}.o"
    defines = [f"-D{key}={value}" for key, value in options.items()]
    return compiled(ROOT / "tests/native/mutant.cpp", to, *defines)


def link(objects, isa=None, dtype=None, emulated=False):
    """librmsnorm.so of these objects, and of the originals of what they lack."""
    stems = {path.stem for path in objects}
    for source in (*SHARED, "plan", "isa_scalar", "isa_avx2"):
        if source not in stems:
            objects = [*objects, original(source, emulated and source == "dispatch")]
    for instruction_set, names in KERNELS.items():
        mutated = instruction_set == isa
        objects += [choice(name, dtype if mutated else None, mutated) for name in names]
    objects += [compiled_absent()]
    library = BUILD / "rmsnorm_cuda/lib/librmsnorm.so"
    run = ["g++", "-shared", "-Wl,-soname,librmsnorm.so", *objects, "-o", library]
    subprocess.run(list(map(str, run)), check=True)


@functools.cache
def compiled_absent():
    reason = '-DRMSNORM_CUDA_ABSENT_REASON="it is a mutant"'
    return compiled(ROOT / "csrc/cuda/absent.cpp", ORIGINALS / "absent.o", reason)


@functools.cache
def cpu_check():
    program, source = BUILD / "cpu_check", ROOT / "tests/native/cpu_check.cpp"
    lib = program.parent / "rmsnorm_cuda/lib"
    options = ["-std=c++17", "-O2", f"-L{lib}", "-lrmsnorm", f"-Wl,-rpath,{lib}"]
    subprocess.run(["g++", str(source), *options, "-o", str(program)], check=True)
    return program


# ---------------------------------------------------------------- testing


def limit(seconds=20):
    """Of CPU time: another process may need the machine."""
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def native(*arguments):
    """Of cpu_check: "" if it passes, or how it was killed."""
    command = [cpu_check(), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=limit) as process:
        line = process.stdout.readline()  # silent until a failure or the end
        if not line.endswith(" 0 failed\n"):
            process.kill()
    if line.endswith(" 0 failed\n"):
        return ""
    return "timed out" if process.returncode == -signal.SIGXCPU else "killed"


def python(kind):
    """The same of pytest: in a fork of this process, which has loaded torch."""
    import pytest
    import torch  # noqa: F401

    pid = os.fork()
    if not pid:
        with open(BUILD / "pytest.log", "w") as log:
            os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
        os.chdir(BUILD)
        sys.path.insert(0, str(BUILD))
        limit(30 if kind == "plan" else 300)
        os._exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", *PYTEST[kind]]))
    status = os.waitpid(pid, 0)[1]
    return "" if status == 0 else "timed out" if status == signal.SIGXCPU else "killed"


def kind_of(mutant):
    return "plan" if mutant.file.parent == PLAN.parent else "cpu"


def outcome(mutant):
    """killed, timed out, not compiled, same code (in all that was compiled) or survived."""
    file, objects = mutant.file, []
    try:
        if kind_of(mutant) == "plan":
            copy_sources(mutant, None)
            to = compiled(BUILD / PLAN.with_suffix(".cpp"), BUILD / "plan.o")
            link([to])
            return python("plan") or "survived"
        is_shared = file.suffix == ".cpp" and file.stem in SHARED
        if is_shared or file.suffix == ".h":
            folder = copy_sources(mutant, None)
            sources = [file.stem] if is_shared else SHARED
            objects = [
                compiled(folder / f"{s}.cpp", BUILD / f"{s}.o", *supports(False)) for s in sources
            ]
            same = all(o.read_bytes() == original(o.stem).read_bytes() for o in objects)
            if not same:
                link(objects)
                for part in (["gated"], ["choice"], ["fp64"], ["avx2"]):
                    if result := native(*part):
                        return result
            if is_shared:
                return "same code" if same else python("cpu") or "survived"
        return outcome_of_kernels(mutant, objects)
    except NotCompiled:
        return "not compiled"


def outcome_of_kernels(mutant, shared):
    steps, families = STEPS, [mutant.file.stem] if mutant.file.stem in FAMILIES else FAMILIES
    if mutant.file.stem.startswith("isa_"):
        steps = [(mutant.file.stem[4:], dtype) for dtype in (*DTYPES, None)]
    changed = False
    for isa, dtype in steps:
        for family in families:
            folder = copy_sources(mutant, dtype)
            to = compile_family(folder, isa, family, BUILD / "kernels.o")
            if to.read_bytes() == original_family(isa, family, dtype):
                continue
            changed, emulated = True, isa == "avx512"
            objects = [to, *shared]
            if emulated and shared:
                objects[1] = compiled(
                    folder / "dispatch.cpp", BUILD / "dispatch.o", *supports(True)
                )
            link(objects, isa, dtype, emulated)
            names = [NAMES[name] for name in KERNELS[isa]] + [LIKE[isa]]
            parts = ["forward", "quant"] if family == "forward" else [family]  # quant's first step
            if result := native(*parts, *names, *([f"of={DTYPES[dtype]}"] if dtype else [])):
                return result
    if not changed:
        return "same code"
    return python("cpu") or "survived"


def is_excused(mutant, entries):
    """Is there an entry `FILE: LINE` or `FILE: LINE  |  BEFORE -> AFTER, ...`; or `FILE: *`?"""
    line, any_line = f"{mutant.file}: {mutant.text}", f"{mutant.file}: *"
    for entry in entries:
        place, _, changes = entry.partition("  |  ")
        if place in (line, any_line) and (not changes or mutant.change in changes.split(", ")):
            return True
    return False


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("places", nargs="*", help="FILE or FILE:LINE; default: all files")
    parser.add_argument("--sample", type=int, help="so many mutants, of each file its share")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--list", action="store_true", help="only name them")
    options = parser.parse_args()
    files = [p.relative_to(ROOT) for p in sorted((ROOT / CPU).iterdir())]
    everything = [m for f in [*files, PLAN, PLAN.with_suffix(".cpp")] for m in mutants_of(f)]
    mutants = everything
    if options.places:
        wanted = set(options.places)
        mutants = [m for m in mutants if {str(m.file), f"{m.file}:{m.line}"} & wanted]
    if options.sample and options.sample < len(mutants):
        shuffled = sorted(
            mutants, key=lambda m: (m.file, random.Random(f"{options.seed} {m}").random())
        )
        mutants = [shuffled[i * len(mutants) // options.sample] for i in range(options.sample)]
    entries = [e for e in REASONS.read_text().splitlines() if e and not e.startswith("#")]
    if stale := [e for e in entries if not any(is_excused(m, [e]) for m in everything)]:
        sys.exit("\n".join([f"{REASONS.name} has what is no mutant:", *stale]))
    if options.list:
        return print(*mutants, sep="\n")

    ORIGINALS.mkdir(parents=True, exist_ok=True)
    for name in ("rmsnorm_cuda", "tests"):
        shutil.rmtree(BUILD / name, ignore_errors=True)
        shutil.copytree(ROOT / name, BUILD / name)
    shutil.copy(ROOT / "pyproject.toml", BUILD)
    copy_sources(None, None)
    link([])
    kinds = {kind_of(m) for m in mutants if not is_excused(m, entries)}
    if any(map(python, kinds)) or native("choice"):
        sys.exit(f"the originals fail: see {BUILD.name}/pytest.log")

    survivors = []
    table = collections.defaultdict(collections.Counter)
    for number, mutant in enumerate(mutants, 1):
        result = "excused" if is_excused(mutant, entries) else outcome(mutant)
        survivors += [mutant] if result == "survived" else []
        table[mutant.file][result] += 1
        print(f"{number}/{len(mutants)} {result}: {mutant}", flush=True)
    for file, counts in table.items():
        print(f"{file}: " + ", ".join(f"{n} {what}" for what, n in sorted(counts.items())))
    print(
        "in all: "
        + ", ".join(
            f"{n} {what}" for what, n in sorted(sum(table.values(), collections.Counter()).items())
        )
    )
    if survivors:
        print(*["survived without a reason:", *map(str, survivors)], sep="\n")
    return bool(survivors)


if __name__ == "__main__":
    sys.exit(main())
