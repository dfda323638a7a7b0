"""NVIDIA's cuda.h, read for a comparison with the table of entry points and for the ABI test.

A header comes with the package nvidia-cuda-runtime on PyPI. Nothing of it is part of this repository.
Needs cc and Python's pycparser (`tests/clients/python/requirements.txt` has both packages).
"""
import importlib.metadata
import os
import re
import subprocess

from pycparser import c_ast, c_parser

SCALARS = {
    "int": "i32", "unsigned int": "u32", "unsigned": "u32", "long long": "i64", "unsigned long long": "u64",
    "long": "i64", "unsigned long": "u64", "long unsigned int": "u64", "short": "i16", "unsigned short": "u16",
    "char": "c_char", "signed char": "i8", "unsigned char": "u8", "float": "f32", "double": "f64",
    "size_t": "usize", "cuuint32_t": "u32", "cuuint64_t": "u64", "void": "void",
}

def installed():
    """The cuda.h of the package nvidia-cuda-runtime in this Python's environment; None without it."""
    try:
        files = importlib.metadata.files("nvidia-cuda-runtime") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((str(f.locate()) for f in files if f.name == "cuda.h"), None)


class Header:
    """What a cuda.h, and the cudaTypedefs.h beside it, declare.

    `functions`: exported name -> FuncDecl, legacy names and per-thread variants included.
    `entry_points`: (base, version, variant) -> FuncDecl, as cuGetProcAddress knows them.
    """

    def __init__(self, path):
        self.path = path
        self.typedefs, self.functions = {}, {}
        entry_points = {}
        for item in _parse(path):
            if isinstance(item, c_ast.Typedef):
                self.typedefs[item.name] = item.type
                pfn = re.fullmatch(r"PFN_(cu[A-Z]\w*?)_v(\d+)(?:_(pts[zd]|ptds))?", item.name)
                if pfn and isinstance(item.type, c_ast.PtrDecl):
                    entry_points[pfn[1], int(pfn[2]), pfn[3] or ""] = item.type.type
            elif isinstance(item, c_ast.Decl) and isinstance(item.type, c_ast.FuncDecl):
                if re.match("cu[A-Z]", item.name) and "inline" not in item.funcspec:
                    self.functions[item.name] = item.type
        self.entry_points = entry_points

    def version(self):
        """CUDA_VERSION: 1000 * major + 10 * minor."""
        with open(self.path, encoding="utf-8") as text:
            return int(re.search(r"#define CUDA_VERSION (\d+)", text.read())[1])

    def parameters(self, function):
        """The declarations of a function's parameters."""
        given = function.args.params if function.args else []
        return [p for p in given if in_rust(p.type, self.typedefs) != "void"]

    def signature(self, function):
        """The parameters' types as the table spells them: enums raw, pointers to structures opaque."""
        kinds = [in_rust(p.type, self.typedefs) for p in self.parameters(function)]
        # The same structure goes by a name with and without its version.
        return [re.sub(r"_v\d+$", "", kind.removeprefix("struct ")) for kind in kinds]


def _parse(path):
    """The header's declarations, with everything internal declared too."""
    folder = os.path.dirname(path)
    text = '#include "cuda.h"\n'
    if os.path.exists(os.path.join(folder, "cudaTypedefs.h")):
        text += '#include "cudaTypedefs.h"\n'
    command = ["cc", "-E", "-P", "-D__CUDA_API_VERSION_INTERNAL", "-I", folder, "-x", "c", "-"]
    text = subprocess.run(command, input=text, check=True, capture_output=True, text=True).stdout
    for noise in (
        r"__attribute__\s*\(\((?:[^()]|\([^()]*\))*\)\)", r"__extension__|__inline(?:__)?|__restrict(?:__)?",
        r"static_assert\s*\([^;]*\);", r"__asm__\s*\([^;]*\)", r"(?:_A|a)lignas\s*\([^()]*(?:\([^()]*\))?[^()]*\)",
    ):
        text = re.sub(noise, "", text)
    return c_parser.CParser().parse(text).ext


def in_rust(kind, typedefs):
    """The table's spelling of a C type; structures by value are `struct NAME`."""
    if isinstance(kind, (c_ast.PtrDecl, c_ast.ArrayDecl)):
        target = kind.type
        if isinstance(target, c_ast.FuncDecl):
            return "*mut c_void"
        name = in_rust(target, typedefs)
        if name in ("void", "function") or name.startswith("struct "):
            name = "c_void"
        return ("*const " if "const" in (getattr(target, "quals", None) or []) else "*mut ") + name
    if isinstance(kind, c_ast.TypeDecl):
        return in_rust(kind.type, typedefs)
    if isinstance(kind, c_ast.FuncDecl):
        return "function"
    if isinstance(kind, c_ast.Enum):
        return "u32"
    if isinstance(kind, (c_ast.Struct, c_ast.Union)):
        return "struct ?"
    name = " ".join(kind.names)
    if name in SCALARS:
        return SCALARS[name]
    resolved = in_rust(typedefs[name], typedefs)
    return "struct " + name if resolved.startswith("struct ") else resolved
