#!/usr/bin/env python3
"""End to end on whatever driver is there: a daemon, programs under Spillway, swaps, and every byte checked.

    gpu-e2e.py --base ARCHIVE --out DIR [--seconds 500] [--device UUID] [CASE ...]

Run by gpu-check. ARCHIVE is an unpacked release. Uses at most 16 GiB of the first device (or of a MIG
slice): the daemon is told so by --capacity. Writes DIR/e2e.json after every case, and the logs of all
programs. A case that fails does not stop the others. Exit code 1 if one failed.
"""
import argparse, http.client, json, os, shutil, signal, subprocess, sys, threading, time
from pathlib import Path

from daemon_api import Api
from processes import end_all, end_by_signal, temporary

MiB, GiB = 1 << 20, 1 << 30
GRANULE = 2 * MiB


class Failed(Exception):
    """What was found, in one line."""


def need(condition, text):
    if not condition:
        raise Failed(text)


class Skipped(Exception):
    """Why it cannot be done here."""


class Program:
    """A client program driven by lines, with every wait bounded."""

    def __init__(self, machine, name, arguments, log, env=None, prefix=()):
        # Where cases are done by threads, some go on while everything is ended.
        need(not machine.closed, f"{name} is not started: everything is ended")
        self.log = open(log, "wb")
        self.name = name
        self.child = subprocess.Popen([*prefix, str(machine.test / name), *arguments], stdin=subprocess.PIPE,
                                      stdout=subprocess.PIPE, stderr=self.log, text=True, bufsize=1,
                                      env={**machine.env, **(env or {})})
        self.lines, self.word = [], threading.Condition()
        threading.Thread(target=self.read, daemon=True).start()

    def read(self):
        for line in self.child.stdout:
            self.log.write(b"> " + line.encode()); self.log.flush()
            with self.word:
                self.lines.append(line.rstrip("\n")); self.word.notify_all()
        with self.word:
            self.lines.append(None); self.word.notify_all()

    def line(self, timeout=60):
        with self.word:
            self.word.wait_for(lambda: self.lines, timeout)
            need(self.lines, f"{self.name} says nothing for {timeout} s")
            if self.lines[0] is None:
                raise Failed(f"{self.name} ended ({self.child.poll()}); its log is {self.log.name}")
            return self.lines.pop(0)

    def say(self, text):
        try:
            self.child.stdin.write(text + "\n"); self.child.stdin.flush()
        except OSError:
            raise Failed(f"{self.name} is gone; its log is {self.log.name}") from None

    def ask(self, text, timeout=60):
        self.say(text)
        return self.line(timeout)

    def expect(self, text, answer, timeout=60):
        got = self.ask(text, timeout)
        need(got == answer or got.startswith(answer + " "), f"{text!r} was answered by {got!r}, not {answer!r}")
        return got

    def end(self, timeout=30):
        try:
            self.say("quit")
            self.child.stdin.close()
        except (Failed, OSError):
            pass
        try:
            return self.child.wait(timeout)
        except subprocess.TimeoutExpired:
            self.child.kill()
            raise Failed(f"{self.name} did not end within {timeout} s") from None


