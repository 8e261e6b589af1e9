"""Programs in processes of their own.

run() forks them off a process that has imported torch and nothing else: starting Python and torch
takes 2 s of a core, and the suite has a hundred such programs. What is about that start, such as
Python's options or the loader's variables, is run by subprocess instead.
"""

import atexit
import functools
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
import types
from pathlib import Path


def run(code=None, *, file=None, module=None, arguments=(), cwd=None, timeout=300, **environment):
    """The CompletedProcess of `python -c code`, `python file` or `python -m module`; beside the
    variables of `environment`, those of this process."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = [os.path.join(folder, name) for name in ("stdout", "stderr")]
        request = {
            "code": code,
            "file": file and str(file),
            "module": module,
            "arguments": list(map(str, arguments)),
            "cwd": str(cwd or os.getcwd()),
            "timeout": timeout,
            "environment": dict(os.environ) | environment,
            "outputs": outputs,
        }
        server = _server()
        print(json.dumps(request), file=server.stdin, flush=True)
        status = int(server.stdout.readline())
        stdout, stderr = (Path(output).read_text() for output in outputs)
    return subprocess.CompletedProcess(code or file or module, status, stdout, stderr)


@functools.cache
def _server():
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    server = subprocess.Popen([sys.executable, __file__], env=environment, **pipes)
    atexit.register(server.communicate)  # it ends with its input
    return server


def _serve():
    import torch  # noqa: F401

    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _become(**json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _become(code, file, module, arguments, cwd, timeout, environment, outputs):
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for output, number in zip(outputs, (1, 2)):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    signal.alarm(timeout)
    first = os.path.dirname(file) if file else ""
    path = [part for part in environment.get("PYTHONPATH", "").split(os.pathsep) if part]
    sys.path[:] = [first, *path, *sys.path[1:]]
    sys.argv[:] = [file or "-c", *arguments]
    try:
        if module:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        else:
            main = sys.modules["__main__"] = types.ModuleType("__main__")
            if file:
                main.__file__, code = file, Path(file).read_text()
            exec(compile(code, file or "<string>", "exec"), vars(main))
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        print(error.code, file=sys.stderr) if isinstance(error.code, str) else None
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    _serve()
