"""What a frozen application takes along beside the Python modules: the libraries, where load.py
looks for them."""

from pathlib import Path

from PyInstaller.utils.hooks import get_package_paths

_base, _package = get_package_paths("rmsnorm_cuda")
datas = [
    (str(path), str(path.parent.relative_to(_base))) for path in Path(_package, "lib").rglob("*.so")
]