class Machine:
    """The daemon, its folder, and what is started there."""

    def __init__(self, base, out, device):
        self.base, self.out, self.test = base, out, base / "test-bin"
        self.dir = temporary("spillway-e2e.")
        self.run = self.dir / "run"
        self.daemon, self.programs, self.count, self.closed = None, [], 0, False
        self.env = {**os.environ, "SPILLWAY_RUN_DIR": str(self.run), "SPILLWAY_LOG": "info",
                    "SPILLWAY_LIBRARY": str(base / "lib/libspillway.so")}
        if device:
            self.env["CUDA_VISIBLE_DEVICES"] = device

    def start(self, *flags):
        self.flags = flags
        log = open(self.out / "spillwayd.log", "ab")
        self.daemon = subprocess.Popen([str(self.base / "bin/spillwayd"), "--run-dir", str(self.run), *flags],
                                       stdout=log, stderr=log, env=self.env)
        self.until(lambda: self.get("/v1/status")["pid"] == self.daemon.pid, 20, "spillwayd answers")

    def until(self, what, timeout, name):
        end, why = time.monotonic() + timeout, ""
        while time.monotonic() < end:
            if self.daemon.poll() is not None:
                raise Failed(f"spillwayd ended ({self.daemon.returncode}); see spillwayd.log")
            try:
                found = what()
                if found:
                    return found
            except (OSError, KeyError, http.client.HTTPException, json.JSONDecodeError, Failed) as error:
                why = f" ({error})"
            time.sleep(0.02)
        raise Failed(f"not within {timeout} s: {name}{why}")

    def restart(self, *flags):
        self.daemon.terminate()
        self.daemon.wait(20)
        self.start(*flags)

    def request(self, method, target, timeout=130):
        api = Api(self.run / "api.sock", timeout)
        try:
            api.request(method, target)
            answer = api.getresponse()
            return answer.status, json.loads(answer.read() or b"null")
        finally:
            api.close()

    def get(self, target):
        status, body = self.request("GET", target, 10)
        need(status == 200, f"GET {target}: {status} {body}")
        return body

    def post(self, name, verb):
        status, body = self.request("POST", f"/v1/workloads/{name}/{verb}?timeout=120")
        need(status == 200, f"{verb} {name}: {status} {body}")
        return body

    def workload(self, name):
        return self.get(f"/v1/workloads/{name}")

    def program(self, name, *arguments, workload=None, request=None, limit=None, swap=None):
        """Starts it under Spillway; without a workload bare."""
        self.count += 1
        log = self.out / f"{self.count:02}-{workload or 'bare'}-{name}.log"
        prefix = []
        if workload:
            prefix = [str(self.base / "bin/spillway"), "run", "--workload", workload]
            for flag, value in (("--request", request), ("--limit", limit)):
                prefix += [flag, f"{value}B"] if value else []
            prefix += ["--swap", swap] if swap else []
            prefix.append("--")
        program = Program(self, name, arguments, log, prefix=prefix)
        self.programs.append(program)
        return program

    def hold(self, workload, nbytes, **quota):
        program = self.program("gpu-hold", "--bytes", f"{nbytes}B", workload=workload, **quota)
        first = program.line(120)
        need(first == f"held {nbytes}", f"gpu-hold holds less than {nbytes}: {first!r}")
        return program

    def clear(self):
        """Between cases: nothing runs but the daemon."""
        for program in self.programs:
            if program.child.poll() is None:
                program.child.kill()
            program.child.wait()
        self.programs = []
        if self.daemon and self.daemon.poll() is not None:
            self.start(*self.flags)
        self.until(lambda: not self.get("/v1/workloads")["workloads"], 20, "all workloads are gone")
        self.until(lambda: all(d["granted_bytes"] == 0 for d in self.get("/v1/status")["devices"]), 20,
                   "everything is given back")

    def close(self):
        self.closed = True
        for program in self.programs:
            program.child.kill()
        if self.daemon and self.daemon.poll() is None:
            self.daemon.terminate()
            try:
                self.daemon.wait(10)
            except subprocess.TimeoutExpired:
                self.daemon.kill()
        end_all()
        shutil.rmtree(self.dir, ignore_errors=True)


def rate(done):
    return round(done["bytes"] / done["seconds"] / 1e9, 2) if done["seconds"] > 0 else None


# ------------------------------------------------------------------ cases: each gets the machine and the
# unit (an eighth of the capacity), raises Failed, and returns figures for the report.

