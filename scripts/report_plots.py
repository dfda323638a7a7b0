"""Which figures a report plots, and how: added cost per call, allocation, swap rate against size, throughput and
latency against concurrency. `sections` writes the files and returns the Markdown around them.
"""
import re

from plots import Axis, Empty, Panel, Rows, Series, usable, write
from report_lib import NONE, cell

MiB = 1 << 20
MODES = {"alone": "alone, without Spillway", "static": "static fraction", "request_limit": "request and limit",
         "swap": "request and limit, neighbour swapped out"}
# Every file that `sections` may write.
PLOTS = ("added-cost-free.svg", "added-cost.svg", "alloc-free.svg", "alloc.svg", "swap-rate.svg", "serving.svg", "serving-tail.svg")
UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def size_text(nbytes):
    for unit, scale in reversed(UNITS.items()):
        if nbytes >= scale:
            return f"{nbytes / scale:g} {unit}"
    return f"{nbytes:g} B"


def added_cost(figures, on, title):
    """A row per call: threads beside each other, quartiles as bars."""
    kinds = {("1", None): "1 thread", ("2", None): "2 threads", ("1", "_wc"): "1 thread, after write-combined stores"}
    names, series = [], {kind: Series(text, [], [], line=False) for kind, text in kinds.items()}
    for one in figures:
        found = re.fullmatch(r"(.+?)(_wc)?_(\d+)", one["what"], re.DOTALL)
        if one["bench"] != "hooks" or one["on"] != on or one["metric"] != "added_ns" or not found or not usable(one["value"]):
            continue
        call, kind = found[1], (found[3], found[2])
        if kind not in series:
            continue
        if call not in names:
            names.append(call)
        pair = one.get("quartiles")
        series[kind].points.append((one["value"], names.index(call)))
        series[kind].spread.append(tuple(pair) if isinstance(pair, list) and len(pair) == 2 and all(map(usable, pair)) else None)
    series = [s for s in series.values() if s.points]
    values = [abs(v) for s in series for v, _ in s.points] + [abs(v) for s in series for pair in s.spread if pair for v in pair]
    kind = "symlog" if values and max(values) > 100 else "linear"
    if not series:
        raise Empty(title)
    scale = ", logarithmic beyond 1" if kind == "symlog" else ""
    return [Rows(title, Axis(f"nanoseconds added per call (median, quartiles{scale})", kind), names, series)]


def allocation(figures, on, title):
    """Time of an alloc and free against its size, with Spillway and the driver's own."""
    series = {}
    for one in figures:
        found = re.fullmatch(r"(\d+)([KMG]iB)_(\d)", one["what"])
        if one["bench"] != "alloc" or one["on"] != on or one["metric"] != "added_ns" or not found:
            continue
        threads = f"{found[3]} thread{'s' if found[3] != '1' else ''}"
        for name, value in ((f"under Spillway, {threads}", one.get("with")), (f"the driver's own, {threads}", one.get("baseline"))):
            if usable(value):
                series.setdefault(name, Series(name, [])).points.append((int(found[1]) * UNITS[found[2]], value))
    ticks = sorted({p[0] for s in series.values() for p in s.points})
    return [Panel(title, Axis("size", "log", ticks, size_text), Axis("nanoseconds per alloc and free", "log"), list(series.values()), width=620)]


def swap_rate(figures, parts, facts):
    """GB/s out and in against size, beside plain pinned copies: of the bench swap, and of what gpu-check's other parts
    moved and copied."""
    moved, plain = {"out": {}, "in": {}}, {"out": {}, "in": {}}
    for part in parts:
        for one in part["cases"] if part["part"] == "e2e" else []:
            got = one.get("figures") or {}
            if one["name"] == "swap" and usable(got.get("MiB")):
                for way in moved:
                    if usable(got.get(f"{way}_GBps")):
                        moved[way][got["MiB"]] = got[f"{way}_GBps"]
    for name, rates in (facts.get("copies") or {}).items() if isinstance(facts, dict) else ():
        found = re.fullmatch(r"([\d.]+) MiB", name)
        if found and isinstance(rates, dict):
            for way, key in (("out", "d2h"), ("in", "h2d")):
                if usable(rates.get(key)):
                    plain[way][float(found[1])] = rates[key]
    of_bench = [one for one in figures if one["bench"] == "swap" and one["metric"] == "rate" and one.get("way") in moved and usable(one.get("MiB"))]
    if of_bench:
        plain = {"out": {}, "in": {}}
    for one in of_bench:
        for into, value in ((moved, one["value"]), (plain, one.get("baseline"))):
            if usable(value):
                into[one["way"]][one["MiB"]] = value
    series = [Series(f"swap {way}", sorted(moved[way].items())) for way in moved if moved[way]]
    if not series:
        raise Empty("swap rate")
    series += [Series("plain pinned copy", sorted(plain[way].items()), dashed=True, color=number)
               for number, way in enumerate(("out", "in")) if plain[way]]
    sizes = sorted({x for s in series for x, _ in s.points})
    return [Panel("Swap rate against size", Axis("size", "log", sizes, lambda v: size_text(v * MiB)), Axis("GB/s"), series, width=720)]


