"""What a wheel is built with so that it runs on older systems than the one that builds it.
wheels.py calls this.

    python .ci/toolchain.py FOLDER    puts the CUDA compiler there, as FOLDER/bin/nvcc
"""

import functools
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

MACHINE = platform.machine()
GLIBC = "2.28"
PLATFORM = f"manylinux_{GLIBC.replace('.', '_')}_{MACHINE}"  # that of torch's own wheels
ZIG = ("ziglang==0.17.1",)
CUDA = (
    *("nvidia-cuda-nvcc==13.0.88", "nvidia-cuda-crt==13.0.88", "nvidia-nvvm==13.0.88"),
    *(
        "nvidia-cuda-nvcc-cu12==12.9.86",
        "nvidia-cuda-runtime-cu12==12.9.79",
        "nvidia-cuda-cccl-cu12==12.9.27",
    ),
)
PTX = "8.8"  # the newest that ptxas 12.9 reads

# libstdc++ asks this variable of glibc 2.32 whether it may go without atomics; where it is 0, it
# does not.
SINGLE_THREADED = '__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;\n'

# Objects that were compiled where libpthread and the like are part of libc do not name them.
LIBC_SO = (
    "GROUP ( libc.so.6 libc_nonshared.a AS_NEEDED ( libpthread.so libdl.so librt.so libld.so ) )\n"
)

CICC = f"""#!/bin/sh
# The PTX says the version that ptxas 12.9 and a driver of CUDA 12 read; ptxas sees to it that
# nothing in it is newer.
"$0-13" "$@" || exit
for output; do :; done  # the last argument
sed -i '1,/^\\.version /s/^\\.version .*/.version {PTX}/' "$output"
"""
FATBINARY = """#!/bin/sh
# LZ4. The default of 13.0 is zstd, which drivers before R550 do not read.
exec "$0-13" --compress-mode=speed "$@"
"""


def install(folder, packages):
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--target",
        folder,
        *packages,
    ]
    print("+", *command, file=sys.stderr, flush=True)
    subprocess.run(list(map(str, command)), check=True)


def script(path, text):
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)


def once(*recipe):
    """Decorates make(folder, scratch), which fills a folder: it is called where that was not done
    yet by this recipe.
    """

    def decorate(make):
        @functools.wraps(make)
        def filled(folder):
            made = folder / "made-of"
            if not made.exists() or made.read_text(encoding="utf-8") != "\n".join(recipe):
                scratch = folder.with_name(folder.name + ".scratch")
                for stale in (folder, scratch):
                    shutil.rmtree(stale, ignore_errors=True)
                    stale.mkdir(parents=True)
                make(folder, scratch)
                shutil.rmtree(scratch)
                made.write_text("\n".join(recipe), encoding="utf-8")
            return folder

        return filled

    return decorate


