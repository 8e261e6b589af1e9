"""The import: repeated in a process, interrupted, beside modules that fail, and under options."""

import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import programs
import pytest

import rmsnorm_cuda


def run(tmp_path, *parts, options=None):
    """The parts as one program, from a file: what is fused has its source read."""
    program = tmp_path / "program.py"
    program.write_text("".join(map(textwrap.dedent, parts)))
    if options is None:
        done = programs.run(file=program, cwd=tmp_path)
    else:
        command = [sys.executable, *options, str(program)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_import_is_quick_and_lazy(tmp_path):
    """Less than 100 ms of a core on top of `import torch` (quickest of five). Nothing heavy or
    seldom used is imported, and even a plug-in does not import the library that it is for."""
    code = """
        import sys, time, torch
        before, start = set(sys.modules), time.process_time()
        import rmsnorm_cuda
        print(time.process_time() - start, *(set(sys.modules) - before))
        from rmsnorm_cuda.integrations import kernels, megatron, sglang, vllm
        print(*sys.modules)
    """
    servers = {"kernels", "vllm", "sglang", "torchtitan", "megatron"}
    heavy = "numpy", "transformers", "torch._dynamo", "torch._inductor", "torch.distributed.tensor"
    lazy = {f"integrations.{name}" for name in (*servers, "transformers", "sharded")}
    lazy = {f"rmsnorm_cuda.{name}" for name in (*lazy, "monitoring", "ops")}
    times = []
    while not times or (min(times) >= 0.1 and len(times) < 5):
        at_import, with_plugins = run(tmp_path, code).stdout.splitlines()
        seconds, *modules = at_import.split()
        times.append(float(seconds))
        assert "rmsnorm_cuda.functional" in modules
        assert not [name for name in modules if name.startswith(heavy) or name in lazy | servers]
        assert lazy & set(with_plugins.split()) and not servers & set(with_plugins.split())
    assert min(times) < 0.1, times


def test_dir_is_what_a_user_may_use(tmp_path):
    """Before and after what is lazy was imported: no module or helper that is only imported."""
    code = """
        import rmsnorm_cuda
        for _ in range(2):
            names = [name for name in dir(rmsnorm_cuda) if not name.startswith("__")]
            assert names == sorted(rmsnorm_cuda.__all__), names
            assert all(hasattr(rmsnorm_cuda, name) for name in [*names, "__version__"])
            assert {"__version__", "__doc__"} < set(dir(rmsnorm_cuda))
            from rmsnorm_cuda import *
            assert replace_rms_norm is rmsnorm_cuda.replace_rms_norm and callable(monitor)
        try:
            rmsnorm_cuda.nothing
        except AttributeError as error:
            assert str(error) == "module 'rmsnorm_cuda' has no attribute 'nothing'"
        else:
            raise AssertionError
    """
    run(tmp_path, code)


LAYER = """
    class Layer(torch.nn.Module):
        def __init__(self, kind):
            super().__init__()
            self.one, self.two, self.linear = kind(8), kind(8), torch.nn.Linear(8, 8)

        def forward(self, hidden_states):
            residual = hidden_states
            hidden_states = self.linear(self.one(hidden_states))
            hidden_states = residual + hidden_states
            residual = hidden_states
            hidden_states = self.two(hidden_states)
            return residual + hidden_states

    torch.manual_seed(0)
    x = torch.randn(4, 8)
"""
FIRST = """
    import importlib, sys, torch
    import rmsnorm_cuda
    from rmsnorm_cuda import RMSNorm, monitoring
"""
MADE = """
    from rmsnorm_cuda.integrations import kernels, vllm
    want, norm, before = rmsnorm_cuda.rms_norm(x, 8), RMSNorm(8), Layer(torch.nn.RMSNorm)
    swap = rmsnorm_cuda.replace_rms_norm(before, fuse_residual=True)
    watched = Layer(RMSNorm)
    watch = rmsnorm_cuda.monitor(watched).__enter__()
"""
CHECKS = """
    import copy
    import rmsnorm_cuda as again
    assert again._C is sys.modules["rmsnorm_cuda._C"] and torch.equal(again.rms_norm(x, 8), want)
    leaf = x.clone().requires_grad_()
    again.fused_add_rms_norm(leaf, leaf)[0].sum().backward()
    assert torch.equal(torch.func.vmap(lambda row: again.rms_norm(row, 8))(x), want)
    assert again.rms_norm(x.to("meta"), 8).shape == x.shape and again.decompositions()
    for module in (norm, again.RMSNorm(8)):
        assert torch.equal(module(x), want)
        assert torch.equal(torch.compile(module, backend="aot_eager", fullgraph=True)(x), want)

    # Norms made before are ours, for what swaps, fuses and watches them now.
    assert len(again.replace_rms_norm(torch.nn.Sequential(norm, torch.nn.RMSNorm(8)))) == 1
    for mixed in (Layer(RMSNorm), Layer(torch.nn.RMSNorm)):
        swapped = again.replace_rms_norm(mixed, fuse_residual=True)
        assert [fused.norms for fused in swapped.fused] == [("two",)]
        expected = mixed(x)
        with again.monitor(mixed) as m:
            assert torch.equal(mixed(x), expected)
            assert torch.equal(copy.deepcopy(mixed)(x), expected)
        assert len(m.norms) == 2 and m.steps == [0] and not m.skipped
        assert (m.figures()[0, :, 0] == 4).all()  # rows of each norm
        swapped.restore()
        assert type(mixed) is Layer
    assert len(again.replace_rms_norm(before, fuse_residual=True)) == 0
    swap.restore()
    assert type(before) is Layer and type(before.one) is torch.nn.RMSNorm

    # A monitor that was open meanwhile goes on, and lets go of all norms.
    watched(x)
    try:
        again.monitor(watched).__enter__()
    except RuntimeError as error:
        assert "already" in str(error)
    watch.__exit__(None, None, None)
    assert watch.steps == [0] and all(type(m) is RMSNorm for m in (watched.one, watched.two))

    import torch.distributed as dist
    from torch.distributed.tensor import Shard, distribute_tensor
    ours = [f for f in sys.meta_path if type(f).__module__.startswith("rmsnorm_cuda")]
    assert not [f for f in ours if "torch.distributed.tensor" in f.names]
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    rows = distribute_tensor(x, dist.init_device_mesh("cpu", (1,)), [Shard(0)])
    y = again.rms_norm(rows, (8,))
    assert y.placements == rows.placements and torch.equal(y.to_local(), want)
    assert torch.equal(again.rms_norm_sharded(x, 8), torch.nn.functional.rms_norm(x, (8,)))
    dist.destroy_process_group()
"""
OURS = "for name in sorted(n for n in sys.modules if n.split('.')[0] == 'rmsnorm_cuda'):\n"
FORGET = OURS + "    del sys.modules[name]\n"
COMPILED = "    if name == 'rmsnorm_cuda._C':\n        continue\n"
WAYS = {
    "all forgotten": FORGET,
    "Python modules forgotten": FORGET.replace(OURS, OURS + COMPILED),
    "package reloaded": "importlib.reload(rmsnorm_cuda)\n",
    "each reloaded": OURS + COMPILED + "    importlib.reload(sys.modules[name])\n",
    "DTensor, then forgotten": "import torch.distributed.tensor\n" + FORGET,
}


FEW = ("all forgotten", "DTensor, then forgotten")


@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=[] if way in FEW else pytest.mark.slow) for way in WAYS]
)
def test_imported_again(way, tmp_path):
    """Twice: what piles up shows. Nothing is registered over what is there: torch would warn."""
    done = run(tmp_path, FIRST, LAYER, MADE, (WAYS[way] + "import rmsnorm_cuda\n") * 2, CHECKS)
    assert "Overriding" not in done.stderr


