"""The table of driver entry points, read from its source."""
import os
import re
from collections import namedtuple

ROWS = os.path.join(os.path.dirname(__file__), "..", "..", "interposer", "core", "src", "table", "rows.rs")

# One row of the table. `arguments` are Rust types, as rows.rs spells them.
Row = namedtuple("Row", "name how group base version variant arguments")


def rows():
    """The table's rows, in its order; a name with two rows is there twice."""
    found = []
    with open(ROWS, encoding="utf-8") as lines:
        for line in lines:
            row = re.match(r"\s+(\w+) (\w+) (cu\w+) = (\w+) (\d+) \[([\w ]*)\] \((.*)\);", line)
            if row:
                how, group, name, base, version, marks, arguments = row.groups()
                variant = next((m for m in marks.split() if m in ("ptsz", "ptds")), "")
                types = [argument.split(": ")[1] for argument in arguments.split(", ") if argument]
                found.append(Row(name, how, group, base, int(version), variant, types))
    return found
