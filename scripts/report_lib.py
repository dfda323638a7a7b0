"""Reports of measurements as Markdown: what bench-report.py and gpu-check.py share. report_plots.py has the plots.

A figure is an object as the benches print it: bench, case, metric, value, unit, and what explains it. Whatever a
figure holds, a name or an error's text, is data: `cell` and `code` make it text that can neither end a table's row
nor become markup. A figure that is not there is "not measured".
"""
import json, math, os, platform, re, subprocess
from pathlib import Path

NONE = "not measured"


def cell(value):
    """Text of one line, as it is."""
    text = "".join(c if c.isprintable() else "?" for c in " ".join(str(value).split()))
    text = re.sub(r"&(?=#?\w+;)", "&amp;", text).replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*\[|~])", r"\\\1", text)
    # At the beginning of a list's entry these would make a heading or another list.
    return re.sub(r"^(\d*)([#+\-=.)])(?=[#+\-=]*(\s|$))", r"\1\\\2", text)


def code(text):
    """A code span, whatever backticks are in it; not for tables."""
    text = "".join(c if c.isprintable() else "?" for c in " ".join(str(text).split()))
    fence = "`" * (1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    pad = " " if len(fence) > 1 else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def table(head, rows):
    """Lines of a table; every entry is escaped, None is an empty one."""
    line = lambda row: "| " + " | ".join("" if value is None else cell(value) for value in row) + " |"
    return [line(head), "|" + " --- |" * len(head), *(line(row) for row in rows)]


def number(value):
    """As it was measured; 12 digits at most, and no exponent where people read bytes."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None if value is None else str(value)
    if not math.isfinite(value):
        return None
    return f"{value:.0f}" if value == int(value) and abs(value) < 1e15 else f"{value:.12g}"


def quartiles(figure):
    pair = figure.get("quartiles")
    return f"{number(pair[0])} to {number(pair[1])}" if isinstance(pair, list) and len(pair) == 2 else None


def normal(line, default="device"):
    """A figure that says which driver it is of (`on`: free or device; of hooks and alloc alone), and its case without
    that (`what`)."""
    found = {"metric": "", "value": None, "unit": "", **line}
    found["bench"], found["case"] = str(line.get("bench", "")), str(line.get("case", ""))
    if found["bench"] in ("hooks", "alloc"):
        prefix = re.match(r"(free|sim)_", found["case"])
        if "driver" in line:
            found["on"] = "free" if line["driver"] == "Free driver" else "device"
        else:
            found["on"] = {"free_": "free", "sim_": "device"}.get(prefix and prefix[0], default)
        found["what"] = found["case"][prefix.end():] if prefix else found["case"]
    else:
        found["on"], found["what"] = None, found["case"]
    return found


def figures_of_parts(parts):
    """The benches' figures among gpu-check's parts; cases of older reports are named BENCH.CASE.METRIC."""
    found = []
    for part in parts:
        if part["part"] not in ("hooks", "alloc", "swap", "serve", "bench"):
            continue
        for one in part["cases"]:
            figures, name = one.get("figures"), str(one["name"])
            if not figures:
                continue
            bench = part["part"]
            if bench == "bench":
                bench, _, name = name.partition(".")
            case, _, metric = name.rpartition(".")
            found.append(normal({"bench": bench, "case": case, "metric": metric, **figures}))
    return found


def find(figures, bench, on, what, metric):
    for one in figures:
        if (one["bench"], one["on"], one["what"], one["metric"]) == (bench, on, what, metric):
            return one
    return None


# What a reader looks for first: text, bench, driver, case, metric, which value of it, unit, and the most that it may
# be (None: it is judged by what is computed, if anything is).
SHORT = [
    ("launch, 1 thread, added", "hooks", "free", "launch_1", "added_ns", "value", "ns", 3),
    ("launch, 2 threads, added", "hooks", "free", "launch_2", "added_ns", "value", "ns", 5),
    ("launch after write-combined stores, added", "hooks", "free", "launch_wc_1", "added_ns", "value", "ns", 6),
    ("launch, instructions added", "hooks", "free", "launch_1", "added_instructions", "value", "", 40),
    ("copy, 1 thread, added", "hooks", "free", "copy_1", "added_ns", "value", "ns", 2),
    ("copy, instructions added", "hooks", "free", "copy_1", "added_instructions", "value", "", 20),
    ("cuMemGetInfo under Spillway", "hooks", "free", "mem_get_info_1", "added_ns", "with", "ns", 50),
    ("cuMemGetInfo under Spillway, 2 threads", "hooks", "free", "mem_get_info_2", "added_ns", "with", "ns", None),
    ("alloc + free of 4 KiB, added", "alloc", "free", "4KiB_1", "added_ns", "value", "ns", 150),
    ("alloc + free of 1 MiB, added", "alloc", "free", "1MiB_1", "added_ns", "value", "ns", 150),
    ("alloc + free of 4 KiB, 2 threads, added", "alloc", "free", "4KiB_2", "added_ns", "value", "ns", None),
    ("alloc + free of 1 MiB, 2 threads, added", "alloc", "free", "1MiB_2", "added_ns", "value", "ns", None),
    ("alloc + free with 100,000 live, over 100 live", "alloc", "free", "live_100000", "ratio", "value", "", 2),
    ("any one of 100,000 freed and made anew, over 100", "alloc", "free", "churn_100000", "ratio", "value", "", None),
    ("launch, 1 thread, added", "hooks", "device", "launch_1", "added_ns", "value", "ns", None),
    ("copy, 1 thread, added", "hooks", "device", "copy_1", "added_ns", "value", "ns", None),
    ("cuMemGetInfo under Spillway", "hooks", "device", "mem_get_info_1", "added_ns", "with", "ns", None),
    ("cuMemGetInfo under Spillway, 2 threads", "hooks", "device", "mem_get_info_2", "added_ns", "with", "ns", None),
    ("alloc + free of 4 KiB, added", "alloc", "device", "4KiB_1", "added_ns", "value", "ns", None),
    ("alloc + free of 64 MiB, over the driver's VMM calls", "alloc", "device", "64MiB_1", "ratio", "value", "", 1.10),
    ("alloc + free of 64 MiB, 2 threads, over the driver's VMM calls", "alloc", "device", "64MiB_2", "ratio", "value", "", None),
    ("alloc + free of 1 GiB, over the driver's VMM calls", "alloc", "device", "1GiB_1", "ratio", "value", "", None),
    ("loading the library into /bin/true, added", "preload", None, "true", "added_ms", "value", "ms", 0.5),
    ("loading the library into python3 -c pass, added", "preload", None, "python", "added_ms", "value", "ms", None),
    *((f"{what} that the library adds to {program}", "preload", None, case, f"added_{what}", "value", "", 0)
      for case, program in (("true", "/bin/true"), ("python", "python3 -c pass")) for what in ("threads", "sockets", "files")),
    ("swap out, share of the plain copy's rate", "swap", None, "one_way_out", "share", "value", "", None),
    ("swap in, share of the plain copy's rate", "swap", None, "one_way_in", "share", "value", "", None),
    ("two workloads exchanged, over full overlap", "swap", None, "exchange", "ratio", "value", "", None),
    ("request/limit over static: throughput", "serve", None, "dynamic_vs_static", "throughput_ratio", "value", "", None),
    ("request/limit over static: median latency", "serve", None, "dynamic_vs_static", "p50_ratio", "value", "", None),
    ("swap over static: throughput", "serve", None, "swap_vs_static", "throughput_ratio", "value", "", None),
    ("first answer: swap-in over cold start", "serve", None, "swap_vs_cold", "ratio", "value", "", None),
    ("three models in 1.5 GPUs' memory, share of their own GPUs' throughput", "serve", None, "consolidated", "share", "value", "", None),
    ("control: caches that never outgrow the request", "serve", None, "control", "throughput_ratio", "value", "", None),
    ("control: models that all fit", "serve", None, "consolidated_control", "share", "value", "", None),
]
ON = {"free": "a driver whose calls cost nothing", "device": "the device's driver", None: ""}


def in_short(figures, benches=("hooks", "alloc", "preload", "escape", "replay", "swap", "serve")):
    """The table of what is looked for first, of these benches."""
    rows = []
    for text, bench, on, what, metric, which, unit, most in (row for row in SHORT if row[1] in benches):
        one = find(figures, bench, on, what, metric)
        value = one.get(which) if one else None
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            rows.append((text, ON[on], NONE, None, None, None))
            continue
        wanted = f"{number(most)} {unit} or less".replace("  ", " ") if most else None if most is None else "0"
        verdict = None if most is None else "met" if value <= most else "missed"
        if "computed" in one:
            wanted = f"computed {number(one['computed'])}"
            verdict = None if "within" not in one else f"within {one.get('tolerance', 0):.0%}" if one["within"] else "missed"
        # Five digits here; all of them are below.
        rows.append((text, ON[on], f"{number(float(f'{value:.5g}'))} {unit}".strip(), quartiles(one) if which == "value" else None, wanted, verdict))
    for bench, summary in (("escape", escapes), ("replay", replays)):
        if bench in benches or any(one["bench"] == bench for one in figures):
            rows.append(summary(figures))
    return table(("what", "on", "measured", "quartiles", "wanted", ""), rows)


def named(why, names):
    return f"{why}: {', '.join(dict.fromkeys(names))}"


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def escapes(figures):
    """The row of the adversaries: anything but `ok` is a miss, however few bytes it was; what was not tried is named."""
    text = "ways past the limit: most bytes above it"
    found = [one for one in figures if (one["bench"], one["metric"]) == ("escape", "bytes_over")]
    skipped = [one["case"] for one in found if one.get("verdict") == "skipped"]
    tried = [one for one in found if one.get("verdict") != "skipped"]
    # A family that broke may have no value.
    bad = [f"{one['case']} ({one.get('verdict', 'no verdict')})" for one in tried
           if one.get("verdict", "ok") != "ok" or not is_number(one["value"]) or one["value"] > 0]
    left = [one["case"] for one in figures if one["bench"] == "escape" and isinstance(one.get("skipped"), str)]
    about = [named("skipped", skipped + left)] if skipped + left else []
    if not tried:
        return (text, "", NONE, None, None, "; ".join(about) or None)
    most = max((one["value"] for one in tried if is_number(one["value"])), default=None)
    verdict = named("missed", bad) if bad else "met"
    return (f"{text}, {len(tried)} families", "", NONE if most is None else number(most), None, "0", "; ".join([verdict, *about]))


def replays(figures):
    """The row of the replayed traces: one of which nothing was compared shows nothing."""
    text = "recorded programs replayed: results that differ"
    of = lambda metric: {one["case"]: one for one in figures if (one["bench"], one["metric"]) == ("replay", metric) and is_number(one["value"])}
    found, compared = of("different"), of("results_compared")
    none = [case for case in found if case not in compared or compared[case]["value"] <= 0]
    counted = [one["value"] for case, one in found.items() if case not in none]
    cut = [case for case, one in found.items() if one.get("cut_off")]
    about = ([named("nothing compared", none)] if none else []) + ([named("cut off", cut)] if cut else [])
    if not counted:
        return (text, "", NONE, None, None, "; ".join(about) or None)
    verdict = ["missed"] if sum(counted) > 0 else [] if none else ["met"]
    return (f"{text}, {len(counted)} traces", "", number(sum(counted)), None, "0", "; ".join(verdict + about))


def all_figures(figures):
    """Every figure, a table per bench."""
    text = []
    for bench in dict.fromkeys(one["bench"] for one in figures):
        text += ["", f"### {cell(bench)}", ""]
        rows = []
        for one in (one for one in figures if one["bench"] == bench):
            note = [f"skipped: {one['skipped']}"] if isinstance(one.get("skipped"), str) else []
            note += [f"{key} {one[key]}" for key in ("beside", "verdict", "by") if key in one]
            note += [str(text)[:300] for key in ("bad", "list") if isinstance(one.get(key), list) for text in one[key][:3] if isinstance(text, str)]
            note += [] if one.get("within", True) else [f"further than {one.get('tolerance', 0):.0%} from what is computed"]
            rows.append((one["case"], one["metric"], NONE if one["value"] is None else number(one["value"]), one["unit"], quartiles(one),
                         number(one.get("baseline")), number(one.get("with")), number(one.get("computed")), "; ".join(note)))
        text += table(("case", "metric", "value", "unit", "quartiles", "baseline", "with Spillway", "computed", "note"), rows)
    return text


def host():
    """The machine under the measurement."""
    model = None
    try:
        with open("/proc/cpuinfo") as f:
            model = next((line.split(":", 1)[1].strip() for line in f if line.startswith("model name")), None)
    except OSError:
        pass
    return {"kernel": platform.release(), "machine": platform.machine(), "glibc": "".join(platform.libc_ver()),
            "cpus": os.cpu_count(), "cpu": model, "python": platform.python_version()}


def machine_row(machine):
    return (f"{machine.get('machine')}, {machine.get('cpus')} CPUs ({machine.get('cpu')}), Linux {machine.get('kernel')}, "
            f"{machine.get('glibc')}")


def commit(root):
    """The source's commit, and whether it was changed."""
    ask = lambda *a: subprocess.run(["git", "-C", str(root), *a], capture_output=True, text=True, timeout=30)
    try:
        got, changes = ask("rev-parse", "HEAD"), ask("status", "--porcelain", "--untracked-files=no", ":!docs", ":!*.md")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    if got.returncode != 0:
        return "unknown"
    return got.stdout.strip() + (" with changes" if changes.stdout.strip() else "")


def read_json(path):
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError):
        return None
