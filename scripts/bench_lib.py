"""What bench-swap.py and bench-serve.py share: the machine, the daemon, programs that are measured, and figures.

BASE is an unpacked release or anything laid out like one: bin/ (spillwayd, spillway), lib/ (libspillway.so),
test-bin/ (the measured programs; the simulated driver where it is used). With SPILLWAY_SIM_DIR set, every
`Machine` is a simulated one of its own, with the memory and the rates that it is given; else it is the GPU.
"""
import collections, http.client, json, os, shutil, signal, socket, statistics, subprocess, threading, time
from pathlib import Path

from daemon_api import Api
from processes import end_by_signal, temporary

MiB, GiB = 1 << 20, 1 << 30
SIMULATED = "SPILLWAY_SIM_DIR" in os.environ


class Failed(Exception):
    """What was found, in one line."""


def need(condition, text):
    if not condition:
        raise Failed(text)


def size(text):
    """Bytes of `64MiB`, `1GiB`, or a number."""
    if isinstance(text, (int, float)):
        return int(text)
    for unit, scale in (("GiB", GiB), ("MiB", MiB), ("KiB", 1 << 10)):
        if text.endswith(unit):
            return int(float(text[:-len(unit)]) * scale)
    raise ValueError(f"{text}: write a size such as 64MiB")


def quartiles(values):
    """(low, median, high): a quarter of the values, rounded down, is below and above; of up to four none is."""
    values = sorted(values)
    outside = (len(values) - 1) // 4
    return values[outside], statistics.median(values), values[-1 - outside]


class Figures:
    """Prints figures as they come: a table, or a JSON object per line, as the bench programs do."""

    def __init__(self, bench, as_json, common=None):
        self.bench, self.json, self.common, self.lines, self.missed = bench, as_json, common or {}, [], []

    def add(self, case, metric, values, unit, baseline=None, computed=None, tolerance=None, **more):
        """`values`: one per round. With `computed` and `tolerance` (a share of it) it is judged."""
        values = [v for v in (values if isinstance(values, list) else [values]) if v is not None]
        line = {"bench": self.bench, "case": case, "metric": metric}
        if not values:
            line["skipped"] = "no value"
        else:
            low, value, high = quartiles(values)
            line |= {"value": rounded(value), "unit": unit}
            if baseline is not None:
                line["baseline"] = rounded(baseline)
            line |= {"spread": rounded(high - low), "quartiles": [rounded(low), rounded(high)], "rounds": len(values)}
            if computed is not None:
                line["computed"] = rounded(computed)
            if tolerance is not None:
                line["within"] = abs(value - computed) <= tolerance * computed
                line["tolerance"] = tolerance
                if not line["within"]:
                    self.missed.append(f"{case}.{metric} is {value:.3g}, computed {computed:.3g}, more than {tolerance:.0%} apart")
        line |= {**more, **self.common}
        self.lines.append(line)
        print(json.dumps(line) if self.json else self.row(line), flush=True)

    def write(self, path, failed, **more):
        """All of them, as one file."""
        path.write_text(json.dumps({**more, "figures": self.lines, "failed": failed}, indent=1) + "\n")

    @staticmethod
    def row(line):
        name = f"{line['case']:<26} {line['metric']:<18}"
        if "skipped" in line:
            return f"{name} skipped: {line['skipped']}"
        text = f"{name} {line['value']:g} {line['unit']} ({line['quartiles'][0]:g} to {line['quartiles'][1]:g})"
        text += f", beside {line['baseline']:g}" if "baseline" in line else ""
        text += f", computed {line['computed']:g}" if "computed" in line else ""
        return text + ("" if line.get("within", True) else "  MISSED")


def rounded(value):
    return float(f"{value:.4g}")


class Program:
    """A program driven by lines, with every wait bounded."""

    def __init__(self, machine, command, log, env=None):
        self.name = Path(command[0]).name if "--" not in command else Path(command[command.index("--") + 1]).name
        self.path = log
        self.began = time.perf_counter()
        with open(log, "ab") as errors:
            self.child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                                          bufsize=1, env={**machine.env, **(env or {})})
        self.lines, self.word = collections.deque(), threading.Condition()
        threading.Thread(target=self.read, daemon=True).start()

    def read(self):
        for line in self.child.stdout:
            with self.word:
                self.lines.append(line.rstrip("\n")); self.word.notify_all()
        with self.word:
            self.lines.append(None); self.word.notify_all()

    def line(self, timeout=120):
        with self.word:
            self.word.wait_for(lambda: self.lines, timeout)
            need(self.lines, f"{self.name} says nothing for {timeout} s; its log is {self.path}")
            line = self.lines.popleft()
        if line is None:
            tail = self.path.read_text(errors="replace").strip()[-300:]
            raise Failed(f"{self.name} ended ({self.child.wait()}): {tail}")
        return line

    def ask(self, text, timeout=120):
        try:
            self.child.stdin.write(text + "\n"); self.child.stdin.flush()
        except OSError:
            raise Failed(f"{self.name} is gone ({self.child.poll()}); its log is {self.path}") from None
        return self.line(timeout)

    def end(self):
        if self.child.poll() is None:
            try:
                self.child.stdin.write("quit\n"); self.child.stdin.close()
            except OSError:
                pass
            try:
                self.child.wait(1 if self.name == "model-server" else 10)
            except subprocess.TimeoutExpired:
                self.child.kill(); self.child.wait()


