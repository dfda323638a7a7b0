#!/usr/bin/env python3
"""Writes what the ABI test (tests/e2e/tests/abi.rs) is compiled from.

usage: generate.py FOLDER [PATH/TO/cuda.h]

FOLDER gets rows.inc (one ROW per entry point, for both programs), driver.inc (the functions of the fake
driver, included by driver.c) and calls.inc (one caller per entry point, included by calls.c). All types
are the header's own, so a C compiler checks them against its declarations. Without a path the header is
that of the package nvidia-cuda-runtime of the Python that runs this.
"""
import copy
import os
import sys

sys.dont_write_bytecode = True
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from pycparser import c_ast, c_generator  # noqa: E402

from header import Header, installed  # noqa: E402
from table import rows  # noqa: E402


def declare(parameter, name):
    """`TYPE name`, without the outermost const, so that the variable can be filled."""
    kind = copy.deepcopy(parameter.type)
    if isinstance(kind, c_ast.ArrayDecl):
        kind = c_ast.PtrDecl([], kind.type)
    if isinstance(kind, c_ast.TypeDecl):
        kind.quals = []
    inner = kind
    while not isinstance(inner, c_ast.TypeDecl):
        inner = inner.type
    inner.declname = name
    if isinstance(kind, c_ast.PtrDecl):
        kind.quals = []
    declaration = c_ast.Decl(name, [], [], [], [], kind, None, None)
    return c_generator.CGenerator().visit(declaration)


def is_pointer(parameter, typedefs):
    """Whether an argument is an address in this program: something may be read or written there."""
    kind = parameter.type
    while isinstance(kind, c_ast.TypeDecl) and isinstance(kind.type, c_ast.IdentifierType):
        name = " ".join(kind.type.names)
        if name not in typedefs:
            return False
        kind = typedefs[name]
    return isinstance(kind, (c_ast.PtrDecl, c_ast.ArrayDecl))


def function(number, name, parameters):
    """The fake driver's function: keeps what it was given, returns a code of its own."""
    names = [f"a{i}" for i in range(len(parameters))]
    given = ", ".join(declare(p, n) for p, n in zip(parameters, names)) or "void"
    takes = " ".join(f"take(&{n}, sizeof {n});" for n in names)
    look_up = ""
    if name == "cuGetProcAddress":
        look_up = " if (!probed(a0)) return look_up(a0, a1, a2, a3, 0);"
    elif name == "cuGetProcAddress_v2":
        look_up = " if (!probed(a0)) return look_up(a0, a1, a2, a3, a4);"
    return f"CUresult {name}({given}) {{{look_up} begin({number}); {takes} return code({number}); }}"


def caller(number, name, parameters, typedefs):
    """Calls `function`, or the function of that name as the program was linked, with values of its own."""
    names = [f"a{i}" for i in range(len(parameters))]
    lines = [f"static int call_{name}(void *function, int round) {{", f"    prepare({number}, round);"]
    for parameter, n in zip(parameters, names):
        lines.append(f"    {declare(parameter, n)};")
        fill = "give_pointer" if is_pointer(parameter, typedefs) else "give"
        if name.startswith("cuGetProcAddress") and n == "a0":
            lines.append(f"    {n} = PROBE; keep(&{n}, sizeof {n});")
        else:
            lines.append(f"    {fill}(&{n}, sizeof {n});")
    arguments = ", ".join(names)
    lines.append(f"    __typeof__(&{name}) typed = function;")
    lines.append(f"    return check({number}, typed ? typed({arguments}) : {name}({arguments}));")
    lines.append("}")
    return "\n".join(lines)


def main():
    if len(sys.argv) not in (2, 3) or sys.argv[1].startswith("-"):
        sys.exit(__doc__.strip())
    path = sys.argv[2] if len(sys.argv) == 3 else installed()
    if not path:
        sys.exit("generate.py: this Python has no nvidia-cuda-runtime: see tests/clients/python/requirements.txt")
    header = Header(path)
    how = {row.name: row.how for row in rows()}
    symbols = {(row.base, row.version, row.variant): row.name for row in rows()}
    table, functions, callers = [], [], []
    for number, (key, declaration) in enumerate(sorted(header.entry_points.items())):
        base, version, variant = key
        if key not in symbols or symbols[key] not in header.functions:
            sys.exit(f"generate.py: {base} {version} {variant}: see scripts/check-header")
        name = symbols[key]
        parameters = header.parameters(header.functions[name])
        hooked = int(how[name] in ("hot", "gated", "custom", "entry"))
        gated = int(how[name] in ("hot", "gated"))
        table.append(f'ROW({number}, {name}, {base}, {version}, {int(bool(variant))}, {hooked}, {gated})')
        functions.append(function(number, name, parameters))
        callers.append(caller(number, name, parameters, header.typedefs))
    for file, lines in (("rows.inc", table), ("driver.inc", functions), ("calls.inc", callers)):
        with open(os.path.join(sys.argv[1], file), "w", encoding="utf-8") as out:
            out.write("\n".join(lines) + "\n")
    print(os.path.dirname(header.path))


if __name__ == "__main__":
    main()
