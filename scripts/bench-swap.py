#!/usr/bin/env python3
"""What moving memory between the device and the host costs, beside plain pinned copies of the same run.

    bench-swap.py --base ARCHIVE [--json] [--out DIR] [--size 512MiB] [--rounds N] [--link IN,OUT,BOTH] [--smoke]

Run by scripts/bench and gpu-check. Every round copies as many bytes as are moved, plainly, by one process from and
to pinned memory (bench-copy), and moves them; the figures are of quotients within rounds.

  one_way_out, one_way_in  share: seconds of the plain copy over those that `spillway evict` and `restore` take,
                           from the request to the answer, of a model's weights
  small_allocations        share: the same out and in, for 20,000 allocations of up to 64 KiB
  exchange                 ratio: the first answer of a workload for which another has to leave, over the larger of
                           the plain one-way time and all bytes at the plain rate both ways. 1.0 would be a full
                           overlap; one after the other is about twice the one-way time
  clean_exchange           the same where nothing was written since the last exchange; bytes_out: of those that
                           leave, how many were copied although the host had them already

Exit code 1 if something failed.
"""
import argparse, shutil, sys, tempfile, time
sys.dont_write_bytecode = True
from pathlib import Path
from bench_lib import SIMULATED, Failed, Figures, GiB, Machine, MiB, bounded, check_base, make_weights, need, size

KV = 2 * MiB
STEP = 1.0  # milliseconds: what an answer needs besides the memory
SETTLE = 1.0  # seconds, until host memory is ready in the background
PAUSE = 0.4  # seconds without work before the other's turn: longer than --idle-after


class Plain:
    """The plain copy."""

    def __init__(self, machine):
        self.program = machine.program("bench-copy")
        self.program.line()

    def seconds(self, way, nbytes):
        return float(self.program.ask(f"{way} {nbytes}"))


