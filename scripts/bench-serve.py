#!/usr/bin/env python3
"""What serving models gains from request and limit, from swap, and from sharing memory: measured beside computed.

    bench-serve.py --base ARCHIVE [--json] [--out DIR] [--scenario FILE] [--rounds N] [--smoke] [PART ...]

Run by scripts/bench and gpu-check. The scenario's sizes and rates are in a file; bench_model.py computes from them
what must come out. Every round measures all sides in turn, so that each ratio has its baseline of the same round. The disk is modelled also on a GPU.

Parts and cases:
  spread  MODE_cN: a server at N clients. alone: without Spillway, the device to itself; static: request = limit;
          request_limit: a neighbour uses little of its share; swap: a neighbour's share is full, and idle.
          dynamic_vs_static: request_limit over static at the most clients; control: caches that never outgrow
          the static fraction; added: request_limit over alone, one request at a time.
  turns   swap_vs_cold: the first answer of a model that has to come in for another, over that of a new process
          that reads the disk; swap_control: both models fit, over one alone; cold_control: a cold start under
          Spillway over one without.
  trio    consolidated: three servers in the memory of one and a half GPUs, over each on its own;
          consolidated_control: all three fit.

A ratio is A over B for A_vs_B. On the simulator the rates are the scenario's, and on a GPU they are measured
first; there the steps are kernels of the same length. Exit code 1 if something failed, or if a ratio is further
than 10 % from the computed one or a control further than 0.05 from 1.0 (not with --smoke).
"""
import argparse, json, math, shutil, sys, time
sys.dont_write_bytecode = True
from pathlib import Path
import bench_model as model
from bench_lib import SIMULATED, Failed, Figures, Machine, MiB, bounded, check_base, make_weights, need, size
from processes import end_all, temporary

PARTS = ("spread", "turns", "trio")
SCENARIO = "serve.json"
NEAR, CONTROL = 0.10, 0.05


class Run:
    def __init__(self, a, scenario, figures, folder):
        self.a, self.s, self.figures, self.folder = a, scenario, figures, folder
        self.rounds = a.rounds or scenario["rounds"]
        self.serving = model.Serving(scenario["step_ms"] / 1e3, scenario["per_request_ms"] / 1e3, scenario["linger_ms"] / 1e3,
                                     scenario["steps"])
        self.steps = {"step": scenario["step_ms"], "per_request": scenario["per_request_ms"], "linger": scenario["linger_ms"]}
        self.link = {way: rate * 1e9 for way, rate in scenario["link_GBps"].items()}
        self.disk = scenario["disk_GBps"] * 1e9
        self.weights = {}

    def machine(self, **more):
        return Machine(self.a.base, self.a.out, link=self.s["link_GBps"], **more)

    def file(self, machine, text, seed=1):
        if (text, seed) not in self.weights:
            self.weights[text, seed] = make_weights(machine, self.folder / f"weights-{text}-{seed}", size(text), seed)
        return self.weights[text, seed]

    def measure_link(self):
        """On a GPU the rates are what a plain pinned copy reaches there."""
        if SIMULATED:
            return
        with self.machine() as machine:
            copy = machine.program("bench-copy")
            copy.line()
            nbytes = 1 << 30
            for way, factor in (("in", 1), ("out", 1), ("both", 2)):
                copy.ask(f"{way} {nbytes}")
                took = sorted(float(copy.ask(f"{way} {nbytes}")) for _ in range(5))[2]
                self.link[way] = factor * nbytes / took
        for way, rate in self.link.items():
            self.figures.add("link", way, rate / 1e9, "GB/s")


# ------------------------------------------------------------------ a KV cache that spreads

MODES = ("alone", "static", "request_limit", "swap")


