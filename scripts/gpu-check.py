"""Runs what needs a GPU, from an unpacked release archive, and writes a report. Start it by scripts/gpu-check.

Parts:
  conformance   tests/conformance on the real driver, without Spillway: is the simulator right?
  e2e           programs under Spillway on the real driver: quotas, swaps, deaths, every byte checked
  facts         the questions that no documentation answers (gpu-facts.py)
  torch         PyTorch, where python3 has it: the same bits with and without Spillway (gpu-torch.py)
  models        language models that take turns: cold start against swap-in (gpu-models.py; needs PyTorch)
  peers         other ways to bring a model off the GPU and back (gpu-peers.py; needs PyTorch)
  hooks         what is added to single calls, beside the driver's own (bench-calls.py)
  alloc         what allocating and freeing costs, beside the driver's own (bench-calls.py)
  swap          what moving memory costs, beside plain pinned copies (bench-swap.py)
  serve         model servers with request and limit, and in turns, beside what is computed (bench-serve.py)
  all           all of these

Each part ends within 9 minutes. A part that fails does not stop the others. The folder gets report.json, report.md
with its plots (*.svg), and per part a JSON file and logs. `--again FOLDER` writes report.md and the plots of a folder
anew from its report.json, without measuring anything. Exit code: 0 if all passed, 1 if something failed, 2 if nothing
could be run. Ended by SIGINT, SIGTERM or SIGHUP it ends what it started, within half a minute, keeps the report of
what was done, and exits with 128 and the signal's number. No setting of the GPU is changed; an idle GPU gives the
best figures.
"""
import argparse, ctypes as C, datetime, json, os, shutil, signal, subprocess, sys, tempfile, time
sys.dont_write_bytecode = True
from pathlib import Path

from processes import adopt, end_all, end_with_parent, on_endings, temporary
from report_lib import all_figures, cell, code, figures_of_parts, host, in_short, machine_row, number, read_json, table
from report_plots import sections

PARTS = ("conformance", "e2e", "facts", "torch", "models", "peers", "hooks", "alloc", "swap", "serve")
OPTIONAL = ("torch", "models", "peers")  # where PyTorch is: all of it may be skipped
LIMIT = 540  # seconds for a part, whatever happens
GRACE = 20  # of these, for its own clean-up
QUICK = False  # by --quick
STOPPED = []  # the signals that ask this script to end


class Library:
    """NVML by ctypes: what is not there or fails is None."""

    def __init__(self):
        try:
            self.lib = C.CDLL("libnvidia-ml.so.1")
            self.ready = self.lib.nvmlInit_v2() == 0
        except OSError:
            self.ready = False

    def call(self, name, *a):
        try:
            return self.ready and getattr(self.lib, name)(*a) == 0
        except AttributeError:
            return False

    def text(self, name, *before):
        buffer = C.create_string_buffer(96)
        return buffer.value.decode(errors="replace") if self.call(name, *before, buffer, 96) else None

    def number(self, name, *before):
        value = C.c_int()
        return value.value if self.call(name, *before, C.byref(value)) else None


def describe():
    """The machine and its devices, for the head of the report."""
    nv = Library()
    cuda = nv.number("nvmlSystemGetCudaDriverVersion_v2")
    devices = []
    for index in range(nv.number("nvmlDeviceGetCount_v2") or 0):
        d, memory = C.c_void_p(), (C.c_ulonglong * 3)()
        if not nv.call("nvmlDeviceGetHandleByIndex_v2", index, C.byref(d)):
            continue
        known = nv.call("nvmlDeviceGetMemoryInfo", d, memory)
        devices.append({
            "index": index, "name": nv.text("nvmlDeviceGetName", d), "uuid": nv.text("nvmlDeviceGetUUID", d),
            "total_bytes": memory[0] if known else None, "used_bytes": memory[2] if known else None,
            "pcie": {"generation": nv.number("nvmlDeviceGetCurrPcieLinkGeneration", d),
                     "width": nv.number("nvmlDeviceGetCurrPcieLinkWidth", d),
                     "generation_max": nv.number("nvmlDeviceGetMaxPcieLinkGeneration", d),
                     "width_max": nv.number("nvmlDeviceGetMaxPcieLinkWidth", d)},
            "compute_mode": {0: "default", 1: "exclusive thread", 2: "prohibited", 3: "exclusive process"}.get(
                nv.number("nvmlDeviceGetComputeMode", d)),
            "persistence": nv.number("nvmlDeviceGetPersistenceMode", d)})
    return {"driver": nv.text("nvmlSystemGetDriverVersion"),
            "cuda": f"{cuda // 1000}.{cuda % 1000 // 10}" if cuda else None, "devices": devices, **host()}