def test_interrupted(tmp_path):
    """Ctrl-C at each module of the package, and around each registration; then it is imported."""
    stops = """
        import sys, torch
        seen, real = set(), torch.library.Library.impl

        def stop(*what):
            if what not in seen:
                seen.add(what)
                raise KeyboardInterrupt

        class Finder:
            def find_spec(self, name, path=None, target=None):
                name.startswith("rmsnorm_cuda.") and stop(name)

        def impl(self, op, function, key, **options):
            stop("before", op, key)
            real(self, op, function, key, **options)
            stop("after", op, key)

        sys.meta_path.insert(0, Finder())
        torch.library.Library.impl = impl
        while "rmsnorm_cuda" not in sys.modules:
            try:
                import rmsnorm_cuda
            except KeyboardInterrupt:
                pass
        del sys.meta_path[[type(finder) for finder in sys.meta_path].index(Finder)]
        torch.library.Library.impl = real
        assert ("rmsnorm_cuda.functional",) in seen and len(seen) > 30
    """
    assert "Overriding" not in run(tmp_path, stops, FIRST, LAYER, MADE, CHECKS).stderr


def test_beside_modules_that_fail(tmp_path):
    """Neither the import nor eager use asks others for anything; torch._dynamo, imported, does."""
    others = """
        import sys, types, torch

        class Other(types.ModuleType):
            def __getattr__(self, name):
                raise RuntimeError(f"{name} of a module that has nothing to do with it")

        sys.modules["other"] = Other("other")
    """
    use = """
        model = Layer(torch.nn.RMSNorm)
        assert len(rmsnorm_cuda.replace_rms_norm(model, fuse_residual=True).fused) == 1
        with rmsnorm_cuda.monitor(model):
            model(x)
        assert torch.func.vmap(lambda row: rmsnorm_cuda.rms_norm(row, 8))(x).shape == x.shape
        assert rmsnorm_cuda.rms_norm(x.to("meta"), 8).shape == x.shape
    """
    run(tmp_path, others, FIRST, LAYER, use)