class Server:
    """tests/clients' model-server."""

    def __init__(self, machine, name, program, listen):
        self.machine, self.name, self.program, self.listen, self.request, self.limit = machine, name, program, listen, None, None

    def ready(self):
        line = json.loads(self.program.line())
        need(line.get("ready"), f"{self.name} begins with {line}")
        return self

    def ask(self, op, timeout=120, **fields):
        """(answer, seconds as the client sees them)."""
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(timeout)
        began = time.perf_counter()
        try:
            connection.connect(str(self.listen))
            connection.sendall((json.dumps({"op": op, **fields}) + "\n").encode())
            line = connection.makefile().readline()
        except OSError as why:
            raise Failed(f"{self.name} does not answer {op}: {why}; its log is {self.program.path}") from None
        finally:
            connection.close()
        took = time.perf_counter() - began
        need(line, f"{self.name} is gone; its log is {self.program.path}")
        answer = json.loads(line)
        need(answer.get("ok"), f"{self.name}: {op}: {answer.get('error')}")
        return answer, took

    def load(self, concurrency, passes, steps):
        """So many clients at a time; serve-load's report."""
        got = subprocess.run([str(self.machine.tests / "serve-load"), "--connect", str(self.listen), "--concurrency", str(concurrency),
                              "--passes", str(passes), "--steps", str(steps)], env=self.machine.plain, capture_output=True,
                             text=True, timeout=300)
        need(got.stdout.startswith("{"), f"serve-load on {self.name}: {got.stderr.strip()[-200:]}")
        report = json.loads(got.stdout)
        need(not report["failures"], f"{report['failures']} clients of {self.name} failed: {report['error']}")
        return report

    def end(self, check=True):
        """Ends it, after its weights were checked once more."""
        if self.program.child.poll() is None:
            if check:
                self.ask("verify")
            self.ask("quit")
            try:
                self.program.child.wait(10)
            except subprocess.TimeoutExpired:
                raise Failed(f"{self.name} does not end") from None
        self.machine.programs.remove(self.program)