def waited(child, seconds, stop=lambda: False):
    """Its exit code; None if it runs on after so many seconds, or when `stop` holds."""
    end = time.monotonic() + seconds
    while not stop():
        try:
            return child.wait(max(0.0, min(0.2, end - time.monotonic())))
        except subprocess.TimeoutExpired:
            if time.monotonic() >= end:
                break
    return None


def bounded(command, log, env, seconds):
    """Runs a command in a session of its own. Returns (exit code or None if it was ended before it was done, seconds).
    Nothing that it started is there afterwards, whatever session that has."""
    began = time.monotonic()
    with open(log, "wb") as out:
        child = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=env,
                                 start_new_session=True, preexec_fn=end_with_parent)
        try:
            code = waited(child, seconds, lambda: STOPPED)
            if code is None:
                # The group is there: its leader is not waited for.
                os.killpg(child.pid, signal.SIGTERM)
                waited(child, GRACE)
        finally:
            if child.poll() is None:
                child.kill()
                waited(child, GRACE)  # a process in the driver may not end at once
            if not end_all():
                print("gpu-check: a process of it does not end, not even killed", file=sys.stderr, flush=True)
    return code, time.monotonic() - began


def lines_of(log):
    """The conformance program's lines, for when it could not write its JSON."""
    cases = []
    for line in log.read_text(errors="replace").splitlines():
        words = line.split(" ", 2)
        if len(words) >= 2 and words[1] in ("ok", "FAIL", "skipped") and "." in words[0]:
            cases.append({"name": words[0], "result": words[1], "reason": words[2] if len(words) > 2 else "", "observed": []})
        elif line.startswith("    observed: ") and cases:
            cases[-1]["observed"].append(line[14:])
    return cases


def conformance(here, out, env):
    log, result = out / "conformance.log", out / "conformance.json"
    code, seconds = bounded([str(here / "test-bin/spillway-conformance"), "all", "--json", str(result)], log, env, LIMIT - GRACE)
    cases = (read_json(result) or {}).get("cases") or lines_of(log)
    return code, seconds, cases


def e2e(here, out, env):
    folder = out / "e2e"
    folder.mkdir(exist_ok=True)
    code, seconds = bounded([sys.executable, str(here / "scripts/gpu-e2e.py"), "--base", str(here), "--out", str(folder),
                             "--seconds", str(LIMIT - 120)], folder / "e2e.log", env, LIMIT - GRACE)
    return code, seconds, (read_json(folder / "e2e.json") or {}).get("cases", [])


def facts(here, out, env):
    folder = out / "facts"
    folder.mkdir(exist_ok=True)
    code, seconds = bounded([sys.executable, str(here / "scripts/gpu-facts.py"), "--out", str(folder), "--limit", "75",
                             "--total", str(LIMIT - 60)], folder / "facts.log", env, LIMIT - GRACE)
    answers = read_json(folder / "gpu-facts.json") or {}
    cases = []
    for name, answer in answers.items():
        last = (answer.get("stderr") or "").strip().splitlines()[-1:]
        reason = ": ".join([str(answer["failed"]), *last]) if "failed" in answer else ""
        cases.append({"name": name, "result": "FAIL" if "failed" in answer else "ok", "reason": reason})
    return code, seconds, cases


