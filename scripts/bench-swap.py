#!/usr/bin/env python3
"""What moving memory between the device and the host costs, beside plain pinned copies of the same run.

    bench-swap.py --base ARCHIVE [--json] [--out DIR] [--size 512MiB] [--rounds N] [--link IN,OUT,BOTH] [--smoke]

Run by scripts/bench and gpu-check. Every round copies as many bytes as are moved, plainly, by one process from and
to pinned memory (bench-copy), and moves them; the figures are of quotients within rounds.

  one_way_out, one_way_in  share: seconds of the plain copy over those that `spillway evict` and `restore` take,
                           from the request to the answer, of a model's weights
  one_way_*, size_N_*      rate: GB/s, of the weights and of N MiB, beside the plain copy's
  small_allocations        share: the same out and in, for 20,000 allocations of up to 64 KiB
  exchange                 ratio: seconds until a workload runs for which another has to leave that has written all
                           its memory, over the larger of the plain one-way time and all bytes at the plain rate
                           both ways. 1.0 is a full overlap; one after the other is twice the one-way time
  clean_exchange           the same where nothing was written since the last exchange, over the one-way time alone:
                           nothing would have to leave; bytes_out: how much was copied out all the same

Exit code 1 if something failed.
"""
import argparse, shutil, sys, time
sys.dont_write_bytecode = True
from pathlib import Path
from bench_lib import SIMULATED, Failed, Figures, GiB, Machine, MiB, bounded, check_base, make_weights, need, size
from processes import end_all, temporary