def spread(run):
    s = run.s["spread"]
    kv, control_kv, fraction, limit = (size(s[name]) for name in ("kv", "kv_control", "fraction", "limit"))
    device = size(s["device"])
    with run.machine(memory=device, gpus=1) as machine:
        weights = run.file(machine, s["weights"])
        machine.warm(device)
        overhead, (held,) = machine.needs([weights], kv)
        light, full = (size(s["neighbour"][name]) for name in ("light", "full"))
        room = limit + light + 8 * MiB + 2 * overhead
        need(full + limit + 2 * overhead > room, "the scenario's neighbour fits beside the limit: nothing has to be swapped")
        need(not SIMULATED or room <= device, f"the scenario's device is too small: {room} of {device}")
        fits = {"static": model.fit(fraction, held, kv), "request_limit": model.fit(limit, held, kv), "swap": model.fit(limit, held, kv)}
        got = {mode: {clients: [] for clients in s["concurrency"]} for mode in MODES}
        controls = {mode: [] for mode in ("static", "request_limit")}
        machine.start(room)
        for number in range(run.rounds):
            # In another order each time: whatever the machine does besides meets all of them.
            for mode in MODES[number % 4:] + MODES[:number % 4]:
                spread_mode(run, machine, mode, weights, kv, overhead, fits, got[mode])
            for mode in ("static", "request_limit") if number % 2 else ("request_limit", "static"):
                controls[mode].append(spread_control(run, machine, mode, weights, control_kv, overhead))
        machine.stop()
    for mode in MODES:
        for clients in s["concurrency"]:
            reports, (throughput, latency, first) = got[mode][clients], run.serving.closed_loop(clients, fits[mode])
            add = lambda metric, key, unit, computed: run.figures.add(
                f"{mode}_c{clients}", metric, [r[key] for r in reports], unit, computed=computed)
            add("throughput", "throughput", "requests/s", throughput)
            add("p50", "p50", "s", latency)
            add("p99", "p99", "s", latency)
            add("first_p50", "first_p50", "s", first)
    compare = lambda case, metric, over, under, key, clients, **more: run.figures.add(
        case, metric, [a[key] / b[key] for a, b in zip(over, under)], "ratio",
        baseline=sorted(b[key] for b in under)[len(under) // 2], clients=clients, **more)
    top, one = s["headline"], s["concurrency"][0]
    at = lambda mode, clients: got[mode][clients]
    theory = lambda mode, clients: run.serving.closed_loop(clients, fits[mode])
    for name, mode in (("dynamic_vs_static", "request_limit"), ("swap_vs_static", "swap")):
        for metric, key, index in (("throughput_ratio", "throughput", 0), ("p50_ratio", "p50", 1)):
            compare(name, metric, at(mode, top), at("static", top), key, top, tolerance=NEAR, fit=[fits[mode], fits["static"]],
                    computed=theory(mode, top)[index] / theory("static", top)[index])
    for metric, key in (("throughput_ratio", "throughput"), ("p50_ratio", "p50")):
        compare("control", metric, controls["request_limit"], controls["static"], key, s["control"], computed=1.0, tolerance=CONTROL)
        compare("added", metric, at("request_limit", one), at("alone", one), key, one, computed=1.0, tolerance=CONTROL)


def under(machine, mode, weights, kv, overhead, run):
    """A server in that mode, and its neighbour if it has one."""
    s = run.s["spread"]
    if mode == "alone":
        return machine.server(mode, weights, kv, bare=True, **run.steps).ready(), None
    fraction, limit = size(s["fraction"]) + overhead, size(s["limit"]) + overhead
    nbytes = size(s["neighbour"]["full" if mode == "swap" else "light"])
    neighbour = machine.program("gpu-hold", "--bytes", f"{nbytes}B", "--step", "16MiB", workload="neighbour", request=fraction, limit=fraction)
    first = neighbour.line()
    need(first == f"held {nbytes}", f"the neighbour holds less than {nbytes}: {first}")
    server = machine.server(mode, weights, kv, request=fraction, limit=fraction if mode == "static" else limit, **run.steps)
    return server.ready(), neighbour


def leave(machine, server, neighbour):
    server.end()
    if neighbour:
        need(neighbour.ask("checksum") == "ok", "the neighbour's memory has other contents")
        neighbour.end()
        machine.programs.remove(neighbour)
        machine.until(lambda: not machine.get("/v1/workloads")["workloads"], 20, "the workloads are gone")
    time.sleep(0.1)  # the dead one's memory comes back


def spread_mode(run, machine, mode, weights, kv, overhead, fits, got):
    s = run.s["spread"]
    server, neighbour = under(machine, mode, weights, kv, overhead, run)
    if mode == "alone":  # what it may have is what the driver has left
        fits[mode] = server.ask("stats")[0]["free_bytes"] // kv
    for clients in s["concurrency"]:
        if neighbour:
            # Back on the device, and idle again: a burst begins with it there.
            neighbour.ask("launch")
            time.sleep(0.3)
        # One pass until the queue is there, then as many as fill the time, one at least.
        passes = 1 + max(1, math.ceil(s["point_s"] / run.serving.closed_loop(clients, fits[mode])[1]))
        got[clients].append(server.load(clients, passes, run.serving.steps))
    if mode == "swap":
        need(machine.workload("neighbour")["swaps_out"] > 0, "the neighbour was never swapped out: the burst found other memory")
    leave(machine, server, neighbour)


def spread_control(run, machine, mode, weights, kv, overhead):
    s = run.s["spread"]
    server, neighbour = under(machine, mode, weights, kv, overhead, run)
    report = server.load(s["control"], s["control_passes"], run.serving.steps)
    leave(machine, server, neighbour)
    return report


# ------------------------------------------------------------------ turns, and cold starts

def turns(run):
    s = run.s["turns"]
    kv, nbytes = size(s["kv"]), size(s["weights"])
    pause = s["pause_ms"] / 1e3
    answers = {name: [] for name in ("swap", "cold", "cold_spillway", "control", "alone", "start")}
    memory = size(s["room_control"]) + 256 * MiB
    with run.machine(memory=memory, gpus=2) as machine:
        files = [run.file(machine, s["weights"], seed) for seed in (1, 2)]
        small = run.file(machine, "4MiB")
        spare = machine.spare()
        machine.warm(memory, nbytes + 64 * MiB)
        overhead, (held,) = machine.needs(files[:1], kv)
        room = size(s["room"]) + 3 * overhead  # with the one that starts anew
        need(held + kv <= size(s["room"]) < 2 * held, "of the scenario's two models not exactly one fits")
        quota = {"request": nbytes // 4, "limit": size(s["room"]) + overhead}
        server = lambda name, file, **more: machine.server(name, file, kv, **{**run.steps, **more})

        def cold(**more):
            began = time.perf_counter()
            one = server("cold", **more).ready()
            one.ask("generate", steps=1)
            took = time.perf_counter() - began
            return took, one

        def pair():
            return [server(name, file, **quota).ready() for name, file in zip("ab", files)]

        def take_turns(two, count, steps, wait=pause):
            took = []
            for _ in range(count):
                for one in two:
                    time.sleep(wait)
                    took.append(one.ask("generate", steps=steps)[1])
            return took

        machine.start(room)
        two = pair()
        take_turns(two, 1, 1)  # the host's memory is made ready meanwhile
        time.sleep(1)
        for number in range(run.rounds):
            def swapped():
                answers["swap"].append(take_turns(two, s["turns"], 1))

            def colds():
                if spare == 0:  # the one device there is
                    for one in two:
                        machine.move(one.name, "evict")
                sides = [("cold", {"bare": True, "device": spare}), ("cold_spillway", {"request": nbytes // 8, "limit": quota["limit"]})]
                for name, more in sides if number % 2 else reversed(sides):
                    if name == "cold_spillway":
                        for one in two:
                            machine.move(one.name, "evict")
                    took, one = cold(file=files[number % 2], disk=run.disk, **more)
                    answers[name].append(took)
                    one.end()
                # The same without reading: what starting a process takes.
                took, one = cold(file=small, bare=True, device=spare)
                answers["start"].append(took - run.serving.lasts(1, 1) - run.serving.linger)
                one.end()
                if machine.workload("a")["state"] == "evicted":
                    take_turns(two, 1, 1)

            for what in (swapped, colds) if number % 2 else (colds, swapped):
                what()
        moved = machine.workload("a")
        need(moved["swaps_out"] >= run.rounds and moved["swaps_in"] >= run.rounds, "the models did not take turns")
        out_s, in_s = moved["last_out_seconds"], moved["last_in_seconds"]
        for one in two:
            one.end()
        machine.stop()
        machine.start(size(s["room_control"]) + 2 * overhead)
        two = pair()
        alone = server("alone", files[0], bare=True, device=spare).ready()
        for number in range(run.rounds):
            both = [("control", lambda: take_turns(two, s["control_turns"], s["control_steps"], 0.05)),
                    ("alone", lambda: take_turns([alone], 2 * s["control_turns"], s["control_steps"], 0.05))]
            for name, what in both if number % 2 else reversed(both):
                answers[name].append(what())
        need(machine.workload("a")["swaps_out"] == 0, "models that fit were swapped")
        for one in (*two, alone):
            one.end()
    mid = lambda values: sorted(values)[len(values) // 2]
    add, first = run.figures.add, run.serving.lasts(1, 1) + run.serving.linger
    one_by_one = model.swap(held, held, run.link["out"], run.link["in"]) + first
    overlapped = model.swap_overlapped(held, held, run.link["out"], run.link["in"], run.link["both"]) + first
    # On the simulator a process starts at once, as far as the rates go; on a GPU its start is measured.
    cold_computed = model.cold_start(nbytes, run.disk, run.serving) + (0 if SIMULATED else mid(answers["start"]))
    swaps = [mid(r) for r in answers["swap"]]
    add("swap_in", "first_answer", [v for r in answers["swap"] for v in r], "s", computed=one_by_one, computed_overlapped=overlapped,
        last_out_seconds=out_s, last_in_seconds=in_s)
    add("cold_start", "first_answer", answers["cold"], "s", computed=cold_computed, process_start=mid(answers["start"]))
    add("swap_vs_cold", "ratio", [a / b for a, b in zip(swaps, answers["cold"])], "ratio", baseline=mid(answers["cold"]),
        computed=one_by_one / cold_computed, tolerance=NEAR, computed_overlapped=overlapped / cold_computed,
        times_shorter=round(mid([b / a for a, b in zip(swaps, answers["cold"])]), 2))
    add("swap_control", "ratio", [mid(a) / mid(b) for a, b in zip(answers["control"], answers["alone"])], "ratio",
        baseline=mid([v for r in answers["alone"] for v in r]), computed=1.0, tolerance=CONTROL)
    add("cold_control", "ratio", [a / b for a, b in zip(answers["cold_spillway"], answers["cold"])], "ratio",
        baseline=mid(answers["cold"]), computed=1.0, tolerance=CONTROL)


# ------------------------------------------------------------------ three in the memory of one and a half

def trio(run):
    s = run.s["trio"]
    kv, clients = size(s["kv"]), s["concurrency"]
    shared_room = int(size(s["own_gpu"]) * s["gpus"])
    wave = run.serving.lasts(clients) + run.serving.linger

    def measure(names, passes):
        """Walls of (shared, own) per round; overhead, and what each holds."""
        memory = shared_room + 256 * MiB
        with run.machine(memory=memory, gpus=4) as machine:
            machine.warm(memory, *[size(s["own_gpu"])] * 3)
            files = [run.file(machine, text, 3 + number) for number, text in enumerate(names)]
            overhead, held = machine.needs(files, kv)
            # What the driver takes for each process is memory that no model can have: given on top.
            machine.start(shared_room + 3 * overhead)
            server = lambda name, file, **more: machine.server(name, file, kv, **run.steps, **more).ready()
            shared = [server(name, file, request=size(text) // 4, limit=shared_room + overhead) for name, file, text in zip("abc", files, names)]
            own = [server(f"own-{number}", file, bare=True, device=machine.spare(number)) for number, file in enumerate(files)]

            def cycle(servers, passes):
                return sum(one.load(clients, passes, run.serving.steps)["wall"] for one in servers)

            for _ in range(2):  # who is there and who is not is settled, and host memory ready
                cycle(shared, s["settle_passes"])
                time.sleep(0.5)
            before = [machine.workload(name)["bytes_in"] for name in "abc"]
            walls = []
            for number in range(run.rounds):
                both = [lambda: cycle(shared, passes * s["cycles"]), lambda: cycle(own, passes * s["cycles"])]
                if number % 2:
                    walls.append(tuple(what() for what in both))
                else:
                    walls.append(tuple(reversed([what() for what in reversed(both)])))
            moved = [machine.workload(name)["bytes_in"] - b for name, b in zip("abc", before)]
            for one in (*shared, *own):
                one.end()
        return walls, held, moved

    def report(case, names, passes, tolerance):
        walls, held, moved = measure(names, passes)
        order = [0, 1, 2] * 3
        moves = model.turns_of(held, clients * kv, shared_room, order)[-3:]
        swaps = sum(model.swap(out, into, run.link["out"], run.link["in"]) for out, into in moves)
        work = 3 * passes * s["cycles"] * wave
        run.figures.add(case, "share", [own / shared for shared, own in walls], "ratio", baseline=sorted(own for _, own in walls)[len(walls) // 2],
                        computed=model.share(work, swaps), tolerance=tolerance, swapped_in_GB=round(sum(moved) / run.rounds / 1e9, 3),
                        computed_in_GB=round(sum(into for _, into in moves) / 1e9, 3), own_wall_computed=round(work, 3))

    report("consolidated", s["weights"], s["passes"], NEAR)
    report("consolidated_control", [s["weights_control"]] * 3, s["passes_control"], CONTROL)


def scaled(value, factor):
    """The scenario with all its sizes so many times as large."""
    if isinstance(value, dict):
        return {key: scaled(inner, factor) for key, inner in value.items()}
    if isinstance(value, list):
        return [scaled(inner, factor) for inner in value]
    return f"{int(value[:-3]) * factor}MiB" if isinstance(value, str) and value.endswith("MiB") and value[:-3].isdigit() else value


def main():
    ap = argparse.ArgumentParser(prog="bench-serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--base", type=Path, required=True, help="an unpacked archive, or what is laid out like one")
    ap.add_argument("--out", type=Path, help="folder for logs and serve.json [a temporary one]")
    ap.add_argument("--scenario", type=Path, help=f"[{SCENARIO} beside the kernels of the archive, or in tests/bench/scenarios]")
    ap.add_argument("--json", action="store_true", help="a JSON object per figure and line")
    ap.add_argument("--scale", type=int, default=1 if SIMULATED else 8, help="all sizes times this [1 on the simulator, else 8]")
    ap.add_argument("--rounds", type=int, help="[the scenario's]")
    ap.add_argument("--smoke", action="store_true", help="a few seconds of each part, nothing is judged")
    ap.add_argument("--seconds", type=float, default=530, help="ends after these, whatever happens [530]")
    ap.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} [all]")
    a = ap.parse_args()
    unknown = [part for part in a.parts if part not in PARTS]
    if unknown:
        ap.error(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    a.base = a.base.resolve()
    check_base(ap, a.base)
    root = Path(__file__).resolve().parent.parent
    found = [p for p in (a.scenario, root / "tests/bench/scenarios" / SCENARIO, root / "scenarios" / SCENARIO) if p and p.exists()]
    if not found:
        ap.error(f"no scenario: name {SCENARIO} by --scenario")
    scenario = json.loads(found[0].read_text())
    if a.smoke:
        for key, value in scenario["smoke"].items():
            scenario[key] = {**scenario[key], **value} if isinstance(value, dict) else value
    scenario = scaled(scenario, a.scale)
    bounded(a.seconds)
    folder = temporary("spillway-serve.")
    a.out = (a.out or folder / "logs").resolve()
    a.out.mkdir(parents=True, exist_ok=True)
    figures = Figures("serve", a.json, {"machine": "simulator" if SIMULATED else "gpu"})
    run, failed = Run(a, scenario, figures, folder), []
    try:
        run.measure_link()
        for part in a.parts or PARTS:
            began = time.monotonic()
            try:
                {"spread": spread, "turns": turns, "trio": trio}[part](run)
            except Failed as why:
                failed.append(f"{part}: {why}")
                print(f"bench-serve: {part}: {why}", file=sys.stderr, flush=True)
            print(f"bench-serve: {part}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        figures.write(a.out / "serve.json", failed, scenario=scenario)
    finally:
        end_all()
        if failed and a.out.is_relative_to(folder):
            print(f"bench-serve: logs are in {a.out}", file=sys.stderr)
            for file in folder.glob("weights-*"):
                file.unlink()
        else:
            shutil.rmtree(folder, ignore_errors=True)
    if not a.smoke:
        for line in figures.missed:
            print(f"bench-serve: {line}", file=sys.stderr)
    return 1 if failed or (figures.missed and not a.smoke) else 0


if __name__ == "__main__":
    sys.exit(main())