def by_script(name):
    """A part that a script of its own does, into a folder of its own."""
    def run(here, out, env):
        folder = out / name
        folder.mkdir(exist_ok=True)
        code, seconds = bounded([sys.executable, str(here / f"scripts/gpu-{name}.py"), "--base", str(here), "--out", str(folder),
                                 "--seconds", str(LIMIT - 90), *(["--quick"] if QUICK else [])], folder / f"{name}.log", env,
                                LIMIT - GRACE)
        return code, seconds, (read_json(folder / f"{name}.json") or {}).get("cases", [])
    return run


def by_bench(name, script, *arguments):
    """A bench, into a folder of its own: a case per figure, failed if it is not what was computed."""
    def run(here, out, env):
        folder = out / name
        folder.mkdir(exist_ok=True)
        code, seconds = bounded([sys.executable, str(here / "scripts" / script), "--base", str(here), "--out", str(folder), "--json",
                                 "--seconds", str(LIMIT - 60), *(["--smoke"] if QUICK else []), *arguments], folder / f"{name}.log", env,
                                LIMIT - GRACE)
        got = read_json(folder / f"{name}.json") or {}
        cases = [{"name": name, "result": "FAIL", "reason": why} for why in got.get("failed", [])]
        for line in got.get("figures", []):
            if "skipped" in line:
                # A bench's program that could not measure a case ends with an error; what it left out is no failure.
                cases.append({"name": str(line["case"]), "result": "FAIL" if str(line["skipped"]).startswith("failed") else "skipped",
                              "reason": line["skipped"]})
                continue
            missed = line.get("within") is False and not QUICK
            figures = {key: value for key, value in line.items() if key not in ("bench", "case", "metric", "machine", "preload")}
            cases.append({"name": f"{line['case']}.{line['metric']}", "result": "FAIL" if missed else "ok",
                          "reason": f"{line['value']}, computed {line['computed']}" if missed else "", "figures": figures})
        return code, seconds, cases
    return run


DOERS = {"conformance": conformance, "e2e": e2e, "facts": facts, **{name: by_script(name) for name in OPTIONAL},
         **{name: by_bench(name, "bench-calls.py", name) for name in ("hooks", "alloc")},
         **{name: by_bench(name, f"bench-{name}.py") for name in ("swap", "serve")}}


def part(name, here, out, env):
    """One part's account."""
    print(f"gpu-check: {name} ...", flush=True)
    try:
        code, seconds, cases = DOERS[name](here, out, env)
    except OSError as why:
        code, seconds, cases = 1, 0.0, [{"name": name, "result": "FAIL", "reason": str(why)}]
    count = lambda word: sum(case["result"] == word for case in cases)
    account = {"part": name, "exit_code": code, "seconds": round(seconds, 1), "passed": count("ok"),
               "failed": count("FAIL"), "skipped": count("skipped"), "cases": cases}
    problems = [f"{case['name']}: {case.get('reason', '')}" for case in cases if case["result"] == "FAIL"]
    if code is None and STOPPED:
        problems.append(f"ended by {signal.Signals(STOPPED[0]).name} before it was done")
    elif code is None:
        problems.append(f"its {LIMIT} s were over before it was done")
    elif code != 0 and not problems:
        problems.append(f"ended with {code}; see its log")
    elif not account["passed"] and not (name in OPTIONAL and account["skipped"]):
        problems.append("nothing passed; see its log")
    account["problems"] = problems
    print(f"gpu-check: {name}: {account['passed']} passed, {account['failed']} failed, {account['skipped']} skipped "
          f"({seconds:.0f} s)", flush=True)
    for problem in problems:
        print(f"gpu-check:   {problem}", flush=True)
    return account


BENCHES = ("hooks", "alloc", "swap", "serve", "bench")  # their figures are tables; `bench` is of older reports