def one_way(machine, plain, figures, rounds, case, name, nbytes, ask):
    """Out and in of a workload, and as many bytes plainly."""
    out, into, both = [], [], {"out": [], "in": []}
    ask()
    time.sleep(SETTLE)
    machine.move(name, "evict"), machine.move(name, "restore")
    time.sleep(SETTLE)
    for number in range(rounds):
        def moved():
            gone = machine.move(name, "evict")
            back = machine.move(name, "restore")
            need(gone["bytes"] >= nbytes * 0.95 and back["bytes"] == gone["bytes"],
                 f"{name}: {gone['bytes']} bytes went out and {back['bytes']} in, of {nbytes}")
            return gone, back

        if number % 2:
            gone, back = moved()
        plain_out, plain_in = plain.seconds("out", nbytes), plain.seconds("in", nbytes)
        if not number % 2:
            gone, back = moved()
        scale = gone["bytes"] / nbytes
        out.append(plain_out * scale / gone["wall"]), into.append(plain_in * scale / back["wall"])
        both["out"].append(nbytes / plain_out / 1e9), both["in"].append(nbytes / plain_in / 1e9)
        ask()
        time.sleep(PAUSE)
    mid = lambda values: sorted(values)[len(values) // 2]
    if case:
        figures.add(case, "share", [2 / (1 / a + 1 / b) for a, b in zip(out, into)], "share", baseline=mid(both["out"]), MiB=nbytes // MiB)
        return
    for way, values in (("out", out), ("in", into)):
        figures.add(f"one_way_{way}", "share", values, "share", baseline=mid(both[way]), baseline_unit="GB/s", MiB=nbytes // MiB)


def exchange(machine, plain, figures, rounds, files, held, quota):
    """Two model servers in turn."""
    two = [machine.server(name, file, KV, STEP, linger=0.0, **quota).ready() for name, file in zip("ab", files)]
    for _ in range(2):  # both have been out, and host memory is ready
        for one in two:
            time.sleep(SETTLE)
            one.ask("generate", steps=1)
    ratios, one_ways, copied, seconds = [], [], [], []
    for number in range(rounds):
        plain_out, plain_in, plain_both = (plain.seconds(way, held) for way in ("out", "in", "both"))
        ideal = max(plain_out, plain_in, plain_both)
        before = {one.name: machine.workload(one.name) for one in two}
        took = []
        for one in two:
            time.sleep(PAUSE)
            took.append(one.ask("generate", steps=1)[1] - STEP / 1e3)
        after = {one.name: machine.workload(one.name) for one in two}
        need(all(after[n]["swaps_in"] == before[n]["swaps_in"] + 1 for n in "ab"), "the two did not take turns")
        copied.append(sum(after[n]["bytes_out"] - before[n]["bytes_out"] for n in "ab") / 2)
        ratios.append(sum(took) / 2 / ideal), one_ways.append(sum(took) / 2 / max(plain_out, plain_in)), seconds.append(sum(took) / 2)
    mid = lambda values: sorted(values)[len(values) // 2]
    figures.add("exchange", "ratio", ratios, "ratio", baseline=mid([s / r for s, r in zip(seconds, ratios)]), baseline_unit="s",
                over_one_way=round(mid(one_ways), 3), MiB=held // MiB)
    # Weights are only read: every exchange of them is of unchanged memory.
    figures.add("clean_exchange", "ratio", [s / (r_ideal) for s, r_ideal in zip(seconds, [s / o for s, o in zip(seconds, one_ways)])], "ratio",
                baseline=mid([s / o for s, o in zip(seconds, one_ways)]), baseline_unit="s", note="over the one-way time: nothing needs to leave")
    figures.add("clean_exchange", "bytes_out", copied, "bytes", baseline=held)
    for one in two:
        one.end()


def small(machine, plain, figures, rounds, nbytes, count):
    program = machine.program("alloc-stress", "--bytes", f"{nbytes}B", "--largest", "64KiB", "--count", count, "--threads", 0,
                              workload="small", request=nbytes, limit=4 * nbytes)
    need(program.line() == "ready", "alloc-stress is not ready")
    held = machine.workload("small")["devices"][0]
    held = held["used_bytes"] - held["overhead_bytes"] - held["pinned_bytes"]
    one_way(machine, plain, figures, rounds, "small_allocations", "small", held, lambda: need(program.ask("verify").startswith("ok"), "other bytes"))
    program.end()
    machine.programs.remove(program)


def main():
    ap = argparse.ArgumentParser(prog="bench-swap", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--base", type=Path, required=True, help="an unpacked archive, or what is laid out like one")
    ap.add_argument("--out", type=Path, help="folder for logs [a temporary one]")
    ap.add_argument("--json", action="store_true", help="a JSON object per figure and line")
    ap.add_argument("--size", type=size, default=None, help="of a workload [512MiB on the simulator, else 4GiB]")
    ap.add_argument("--link", default="2,2,3.32", help="GB/s in, out, and both together, of the simulated link [2,2,3.32]")
    ap.add_argument("--rounds", type=int, default=7, help="[7]")
    ap.add_argument("--smoke", action="store_true", help="a few seconds, small")
    ap.add_argument("--seconds", type=float, default=500, help="ends after these, whatever happens [500]")
    a = ap.parse_args()
    a.base = a.base.resolve()
    check_base(ap, a.base)
    nbytes = a.size or (512 * MiB if SIMULATED else 4 * GiB)
    if a.smoke:
        nbytes, a.rounds = min(nbytes, 96 * MiB), 2
    folder = Path(tempfile.mkdtemp(prefix="spillway-swap.", dir="/tmp"))
    a.out = (a.out or folder / "logs").resolve()
    a.out.mkdir(parents=True, exist_ok=True)
    bounded(a.seconds)
    figures = Figures("swap", a.json, {"machine": "simulator" if SIMULATED else "gpu"})
    link, failed = dict(zip(("in", "out", "both"), map(float, a.link.split(",")))), []
    try:
        memory = 2 * nbytes + 384 * MiB
        with Machine(a.base, a.out, memory=memory, link=link) as machine:
            machine.warm(memory)
            files = [make_weights(machine, folder / f"weights-{seed}", nbytes, seed) for seed in (1, 2)]
            overhead, (held,) = machine.needs(files[:1], KV)
            plain = Plain(machine)
            room = held + held // 4 + 16 * MiB + 3 * overhead
            machine.start(room)
            quota = {"request": nbytes // 4, "limit": room - overhead}
            for what in (lambda: whole(machine, plain, figures, a.rounds, files[0], held, quota),
                         lambda: small(machine, plain, figures, a.rounds, nbytes // 2, 1000 if a.smoke else 20000),
                         lambda: exchange(machine, plain, figures, a.rounds, files, held, quota)):
                try:
                    what()
                except Failed as why:
                    failed.append(str(why))
                    print(f"bench-swap: {why}", file=sys.stderr, flush=True)
    except Failed as why:
        failed.append(str(why))
        print(f"bench-swap: {why}", file=sys.stderr, flush=True)
    finally:
        for file in folder.glob("weights-*"):
            file.unlink()
        if failed and a.out.is_relative_to(folder):
            print(f"bench-swap: logs are in {a.out}", file=sys.stderr)
        else:
            shutil.rmtree(folder, ignore_errors=True)
    return 1 if failed else 0


def whole(machine, plain, figures, rounds, file, held, quota):
    server = machine.server("whole", file, KV, STEP, linger=0.0, **quota).ready()
    one_way(machine, plain, figures, rounds, None, "whole", held, lambda: server.ask("generate", steps=1))
    server.end()


if __name__ == "__main__":
    sys.exit(main())
