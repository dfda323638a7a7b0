#!/usr/bin/env python3
"""A report of scripts/bench: report.md, report.json and plots, all from the benches' own lines.

    scripts/bench report --out FOLDER [--benches LIST] [--no-build]     runs the benches, one after the other
    scripts/bench report --out FOLDER --from FILE [--from FILE]...      of what was measured before

FILE has JSON lines, as `scripts/bench NAME --json` prints them, or is a report.json of this program; then the head
(date, commit, machine) is that report's. The head of a report of JSON lines is of now, and says where they are from.

While it measures, the report of what is there so far is in FOLDER/unfinished, and stays there after an interruption;
an earlier report in FOLDER stays until the new one is complete. Of wrong input nothing is written. Exit code: 0 if all
benches ran and found nothing wrong, 1 if not, 2 for a wrong command line or wrong input, 130 after an interruption.
"""
import argparse, datetime, json, math, os, shutil, signal, subprocess, sys, tempfile, threading, time
sys.dont_write_bytecode = True
from pathlib import Path
from report_lib import all_figures, cell, commit, host, in_short, machine_row, normal, table
from report_plots import PLOTS, sections

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


# What a report or figure that is not as the benches print it runs into.
WRONG = (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, LookupError, RecursionError)


def write(report, folder):
    """All of it is made before anything in the folder changes."""
    made_for_it = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        fill(report, folder)
    except BaseException:
        if made_for_it:
            folder.rmdir()
        raise


def fill(report, folder):
    with tempfile.TemporaryDirectory(prefix=".report-", dir=folder) as made:
        made = Path(made)
        (made / "report.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
        (made / "report.md").write_text(markdown(report, made))
        for name in (*dict.fromkeys((*PLOTS, *(plot.name for plot in made.glob("*.svg")))), "report.md", "report.json"):
            if (made / name).exists():
                os.replace(made / name, folder / name)
            else:
                (folder / name).unlink(missing_ok=True)


class Unusable(ValueError):
    """JSON, but nothing that can be shown."""


def loads(text):
    """JSON without what is no number, and not too deep."""
    def no_number(word):
        raise Unusable(f"{word} is no number")

    def real(word):
        return float(word) if math.isfinite(float(word)) else no_number(word)

    try:
        return json.loads(text, parse_constant=no_number, parse_float=real)
    except RecursionError:
        raise Unusable("nested too deeply") from None


def lines_of(text, name, strict=False):
    """The figures among lines; what is none is said. Strict: one that cannot be used is an error."""
    found = []
    for count, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            one = loads(line)
        except Unusable as why:
            if strict:
                raise Unusable(f"{name}, line {count}: {why}") from None
            one = None
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
            whole = loads(text)
        except Unusable as why:
            raise Unusable(f"{file}: {why}") from None
        except ValueError:
            whole = None
        if isinstance(whole, dict) and isinstance(whole.get("figures"), list) and "machine" in whole:
            if len(files) > 1:
                raise ValueError(f"{file} is a report; take it alone")
            return whole
        report["figures"] += lines_of(text, file.name, strict=True)
        names.append(file.name)
    if not report["figures"]:
        raise ValueError(f"no figure in {', '.join(map(str, files))}")
    return {**report, "from": f"{', '.join(names)}; date, commit and machine are those of this report"}


def end(child):
    """Ends a bench and what it started, and waits for it; a second interruption changes nothing."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    for number, seconds in ((signal.SIGTERM, 30), (signal.SIGKILL, 10)):
        try:
            os.killpg(child.pid, number)
            child.wait(seconds)
            return
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            pass


class Interruption:
    """Raises KeyboardInterrupt, but not while a child is made that nobody could end yet: then later."""
    held = asked = False

    @classmethod
    def come(cls, number, frame):
        cls.asked = True
        if not cls.held:
            raise KeyboardInterrupt

    @classmethod
    def release(cls):
        cls.held = False
        if cls.asked:
            raise KeyboardInterrupt


def run(bench, more):
    """A bench's account and figures; what it says on standard error is passed on."""
    began, said = time.monotonic(), []
    # A group of its own, so that all of it can be ended.
    Interruption.held = True
    child = subprocess.Popen([str(ROOT / "scripts/bench"), bench, "--json", *more], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True)

    def listen():
        for line in child.stderr:
            print(line, end="", file=sys.stderr, flush=True)
            said.append(line.rstrip("\n"))

    thread = threading.Thread(target=listen, daemon=True)
    try:
        Interruption.release()
        thread.start()
        figures = lines_of(child.stdout.read(), bench)
        code = child.wait()
    except BaseException:
        end(child)
        raise
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
        names = ", ".join(map(str, a.files))
        try:
            report = taken(a.files)
            try:
                write(report, a.out)
            except WRONG as why:
                raise ValueError(f"{names}: no report or figures as the benches print them: {type(why).__name__}: {why}") from None
        except (OSError, ValueError) as why:
            print(f"bench report: {why}", file=sys.stderr)
            return 2
        print(f"bench report: {a.out / 'report.md'}")
        return 0
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, Interruption.come)
    report, unfinished = new(), a.out / "unfinished"
    try:
        unfinished.mkdir(parents=True, exist_ok=True)
    except OSError as why:
        print(f"bench report: {why}", file=sys.stderr)
        return 2
    bench = None
    try:
        for bench in wanted:
            print(f"bench report: {bench} ...", file=sys.stderr, flush=True)
            account, figures = run(bench, ["--no-build"] if a.no_build else [])
            report["runs"].append(account)
            report["figures"] += figures
            write(report, unfinished)
            print(f"bench report: {bench}: exit code {account['exit_code']}, {len(figures)} figures, {account['seconds']:.0f} s",
                  file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        print(f"bench report: interrupted in {bench}; what was measured before is in {unfinished}", file=sys.stderr, flush=True)
        return 130
    # The last moment is no time for an end.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    write(report, a.out)
    shutil.rmtree(unfinished, ignore_errors=True)
    print(f"bench report: {a.out / 'report.md'}")
    return 1 if any(account["exit_code"] for account in report["runs"]) else 0


if __name__ == "__main__":
    sys.exit(main())