def markdown(report, out, plots=None):
    """The report; its plots go into the folder, or into another."""
    machine, text = report["machine"], [f"# Spillway on {cell(report['on'])}", ""]
    if report["simulator"]:
        text += ["**This is the simulator, no GPU.** Times and rates mean nothing, but for the nanoseconds and instructions on the driver "
                 "whose calls cost nothing, which are this machine's CPU's.", ""]
    rows = [("date", report["date"]), ("archive", "; ".join(report["archive"])), ("driver", f"{machine['driver']}, CUDA {machine['cuda']}"),
            ("machine", machine_row(machine))]
    for d in machine["devices"]:
        pcie, total = d["pcie"], d["total_bytes"]
        rows.append((f"device {d['index']}", f"{d['name']}, {total / 2**30:.1f} GiB" if total else d["name"]))
        rows.append(("", f"PCIe generation {pcie['generation']} of {pcie['generation_max']}, width {pcie['width']} of {pcie['width_max']}, "
                         f"compute mode {d['compute_mode']}"))
    text += ["| | |", "| --- | --- |", *table(("", ""), rows)[2:], ""]
    text += table(("part", "passed", "failed", "skipped", "seconds"),
                  [(p["part"], p["passed"], p["failed"], p["skipped"], number(p["seconds"])) for p in report["parts"]])
    there = {p["part"] for p in report["parts"]} | ({"hooks", "alloc"} if any(p["part"] == "bench" for p in report["parts"]) else set())
    text += [f"| {name} | not measured | | | |" for name in PARTS if name not in there]
    figures = figures_of_parts(report["parts"])
    text += ["", "## In short", "", *in_short(figures, BENCHES)]
    text += sections(report, plots or out, figures, report["parts"], read_json(out / "facts/gpu-facts.json") or {})
    for p in report["parts"]:
        text += ["", f"## {cell(p['part'])}", ""]
        text += [f"- FAILED: {cell(problem)}" for problem in p["problems"]]
        skipped = [case for case in p["cases"] if case["result"] == "skipped"]
        text += [f"- skipped: {cell(case['name'])}: {cell(case.get('reason', ''))}" for case in skipped]
        text += [f"- {cell(case['name'])}: observed: {cell(line)}" for case in p["cases"] for line in case.get("observed", [])]
        if p["part"] in BENCHES:
            text += all_figures(figures_of_parts([p]))
        else:
            text += [f"- {cell(case['name'])}: {code(json.dumps(case['figures']))}" for case in p["cases"] if case.get("figures")]
        if p["part"] == "facts":
            text += ["", "The answers: [facts/gpu-facts.md](facts/gpu-facts.md)"]
        if p["part"] in ("models", "peers"):
            text += ["", f"The table: [{p['part']}/{p['part']}.md]({p['part']}/{p['part']}.md)"]
    return "\n".join(text) + "\n"


def again(out):
    """Writes a report anew. None, or why it is none; then nothing is changed."""
    path = out / "report.json"
    report = read_json(path)
    if not isinstance(report, dict) or not isinstance(report.get("parts"), list):
        return f"{path} is no report of gpu-check"
    place = temporary("spillway-gpu-check.")
    try:
        # Into another folder first: what is there is not replaced by half of one.
        markdown(report, out, place)
        (out / "report.md").write_text(markdown(report, out))
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as why:
        return f"{path} is no report of gpu-check, or is broken: {type(why).__name__}: {cell(why)}"
    except OSError as why:
        return f"{out}: no report can be written there: {why.strerror or why}"
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return None


def simulated(here, env, place):
    """The simulated driver in a folder, under the names that programs load."""
    (place / "lib").mkdir()
    (place / "machine").mkdir()
    for made, name in (("libcuda.so", "libcuda"), ("libnvidia_ml.so", "libnvidia-ml")):
        shutil.copy(here / "test-bin" / made, place / "lib" / f"{name}.so.1")
        (place / "lib" / f"{name}.so").symlink_to(f"{name}.so.1")
    env["LD_LIBRARY_PATH"] = str(place / "lib")
    env["SPILLWAY_SIM_DIR"] = str(place / "machine")
    env.setdefault("SPILLWAY_SIM_MEMORY", "4GiB")


