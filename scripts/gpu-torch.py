#!/usr/bin/env python3
"""PyTorch on whatever driver is there: the same bits with and without Spillway, also while its memory comes and goes.

    gpu-torch.py --base ARCHIVE --out DIR [--seconds 480] [--quick] [CASE ...]

Run by gpu-check. ARCHIVE is an unpacked release. Each case trains a small model and asks it (gpu-torch-child.py),
three times: *plain*, without Spillway; *spillway*, under it; *evicted*, under it and moved to the host before and in
the middle of steps. SHA-256 of losses, answers, parameters, optimizer, random state and 512 MiB of ballast must be
equal. Steps of plain and spillway are timed one after the other, with nobody else at a step.

Other cases: traces (the driver calls of each allocator, and with graphs, recorded into DIR/traces for
`scripts/bench replay`: gpu_trace.py), startup (evicted all the while it starts and captures), limit (out of memory in each allocator), turns (two
models on space for one and a half, which the daemon moves by itself).

Writes DIR/torch.json after every case, and the logs of all programs; of one that hangs, the stacks. A case that
fails does not stop the others. Without PyTorch, or if it finds no GPU, all are skipped. Exit code 1 if one failed.
"""
import argparse, contextlib, http.client, importlib.util, json, queue, shutil, signal, subprocess, sys, threading, time
sys.dont_write_bytecode = True
from pathlib import Path

import gpu_trace
from processes import end_by_signal

HERE = Path(__file__).resolve().parent
spec = importlib.util.spec_from_file_location("gpu_e2e", HERE / "gpu-e2e.py")
e2e = importlib.util.module_from_spec(spec)
spec.loader.exec_module(e2e)
Failed, Skipped, need, MiB, GiB = e2e.Failed, e2e.Skipped, e2e.need, e2e.MiB, e2e.GiB

REQUEST, LIMIT = 5 * GiB, 8 * GiB
EACH = 14 * GiB  # of the device, for a case's three programs and their contexts
PARTS = ("losses", "answers", "parameters", "optimizer", "random", "ballast", "steps")
TIRED = (OSError, ValueError, KeyError, http.client.HTTPException, subprocess.SubprocessError)


def allocator(setting):
    return {"PYTORCH_CUDA_ALLOC_CONF": setting, "PYTORCH_ALLOC_CONF": setting}


EXPANDABLE, ASYNC = allocator("expandable_segments:True"), allocator("backend:cudaMallocAsync")
# name: mode of the child, environment, whether its memory can move, whether quick has it, layers
VARIANTS = {
    "compile": ("compile", {}, True, True, 2),  # first, since it takes longest
    "caching": ("eager", {}, True, True, 4),
    "expandable": ("eager", EXPANDABLE, False, True, 4),
    "async": ("eager", ASYNC, True, True, 4),
    "graphs": ("graphs", {}, True, True, 4),
    "loader": ("loader", {}, True, True, 4),
    "compile-graphs": ("compile-graphs", {}, True, False, 2),
    "callables": ("callables", {}, True, False, 4),
    "graphs-async": ("graphs", ASYNC, True, False, 4),
    "graphs-expandable": ("graphs", EXPANDABLE, False, False, 4),
}
# name: mode of the child, environment, calls that its trace must have
TRACES = {
    "torch-caching": ("eager", {}, (("cuMemAlloc_v2",), gpu_trace.LAUNCH)),
    "torch-expandable": ("eager", EXPANDABLE, (("cuMemCreate",), ("cuMemMap",), gpu_trace.LAUNCH)),
    "torch-async": ("eager", ASYNC, (gpu_trace.POOLS, gpu_trace.LAUNCH)),
    "torch-graphs": ("graphs", {}, (("cuStreamBeginCapture",), ("cuGraphLaunch",), gpu_trace.LAUNCH)),
}


