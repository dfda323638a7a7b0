"""What gpu-models.py and gpu-peers.py share: programs driven by lines, the daemon, cases that are bounded and reported."""
import argparse, collections, http.client, json, os, shutil, signal, statistics, subprocess, sys, tempfile, threading, time
from pathlib import Path

from daemon_api import Api
from processes import end_all, end_by_signal, temporary

MiB, GiB = 1 << 20, 1 << 30
CHILD = Path(__file__).resolve().parent / "gpu-llm-child.py"
BYTES = {"3B": 6040147968, "7B": 14496047104, "12B": 24495564800, "30B": 61204770816, "tiny": 3279360}
TITLE = {"3B": "3B (28 layers of 3072)", "7B": "Mistral-7B's shape", "12B": "12B (40 layers of 5120)",
         "30B": "30B (60 layers of 6144)", "tiny": "tiny"}
ANSWER = 8  # tokens of each answer
ON_CPU = os.environ.get("GPU_LLM_DEVICE") == "cpu"  # a test of these scripts: nothing is swapped


class Failed(Exception):
    """What was found, in one line."""


class Skipped(Exception):
    """Why it cannot be done here."""


def need(condition, text):
    if not condition:
        raise Failed(text)


def seconds(since, until):
    return round((until - since) / 1e9, 4)


def rate(nbytes, took):
    return round(nbytes / took / 1e9, 2) if took and took > 0 else None


def median(values):
    values = [v for v in values if v is not None]
    return round(statistics.median(values), 4) if values else None


def nbytes_of(shape):
    """Weights in bytes; NAME or NAME/LAYERS."""
    if shape in BYTES:
        return BYTES[shape]
    return int(subprocess.run([sys.executable, str(CHILD), "--bytes", shape], capture_output=True, text=True, timeout=60).stdout)


def available_memory():
    """Of the host, in bytes."""
    with open("/proc/meminfo") as f:
        for line in f:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    return 0