def main():
    ap = argparse.ArgumentParser(prog="gpu-check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} or all [all]")
    ap.add_argument("--out", type=Path, default=Path("gpu-check-report"), help="folder for the report [gpu-check-report]")
    ap.add_argument("--simulator", action="store_true", help="on the simulator in the archive: a test of this script")
    ap.add_argument("--from", dest="here", type=Path, default=Path(__file__).resolve().parent.parent,
                    help="the unpacked archive [where this script is]")
    ap.add_argument("--quick", action="store_true", help="torch: a case of each kind, few steps; hooks, alloc, swap, serve: their short forms")
    ap.add_argument("--again", type=Path, metavar="FOLDER", help="only writes a report's report.md and plots anew")
    ap.add_argument("--describe", action="store_true", help=argparse.SUPPRESS)
    a = ap.parse_args()
    global QUICK
    QUICK = a.quick
    if a.describe:
        print(json.dumps(describe()))
        return 0
    if a.again:
        why = again(a.again)
        if why:
            ap.exit(2, f"gpu-check: {why}\n")
        return 0
    unknown = [name for name in a.parts if name not in (*PARTS, "all")]
    if unknown:
        ap.error(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)} and all")
    parts = PARTS if not a.parts or "all" in a.parts else [name for name in PARTS if name in a.parts]
    here = a.here.resolve()
    for file in ("test-bin/spillway-conformance", "test-bin/gpu-hold", "bin/spillwayd", "lib/libspillway.so"):
        if not (here / file).exists():
            ap.error(f"{here / file} is not there: run this from an unpacked archive (made by scripts/release), or name it by --from")
    # Nothing of the caller's settings for Spillway may change what is tested.
    env = {k: v for k, v in os.environ.items() if not k.startswith("SPILLWAY_") or k.startswith("SPILLWAY_SIM_")}
    env.pop("LD_PRELOAD", None)
    try:
        out = a.out.resolve()
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as why:
        ap.exit(2, f"gpu-check: --out {a.out}: no report can be written there: {why.strerror or why}\n")
    adopt()
    on_endings(lambda number, _: STOPPED.append(number))
    place = temporary("spillway-gpu-check.", below=11)
    try:
        # What the parts leave behind, killed before they could clean up, is in a folder that goes with this one.
        env["TMPDIR"] = str(place)
        if a.simulator:
            simulated(here, env, place)
        said = place / "describe.log"
        code, _ = bounded([sys.executable, __file__, "--describe"], said, env, 60)
        said = said.read_text(errors="replace").strip()
        if STOPPED:
            return 128 + STOPPED[0]
        machine = json.loads(said.splitlines()[-1]) if code == 0 else {"devices": []}
        if not machine["devices"]:
            print(f"gpu-check: no NVIDIA driver or no device here{': ' + said[-200:] if code else ''}", file=sys.stderr)
            return 2
        version = here / "VERSION"
        report = {"on": "the simulator" if a.simulator else machine["devices"][0]["name"], "simulator": a.simulator,
                  "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
                  "archive": version.read_text().strip().splitlines() if version.exists() else ["unknown"],
                  "machine": machine, "parts": []}
        for name in parts:
            report["parts"].append(part(name, here, out, env))
            # After every part, so that an interruption loses nothing.
            (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
            (out / "report.md").write_text(markdown(report, out))
            if STOPPED:
                print(f"gpu-check: ended by {signal.Signals(STOPPED[0]).name}; report of what was done in {out}", flush=True)
                return 128 + STOPPED[0]
        bad = [p["part"] for p in report["parts"] if p["problems"]]
        print(f"gpu-check: report in {out}; " + (f"problems in {', '.join(bad)}" if bad else "all passed"))
        return 1 if bad else 0
    finally:
        shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
