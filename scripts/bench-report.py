#!/usr/bin/env python3
"""A report of scripts/bench: report.md, report.json and plots, all from the benches' own lines.

    scripts/bench report --out FOLDER [--benches LIST] [--no-build]     runs the benches, one after the other
    scripts/bench report --out FOLDER --from FILE [--from FILE]...      of what was measured before

FILE has JSON lines, as `scripts/bench NAME --json` prints them, or is a report.json of this program; then the head
(date, commit, machine) is that report's. The head of a report of JSON lines is of now, and says where they are from.

The report is written anew after each bench, so an interruption loses nothing. Exit code: 0 if all benches ran and
found nothing wrong, 1 if not, 2 for a wrong command line.
"""
import argparse, datetime, json, os, subprocess, sys, threading, time
sys.dont_write_bytecode = True
from pathlib import Path
from report_lib import all_figures, cell, commit, host, in_short, machine_row, normal, table
from report_plots import sections

ROOT = Path(__file__).resolve().parent.parent
BENCHES = ("hooks", "alloc", "preload", "escape", "replay", "swap", "serve")


def version(figure):
    number = figure.get("driver_version")
    return f"{number // 1000}.{number % 1000 // 10}" if isinstance(number, int) else "unknown"


def markdown(report, folder):
    figures = [normal(line) for line in report["figures"]]
    text = ["# Spillway on the simulator", "",
            "**This is the simulator, no GPU: it shows that the mechanisms work, and says nothing about a GPU's speed.** Rates and times of "
            "*swap* and *serve* follow from a simulated link, disk and steps. Real are the nanoseconds and instructions of *hooks* and "
            "*alloc* on the driver whose calls cost nothing, and *preload*: they are this machine's CPU's.", ""]
    text += ["| | |", "| --- | --- |"]
    drivers = dict.fromkeys(f"{one['driver']}, CUDA {version(one)}" for one in figures if "driver" in one and one["on"])
    rows = [("date", report["date"]), ("commit", report["commit"]), ("device", "none: simulated"),
            ("driver", "; ".join(drivers) or "simulated"), ("machine", machine_row(report["machine"]))]
    rows += [(name, report[key]) for name, key in (("load before it began", "load"), ("figures from", "from")) if report.get(key)]
    text += table(("", ""), rows)[2:]
    if report["runs"]:
        text += ["", *table(("bench", "exit code", "figures", "seconds"),
                            [(run["bench"], run["exit_code"], sum(f["bench"] == run["bench"] for f in figures), run["seconds"]) for run in report["runs"]])]
        for run in (run for run in report["runs"] if run["exit_code"]):
            text += ["", f"**{cell(run['bench'])} found something wrong**, its figures below say what" + (":" if run["said"] else ".")]
            text += ["", *(f"- {cell(line)}" for line in run["said"])] if run["said"] else []
    text += ["", "## In short", "", *in_short(figures), *sections(report, folder, figures), "", "## All figures", *all_figures(figures)]
    return "\n".join(text) + "\n"


def write(report, folder):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / "report.md").write_text(markdown(report, folder))


def lines_of(text, name):
    """The figures among lines; what is none is said."""
    found = []
    for count, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            one = json.loads(line)
        except ValueError:
            one = None
        if isinstance(one, dict) and "bench" in one and "case" in one:
            found.append(one)
        else:
            print(f"bench report: {name}, line {count} is no figure: {line[:100]!r}", file=sys.stderr)
    return found


def new():
    load = " ".join(f"{value:.2f}" for value in os.getloadavg())
    return {"on": "the simulator", "simulator": True, "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "commit": commit(ROOT), "machine": host(), "load": load, "runs": [], "figures": []}


def taken(files):
    """A report of what was measured before."""
    report = new()
    del report["load"]
    names = []
    for file in files:
        text = file.read_text(errors="replace")
        try:
            whole = json.loads(text)
        except ValueError:
            whole = None
        if isinstance(whole, dict) and isinstance(whole.get("figures"), list) and "machine" in whole:
            if len(files) > 1:
                raise ValueError(f"{file} is a report; take it alone")
            return whole
        report["figures"] += lines_of(text, file.name)
        names.append(file.name)
    if not report["figures"]:
        raise ValueError(f"no figure in {', '.join(map(str, files))}")
    return {**report, "from": f"{', '.join(names)}; date, commit and machine are those of this report"}


def run(bench, more):
    """A bench's account and figures; what it says on standard error is passed on."""
    began, said = time.monotonic(), []
    child = subprocess.Popen([str(ROOT / "scripts/bench"), bench, "--json", *more], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True, errors="replace")

    def listen():
        for line in child.stderr:
            print(line, end="", file=sys.stderr, flush=True)
            said.append(line.rstrip("\n"))

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    figures = lines_of(child.stdout.read(), bench)
    code = child.wait()
    thread.join(5)
    return {"bench": bench, "exit_code": code, "seconds": round(time.monotonic() - began, 1), "said": said[-20:]}, figures


def main():
    ap = argparse.ArgumentParser(prog="scripts/bench report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--out", type=Path, required=True, help="folder of the report; what it has of an earlier one is replaced")
    ap.add_argument("--from", type=Path, action="append", dest="files", metavar="FILE", help="figures from a file instead of a run")
    ap.add_argument("--benches", default=",".join(BENCHES), help=f"with commas, of {','.join(BENCHES)} [all]")
    ap.add_argument("--no-build", action="store_true", help="takes what was built before")
    a = ap.parse_args()
    wanted = a.benches.split(",")
    if unknown := [name for name in wanted if name not in BENCHES]:
        ap.error(f"no bench {', '.join(unknown)}; there are {', '.join(BENCHES)}")
    if a.files:
        try:
            write(taken(a.files), a.out)
        except (OSError, ValueError) as why:
            ap.error(str(why))
        print(f"bench report: {a.out / 'report.md'}")
        return 0
    report = new()
    for bench in wanted:
        print(f"bench report: {bench} ...", file=sys.stderr, flush=True)
        account, figures = run(bench, ["--no-build"] if a.no_build else [])
        report["runs"].append(account)
        report["figures"] += figures
        write(report, a.out)
        print(f"bench report: {bench}: exit code {account['exit_code']}, {len(figures)} figures, {account['seconds']:.0f} s",
              file=sys.stderr, flush=True)
    print(f"bench report: {a.out / 'report.md'}")
    return 1 if any(account["exit_code"] for account in report["runs"]) else 0


if __name__ == "__main__":
    sys.exit(main())