class Child:
    """A model's process. Answers are JSON lines; every wait is bounded."""

    def __init__(self, run, name, prefix=(), env=None):
        self.run, self.name = run, name
        run.count += 1
        self.path = run.out / f"{run.count:02}-{name}.log"
        self.log = open(self.path, "wb")
        self.spawned = time.monotonic_ns()
        self.child = subprocess.Popen([*map(str, prefix), sys.executable, str(CHILD)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                      stderr=self.log, text=True, bufsize=1, env={**run.env, **(env or {})})
        self.lines, self.word = collections.deque(), threading.Condition()
        threading.Thread(target=self.read, daemon=True).start()
        run.children.append(self)

    def read(self):
        for line in self.child.stdout:
            with self.word:
                self.lines.append(line.rstrip("\n")); self.word.notify_all()
        with self.word:
            self.lines.append(None); self.word.notify_all()

    def say(self, text):
        """Returns when it was said."""
        now = time.monotonic_ns()
        try:
            self.child.stdin.write(text + "\n"); self.child.stdin.flush()
        except OSError:
            raise Failed(f"{self.name} is gone ({self.child.poll()}); its log is {self.path.name}") from None
        return now

    def answer(self, timeout=60):
        timeout = self.run.bound(timeout)
        with self.word:
            self.word.wait_for(lambda: self.lines, timeout)
            if not self.lines:
                raise Failed(f"{self.name} says nothing for {timeout:.0f} s; its log is {self.path.name}")
            line = self.lines.popleft()
        if line is None:
            self.lines.append(None)
            try:
                code = self.child.wait(5)
            except subprocess.TimeoutExpired:
                code = None
            raise Failed(f"{self.name} ended ({code}); its log is {self.path.name}")
        try:
            got = json.loads(line)
        except ValueError:
            raise Failed(f"{self.name} says {line[:200]!r}") from None
        if "unavailable" in got:
            raise Skipped(got["unavailable"])
        need("error" not in got, f"{self.name}: {got.get('error')}; its log is {self.path.name}")
        return got

    def ask(self, text, timeout=60):
        """The answer to a command; `asked` is when it was said."""
        asked = self.say(text)
        return {**self.answer(timeout), "asked": asked}

    def end(self, timeout=15):
        try:
            self.say("quit")
            self.child.stdin.close()
        except (Failed, OSError):
            pass
        try:
            self.child.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
        self.log.close()
        if self in self.run.children:
            self.run.children.remove(self)

    def kill(self):
        if self.child.poll() is None:
            self.child.kill()
            self.child.wait()


class Daemon:
    """spillwayd in a folder of its own."""

    def __init__(self, run, *flags):
        self.run, self.dir = run, temporary("spillway-llm.")
        self.socket = self.dir / "run/api.sock"
        run.trace(f"spillwayd {' '.join(flags)}")
        log = open(run.out / "spillwayd.log", "ab")
        log.write(f"---- {' '.join(flags)}\n".encode()); log.flush()
        self.child = subprocess.Popen([str(run.base / "bin/spillwayd"), "--run-dir", str(self.dir / "run"), *flags],
                                      stdout=log, stderr=log, env=run.env)
        log.close()
        run.daemons.append(self)
        end, why = time.monotonic() + 20, ""
        while time.monotonic() < end:
            need(self.child.poll() is None, f"spillwayd ended ({self.child.returncode}); see spillwayd.log")
            try:
                if self.get("/v1/status")["pid"] == self.child.pid:
                    return
            except (OSError, http.client.HTTPException, ValueError, Failed) as error:
                why = str(error)
            time.sleep(0.02)
        raise Failed(f"spillwayd does not answer within 20 s: {why}")

    def request(self, method, target, timeout):
        api = Api(self.socket, timeout)
        try:
            api.request(method, target)
            answer = api.getresponse()
            return answer.status, answer.read()
        finally:
            api.close()

    def get(self, target):
        status, body = self.request("GET", target, 10)
        need(status == 200, f"GET {target}: {status} {body[:200]}")
        return json.loads(body)

    def workload(self, name):
        if ON_CPU:
            return collections.defaultdict(int, state="evicted")
        return self.get(f"/v1/workloads/{name}")

    def evict(self, name, timeout=60):
        if ON_CPU:
            return {"bytes": 0, "seconds": 0}
        timeout = max(1, int(self.run.bound(timeout)))
        status, body = self.request("POST", f"/v1/workloads/{name}/evict?timeout={timeout}", timeout + 5)
        need(status == 200, f"evict {name}: {status} {body[:300]}")
        return json.loads(body)

    def child_of(self, name, request, limit):
        """A model's process under Spillway."""
        prefix = [self.run.base / "bin/spillway", "run", "--workload", name, "--request", f"{request}B", "--limit", f"{limit}B", "--"]
        return Child(self.run, name, prefix, {"SPILLWAY_RUN_DIR": str(self.dir / "run"), "SPILLWAY_LOG": "info",
                                              "SPILLWAY_LIBRARY": str(self.run.base / "lib/libspillway.so")})

    def close(self):
        for target, name in (("/v1/events?follow=0", "events.jsonl"), ("/v1/status", "status.json")):
            try:
                with open(self.run.out / name, "ab") as f:
                    f.write(self.request("GET", target, 5)[1] + b"\n")
            except (OSError, http.client.HTTPException):
                pass
        if self.child.poll() is None:
            self.child.terminate()
            try:
                self.child.wait(10)
            except subprocess.TimeoutExpired:
                self.child.kill(); self.child.wait()
        shutil.rmtree(self.dir, ignore_errors=True)
        if self in self.run.daemons:
            self.run.daemons.remove(self)


class Run:
    """One run of a script: its time, its programs, its results."""

    def __init__(self, name, a, render):
        self.name, self.a, self.render = name, a, render
        self.base, self.out = a.base.resolve(), a.out.resolve()
        self.out.mkdir(parents=True, exist_ok=True)
        self.began = time.monotonic()
        self.end = self.began + a.seconds
        self.count, self.children, self.daemons, self.cases = 0, [], [], []
        self.state = {}  # what later cases need of earlier ones
        self.files = None
        self.env = {k: v for k, v in os.environ.items() if not k.startswith("SPILLWAY_") or k.startswith("SPILLWAY_SIM_")}
        self.env.pop("LD_PRELOAD", None)
        self.env |= {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "PYTHONUNBUFFERED": "1"}
        self.env.pop("PYTORCH_CUDA_ALLOC_CONF", None)
        self.env.pop("PYTORCH_ALLOC_CONF", None)
        if a.device:
            self.env["CUDA_VISIBLE_DEVICES"] = a.device

    def trace(self, text):
        print(f"{time.monotonic() - self.began:8.2f} {text}", flush=True)

    def left(self):
        return self.end - time.monotonic()

    def bound(self, timeout):
        """No wait is longer than what is left."""
        return max(3.0, min(timeout, self.left()))

    def enough(self, wanted, what):
        if self.left() < wanted:
            raise Skipped(f"{what} takes about {wanted:.0f} s, {max(0, self.left()):.0f} s are left")

    def bare(self, name):
        """A model's process without Spillway."""
        return Child(self, name)

    def write(self):
        document = {"quick": self.a.quick, "scale": self.a.scale, "seconds": round(time.monotonic() - self.began, 1),
                    "facts": self.state.get("facts", {}), "cases": self.cases}
        (self.out / f"{self.name}.json").write_text(json.dumps(document, indent=1) + "\n")
        try:
            text = self.render(self)
        except Exception as why:  # the figures are in the JSON, whatever is wrong with the table
            text = f"The table could not be made: {type(why).__name__}: {why}\n"
        (self.out / f"{self.name}.md").write_text(text)

    def one(self, name, case):
        began, figures = time.monotonic(), {}
        if self.left() < 5:
            result, reason = "skipped", f"the {self.a.seconds:.0f} s are over"
        else:
            self.trace(f"== {name}")
            try:
                case(self, figures)
                result, reason = "ok", ""
            except Skipped as why:
                result, reason = "skipped", str(why)
            except Failed as why:
                result, reason = "FAIL", str(why)
            except Exception as why:
                import traceback
                traceback.print_exc()
                result, reason = "FAIL", f"{type(why).__name__}: {why}"
        self.clear()
        self.cases.append({"name": name, "result": result, "reason": reason, "seconds": round(time.monotonic() - began, 1),
                           "figures": figures})
        self.trace(f"{name} {result} {reason}")
        for key, value in figures.items():
            self.trace(f"   {key}: {json.dumps(value)}")
        self.write()

    def clear(self):
        """Between cases: nothing runs."""
        for child in list(self.children):
            child.kill()
            if not child.log.closed:
                child.log.close()
        self.children = []
        for daemon in list(self.daemons):
            daemon.close()

    def all(self, cases):
        def over(*_):
            raise Failed(f"the {self.a.seconds:.0f} s and their grace are over")

        end_by_signal()
        signal.signal(signal.SIGALRM, over)
        signal.alarm(int(self.a.seconds) + 15)
        try:
            for name, case in cases:
                self.one(name, case)
        except Failed as why:
            self.trace(str(why))
            self.cases.append({"name": "time", "result": "FAIL", "reason": str(why), "figures": {}})
            self.write()
        finally:
            signal.alarm(0)
            self.clear()
            end_all()
            if self.files:
                shutil.rmtree(self.files, ignore_errors=True)
        count = lambda word: sum(c["result"] == word for c in self.cases)
        print(f"{count('ok')} passed, {count('FAIL')} failed, {count('skipped')} skipped", flush=True)
        return 1 if count("FAIL") else 0


def main(name, doc, cases, quick_cases, render):
    """`cases`: {name: function(run, figures)}."""
    ap = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--base", type=Path, required=True, help="an unpacked archive (scripts/release)")
    ap.add_argument("--out", type=Path, required=True, help="folder for results and logs")
    ap.add_argument("--seconds", type=float, help="no case starts, and no wait lasts, beyond these [420; with --quick 125]")
    ap.add_argument("--quick", action="store_true", help="the headline alone, in about 110 s")
    ap.add_argument("--scale", choices=("full", "small"), default="full", help="small: tiny models, a test of this script")
    ap.add_argument("--layers", type=int, help="this many layers instead of 32 in the 7B model")
    ap.add_argument("--files", type=Path, default=Path(tempfile.gettempdir()), help="where the file of weights goes [TMPDIR, or /tmp]")
    ap.add_argument("--device", help="UUID of the device")
    ap.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(cases)} [all; with --quick {', '.join(quick_cases)}]")
    a = ap.parse_args()
    a.seconds = a.seconds or (125 if a.quick else 420)
    unknown = [c for c in a.cases if c not in cases]
    if unknown:
        ap.error(f"no case {', '.join(unknown)}; there are {', '.join(cases)}")
    for file in ("bin/spillwayd", "bin/spillway", "lib/libspillway.so"):
        if not (a.base / file).exists():
            ap.error(f"{a.base / file} is not there: --base names an unpacked archive (made by scripts/release)")
    run = Run(name, a, render)
    chosen = a.cases or (quick_cases if a.quick else list(cases))
    if "SPILLWAY_SIM_DIR" in os.environ and not ON_CPU:
        run.cases = [{"name": c, "result": "skipped", "reason": "the simulator does not run PyTorch", "figures": {}} for c in chosen]
        run.write()
        print(f"0 passed, 0 failed, {len(chosen)} skipped: the simulator does not run PyTorch")
        return 0
    return run.all([(c, cases[c]) for c in chosen])


def main_shape(run):
    """The shape that the headline is about."""
    if run.a.scale == "small":
        return "tiny"
    return f"7B/{run.a.layers}" if run.a.layers else "7B"


def title(shape):
    name, _, layers = shape.partition("/")
    return TITLE[name] + (f", {layers} layers only" if layers else "")