class Child(e2e.Program):
    """A PyTorch program. Whatever it does not answer in time leaves its stacks in its log."""

    def __init__(self, run, case, name, mode, env, workload=None, request=REQUEST, limit=LIMIT, seed=1, layers=4, more=()):
        self.run, self.title, self.workload, self.machine = run, f"{case}-{name}", workload, run.machine
        prefix = []
        if workload:
            prefix = [str(run.machine.base / "bin/spillway"), "run", "--workload", workload, "--request", f"{request}B",
                      "--limit", f"{limit}B", "--"]
        arguments = ["-u", str(run.program), "--mode", mode, "--seed", str(seed), "--layers", str(layers), *more, *run.child_arguments]
        base = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "PYTHONHASHSEED": "0", "TORCHINDUCTOR_DETERMINISTIC": "1",
                "TORCHINDUCTOR_COMPILE_THREADS": "4", "TORCHINDUCTOR_CACHE_DIR": str(run.machine.dir / f"inductor-{case}"),
                "TRITON_CACHE_DIR": str(run.machine.dir / f"triton-{case}")}
        path = run.machine.out / f"{self.title}.log"
        super().__init__(run.machine, sys.executable, arguments, path, env={**base, **env}, prefix=prefix)
        self.name, self.path = self.title, path
        run.machine.programs.append(self)

    def answer(self, word, timeout):
        """The child's next line, which begins by this word."""
        timeout = max(1.0, min(timeout, self.run.end - time.monotonic()))
        try:
            got = self.line(timeout)
        except Failed as why:
            code = self.child.poll()
            if code is None and self.lines:  # its lines are over, so it ends now
                with contextlib.suppress(subprocess.TimeoutExpired):
                    code = self.child.wait(10)
            if code is None:
                self.stacks()
                raise Failed(f"{why} (stacks are in {self.path.name})") from None
            raise Failed(f"{self.title} ended with {code}: {self.last_words()}") from None
        verb, _, rest = got.partition(" ")
        if verb == "skip":
            raise Skipped(rest)
        need(verb == word, f"{self.title} says {got[:200]!r}, not {word}")
        return json.loads(rest)

    def do(self, text, word, timeout=60):
        self.say(text)
        return self.answer(word, timeout)

    def last_words(self):
        """The end of an error message, or of the log."""
        lines = [line for line in self.path.read_text(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if "Error" in line or "error" in line or "Fatal" in line or "spillway" in line]
        return " | ".join([*errors[-3:], *lines[-2:]])[-700:]

    def stacks(self):
        """Python's stacks of all threads by the child itself; the kernel's and gdb's from outside."""
        pid = self.child.pid
        with open(self.path, "ab") as log:
            log.write(b"\n--- it did not answer; python's stacks:\n")
            log.flush()
            try:
                self.child.send_signal(signal.SIGUSR1)
            except OSError:
                return
            time.sleep(1)
            for task in sorted(Path(f"/proc/{pid}/task").glob("*")):
                log.write(f"--- thread {task.name}\n".encode())
                for file in ("comm", "wchan", "syscall", "stack"):
                    try:
                        log.write(file.encode() + b": " + (task / file).read_bytes().strip() + b"\n")
                    except OSError:
                        pass
            if shutil.which("gdb"):
                try:
                    got = subprocess.run(["gdb", "-p", str(pid), "-batch", "-ex", "thread apply all bt 25"],
                                         capture_output=True, timeout=30)
                    log.write(got.stdout)
                except subprocess.SubprocessError:
                    pass
            try:
                log.write(json.dumps(self.machine.get("/v1/status"), indent=1).encode())
            except (Failed, *TIRED) as why:
                log.write(f"status: {why}".encode())


class Evictor:
    """Moves a workload to the host, and counts."""

    def __init__(self, machine, workload):
        self.machine, self.workload = machine, workload
        self.done = self.bytes = self.busy = self.nothing = 0
        self.refusals = []

    def once(self):
        status, body = self.machine.request("POST", f"/v1/workloads/{self.workload}/evict?timeout=60")
        if status == 200:
            self.done += body["bytes"] > 0
            self.nothing += body["bytes"] == 0
            self.bytes += body["bytes"]
        elif status == 404:
            self.nothing += 1
        else:
            self.busy += 1
            text = f"{status} {body.get('error') if body else ''}"[:200]
            if text not in self.refusals and len(self.refusals) < 4:
                self.refusals.append(text)

    def while_it_works(self, work, delay=0.004):
        """Evicts in the middle of some work."""
        failures = []

        def move():
            try:
                time.sleep(delay)
                self.once()
            except (Failed, *TIRED) as why:
                failures.append(f"evict {self.workload}: {type(why).__name__} {why}")

        thread = threading.Thread(target=move, daemon=True)
        thread.start()
        result = work()
        thread.join(70)
        need(not failures, "; ".join(failures))
        need(not thread.is_alive(), f"evict {self.workload} is not answered")
        return result

    def all_the_while(self, work, pause=0.25):
        """Evicts again and again until the work is done."""
        over = threading.Event()

        def move():
            while not over.wait(pause):
                try:
                    self.once()
                except (Failed, *TIRED) as why:
                    self.refusals.append(f"{type(why).__name__} {why}"[:200])
                    time.sleep(1)

        thread = threading.Thread(target=move, daemon=True)
        thread.start()
        try:
            return work()
        finally:
            over.set()
            thread.join(70)

    def figures(self):
        found = {"evictions": self.done, "evicted_MiB": self.bytes // MiB, "busy": self.busy, "nothing_to_move": self.nothing}
        return {**found, **({"refusals": self.refusals} if self.refusals else {})}


class Run:
    """What all cases share."""

    def __init__(self, machine, end, quick, program, child_arguments):
        self.machine, self.end, self.quick, self.program, self.child_arguments = machine, end, quick, program, child_arguments
        self.timed, self.steps = threading.Lock(), 5 if quick else 30
        self.single, self.answers = (4, 2) if quick else (10, 4)
        self.fixed, self.moving = 1 * GiB, 2560 * MiB  # of one model; measured by the case `caching`

    def child(self, case, name, *a, **b):
        return Child(self, case, name, *a, **b)

    def lines(self, child, evictor=None):
        """The same work for everybody, with evictions before and in the middle for one. Returns seconds per step."""
        before = evictor.once if evictor else (lambda: None)
        within = evictor.while_it_works if evictor else (lambda work: work())
        before()
        took = within(lambda: child.do(f"step {self.steps}", "done"))["seconds"] / self.steps
        for number in range(self.single):
            if number % 2 == 0:
                before()
            within(lambda: child.do("step 1", "done")) if number % 2 else child.do("step 1", "done")
        before()
        answers = within(lambda: child.do(f"infer {self.answers}", "done"))["seconds"] / self.answers
        before()
        return {"ms_per_step": round(took * 1e3, 2), "ms_per_answer": round(answers * 1e3, 2)}

    def account(self, child, problems):
        """What PyTorch says of memory, and what the daemon does; what is wrong with that goes to the problems."""
        def hold(condition, text):
            if not condition:
                problems.append(f"{child.title}: {text}")

        info = child.do("info", "info")
        found = {"peak_allocated_MiB": info["peak_allocated"] // MiB, "peak_reserved_MiB": info["peak_reserved"] // MiB,
                 "total_MiB": info["total"] // MiB, "properties_total_MiB": info["properties_total"] // MiB,
                 "backend": info["backend"], "expandable": info.get("expandable"), "summary_lines": info["summary_lines"]}
        hold(info["allocated"] <= info["reserved"] <= info["total"],
             f"allocated {info['allocated']}, reserved {info['reserved']}, total {info['total']}")
        hold(info["summary_lines"] > 10, f"memory_summary has {info['summary_lines']} lines")
        if not child.workload:
            return found
        w = self.machine.workload(child.workload)
        d = w["devices"][0]
        found.update({"shows_the_limit": info["total"] == d["limit_bytes"], "used_MiB": d["used_bytes"] // MiB,
                      "pinned_MiB": d["pinned_bytes"] // MiB, "overhead_MiB": d["overhead_bytes"] // MiB,
                      "swaps_out": w["swaps_out"], "swaps_in": w["swaps_in"], "bytes_out": w["bytes_out"],
                      "bytes_in": w["bytes_in"], "blocked_s": round(w["blocked_seconds"], 3),
                      "not_swappable": w["not_swappable"], "unknown_entry_points": w["unknown_entry_point_names"]})
        hold(found["shows_the_limit"], f"mem_get_info tells a total of {info['total']}, the limit is {d['limit_bytes']}")
        hold(info["properties_total"] == d["limit_bytes"],
             f"the device's properties tell a total of {info['properties_total']}, the limit is {d['limit_bytes']}")
        hold(info["free"] <= info["total"] - info["reserved"],
             f"{info['free']} of {info['total']} free with {info['reserved']} reserved")
        return found


def differ(a, b):
    return [part for part in PARTS if a[part] != b[part]]


def brief(outcome):
    values = outcome["loss_values"]
    return [round(v, 7) for v in values[:3] + values[-2:]]


def start_all(run, case, mode, env, layers, names):
    """Children side by side; those that compile one after the other, so that the later ones find what the first made."""
    made = {}
    for name in names:
        workload = None if name.startswith("plain") else f"{case}-{name}"
        made[name] = run.child(case, name, mode, env, workload=workload, layers=layers)
        if mode.startswith("compile") and name == "plain":
            plain_ready(made["plain"], mode)
    for name, child in made.items():
        if name != "plain" or not mode.startswith("compile"):
            child.ready = plain_ready(child, mode) if name == "plain" else child.answer("ready", 150)
    return made


def plain_ready(child, mode):
    """Without Spillway: what does not work here does not work, and says nothing about Spillway."""
    try:
        child.ready = child.answer("ready", 150)
    except Failed as why:
        if mode.startswith("compile"):
            raise Skipped(f"torch.compile does not work here without Spillway: {why}") from None
        raise Failed(f"without Spillway: {why}") from None
    return child.ready


def variant(name):
    mode, env, moves, _, layers = VARIANTS[name]

    def case(run):
        made, figures = start_all(run, name, mode, env, layers, ("plain", "spillway", "evicted")), {}
        run.keep_figures(name, figures)  # filled below; a failure tells them, too
        evictor = Evictor(run.machine, f"{name}-evicted")
        for who in ("plain", "spillway"):
            with run.timed:
                figures[who] = run.lines(made[who])
        figures["evicted"] = run.lines(made["evicted"], evictor)
        outcomes, problems = {}, []
        for who, child in made.items():
            figures[who].update(run.account(child, problems), ready_s=child.ready["seconds"])
            outcomes[who] = child.do("outcome", "outcome")
        w = run.machine.workload(f"{name}-evicted")
        figures["evicted"].update(evictor.figures(), swaps_out=w["swaps_out"], bytes_out=w["bytes_out"], bytes_in=w["bytes_in"])
        figures["losses"] = brief(outcomes["plain"])
        if not moves:
            figures["pinned"] = "the program maps this memory itself, which Spillway counts and does not move yet"
        if name == "caching":
            u = figures["spillway"]
            run.fixed = (u["overhead_MiB"] + u["pinned_MiB"]) * MiB
            run.moving = u["used_MiB"] * MiB - run.fixed
        wrong = {who: differ(outcomes["plain"], outcomes[who]) for who in ("spillway", "evicted")}
        if any(wrong.values()):
            for child in made.values():
                child.end()
            second = start_all(run, name, mode, env, layers, ("plain-again",))["plain-again"]
            run.lines(second)
            own = differ(outcomes["plain"], second.do("outcome", "outcome"))
            first = {who: next((i for i, (a, b) in enumerate(zip(outcomes["plain"]["loss_values"], o["loss_values"])) if a != b),
                               "none") for who, o in outcomes.items()}
            raise Failed(f"differs from plain: {wrong}; a second plain run differs in {own or 'nothing'}; the first loss that "
                         f"differs: {first}; losses { {who: brief(o) for who, o in outcomes.items()} }")
        if "expandable" in name:
            if not figures["plain"]["expandable"]:
                problems.append("PyTorch has no expandable segment: the setting was not taken")
            elif not figures["spillway"]["expandable"]:
                problems.append("PyTorch has expandable segments, but none under Spillway")
        if "async" in name and figures["spillway"]["backend"] != "cudaMallocAsync":
            problems.append(f"the allocator is {figures['spillway']['backend']}")
        if moves and not (evictor.done > 0 and figures["evicted"]["bytes_out"] > 0):
            problems.append(f"nothing was moved: {evictor.figures()}; {figures['evicted']['not_swappable']}")
        figures["outcome"] = outcomes["plain"]["parameters"][:16]
        for child in made.values():
            code = child.end(40)
            if code != 0:
                problems.append(f"{child.title} ended with {code}: {child.last_words()}")
        need(not problems, "equal bit for bit, but " + "; ".join(problems))
        return figures

    case.__name__ = name
    return case


def startup(run):
    """Evicted four times a second while it starts, loads code and captures: a capture is never disturbed."""
    plain = run.child("startup", "plain", "graphs", {})
    child = run.child("startup", "evicted", "graphs", {}, workload="startup-evicted")
    evictor = Evictor(run.machine, "startup-evicted")
    ready = evictor.all_the_while(lambda: child.answer("ready", 150))
    figures = {"plain": plain_ready(plain, "graphs")["seconds"], "evicted": ready["seconds"]}
    outcomes = []
    for one in (plain, child):
        run.lines(one)
        outcomes.append(one.do("outcome", "outcome"))
        code = one.end(40)
        need(code == 0, f"{one.title} ended with {code}: {one.last_words()}")
    need(not differ(*outcomes), f"differs from plain in {differ(*outcomes)}")
    return {"ready_s": figures, **evictor.figures()}


def limit(run):
    """Beyond the limit each allocator raises torch.OutOfMemoryError, in this program alone, which goes on."""
    size, found = 3 * GiB, {}
    made = {name: run.child("limit", name, "limit", env, workload=f"limit-{name}", request=size, limit=size)
            for name, env in (("caching", {}), ("expandable", EXPANDABLE), ("async", ASYNC))}
    for name, child in made.items():
        child.answer("ready", 120)
    for name, child in made.items():
        found[name] = child.do("limit", "limit", 60)
        code = child.end(40)
        found[name]["exit"] = code
    for name, got in found.items():
        about = f"{name}: {json.dumps(got)}"
        need(got["total"] == size, f"total is not {size}; {about}")
        need(got["raised"], f"no OutOfMemoryError; {about}")
        need(got["got"] <= got["free"], f"more than free was given; {about}")
        need(got["got"] >= got["free"] - 512 * MiB, f"much less than free was given; {about}")
        need(got["intact"] and got["goes_on"], f"wrong contents; {about}")
        need(got["large"] > 0, f"what was cached did not become free; {about}")
        need(got["exit"] == 0, f"ended badly; {about}")
    return {name: {**got, "message": got["message"][:200]} for name, got in found.items()}


def turns(run):
    """Two models with space for one and a half, both at work: the daemon moves them in turn, by itself."""
    m, fixed, moving = run.machine, run.fixed, run.moving
    capacity = (2 * fixed + moving * 3 // 2) // (2 * MiB) * 2 * MiB
    quota = {"request": (fixed + moving * 6 // 10) // MiB * MiB, "limit": (fixed + moving * 14 // 10) // MiB * MiB}
    sizes = {"capacity_MiB": capacity // MiB, **{f"{k}_MiB": v // MiB for k, v in quota.items()}}
    m.restart("--capacity", f"{capacity}B", "--reserve", "0", "--turn", "300ms", "--growth-wait", "30s")
    steps = 100 if run.quick else 200
    plain = [run.child("turns", f"plain-{seed}", "eager", {}, seed=seed) for seed in (1, 2)]
    shared = [run.child("turns", f"shared-{seed}", "eager", {}, seed=seed, workload=f"turns-{seed}", **quota) for seed in (1, 2)]
    for child in (*plain, *shared):
        child.answer("ready", 150)
    wanted = []
    for child in plain:
        child.do(f"step {steps}", "done", 90)
        child.do("infer 2", "done")
        wanted.append(child.do("outcome", "outcome"))
        child.end(40)
    begin = time.perf_counter()
    for child in shared:
        child.say(f"step {steps}")
    for child in shared:
        child.answer("done", 150)
    took = time.perf_counter() - begin
    for child in shared:
        child.do("infer 2", "done")
    outcomes = [child.do("outcome", "outcome", 90) for child in shared]
    moved = {name: {k: m.workload(name)[k] for k in ("swaps_out", "swaps_in", "bytes_out", "blocked_seconds")}
             for name in ("turns-1", "turns-2")}
    wrong = [differ(a, b) for a, b in zip(wanted, outcomes)]
    need(not any(wrong), f"differ from plain in {wrong}; {sizes} {moved}")
    need(sum(w["swaps_out"] for w in moved.values()) >= 2, f"too few moves: {moved}; {sizes}")
    for child in shared:
        code = child.end(40)
        need(code == 0, f"{child.title} ended with {code}: {child.last_words()}")
    return {**sizes, "steps_each": steps, "both_s": round(took, 2), **moved}


PROBE = """
import json, torch
assert torch.cuda.is_available(), "torch.cuda.is_available() is False"
torch.zeros(1, device="cuda")
free, total = torch.cuda.mem_get_info()
print(json.dumps({"torch": torch.__version__, "device": torch.cuda.get_device_name(0), "free": free, "total": total,
                  "capability": list(torch.cuda.get_device_capability(0))}))
"""


def probe(env, log):
    """What PyTorch finds here; Skipped with the reason if it cannot be used."""
    try:
        got = subprocess.run([sys.executable, "-c", PROBE], env=env, capture_output=True, text=True, timeout=90)
    except subprocess.TimeoutExpired:
        raise Skipped("PyTorch does not start within 90 s, without Spillway") from None
    log.write_text(got.stdout + got.stderr)
    if got.returncode != 0:
        last = (got.stderr.strip().splitlines() or [f"it ended with {got.returncode}"])[-1]
        raise Skipped(f"PyTorch cannot be used here, without Spillway: {last[:300]}")
    return json.loads(got.stdout.splitlines()[-1])


class Report:
    """DIR/torch.json, written after every case."""

    def __init__(self, out):
        self.out, self.results, self.partial, self.lock = out, [], {}, threading.Lock()

    def keep(self, name, result, began, **more):
        with self.lock:
            if result == "FAIL" and name in self.partial:
                more["figures"] = self.partial[name]
            self.results.append({"name": name, "result": result, "seconds": round(time.monotonic() - began, 2), **more})
            text = more.get("reason") or json.dumps(more.get("figures"))[:700]
            print(f"{name} {result} {self.results[-1]['seconds']} s {text}", flush=True)
            counts = {kind: sum(r["result"] == word for r in self.results)
                      for kind, word in (("passed", "ok"), ("failed", "FAIL"), ("skipped", "skipped"))}
            (self.out / "torch.json").write_text(json.dumps({**counts, "cases": self.results}, indent=1) + "\n")

    def run(self, case, run):
        """One case, whatever becomes of it."""
        began = time.monotonic()
        if began > run.end - 15:
            return self.keep(case.__name__, "skipped", began, reason="the time is over")
        try:
            self.keep(case.__name__, "ok", began, figures=case(run))
        except Skipped as why:
            self.keep(case.__name__, "skipped", began, reason=str(why))
        except Failed as why:
            self.keep(case.__name__, "FAIL", began, reason=str(why))
        except Exception as why:  # a fault of this script must not hide the other cases
            self.keep(case.__name__, "FAIL", began, reason=f"{type(why).__name__}: {why}")
        for program in [p for p in run.machine.programs if p.title.startswith(f"{case.__name__}-")]:
            if program.child.poll() is None:
                program.child.kill()
            program.child.wait()


def save_events(machine):
    try:
        with open(machine.out / "events.txt", "ab") as out:
            subprocess.run([str(machine.base / "bin/spillway"), "events", "--no-follow"], env=machine.env, stdout=out,
                           stderr=subprocess.STDOUT, timeout=10)
        (machine.out / "status.json").write_text(json.dumps(machine.get("/v1/status"), indent=1))
    except (Failed, *TIRED):
        pass


def side_by_side(report, run, cases, jobs):
    """Some cases at a time; the main thread stays free for signals."""
    waiting = queue.SimpleQueue()
    for case in cases:
        waiting.put(case)

    def work():
        while True:
            try:
                case = waiting.get_nowait()
            except queue.Empty:
                return
            report.run(case, run)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(jobs, len(cases)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():
            thread.join(0.5)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--base", required=True, type=Path)
    ap.add_argument("--out", required=True, type=Path)
    ap.add_argument("--seconds", type=float, help="in all [480, quick 95]")
    ap.add_argument("--quick", action="store_true", help="a case of each kind, few steps")
    ap.add_argument("--device", help="UUID of the device or MIG slice [the first]")
    ap.add_argument("--jobs", type=int, help="cases at a time [as the device's memory allows, at most 5]")
    ap.add_argument("--child", action="append", default=[], help=argparse.SUPPRESS)  # arguments of the program
    # Another program that speaks the same lines: a test of this script where there is no PyTorch.
    ap.add_argument("--program", type=Path, default=HERE / "gpu-torch-child.py", help=argparse.SUPPRESS)
    ap.add_argument("cases", nargs="*", metavar="CASE")
    a = ap.parse_args()
    cases = {name: variant(name) for name in VARIANTS}
    cases = {"compile": cases.pop("compile"), **cases, "traces": gpu_trace.case(TRACES, Failed, TIRED), "startup": startup, "limit": limit, "turns": turns}
    unknown = [name for name in a.cases if name not in cases]
    if unknown:
        ap.error(f"no case {', '.join(unknown)}; there are {', '.join(cases)}")
    chosen = a.cases or [name for name in cases if not a.quick or name not in VARIANTS or VARIANTS[name][3]]
    out = a.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    began, report = time.monotonic(), Report(out)
    end = began + (a.seconds or (95 if a.quick else 480))
    # Ended from outside: everything goes along, by the finally below.
    end_by_signal()
    machine = e2e.Machine(a.base.resolve(), out, a.device)
    try:
        try:
            here = probe(machine.env, out / "probe.log")
        except Skipped as why:
            for name in chosen:
                report.keep(name, "skipped", began, reason=str(why))
            return 0
        capacity = here["free"] * 9 // 10 // (2 * MiB) * 2 * MiB
        jobs = a.jobs or max(1, min(5, capacity // EACH))
        try:
            machine.start("--capacity", f"{capacity}B", "--reserve", "0", "--drain-deadline", "10s")
        except (Failed, OSError) as why:
            report.keep("start", "FAIL", began, reason=str(why))
            return 1
        report.keep("start", "ok", began, figures={**here, "capacity_MiB": capacity // MiB, "cases at a time": jobs})
        run = Run(machine, end, a.quick, a.program, a.child)
        run.keep_figures = report.partial.__setitem__
        side_by_side(report, run, [cases[name] for name in chosen if name != "turns"], jobs)
        save_events(machine)
        if "turns" in chosen:
            try:
                machine.clear()
            except (Failed, *TIRED) as why:
                report.keep("before turns", "FAIL", began, reason=str(why))
            report.run(turns, run)
            save_events(machine)
    finally:
        machine.close()
    failed = [r["name"] for r in report.results if r["result"] == "FAIL"]
    print(f"{sum(r['result'] == 'ok' for r in report.results)} passed, {len(failed)} failed, "
          f"{sum(r['result'] == 'skipped' for r in report.results)} skipped")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