class Machine:
    """A machine with a daemon (if started) and programs; `with` ends all of it."""

    def __init__(self, base, out, memory=None, link=None, gpus=1):
        self.base, self.out, self.tests = base, out, base / "test-bin"
        self.dir = temporary("spillway-bench.")
        self.programs, self.daemon, self.count, self.gpus = [], None, 0, gpus if SIMULATED else 1
        self.plain = {k: v for k, v in os.environ.items() if not k.startswith("SPILLWAY_") or k.startswith("SPILLWAY_SIM_")}
        for name in ("LD_PRELOAD", "RUST_BACKTRACE"):
            self.plain.pop(name, None)
        if SIMULATED:
            self.plain |= {"SPILLWAY_SIM_DIR": str(self.dir / "sim"), "SPILLWAY_SIM_GPUS": str(gpus)}
            (self.dir / "sim").mkdir()
            if memory:
                self.plain["SPILLWAY_SIM_MEMORY"] = f"{memory // MiB}MiB"
            if link:
                self.plain["SPILLWAY_SIM_LINK"] = ",".join(str(link[way]) for way in ("in", "out", "both"))
        self.env = {**self.plain, "SPILLWAY_RUN_DIR": str(self.dir / "run"), "SPILLWAY_LIBRARY": str(base / "lib/libspillway.so")}

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        try:
            if kind and not issubclass(kind, Exception):  # ended from outside: nobody waits for good manners
                for program in self.programs:
                    program.child.kill()
            for program in self.programs:
                program.end()
            self.stop()
        finally:
            shutil.rmtree(self.dir, ignore_errors=True)

    def log(self, name):
        self.count += 1
        return self.out / f"{self.dir.name.split('.')[-1]}-{self.count:02}-{name}.log"

    def start(self, capacity=None, *flags):
        """spillwayd; `capacity` is what it shares out, all of it grantable."""
        flags = [*(["--capacity", f"{capacity}B", "--reserve", "0"] if capacity else []), *flags]
        with open(self.out / "spillwayd.log", "ab") as log:
            log.write(f"---- {' '.join(flags)}\n".encode()); log.flush()
            self.daemon = subprocess.Popen([str(self.base / "bin/spillwayd"), "--run-dir", str(self.dir / "run"), *flags],
                                           stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=self.env, start_new_session=True)

        def up():
            return self.get("/v1/status")["pid"] == self.daemon.pid

        self.until(up, 20, "spillwayd answers")

    def warm(self, *nbytes):
        """Takes so much of each simulated device's memory once: its first use costs the host page faults, which no
        GPU has."""
        if SIMULATED:
            programs = [self.program("gpu-hold", "--bytes", f"{n}B", "--step", "16MiB", "--device", device)
                        for device, n in enumerate(nbytes)]
            for program in programs:
                program.line()
                program.end()
                self.programs.remove(program)
            time.sleep(0.1)  # the dead one's memory comes back

    def stop(self):
        if self.daemon and self.daemon.poll() is None:
            self.daemon.terminate()
            try:
                self.daemon.wait(10)
            except subprocess.TimeoutExpired:
                self.daemon.kill(); self.daemon.wait()
        self.daemon = None

    def until(self, what, timeout, name):
        end, why = time.monotonic() + timeout, ""
        while time.monotonic() < end:
            need(self.daemon.poll() is None, f"spillwayd ended ({self.daemon.returncode}); see {self.out}/spillwayd.log")
            try:
                found = what()
                if found:
                    return found
            except (OSError, KeyError, http.client.HTTPException, ValueError, Failed) as error:
                why = f" ({error})"
            time.sleep(0.02)
        raise Failed(f"not within {timeout} s: {name}{why}")

    def request(self, method, target, timeout=130):
        api = Api(self.dir / "run/api.sock", timeout)
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

    def workload(self, name):
        return self.get(f"/v1/workloads/{name}")

    def move(self, name, verb):
        """evict or restore: the answer, with `wall`, the seconds that a caller waits."""
        began = time.perf_counter()
        status, body = self.request("POST", f"/v1/workloads/{name}/{verb}?timeout=120")
        need(status == 200, f"{verb} {name}: {status} {body}")
        return {**body, "wall": time.perf_counter() - began}

    def program(self, name, *arguments, workload=None, request=None, limit=None):
        """Starts it under Spillway; without a workload bare."""
        command = [str(self.tests / name), *map(str, arguments)]
        if workload:
            quota = [*(["--request", f"{request}B"] if request else []), *(["--limit", f"{limit}B"] if limit else [])]
            command = [str(self.base / "bin/spillway"), "run", "--workload", workload, *quota, "--", *command]
        program = Program(self, command, self.log(f"{workload or 'bare'}-{name}"), None if workload else {"SPILLWAY_RUN_DIR": ""})
        self.programs.append(program)
        return program

    def server(self, name, weights, kv, step, per_request=0.0, linger=1.0, bare=False, device=0, disk=None, **quota):
        """A model server; not ready yet."""
        self.count += 1
        listen = self.dir / f"s{self.count}"
        more = ["--disk", f"{int(disk)}B"] if disk else []
        program = self.program("model-server", "--weights", weights, "--listen", listen, "--name", name, "--kv", f"{kv}B",
                               "--step", step, "--per-request", per_request, "--linger", linger,
                               "--device", device, *more, workload=None if bare else name, **quota)
        return Server(self, name, program, listen)

    def spare(self, index=0):
        """A device that the daemon's workloads are not on, if there is one."""
        return 1 + index if self.gpus > 1 + index else 0

    def needs(self, files, kv, step=1.0):
        """(bytes that the driver takes for a process, [bytes that each file's weights take on the device]), as the
        daemon sees them. It is started for that, and stopped."""
        self.start()
        servers = [self.server(f"probe{number}", file, kv, step, request=4 * MiB, limit=2 * os.stat(file).st_size + 256 * MiB)
                   for number, file in enumerate(files)]
        for server in servers:
            server.ready().ask("generate", steps=1)
        time.sleep(1.2)  # measured once a second
        shares = [self.workload(server.name)["devices"][0] for server in servers]
        for server in servers:
            server.end(check=False)
        self.stop()
        return max(share["overhead_bytes"] for share in shares), [share["used_bytes"] - share["overhead_bytes"] for share in shares]


def make_weights(machine, path, nbytes, seed=1):
    got = subprocess.run([str(machine.tests / "make-weights"), str(path), f"{nbytes}B", str(seed)], env=machine.plain,
                         capture_output=True, text=True, timeout=300)
    need(got.returncode == 0, f"make-weights: {got.stderr.strip()}")
    return path


def bounded(seconds):
    """Whatever hangs, and by whatever signal it is told to, the bench ends, with all that it started."""
    def over(*_):
        raise Failed(f"the {seconds:.0f} s are over")

    end_by_signal()
    signal.signal(signal.SIGALRM, over)
    signal.alarm(int(seconds))


def check_base(ap, base):
    for file in ("bin/spillwayd", "bin/spillway", "lib/libspillway.so", "test-bin/model-server"):
        if not (base / file).exists():
            ap.error(f"{base / file} is not there: --base names an unpacked archive (made by scripts/release)")