def test_hooks_of_two_packages(tmp_path):
    """Another package may wait for torch.distributed.tensor as ours does: by asking all finders."""
    hook = """
        import sys, torch

        executed = []

        class Finder:
            def find_spec(self, name, path=None, target=None):
                if name == "torch.distributed.tensor":
                    others = [finder for finder in sys.meta_path if finder is not self]
                    specs = (finder.find_spec(name, path, target) for finder in others)
                    spec = next(filter(None, specs))
                    loader, original = spec.loader, spec.loader.exec_module
                    loader.exec_module = lambda module: (original(module), executed.append(name))
                    return spec
    """
    use = """
        import torch.distributed.tensor
        propagator = torch.distributed.tensor.DTensor._op_dispatcher.sharding_propagator
        assert torch.ops.rmsnorm_cuda.rms_norm.default in propagator.op_to_schema_info and executed
    """
    insert = "sys.meta_path.insert(0, Finder())\n"
    run(tmp_path, hook, insert, "import rmsnorm_cuda\n", use)
    run(tmp_path, hook, "import rmsnorm_cuda\n", insert, use)


def test_module_that_imports_the_other(tmp_path):
    """Of two that a hook waits for: the function runs once, after the inner one."""
    (tmp_path / "outer.py").write_text("import inner")
    (tmp_path / "inner.py").write_text("")
    code = """
        import sys
        from rmsnorm_cuda.integrations.when_imported import when_imported

        sys.path.insert(0, ".")
        seen = []
        when_imported(("outer", "inner"), lambda: seen.append("inner" in sys.modules), "hook")
        import outer
        assert seen == [True]
    """
    run(tmp_path, code)


@pytest.mark.parametrize("options", ["-OO -bb -X dev", "-I"])
def test_options_of_python(options, tmp_path):
    """Without docstrings and assertions, and with warnings of ours as errors."""
    strict = "import warnings\nwarnings.filterwarnings('error', module='rmsnorm_cuda')\n"
    use = """
        model = Layer(torch.nn.RMSNorm)
        want = model(x)
        fused = rmsnorm_cuda.replace_rms_norm(model, fuse_residual=True).fused
        with rmsnorm_cuda.monitor(model) as m:
            y = model(x)
        y.sum().backward()
        try:
            rmsnorm_cuda.rms_norm(x, 7)
        except RuntimeError:
            # Sums of terms of about 1, which nearly cancel in places.
            right = len(fused) == 1 and m.steps == [0] and torch.allclose(y, want, atol=1e-6)
            sys.exit(0 if right else f"{fused} {m.steps} {y - want}")
        sys.exit("it was not refused")
    """
    run(tmp_path, strict, FIRST, LAYER, use, options=options.split())


def test_self_check_without_docstrings(tmp_path):
    code = """
        import sys
        from rmsnorm_cuda import __main__ as command
        assert command.main() == 0
        sys.argv.append("--help")
        command.main()
    """
    done = run(tmp_path, code, options=["-OO"])
    assert "self-check against fp64" in done.stdout.partition("usage")[2]


def test_sources_compile_without_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for file in Path(rmsnorm_cuda.__file__).parent.rglob("*.py"):
            compile(file.read_text(), file, "exec")
