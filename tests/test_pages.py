"""The pages: their links, commands, code, tables and charts hold; the front page stays short."""

import ast
import fnmatch
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from email.parser import Parser
from pathlib import Path

import programs
import pytest
import torch

import rmsnorm_cuda
from rmsnorm_cuda.installation import supported

ROOT = Path(__file__).parents[1]
FOLDERS = (
    ".",
    ".ci",
    "benchmarks",
    "benchmarks/layernorm_vs_rmsnorm",
    "csrc",
    "csrc/cuda",
    "rmsnorm_cuda",
    "rmsnorm_cuda/integrations",
    "rmsnorm_cuda/monitoring",
    "tests",
)
PAGES = {folder: ROOT / folder / "README.md" for folder in FOLDERS}
for name in ("SECURITY.md", "rmsnorm_cuda/monitoring/RUNBOOK.md"):
    PAGES[name] = ROOT / name
FRONT = PAGES["."]
STUDY = "layernorm_vs_rmsnorm"
pytestmark = pytest.mark.skipif(not PAGES["rmsnorm_cuda"].exists(), reason="there are no sources")
each_page = pytest.mark.parametrize("folder", PAGES)

LINK = re.compile(r"!?\[[^]]*\]\(([^)]+)\)")
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.M | re.S)


def blocks(page, language):
    """The fenced blocks of a language, without the indentation of a list."""
    found = FENCE.findall(page.read_text())
    return [textwrap.dedent(text) for _, name, text in found if name == language]


def prose(page):
    return FENCE.sub("", page.read_text())


