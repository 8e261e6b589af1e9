"""Writes the type stubs of what has no Python source: rmsnorm_cuda/ops.pyi, from the ops' schemas,
and rmsnorm_cuda/_C.pyi, from these and from what pybind11 says of its functions.

    python .ci/stubs.py           write them
    python .ci/stubs.py --check   fail where one is not what this would write
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from rmsnorm_cuda import _C, ops  # noqa: E402

TYPES = {
    "Tensor": "Tensor",
    "float": "float",
    "bool": "bool",
    "int": "int",
    "str": "str",
    "List[int]": "Sequence[int]",
    "List[bool]": "Sequence[bool]",
}
HEADER = "# Written by `python .ci/stubs.py`.\nfrom collections.abc import Sequence\n"


def type_of(argument):
    if argument.name == "dtype":  # an int to schemas
        return "dtype"
    name = argument.type.annotation_str
    optional = re.fullmatch(r"Optional\[(.*)\]", name)
    return TYPES[optional[1]] + " | None" if optional else TYPES[name]


def parameter(argument):
    text = f"{argument.name}: {type_of(argument)}"
    if not argument.has_default_value():
        return text
    default = repr(argument.default_value).replace("'", '"')
    return f"{text} = {default}"


def result(schema):
    kinds = ["Tensor"] * len(schema.returns)
    if not kinds:
        return "None"
    return kinds[0] if len(kinds) == 1 else f"tuple[{', '.join(kinds)}]"


def stub(name, parameters, returned):
    line = f"def {name}({', '.join(parameters)}) -> {returned}: ..."
    if len(line) <= 100:
        return line
    lines = "".join(f"    {parameter},\n" for parameter in parameters)
    return f"def {name}(\n{lines}) -> {returned}: ..."


def op_stub(schema):
    parameters, keywords = [], False
    for argument in schema.arguments:
        if argument.kwarg_only and not keywords:
            keywords = True
            parameters.append("*")
        parameters.append(parameter(argument))
    return stub(schema.name.partition("::")[2], parameters, result(schema))


def schemas_of(op):
    return torch._C._jit_get_schemas_for_operator(f"rmsnorm_cuda::{op}")


def ops_stubs():
    yield HEADER + "from typing import overload\n\nfrom torch import Tensor, dtype\n"
    for name in ops.__dir__():
        schemas = schemas_of(name)
        op = name.removesuffix("_formula")
        if op != name and len(schemas_of(op)) == 1:
            yield f"\n{name} = {op}\n"
            continue
        for schema in schemas:
            yield ("@overload\n" if len(schemas) > 1 else "") + op_stub(schema)


def entry_parameter(argument):
    kind = type_of(argument)
    if argument.name == "normalized_shape":
        kind = "int | Sequence[int]"
    if argument.alias_info and argument.alias_info.is_write and argument.kwarg_only:
        kind = "Tensor | None"  # None: it is not asked for
    return f"{argument.name}: {kind}"


def entry_stub(name):
    """Of an eager entry point: the arguments of the op's schema, by position."""
    op, _, _ = name.partition("_out")
    wanted = "out" if name.endswith("_out") else ""
    schema = next(schema for schema in schemas_of(op) if schema.overload_name == wanted)
    parameters = [*map(entry_parameter, schema.arguments), "/"]
    returned = result(schema).replace("None", "bool")  # True: what is written was written
    return stub(name, parameters, f"{returned} | None")


# pybind11 tells a dict or a tuple, and not of what.
HOLDS = {"isas": "dict[str, bool]", "libraries": "tuple[str, str]"}


def function_stub(name, parameters, returned):
    parameters = re.sub(r"typing\.SupportsInt( \| typing\.SupportsIndex)?", "int", parameters)
    parameters = re.sub(r"(?:typing\.)?Optional\[(\w+)\]", r"\1 | None", parameters)
    parameters = parameters.replace("torch.dtype", "dtype").split(", ") if parameters else []
    if any(parameter.startswith("arg0") for parameter in parameters):
        parameters.append("/")
    if returned in ("dict", "tuple"):
        returned = HOLDS.get(name, "dict[str, Any]")
    return stub(name, parameters, returned)


def binding_stubs():
    yield HEADER + "from typing import Any\n\nfrom torch import Tensor, dtype\n"
    names = {name: value for name, value in sorted(vars(_C).items()) if name[:2] != "__"}
    texts = [name for name, value in names.items() if isinstance(value, str)]
    yield "".join(f"{name}: str\n" for name in texts)
    for name, value in names.items():
        if name in texts:
            continue
        if signature := re.match(r"\w+\((.*)\) -> (.*)", value.__doc__):
            yield function_stub(name, *signature.groups())
        else:
            yield entry_stub(name)


def main():
    stale = []
    for name, lines in (("ops.pyi", ops_stubs()), ("_C.pyi", binding_stubs())):
        path, text = ROOT / "rmsnorm_cuda" / name, "\n".join(lines).rstrip("\n") + "\n"
        if "--check" not in sys.argv:
            path.write_text(text, encoding="utf-8")
        elif path.read_text(encoding="utf-8") != text:
            stale.append(name)
    if stale:
        sys.exit(f"{', '.join(stale)}: not what the ops are now; run `python .ci/stubs.py`")


if __name__ == "__main__":
    main()