@once(*ZIG, GLIBC, SINGLE_THREADED, LIBC_SO)
def glibc_stubs(folder, scratch):
    """LDFLAGS=-L of this folder links against glibc 2.28, whichever this machine has.

    A library that is linked on Debian 12 asks for glibc 2.34 or newer, where libpthread and libdl
    became part of libc: the linker takes the version of a symbol that is the default where it
    links. Here lie the stubs that Zig's compiler writes for a given glibc: libraries of symbols and
    their versions, with no code. What is not in that glibc is an undefined symbol, and the link
    fails. manylinux's image does the same by being an old system.
    """
    install(scratch, ZIG)
    caches = {f"ZIG_{kind}_CACHE_DIR": str(scratch / "cache") for kind in ("LOCAL", "GLOBAL")}
    environment = os.environ | caches | {"PYTHONPATH": str(scratch)}

    def zig(*arguments):
        command = [sys.executable, "-m", "ziglang", *map(str, arguments)]
        run = subprocess.run(command, env=environment, cwd=scratch, capture_output=True, text=True)
        if run.returncode:
            sys.exit(f"`zig {' '.join(map(str, arguments))}` failed:\n{run.stderr}")
        return run.stderr

    target = "-target", f"{MACHINE}-linux-gnu.{GLIBC}"
    (scratch / "main.c").write_text("int main(void) { return 0; }\n")
    said = zig(
        "cc", *target, "-v", "-fno-sanitize=undefined", "main.c", "-o", "main"
    )  # -v: with what it links
    libraries = {
        Path(path).name.partition(".")[0]: path
        for path in re.findall(r"\S+/lib\w+\.(?:so\.\d+|a)(?=\s)", said)
    }
    wanted = ("libc", "libm", "libpthread", "libdl", "librt", "libld", "libc_nonshared")
    if missing := [name for name in wanted if name not in libraries]:
        sys.exit(f"{ZIG[0]} links without {', '.join(missing)}: its stubs of glibc have changed")
    for name in wanted[1:-1]:
        shutil.copy(scratch / libraries[name], folder / f"{name}.so")
    shutil.copy(scratch / libraries["libc"], folder / "libc.so.6")
    # The static part of libc, packed again with what is added to it: the paths in it would end up
    # in debug symbols.
    objects = scratch / "nonshared"
    objects.mkdir()
    members = subprocess.run(
        ["ar", "t", libraries["libc_nonshared"]],
        cwd=scratch,
        capture_output=True,
        text=True,
        check=True,
    )
    for path in members.stdout.splitlines():
        shutil.copy(scratch / path, objects)
    (scratch / "single_threaded.c").write_text(SINGLE_THREADED)
    zig(
        "cc",
        *target,
        "-O2",
        "-fPIC",
        "-c",
        "single_threaded.c",
        "-o",
        objects / "single_threaded.o",
    )
    names = sorted(path.name for path in objects.iterdir())
    subprocess.run(["strip", "--strip-debug", *names], cwd=objects, check=True)
    subprocess.run(["ar", "rcD", folder / "libc_nonshared.a", *names], cwd=objects, check=True)
    (folder / "libc.so").write_text(LIBC_SO, encoding="utf-8")


@once(*CUDA, CICC, FATBINARY)
def cuda_12(folder, scratch):
    """A CUDA compiler in this folder, as bin/nvcc, whose kernels run with drivers of CUDA 12 (R525)
    and newer.

    torch comes for CUDA 12.6 as well as 13, and its kernels run with a driver of 12. A CUDA runtime
    of 13 refuses such a driver, and the driver refuses machine code of ptxas 13 (its ELF files have
    another ABI version). The other way round all is well: newer drivers run what was built for 12.
    No registry of Python's has a whole compiler of CUDA 12, but all that matters of one, and this
    is put together from it: the front end of 13.0, and of 12.9 ptxas, the runtime and its headers.
    What the front end generates calls that runtime by functions which 12.9 has, or it would not
    link.
    """
    install(scratch, CUDA)
    packages = scratch / "nvidia"
    shutil.copytree(
        packages / "cu13", folder, dirs_exist_ok=True
    )  # its headers are the compiler's own, in include/crt
    for package in ("cuda_runtime", "cuda_cccl"):
        shutil.copytree(packages / package / "include", folder / "include", dirs_exist_ok=True)
    shutil.copytree(packages / "cuda_runtime" / "lib", folder / "lib64")
    for tool, wrapper in ((folder / "nvvm/bin/cicc", CICC), (folder / "bin/fatbinary", FATBINARY)):
        tool.rename(tool.with_name(tool.name + "-13"))
        script(tool, wrapper)
    shutil.copy(packages / "cuda_nvcc/bin/ptxas", folder / "bin/ptxas")
    for tool in (*folder.glob("bin/*"), *folder.glob("nvvm/bin/*")):
        tool.chmod(tool.stat().st_mode | 0o755)


if __name__ == "__main__":
    cuda_12(Path(sys.argv[1]).resolve())