def anchors(page):
    """As a forge makes them of the headings."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# ---------------------------------------------------------------- links and names


@each_page
def test_links(folder):
    page = PAGES[folder]
    for target in LINK.findall(prose(page)):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert ROOT.resolve() in file.parents and file.is_file(), target
        assert not anchor or anchor in anchors(file), target


def test_every_page_is_linked_from_the_front_page():
    """Or from a page that is."""
    linked = {
        (page.parent / target.partition("#")[0]).resolve()
        for page in (FRONT, PAGES["benchmarks"])
        for target in LINK.findall(prose(page))
    }
    assert {page.resolve() for page in PAGES.values()} - {FRONT.resolve()} <= linked


MADE = ("build/", "dist/", ".venv")  # by a build
FILE = re.compile(r"[\w./*-]+\.(?:py|pyi|h|cpp|cu|cuh|inl|json|md|png|sh|toml)\b")


@each_page
def test_files_that_are_named_exist(folder):
    """In `code` and in trees; by their path from the root or the page, or by their name alone."""
    page = PAGES[folder]
    names = {
        path.name
        for pattern in ("*.*", "csrc/**/*", "rmsnorm_cuda/**/*", "tests/**/*", "benchmarks/**/*")
        for path in ROOT.glob(pattern)
    }
    spans = re.findall(r"`([^`\n]+)`", prose(page)) + blocks(page, "")
    files = {file for span in spans for file in FILE.findall(span)}
    for file in files:
        if file.startswith(MADE) or "NAME" in file or file == "setup.py":
            continue
        there = (
            [path for folder in (ROOT, page.parent) for path in folder.glob(file)]
            if "/" in file
            else fnmatch.filter(names, file)
        )
        assert there, file


@each_page
def test_lines(folder):
    """100 columns."""
    for line in PAGES[folder].read_text().splitlines():
        assert len(line) <= 100, line


# ---------------------------------------------------------------- the front page


def sentences(page):
    """Of its prose: not of tables and code, whatever a link leads to."""
    text = re.sub(r"^\|.*$", "", prose(page), flags=re.M)
    text = re.sub(r"(!?)\[([^]]*)\]\([^)]+\)", lambda link: "" if link[1] else link[2], text)
    for paragraph in re.split(r"\n\s*\n|^(?:- |\d+\. |#+ )", text, flags=re.M):
        yield from (
            s.split()
            for s in re.split(r"(?<=[.!?:;])(?:\*\*)?\s", " ".join(paragraph.split()))
            if s
        )


def test_front_page_is_short():
    text = FRONT.read_text()
    assert len(text.split()) <= 750
    assert len(re.findall(r"^- \*\*", text, re.M)) == 5
    (example,) = blocks(FRONT, "python")
    assert len([line for line in example.splitlines() if line]) <= 12
    assert text.count("![") == 1


@each_page
def test_sentences_are_short(folder):
    assert not [" ".join(words) for words in sentences(PAGES[folder]) if len(words) > 30]


def test_front_page_tells_what_is_supported():
    text = FRONT.read_text()
    assert f"| Python | {', '.join(supported.PYTHONS)} |" in text
    minors = ", ".join(version.rpartition(".")[0] for version in supported.TORCHES)
    assert f"| torch | {minors}, " in text


def test_speed_of_the_front_page_is_that_of_the_results():
    sys.path.append(str(ROOT))
    from benchmarks import uses

    rows = [uses.row(figure) for figure in uses.figures()]
    assert len(rows) == 5 and "\n".join(rows) in FRONT.read_text()


def metadata(folder):
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", folder]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (file,) = folder.glob("*.egg-info/PKG-INFO")
    return Parser().parsestr(file.read_text())


def test_front_page_on_a_package_index(tmp_path):
    """Nothing is relative there, and each page that the front page links is named."""
    info = metadata(tmp_path)
    text = info.get_payload()
    assert info["Description-Content-Type"] == "text/markdown"
    assert not LINK.findall(text) and text.startswith("# rmsnorm_cuda")
    assert all(f"(`{folder}/README.md`)" in text for folder in FOLDERS[1:] if STUDY not in folder)
    (listed,) = tmp_path.glob("*.egg-info/SOURCES.txt")  # in the source distribution
    assert {page.resolve() for page in PAGES.values()} <= {
        (ROOT / line).resolve() for line in listed.read_text().splitlines()
    }


# ---------------------------------------------------------------- code


def python_blocks():
    """Found when tests are collected."""
    for folder, page in PAGES.items():
        for i, code in enumerate(blocks(page, "python") if page.exists() else ()):
            yield pytest.param(code, id=f"{folder}-{i}")


@pytest.mark.parametrize("code", list(python_blocks()))
def test_python_compiles_and_what_it_imports_exists(code):
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("rmsnorm_cuda"):
            source = Path(importlib.util.find_spec(node.module).origin).read_text()
            for alias in node.names:
                assert re.search(rf"\b{alias.name}\b", source), alias.name


def test_first_example_runs(capsys):
    (code,) = blocks(FRONT, "python")
    names = {}
    exec(code, names)
    assert names["y"].shape == names["codes"].shape == names["x"].shape
    assert isinstance(names["model"][1], rmsnorm_cuda.RMSNorm) and len(names["swap"]) == 1


def test_example_of_the_functions_runs(monkeypatch):
    """Under torch.compile, but without a compiler."""
    compiled = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, **options: compiled(f, backend="eager", **options)
    )
    code = blocks(PAGES["rmsnorm_cuda"], "python")[0]
    names = {}
    exec(code.replace("8, 512, 4096", "2, 8, 4096"), names)
    assert names["q"].dtype == torch.int8 and names["y"].shape == (2, 8, 4096)
    assert isinstance(names["model"][1], torch.nn.RMSNorm) and not names["swap"].skipped


def test_example_of_debugging_runs(capsys):
    exec(blocks(PAGES["csrc"], "python")[0], {})
    distances = re.findall(r"\d+", capsys.readouterr().out.partition("dtype")[0])
    assert len(distances) == 4 and set(distances) <= {"0", "1"}


# ---------------------------------------------------------------- commands


def commands(page):
    """[environment variables, words] of each command of its shell blocks."""
    for block in blocks(page, "sh"):
        for line in re.sub(r"\\\n\s*", "", block).splitlines():
            words = shlex.split(line, comments=True)
            for part in " ".join(map(shlex.quote, words)).split(" '&&' "):
                words = shlex.split(part)
                at = next(
                    (i for i, word in enumerate(words) if not re.match(r"[A-Z_]+=", word)),
                    len(words),
                )
                if words:
                    yield words[:at], words[at:]


def options(words):
    return [word.partition("=")[0] for word in words if word.startswith("--")]


def check_script(path, words):
    """A script of this repository: it is there, and has these options and subcommands."""
    file = ROOT / path
    source = (file / "__main__.py" if file.is_dir() else file).read_text()
    if "options_of(" in source:
        source += (ROOT / "benchmarks" / "families.py").read_text()
    for option in options(words):
        assert f'"{option}"' in source, option
    if "add_subparsers" in source:
        assert f'add_parser("{words[0]}"' in source, words


def check_make(words):
    text = (ROOT / "Makefile").read_text()
    targets = [word for word in words if "=" not in word]
    assert targets and all(re.search(rf"^{target}:", text, re.M) for target in targets), targets
    for variable, _, value in (word.partition("=") for word in words if "=" in word):
        assert f"$({variable})" in text, variable
        if variable == "ARGS":
            (target,) = targets
            (script,) = re.findall(rf"^{target}:.*\n\t\$\(BIN\)/python (\S+)", text, re.M)
            check_script(script, shlex.split(value))


def check_python(words):
    if words[:2] == ["-m", "rmsnorm_cuda"]:
        file = "bench/command.py" if "bench" in words else "__main__.py"
        source = (ROOT / "rmsnorm_cuda" / file).read_text()
        assert "bench" not in words or f'add_parser("{words[2]}"' in source, words
        assert all(f'"{option}"' in source for option in options(words))
        if "--explain" in words:
            run = programs.run(module=words[1], arguments=words[2:])
            assert run.returncode == 0 and "H100" in run.stdout, run.stderr
    elif words[:2] == ["-m", "pytest"]:
        check_pytest(words[2:])
    elif words[0] == "-m":
        assert words[1] == "sglang.launch_server"
    else:
        check_script(words[0], words[1:])


def check_pytest(words):
    configured = (ROOT / "pyproject.toml").read_text()
    for word in words:
        assert "tests/" not in word or (ROOT / word).exists(), word
    if "-m" in words:
        marker = words[words.index("-m") + 1].removeprefix("not ")
        assert f'"{marker}: ' in configured, marker


def check_pip(words):
    assert words[0] == "install" and set(options(words)) <= {
        "--no-deps",
        "--no-build-isolation",
        "--target",
    }
    for word in words:
        match = re.match(r"rmsnorm_cuda-(.*?)-cp(\d)(\d+)-.*\.whl$", word)
        if match:
            assert (
                match[1] == rmsnorm_cuda.__version__
                and f"{match[2]}.{match[3]}" in supported.PYTHONS
            )
        match = re.match(r"torch==(.*)\.\d+$", word)
        assert not match or match[1] in [
            version.rpartition(".")[0] for version in supported.TORCHES
        ]


def check_cmake(words):
    assert (
        words[0] == "--build" or (ROOT / words[words.index("-S") + 1] / "CMakeLists.txt").exists()
    )


def check_compiler(words):
    for pattern in (word for word in words if word.endswith(".cpp")):
        assert list(ROOT.glob(pattern)), pattern


def check_server(name):
    def check(words):
        text = (ROOT / "benchmarks" / "cpp_server" / "CMakeLists.txt").read_text()
        assert f"add_executable({name} {name}.cpp)" in text
        assert len(words) >= 4

    return check


def check_vllm(words):
    assert '"vllm.general_plugins"' in (ROOT / "pyproject.toml").read_text()
    plugin = (ROOT / "rmsnorm_cuda" / "integrations" / "vllm.py").read_text()
    for op in (option.partition(".")[2] for option in options(words)):
        assert op in plugin, op
    for word in (word for word in words if word.startswith("-cc.")):
        assert re.fullmatch(r"-cc\.custom_ops\+=(\+[a-z0-9_]+,?)+", word), word


PROGRAMS = {
    "make": check_make,
    "python": check_python,
    ".venv/bin/python": check_python,
    "pytest": check_pytest,
    "pip": check_pip,
    "uv": lambda words: check_pip(words[1:]),
    "cmake": check_cmake,
    "g++": check_compiler,
    "sha256sum": lambda words: None,  # test_install.py::test_sums_of_a_release
    "vllm": check_vllm,
    "cd": lambda words: None,
    "../servers/torch_server": check_server("torch_server"),
    "../servers/kernel_server": check_server("kernel_server"),
    "benchmarks/first_run.sh": lambda words: (ROOT / "benchmarks" / "first_run.sh").stat(),
    ".ci/run": lambda words: (ROOT / ".ci" / "run").stat(),
    "build/sanitize/kernels/cpu_check": lambda words: None,  # the line above it builds that
}


@each_page
def test_commands(folder):
    """Cheap ones run, in check_python; of the others all that can be looked up is."""
    for environment, (program, *words) in ((e, w) for e, w in commands(PAGES[folder]) if w):
        assert program in PROGRAMS, program
        PROGRAMS[program](words)
        for variable in (word.partition("=")[0] for word in environment):
            assert variable in VARIABLES | {"PATH", "SGLANG_PLUGINS", "VLLM_PLUGINS"}, variable


def variables_that_are_read():
    files = [ROOT / "setup.py", *ROOT.glob("rmsnorm_cuda/**/*.py"), *ROOT.glob("csrc/**/*.[ch]*")]
    pattern = re.compile(r'(?:environ\.get|environ|getenv|is_set|words_of)[(\[]"([A-Z_]+)"')
    return {name for file in files for name in pattern.findall(file.read_text())}


VARIABLES = variables_that_are_read()
OF_OTHERS = {"SGLANG_PLUGINS", "XDG_CACHE_HOME"}  # which only say where to look


def test_every_environment_variable_is_told():
    told = {
        name
        for page in PAGES.values()
        for names in re.findall(r"^- (`[A-Z_]+`.*?):", page.read_text(), re.M)
        for name in re.findall(r"`([A-Z_]{3,})`", names)
    }
    assert len(VARIABLES) > 10 and told == VARIABLES - OF_OTHERS


# ---------------------------------------------------------------- tables and charts


def test_the_tests_that_are_named_exist():
    text = PAGES["tests"].read_text()
    rows = text[text.index("## Works with") : text.index("## Wheels")].split("\n- ")[1:]
    assert len(rows) > 25
    for row in rows:
        named = re.findall(r"`(\w+\.py)::(\w+)`", row)
        assert named, row
        for file, function in named:
            source = (ROOT / "tests" / file).read_text()
            assert re.search(rf"^def {function}\(", source, re.M), (file, function)


def test_make_figures_draws_the_charts():
    shown = {
        (page.parent / image).resolve()
        for page in PAGES.values()
        for image in re.findall(r"!\[[^]]+\]\((.*?)\)", page.read_text())
        if "screenshot-" not in image  # benchmarks/dashboards.py takes them, of servers
    }
    assert len(shown) >= 6
    if not shutil.which("make"):
        pytest.skip("make is not installed")
    command = ["make", "-C", str(ROOT), "-n", "-W", "pyproject.toml", "figures"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    drawn = [str((ROOT / name).resolve()) for name in re.findall(r"--png (\S+)\.png", text)]
    for image in map(str, shown):  # --png loss.png may come to loss-this.png and loss-that.png
        assert any(image.removesuffix(".png").startswith(name) for name in drawn), image
    for data in re.findall(r"--from (\S+)", text):
        assert (ROOT / data).exists(), data


def test_counts_of_norm_classes():
    """They are those of the list that benchmarks/norm_classes.py has written."""
    listed = (ROOT / "benchmarks" / "results" / "norm_classes.md").read_text()
    classes, swapped = re.search(
        r"## transformers .*\n\n(\d+) classes, (\d+) of them swapped", listed
    ).groups()
    items = listed[: listed.index("## diffusers")].split("\n- ")[1:]
    stay = [item for item in (" ".join(item.split()) for item in items) if "stays: " in item]
    biased = sum("bias" in reason for reason in stay)
    built = sum("it is not built from a width" in reason for reason in stay)
    text = " ".join(PAGES["rmsnorm_cuda/integrations"].read_text().split())
    assert len(stay) == int(classes) - int(swapped) and built == 2
    assert (
        f"Of {classes} in transformers 5.24 it swaps {swapped}. Of the others {biased} have a "
        f"bias, {len(stay) - biased - built} compute something else, and two are small networks."
    ) in text


def table_of_what_was_tested():
    """What `pytest --record=tests/tested.json` has seen."""
    lines = ["| Python | torch | installed | tests passed, skipped |", "|---|---|---|---|"]
    for e in json.loads((ROOT / "tests" / "tested.json").read_text()):
        assert e["failed"] == e["error"] == 0, e
        lines.append(
            f"| {e['python']} | {e['torch']} | {e['installed']} | {e['passed']}, {e['skipped']} |"
        )
    return "\n".join(lines) + "\n"


def test_machines_are_told():
    """`python benchmarks/machines.py` prints the table anew, of the reports that are there."""
    sys.path.append(str(ROOT))
    from benchmarks import machines

    assert machines.table() in PAGES["benchmarks"].read_text()


def test_what_was_tested_is_told(request):
    """To write it anew, put what table_of_what_was_tested() returns into tests/README.md."""
    if request.config.getoption("--record"):
        pytest.skip("it is being recorded")
    assert table_of_what_was_tested() in PAGES["tests"].read_text()


@pytest.mark.parametrize(
    "command, results",
    [
        (["uses.py"], None),
        (["cpu.py"], "cpu"),
        ([STUDY, "ops"], "layernorm-vs-rmsnorm-ops"),
        ([STUDY, "train"], "layernorm-vs-rmsnorm-train"),
    ],
    ids=["uses", "cpu", "ops", "train"],
)
def test_charts_and_tables_are_made_of_the_results(command, results, tmp_path):
    """What `make figures` calls: it measures nothing, and writes the tables that are there."""
    pytest.importorskip("matplotlib")
    file = ROOT / "benchmarks" / "results" / f"{results}-epyc-zen4-avx512"
    words = ["--png", tmp_path / "chart.png"]
    words += ["--from", f"{file}.json"] if results else []
    words += ["--md", tmp_path / "table.md"] if STUDY in command else []
    script, *rest = command
    program = ROOT / "benchmarks" / script
    program = program / "__main__.py" if program.is_dir() else program
    run = programs.run(file=program, arguments=[*rest, *words], cwd=ROOT)
    assert run.returncode == 0, run.stderr
    charts = list(tmp_path.glob("chart*.png"))
    assert charts and all(chart.read_bytes().startswith(b"\x89PNG") for chart in charts)
    if STUDY in command:
        assert (tmp_path / "table.md").read_text() == Path(f"{file}.md").read_text()


def test_benchmark_that_is_imported_takes_nothing_from_the_path():
    """The folders that were on it stay: what imports a benchmark imports from them afterwards."""
    files = sorted(file.stem for file in (ROOT / "benchmarks").glob("*.py"))
    assert {"cpu", "gpu", "generate"} <= set(files)
    code = f"""if True:
        import importlib, sys
        sys.path.append({str(ROOT)!r})
        before = sys.path[:]
        for name in {files}:
            importlib.import_module("benchmarks." + name)
            assert sys.path[: len(before)] == before, name
    """
    run = programs.run(code)
    assert run.returncode == 0, run.stderr


def test_demo_tells_what_the_norm_costs():
    sys.path.append(str(ROOT))
    from benchmarks import generate

    times = {"share theirs": [0.05] * 40, "share ours": [0.01] * 40, "token theirs": [100.0] * 40}
    noise = [(-1) ** i * 2 for i in range(40)]
    said = generate.meaning(times | {"token ours": [96 + n / 2 for n in noise]})
    assert said.startswith(
        "the norm was 5.0% of a token's time and is 1.0%; a token takes 4.0% less"
    )
    said = generate.meaning(times | {"token ours": [100 + n for n in noise]})
    assert "the token's time shows no difference (95 % interval -2.0% to +2.0%)" in said
    assert generate.median_and_interval(range(1, 41)) == (20.5, 14, 27)
