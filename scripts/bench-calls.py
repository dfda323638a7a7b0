#!/usr/bin/env python3
"""What Spillway adds to single calls and to allocations: the programs bench-hooks and bench-alloc, on what is there.

    bench-calls.py --base ARCHIVE [--json] [--out DIR] [--smoke] [--only NAMES] [--seconds N] hooks|alloc

Run by gpu-check (`scripts/bench hooks` and `alloc` do the same from a source tree). spillwayd runs, and the programs
are under the library, twice: on the driver of the machine, and on one whose calls cost nothing (cases `free_...`),
where nanoseconds and instructions are those of this machine's CPU alone. Beside every figure is the driver's own cost
in the same process, in rounds that alternate.

Writes OUT/hooks.json or OUT/alloc.json, and the programs' logs. Exit code 1 if something failed.
"""
import argparse, json, os, shutil, signal, subprocess, sys, time
sys.dont_write_bytecode = True
from pathlib import Path
from bench_lib import SIMULATED, Failed, Figures, GiB, Machine, bounded, check_base, need
from processes import end_all, temporary

# Little is guaranteed, so that the programs' own child processes find room. The limit has room for twice what alloc asks
# for: what it takes from the driver itself, beside, is measured as overhead.
QUOTA = {"SPILLWAY_REQUEST": "256MiB", "SPILLWAY_LIMIT": "8GiB"}
SIMULATED_QUOTA = {"SPILLWAY_REQUEST": "128MiB", "SPILLWAY_LIMIT": "6GiB"}


def command(machine, bench, free, smoke, only):
    """A run of the program, with the names of its cases."""
    made = [str(machine.tests / f"bench-{bench}"), "--json", "--budget", "0.05" if smoke else "1", *(["--only", only] if only else [])]
    if bench == "hooks":
        # Valgrind is not for the threads of a real or a simulated driver.
        return [*made, "--no-valgrind", *(["--prefix", "free_"] if free else [])]
    if smoke:
        made += ["--live", "2000", "--processes", "2"]
    return [*made, *(["--prefix", "free_"] if free else [])]


def environment(machine, free, folder):
    """The library in front of the driver that is asked for."""
    env = {**machine.env, **(SIMULATED_QUOTA if SIMULATED else QUOTA), "LD_PRELOAD": str(machine.base / "lib/libspillway.so")}
    if free:
        (folder / "free").mkdir(exist_ok=True)
        shutil.copy(machine.tests / "libcuda_free.so", folder / "free/libcuda.so.1")
        env["LD_LIBRARY_PATH"] = ":".join(p for p in (str(folder / "free"), env.get("LD_LIBRARY_PATH")) if p)
        # So that the daemon knows the device.
        env["FREE_DRIVER_UUID"] = machine.get("/v1/status")["devices"][0]["uuid"]
    return env


def lines_of(path):
    """Figures; a line that was cut off, or is none, is left out."""
    for line in path.read_text(errors="replace").splitlines():
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict) and "bench" in found and "case" in found:
            yield found


def measure(machine, bench, free, a, folder, figures, end):
    """One run; what it printed before it failed is kept."""
    name = f"{bench}-{'free' if free else 'driver'}"
    out, log = a.out / f"{name}.jsonl", a.out / f"{name}.log"
    left = max(5.0, end - time.monotonic())
    with open(out, "wb") as lines, open(log, "wb") as said:
        program = subprocess.Popen(command(machine, bench, free, a.smoke, a.only), env=environment(machine, free, folder), stdout=lines,
                                   stderr=said, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        code = program.wait(left)
    except subprocess.TimeoutExpired:
        code = f"no end within {left:.0f} s"
    finally:
        try:  # its own processes go with it
            os.killpg(program.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        program.wait()
    for line in lines_of(out):
        figures.lines.append(line)
        print(json.dumps(line) if a.json or "quartiles" not in line else Figures.row(line), flush=True)
    last = log.read_text(errors="replace").strip()[-200:]
    need(code == 0, f"{name}: {'ended with ' if isinstance(code, int) else ''}{code}; {last or 'see its lines'}")


def main():
    ap = argparse.ArgumentParser(prog="bench-calls", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--base", type=Path, required=True, help="an unpacked archive, or what is laid out like one")
    ap.add_argument("--out", type=Path, help="folder for logs [a temporary one]")
    ap.add_argument("--json", action="store_true", help="a JSON object per figure and line")
    ap.add_argument("--smoke", action="store_true", help="a few seconds, few rounds")
    ap.add_argument("--only", help="only cases whose name contains one of these, with commas")
    ap.add_argument("--seconds", type=float, default=480, help="ends after these, whatever happens [480]")
    ap.add_argument("bench", choices=("hooks", "alloc"))
    a = ap.parse_args()
    a.base = a.base.resolve()
    check_base(ap, a.base)
    for file in (f"bench-{a.bench}", "libcuda_free.so"):
        if not (a.base / "test-bin" / file).exists():
            ap.error(f"{a.base / 'test-bin' / file} is not there")
    bounded(a.seconds)
    folder = temporary("spillway-calls.")
    a.out = (a.out or folder / "logs").resolve()
    a.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + a.seconds - 15
    figures, failed = Figures(a.bench, a.json), []
    try:
        with Machine(a.base, a.out, memory=8 * GiB) as machine:
            machine.start()
            # The free driver first: its figures need least time.
            for free in (True, False):
                try:
                    measure(machine, a.bench, free, a, folder, figures, end)
                except Failed as why:
                    failed.append(str(why))
    except (Failed, OSError) as why:
        failed.append(str(why))
    finally:
        end_all()
        figures.write(a.out / f"{a.bench}.json", failed)
        shutil.rmtree(folder, ignore_errors=True)
    for why in failed:
        print(f"bench-calls: {why}", file=sys.stderr, flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