KV = GRANULE = 2 * MiB
PARTS = (256, 64, 16, 4)  # of the weights: the other sizes whose rate is measured
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
    out, into, both, rates = [], [], {"out": [], "in": []}, {"out": [], "in": []}
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
        rates["out"].append(gone["bytes"] / gone["wall"] / 1e9), rates["in"].append(back["bytes"] / back["wall"] / 1e9)
        ask()
        time.sleep(PAUSE)
    mid = lambda values: sorted(values)[len(values) // 2]
    if case:
        figures.add(case, "share", [2 / (1 / a + 1 / b) for a, b in zip(out, into)], "share", baseline=mid(both["out"]), MiB=nbytes // MiB)
        return
    for way, values in (("out", out), ("in", into)):
        if name == "whole":
            figures.add(f"one_way_{way}", "share", values, "share", baseline=mid(both[way]), baseline_unit="GB/s", MiB=nbytes // MiB)
        figures.add(f"{'one_way' if name == 'whole' else name}_{way}", "rate", rates[way], "GB/s", baseline=mid(both[way]),
                    MiB=nbytes // MiB, way=way)


def rates(machine, plain, figures, rounds, nbytes, quota):
    """Smaller workloads than the weights: what each swap takes whatever its size shows there."""
    for held in sorted({nbytes // part // GRANULE * GRANULE for part in PARTS} - {0}):
        name = f"size_{held // MiB}"
        program = machine.program("gpu-hold", "--bytes", f"{held}B", "--step", "64MiB", workload=name, **quota)
        first = program.line()
        need(first == f"held {held}", f"gpu-hold holds less than {held}: {first}")
        one_way(machine, plain, figures, rounds, None, name, held,
                lambda: need(program.ask("launch").startswith("ok"), "gpu-hold cannot write"))
        need(program.ask("checksum") == "ok", "gpu-hold's memory has other contents")
        program.end()
        machine.programs.remove(program)


def exchange(machine, plain, figures, rounds, nbytes, quota):
    """Two programs in turn: what the second waits for, until a kernel of it has run."""
    held = nbytes // GRANULE * GRANULE
    two = [machine.program("gpu-hold", "--bytes", f"{held}B", "--step", "64MiB", workload=name, **quota) for name in "ab"]
    for one in two:
        first = one.line()
        need(first == f"held {held}", f"gpu-hold holds less than {held}: {first}")
        time.sleep(SETTLE)

    def answered(one, dirty):
        """Seconds until it has run; then it writes all it has, or nothing."""
        time.sleep(PAUSE)
        began = time.perf_counter()
        got = one.ask("spin")
        took = time.perf_counter() - began - STEP / 1e3
        need(got.startswith("ok"), f"gpu-hold: {got}")
        if dirty:
            need(one.ask("launch").startswith("ok"), "gpu-hold cannot write")
        return took

    for one in two:  # both have been out, and host memory is ready
        answered(one, True)
        time.sleep(SETTLE)
    counts = lambda: [machine.workload(name) for name in "ab"]
    got = {dirty: {"took": [], "ideal": [], "one_way": [], "out": []} for dirty in (True, False)}
    for number in range(2 * rounds):
        dirty = number % 2 == 0
        # What leaves in the two turns was last used in the round before: a first turn that is not counted
        # makes it what it has to be.
        for one in two:
            answered(one, dirty)
        plain_out, plain_in, plain_both = (plain.seconds(way, held) for way in ("out", "in", "both"))
        before = counts()
        took = [answered(one, dirty) for one in two]
        after = counts()
        need(all(a["swaps_in"] == b["swaps_in"] + 1 for a, b in zip(after, before)), "the two did not take turns")
        row = got[dirty]
        row["took"].append(sum(took) / 2)
        row["one_way"].append(max(plain_out, plain_in)), row["ideal"].append(max(plain_out, plain_in, plain_both))
        row["out"].append(sum(a["bytes_out"] - b["bytes_out"] for a, b in zip(after, before)) / 2)
    mid = lambda values: sorted(values)[len(values) // 2]
    for dirty, case, under in ((True, "exchange", "ideal"), (False, "clean_exchange", "one_way")):
        row = got[dirty]
        quotients = lambda name: [took / other for took, other in zip(row["took"], row[name])]
        figures.add(case, "ratio", quotients(under), "ratio", baseline=mid(row[under]), baseline_unit="s",
                    over_one_way=round(mid(quotients("one_way")), 3), seconds=round(mid(row["took"]), 4), MiB=held // MiB)
    figures.add("clean_exchange", "bytes_out", got[False]["out"], "bytes", baseline=held, baseline_unit="bytes")
    for one in two:
        need(one.ask("checksum") == "ok", "gpu-hold's memory has other contents")
        one.end()
        machine.programs.remove(one)


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
    bounded(a.seconds)
    folder = temporary("spillway-swap.")
    a.out = (a.out or folder / "logs").resolve()
    a.out.mkdir(parents=True, exist_ok=True)
    figures = Figures("swap", a.json, {"machine": "simulator" if SIMULATED else "gpu"})
    link, failed = dict(zip(("in", "out", "both"), map(float, a.link.split(",")))), []
    try:
        memory = 2 * nbytes + 384 * MiB
        with Machine(a.base, a.out, memory=memory, link=link) as machine:
            machine.warm(memory)
            file = make_weights(machine, folder / "weights", nbytes)
            overhead, (held,) = machine.needs([file], KV)
            plain = Plain(machine)
            room = held + held // 4 + 16 * MiB + 3 * overhead
            machine.start(room)
            quota = {"request": nbytes // 4, "limit": room - overhead}
            for what in (lambda: whole(machine, plain, figures, a.rounds, file, held, quota),
                         lambda: rates(machine, plain, figures, a.rounds, nbytes, quota),
                         lambda: small(machine, plain, figures, a.rounds, nbytes // 2, 1000 if a.smoke else 20000),
                         lambda: exchange(machine, plain, figures, a.rounds, nbytes, quota)):
                try:
                    what()
                except Failed as why:
                    failed.append(str(why))
                    print(f"bench-swap: {why}", file=sys.stderr, flush=True)
    except Failed as why:
        failed.append(str(why))
        print(f"bench-swap: {why}", file=sys.stderr, flush=True)
    finally:
        end_all()
        (folder / "weights").unlink(missing_ok=True)
        figures.write(a.out / "swap.json", failed)
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