def against_clients(figures, metric, title, y):
    """A panel: a line per mode, and dashed what is computed."""
    series, computed = [], []
    for number, (mode, text) in enumerate(MODES.items()):
        points, theory = [], []
        for one in figures:
            found = re.fullmatch(rf"{mode}_c(\d+)", one["case"])
            if one["bench"] == "serve" and one["metric"] == metric and found:
                points.append((int(found[1]), one["value"]))
                theory.append((int(found[1]), one.get("computed")))
        points, theory = (sorted((x, v) for x, v in row if usable(v)) for row in (points, theory))
        if points:
            series.append(Series(text, points))
            if metric != "p99":  # computed is the same for every request, so it says nothing of the worst
                computed.append(Series("computed", theory, dashed=True, color=len(series) - 1))
    ticks = sorted({x for s in series for x, _ in s.points})
    return Panel(title, Axis("clients at a time", "log", ticks), y, [*series, *computed], width=450)


def sections(report, folder, figures, parts=(), facts=None):
    """Markdown, and the files in the folder. Files of figures that are not there any more are removed."""
    simulator = report["simulator"]
    device = "the simulator at its usual cost" if simulator else str(report["on"])
    free = "a driver whose calls cost nothing"
    seconds = lambda: Axis("seconds", "log")
    # Heading (None: below the one before), file, panels, on what, and what it shows.
    wanted = [
        ("Added cost per call", "added-cost-free.svg", lambda: added_cost(figures, "free", f"Added per call: {free}"), f"On {free}",
         "What the library itself takes, on this machine's CPU. `control` calls the driver on both sides, `locked` has one locked "
         "instruction on one side."),
        (None, "added-cost.svg", lambda: added_cost(figures, "device", f"Added per call: {device}"), f"On {device}",
         "What of that shows beside the driver's own cost."),
        ("Allocation", "alloc-free.svg", lambda: allocation(figures, "free", f"Alloc and free: {free}"), f"On {free}",
         "An allocation and its free, again and again."),
        (None, "alloc.svg", lambda: allocation(figures, "device", f"Alloc and free: {device}"), f"On {device}",
         "From 64 MiB on the driver's own is create, map, set access, unmap, release."),
        ("Swap rate against size", "swap-rate.svg", lambda: swap_rate(figures, parts, facts), f"On {device}",
         "Dashed are plain copies from and to pinned memory." + (" The link is simulated: its rates are settings." if simulator else "")),
        ("Throughput and latency against concurrency", "serving.svg",
         lambda: [against_clients(figures, "throughput", "Throughput", Axis("requests per second")),
                  against_clients(figures, "p50", "Latency, median", seconds())], f"On {device}",
         "A model server under each way to share. Dashed is what follows from the scenario's rates and capacities."
         + (" Steps, link and disk are the scenario's, not a GPU's." if simulator else "")),
        (None, "serving-tail.svg",
         lambda: [against_clients(figures, "p99", "Latency, 99th percentile", seconds()),
                  against_clients(figures, "first_p50", "Time to the first answer, median", seconds())],
         "The slowest of a hundred, and the first answer", "The same servers."),
    ]
    text = []
    for title, file, panels, on, about in wanted:
        text += ["", f"## {title}"] if title else []
        try:
            write(folder / file, panels())
            text += ["", f"{cell(on)}. {about}", "", f"![{file[:-4]}]({file})"]
        except Empty:
            (folder / file).unlink(missing_ok=True)
            text += ["", f"{cell(on)}: {NONE}."]
    return text