def in_force(m, unit):
    """A program under Spillway registers; doctor finds nothing wrong; the program is told its limit."""
    p = m.hold("inforce", unit, request=unit, limit=4 * unit)
    w = m.workload("inforce")
    need(w["state"] == "resident", f"state is {w['state']}")
    need(w["not_swappable"] is None, f"not swappable: {w['not_swappable']}")
    need(w["limit_bytes"] == 4 * unit, f"limit is {w['limit_bytes']}, not {4 * unit}")
    need(w["devices"][0]["used_bytes"] >= unit, f"used is {w['devices'][0]['used_bytes']}")
    free, total = map(int, p.ask("info").split())
    need(total == 4 * unit, f"cuMemGetInfo tells a total of {total}, not {4 * unit}")
    need(free <= 3 * unit, f"cuMemGetInfo tells {free} free of {total} with {unit} in use")
    doctor = subprocess.run([str(m.base / "bin/spillway"), "doctor", str(p.child.pid)], env=m.env, capture_output=True,
                            text=True, timeout=60)
    (m.out / "doctor.txt").write_text(doctor.stdout + doctor.stderr)
    need(doctor.returncode == 0, f"spillway doctor finds something wrong: see doctor.txt")
    p.end()
    return {"overhead_MiB": w["devices"][0]["overhead_bytes"] // MiB, "unknown_entry_points": w["unknown_entry_points"]}


def quota_exact(m, unit):
    """With request = limit exactly what cuMemGetInfo calls free succeeds, one granule more does not."""
    p = m.program("gpu-hold", workload="quota", request=2 * unit, limit=2 * unit)
    p.line(120)
    for command in ("alloc 4MiB", "launch", "checksum", "free"):  # code is loaded at first use
        p.expect(command, "ok")
    time.sleep(1.5)  # and measured once a second
    free, total = map(int, p.ask("info").split())
    need(total == 2 * unit, f"total is {total}")
    need(p.ask(f"alloc {free + GRANULE}B") == "oom", "more than free was granted")
    got = p.ask(f"alloc {free}B")
    need(got == "ok", f"exactly free ({free}) was answered by {got!r}")
    need(p.ask(f"alloc {GRANULE}B") == "oom", "a granule above the limit was granted")
    p.expect("launch", "ok")
    p.expect("free", "ok")
    # What was given back can be had again, in other pieces.
    p.expect(f"alloc {free // 2 // GRANULE * GRANULE}B", "ok")
    p.expect("checksum", "ok")
    p.end()
    return {"free_MiB": free // MiB, "total_MiB": total // MiB}


def swap(m, unit):
    """An operator's evict frees the device, the next work brings every byte back to its address."""
    p = m.hold("swap", 5 * unit, request=7 * unit)
    used = lambda: m.get("/v1/status")["devices"][0]["nvml_used_bytes"]
    time.sleep(1.5)  # host memory is made ready in the background
    before = used()
    figures = []
    for _ in range(3):
        out = m.post("swap", "evict")
        w = m.workload("swap")
        need(w["state"] == "evicted", f"state is {w['state']}")
        need(w["host_bytes"] >= 5 * unit, f"only {w['host_bytes']} bytes are on the host")
        if before is not None:
            m.until(lambda: used() < before - 4 * unit, 10, "NVML shows the memory as free")
        begin = time.perf_counter()
        p.expect("checksum", "ok", 120)
        answer = time.perf_counter() - begin
        w = m.workload("swap")
        figures.append({"out_GBps": rate(out), "out_s": round(out["seconds"], 4), "in_s": round(w["last_in_seconds"], 4),
                        "first_answer_s": round(answer, 4)})
    back = m.post("swap", "evict")
    restored = m.post("swap", "restore")
    p.expect("checksum", "ok", 120)
    p.end()
    return {"MiB": 5 * unit // MiB, "swaps": figures, "out_GBps": rate(back), "in_GBps": rate(restored)}


def swap_under_load(m, unit):
    """Many allocations of all sizes, launches from four threads, forced swaps all the while."""
    p = m.program("alloc-stress", "--bytes", f"{4 * unit}B", "--largest", f"{unit}B", "--count", "200", "--churn",
                  workload="stress", request=7 * unit)
    first = p.line(180)
    need(first == "ready", f"alloc-stress begins with {first!r}")
    done = busy = 0
    end = time.monotonic() + 60
    while time.monotonic() < end and done < 40:
        status, body = m.request("POST", "/v1/workloads/stress/evict?timeout=120")
        need(status in (200, 409), f"evict: {status} {body}")
        done += status == 200
        busy += status == 409
        if status == 200:
            p.expect("verify", "ok", 120)
        else:
            time.sleep(0.2)
    need(done >= 5, f"only {done} evictions in 60 s, {busy} times busy")
    p.expect("verify", "ok", 120)
    code = p.end(120)
    need(code == 0, f"alloc-stress ends with {code}")
    return {"swaps": done, "busy": busy}


def share(m, unit):
    """Two programs of five eighths each take turns; a third's guarantee is kept; nobody loses a byte."""
    a = m.hold("share-a", 5 * unit, request=2 * unit, limit=7 * unit)
    time.sleep(0.5)
    begin = time.perf_counter()
    b = m.hold("share-b", 5 * unit, request=2 * unit, limit=7 * unit)
    took = time.perf_counter() - begin
    need(m.workload("share-a")["swaps_out"] >= 1, "the idle one was not moved")
    for _ in range(3):
        for p in (a, b):
            p.expect("checksum", "ok", 120)
            time.sleep(0.3)
    c = m.hold("share-c", unit, request=2 * unit)
    for p in (c, a, b, c):
        p.expect("checksum", "ok", 120)
    result = {name: {k: m.workload(name)[k] for k in ("swaps_out", "swaps_in", "last_out_seconds", "last_in_seconds")}
              for name in ("share-a", "share-b")}
    for p in (a, b, c):
        p.end()
    return {"second_started_s": round(took, 3), **result}


def never(m, unit):
    """SPILLWAY_SWAP=never: stays, and an evict is refused with the reason."""
    p = m.hold("never", unit, request=2 * unit, swap="never")
    status, body = m.request("POST", "/v1/workloads/never/evict")
    need(status == 409, f"evict is answered by {status} {body}")
    p.expect("checksum", "ok")
    p.end()
    return {"refusal": body.get("error")}


def killed_program(m, unit):
    """kill -9 of a program gives its memory to the next."""
    p = m.hold("dead", 6 * unit, request=7 * unit)
    p.child.kill()
    p.child.wait()
    begin = time.perf_counter()
    m.until(lambda: not m.get("/v1/workloads")["workloads"], 20, "the workload is gone")
    q = m.hold("next", 6 * unit, request=7 * unit)
    took = time.perf_counter() - begin
    q.end()
    return {"next_had_it_after_s": round(took, 3)}


def killed_daemon(m, unit):
    """kill -9 of the daemon: who is resident goes on, who is on the host comes back with the next daemon."""
    a = m.hold("on-host", 3 * unit, request=4 * unit)
    b = m.hold("on-gpu", 2 * unit, request=3 * unit)
    # Without a daemon nothing new is granted: what a checksum needs must be there already.
    b.expect("checksum", "ok")
    m.post("on-host", "evict")
    m.daemon.kill()
    m.daemon.wait()
    b.expect("checksum", "ok", 30)
    b.expect("launch", "ok", 30)
    m.start(*m.flags)
    m.until(lambda: {w["name"] for w in m.get("/v1/workloads")["workloads"]} == {"on-host", "on-gpu"}, 20, "both came back")
    need(m.workload("on-host")["state"] == "evicted", "the evicted one is not on the host any more")
    begin = time.perf_counter()
    a.expect("checksum", "ok", 60)
    took = time.perf_counter() - begin
    b.expect("checksum", "ok", 60)
    a.end()
    b.end()
    return {"first_answer_s": round(took, 3)}


def killed_in_a_swap(m, unit):
    """kill -9 of the daemon in the middle of an eviction loses no byte."""
    p = m.hold("midway", 5 * unit, request=7 * unit)
    seen = []
    for delay in (0.01, 0.02, 0.05, 0.1, 0.2):
        # All host memory is there, and a daemon that has just started gives and moves again.
        m.until(lambda: m.get("/v1/status")["pool"]["populated_bytes"] >= 5 * unit, 60, "host memory is ready")
        m.until(lambda: not m.get("/v1/status")["adopting"], 20, "the daemon has its processes back")
        threading.Thread(target=lambda: quiet(lambda: m.request("POST", "/v1/workloads/midway/evict")), daemon=True).start()
        m.until(lambda: m.workload("midway")["state"] != "resident", 10, "the eviction begins")
        time.sleep(delay)
        before = m.workload("midway")["state"]
        m.daemon.kill()
        m.daemon.wait()
        m.start(*m.flags)
        m.until(lambda: m.workload("midway"), 20, "it came back")
        seen.append([before, m.workload("midway")["state"]])
        p.expect("checksum", "ok", 120)
    p.end()
    return {"state when killed, and with the next daemon": seen}


def quiet(what):
    try:
        what()
    except Exception:  # the daemon was killed under it
        pass


def demo(m, unit):
    """Three model servers of 1 GiB each on 2 GiB, asked in turn, every answer checked against the weights."""
    folder = m.dir / "models"
    folder.mkdir()
    if shutil.disk_usage(folder).free < 4 * GiB:
        raise Skipped(f"less than 4 GiB of space in {folder.parent}")
    probe = subprocess.run([str(m.test / "spillway-demo"), "probe", "--gpu-hold", str(m.test / "gpu-hold")], env=m.env,
                           capture_output=True, text=True, timeout=60)
    need(probe.returncode == 0, f"spillway-demo probe: {probe.stderr[-300:]}")
    device = json.loads(probe.stdout)
    overhead, usual = device["overhead_bytes"], m.flags
    m.restart("--capacity", f"{2 * GiB + 3 * overhead}B")
    try:
        shown = subprocess.run(
            [str(m.test / "spillway-demo"), "show", "--api", str(m.run / "api.sock"), "--spillway", str(m.base / "bin/spillway"),
             "--server", str(m.test / "model-server"), "--folder", str(folder), "--rounds", "3", "--device", device["name"],
             "--request", f"{512 * MiB + overhead}B", "--limit", f"{1536 * MiB + overhead}B", "--json"],
            env=m.env, capture_output=True, text=True, timeout=240)
        (m.out / "demo.log").write_text(shown.stdout + shown.stderr)
        need(shown.returncode == 0, f"spillway-demo ended with {shown.returncode}; see demo.log")
        result = json.loads(shown.stdout.splitlines()[-1])
        need(result["ok"], f"it says {result}")
        return {"models": result["models"]}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        m.restart(*usual)


# Rules that programs see otherwise under Spillway on a GPU, beside those of tests/conformance/otherwise.txt: no
# figure of a driver shows what only a copy of a descriptor keeps.
OTHERWISE = {"vmm_sharing.a_descriptor_keeps_memory_until_it_is_closed"}


def driver_rules(m, unit):
    """tests/conformance under Spillway: whatever the driver promises a program still holds."""
    program, usual = str(m.test / "spillway-conformance"), m.flags
    result = m.out / "rules.json"
    listed = (m.test / "otherwise.txt").read_text().splitlines()
    otherwise = OTHERWISE | {line.split("  ")[0] for line in listed if not line.startswith("#")}
    m.restart("--reserve", "0")  # all of the device: the cases ask how much there is
    try:
        env = {**m.env, "LD_PRELOAD": m.env["SPILLWAY_LIBRARY"], "SPILLWAY_LOG": "warn"}
        with open(m.out / "rules.log", "wb") as log:
            subprocess.run([program, "all", "--json", str(result)], env=env, stdout=log, stderr=log, timeout=200)
        cases = json.loads(result.read_text())["cases"]
        need(len(cases) > 200, f"only {len(cases)} cases ran")
        broken = [case for case in cases if case["result"] == "FAIL" and case["name"] not in otherwise]
        # What the driver itself answers otherwise is the conformance part's business.
        wrong = [case for case in broken
                 if subprocess.run([program, "run", case["name"]], env=m.env, capture_output=True, timeout=90).returncode == 0]
        need(not wrong, "; ".join(f"{case['name']}: {case['reason']}" for case in wrong))
        return {"ok": sum(case["result"] == "ok" for case in cases), "otherwise without Spillway too": len(broken)}
    finally:
        m.restart(*usual)


CASES = [in_force, quota_exact, swap, swap_under_load, share, never, killed_program, killed_daemon, killed_in_a_swap,
         demo, driver_rules]


def capacity_here(env):
    """An eighth of what the cases may use: free memory of the first device, by the driver."""
    code = ("import ctypes as C\nl=C.CDLL('libcuda.so.1')\nassert l.cuInit(0)==0\nd=C.c_int();assert l.cuDeviceGet(C.byref(d),0)==0\n"
            "c=C.c_void_p();assert l.cuDevicePrimaryCtxRetain(C.byref(c),d)==0;l.cuCtxSetCurrent(c)\n"
            "f,t=C.c_size_t(),C.c_size_t();assert l.cuMemGetInfo_v2(C.byref(f),C.byref(t))==0\nprint(f.value,t.value)\n")
    got = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    need(got.returncode == 0, f"no device can be used: {got.stderr[-300:]}")
    free, total = map(int, got.stdout.split())
    unit = min(16 * GiB, free * 9 // 10) // 8 // (64 * MiB) * (64 * MiB)
    # A third of a unit has to hold a context.
    need(unit >= 192 * MiB, f"only {free // MiB} MiB of {total // MiB} are free: too few for these cases")
    return unit


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--base", required=True, type=Path)
    ap.add_argument("--out", required=True, type=Path)
    ap.add_argument("--seconds", type=float, default=500)
    ap.add_argument("--device")
    ap.add_argument("cases", nargs="*")
    a = ap.parse_args()
    names = {case.__name__: case for case in CASES}
    unknown = [name for name in a.cases if name not in names]
    if unknown:
        ap.error(f"no case {', '.join(unknown)}; there are {', '.join(names)}")
    a.out.mkdir(parents=True, exist_ok=True)
    end, results = time.monotonic() + a.seconds, []

    def keep(name, result, began, **more):
        results.append({"name": name, "result": result, "seconds": round(time.monotonic() - began, 2), **more})
        text = more.get("reason") or json.dumps(more.get("figures"))
        print(f"{name} {result} {text}", flush=True)
        counts = {kind: sum(r["result"] == word for r in results)
                  for kind, word in (("passed", "ok"), ("failed", "FAIL"), ("skipped", "skipped"))}
        (a.out / "e2e.json").write_text(json.dumps({**counts, "cases": results}, indent=1) + "\n")

    # Ended from outside: everything goes along, by the finally below.
    end_by_signal()
    machine = Machine(a.base.resolve(), a.out.resolve(), a.device)
    try:
        began = time.monotonic()
        try:
            unit = capacity_here(machine.env)
            machine.start("--capacity", f"{8 * unit}B", "--reserve", "0", "--turn", "500ms", "--growth-wait", "20s")
        except Failed as why:
            keep("start", "FAIL", began, reason=str(why))
            return 1
        keep("start", "ok", began, figures={"capacity_MiB": 8 * unit // MiB})
        for name in a.cases or names:
            began = time.monotonic()
            if began > end:
                keep(name, "skipped", began, reason=f"the {a.seconds:.0f} s are over")
                continue
            try:
                keep(name, "ok", began, figures=names[name](machine, unit))
            except Skipped as why:
                keep(name, "skipped", began, reason=str(why))
            except (Failed, OSError, ValueError, KeyError, http.client.HTTPException, subprocess.SubprocessError) as why:
                keep(name, "FAIL", began, reason=f"{type(why).__name__}: {why}" if not isinstance(why, Failed) else str(why))
            try:
                machine.clear()
            except (Failed, OSError) as why:
                began = time.monotonic()
                keep(f"after {name}", "FAIL", began, reason=str(why))
                machine.close()
                machine = Machine(a.base.resolve(), a.out.resolve(), a.device)
                machine.start("--capacity", f"{8 * unit}B", "--reserve", "0", "--turn", "500ms", "--growth-wait", "20s")
    finally:
        machine.close()
    failed = [r["name"] for r in results if r["result"] == "FAIL"]
    print(f"{sum(r['result'] == 'ok' for r in results)} passed, {len(failed)} failed, "
          f"{sum(r['result'] == 'skipped' for r in results)} skipped")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
