"""What programs that call librmsnorm.so were compiled with: its functions, structs and enums.

    python tests/native/abi.py    records them in abi.txt, at a release

A program that was compiled with an older header crashes where a struct has grown since.
"""

import re
import subprocess
import tempfile
from pathlib import Path

import rmsnorm_cuda

RECORD = Path(__file__).with_name("abi.txt")
TAGS = {"DW_TAG_structure_type": "struct", "DW_TAG_enumeration_type": "enum class"}


def exports(library):
    """The names of what a library defines for others, but for what any of them may define."""
    command = ["nm", "-DC", "--defined-only", str(library)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    symbols = [line.split(" ", 2)[1:] for line in lines]
    linkers = {"__bss_start", "_edata", "_end"}
    return sorted(name for kind, name in symbols if kind not in "WVu" and name not in linkers)


def type_name(entry):
    if "DW_AT_type" not in entry.attributes:
        return "void"
    of = entry.get_DIE_from_attribute("DW_AT_type")
    if of.tag == "DW_TAG_pointer_type":
        return type_name(of) + "*"
    if of.tag == "DW_TAG_const_type":
        return "const " + type_name(of)
    if of.tag == "DW_TAG_array_type":
        last = [size.attributes["DW_AT_upper_bound"].value for size in of.iter_children()]
        return type_name(of) + "".join(f"[{n + 1}]" for n in last)
    return of.attributes["DW_AT_name"].value.decode()


def types(header):
    """A line for each struct and enum of a header, and one for each of their members."""
    from elftools.elf.elffile import ELFFile

    names = re.findall(r"^(?:struct|enum class) (\w+)", Path(header).read_text(), re.M)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "abi.cpp")
        variables = "\n".join(f"{name} variable_{name};" for name in names)  # or it is left out
        namespaces = "using namespace rmsnorm; using namespace cpu; using namespace cuda;"
        source.write_text(f'#include "{header}"\n{namespaces}\n{variables}')
        options = ["-std=c++17", "-g", "-c", "-o", source.with_suffix(".o")]
        subprocess.run(["g++", source, *options], check=True)
        with open(source.with_suffix(".o"), "rb") as file:
            (unit,) = ELFFile(file).get_dwarf_info().iter_CUs()
            return [*lines_of(names, unit)]


def lines_of(names, unit):
    def value(entry, name):
        value = entry.attributes[f"DW_AT_{name}"].value
        return value.decode() if isinstance(value, bytes) else value

    found = {value(e, "name"): e for e in unit.iter_DIEs() if e.tag in TAGS and is_whole(e)}
    for name in names:
        entry = found[name]
        yield f"{TAGS[entry.tag]} {name}: {value(entry, 'byte_size')} bytes"
        for child in entry.iter_children():
            if child.tag == "DW_TAG_enumerator":
                yield f"  {value(child, 'const_value')} {value(child, 'name')}"
            elif "DW_AT_data_member_location" in child.attributes:
                place = value(child, "data_member_location")
                yield f"  {place} {type_name(child)} {value(child, 'name')}"


def is_whole(entry):
    return {"DW_AT_name", "DW_AT_byte_size"} <= entry.attributes.keys()


def abi():
    library = Path(rmsnorm_cuda.library_dir(), "librmsnorm.so")
    header = Path(rmsnorm_cuda.include_dir(), "rmsnorm.h")
    title = f"librmsnorm.so {rmsnorm_cuda.__version__} on x86-64"
    return [title, "", *exports(library), "", *types(header)]


if __name__ == "__main__":
    RECORD.write_text("\n".join([*abi(), ""]))
