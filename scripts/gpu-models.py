#!/usr/bin/env python3
"""Language models that take turns on one GPU: cold start against swap-in, to the first token.

    gpu-models.py --base ARCHIVE --out DIR [--seconds 420] [--quick] [--scale small] [CASE ...]

Run by gpu-check. ARCHIVE is an unpacked release. Needs PyTorch with CUDA; without it every case is skipped.
Cases:
  files   makes the weights, writes them to a file, and asks the model alone, without Spillway
  turns   two models of Mistral-7B's shape under Spillway, of which one fits: first token of every turn
  cold    a new process reads the file to the first token: file in the page cache, and dropped from it
  trio    3B, 7B and 12B on what one and a half of the largest would need, against all of them resident
  big     61 GB and the 7B in turns
Logits and tokens are compared with those of the run alone, bit for bit. Writes DIR/models.json and
DIR/models.md after every case, and the logs of all programs. A case that fails does not stop the others.
Exit code 1 if one failed.
"""
import ctypes as C, mmap, os, random, sys, tempfile, threading, time
sys.dont_write_bytecode = True
from pathlib import Path
from gpu_llm import (ANSWER, ON_CPU, Daemon, Failed, GiB, MiB, Skipped, available_memory, main, main_shape, median, nbytes_of,
                     need, rate, seconds, title)

TOKENS = (128, 2048)
CONTEXT = 5 * GiB // 4  # generous, for the driver's own memory of each process
GAP = 0.5  # seconds without work before the next turn: longer than spillwayd's --idle-after


def ask(child, tokens, answer=ANSWER, timeout=90):
    """The answer, with `ttft` from the question to the first token."""
    got = child.ask(f"ask {tokens} {answer}", timeout)
    return {**got, "ttft": seconds(got["asked"], got["first"])}


def row(run, shape, tokens):
    return run.state.setdefault("table", {}).setdefault((shape, tokens), {})


def reference(run, shape, seed, tokens, got, wrong):
    """Compares with the run alone; what differs goes to `wrong`."""
    known = run.state.setdefault("reference", {}).setdefault((shape, seed, tokens), (got["sha256"], got["tokens"]))
    if known != (got["sha256"], got["tokens"]):
        wrong.append(f"{tokens} tokens, seed {seed}: logits {got['sha256'][:16]}, tokens {got['tokens']}; "
                     f"alone {known[0][:16]}, {known[1]}")
    return known == (got["sha256"], got["tokens"])


# ------------------------------------------------------------------ the file and the page cache

def filesystem(path):
    """Its type and device, of the longest mount point that holds the path."""
    best = ("", "?", "?")
    with open("/proc/mounts") as f:
        for line in f:
            device, point, kind = line.split()[:3]
            if (str(path) + "/").startswith(point.rstrip("/") + "/") and len(point) >= len(best[0]):
                best = (point, kind, device)
    return f"{best[1]} on {best[2]}"


def cached(path):
    """How much of a file is in the page cache, in bytes; None: not known."""
    try:
        with open(path, "rb") as f:
            size = os.fstat(f.fileno()).st_size
            with mmap.mmap(f.fileno(), size, access=mmap.ACCESS_COPY) as m:
                pages = (size + mmap.PAGESIZE - 1) // mmap.PAGESIZE
                states, at = (C.c_ubyte * pages)(), C.c_char.from_buffer(m)
                failed = C.CDLL(None).mincore(C.c_void_p(C.addressof(at)), C.c_size_t(size), states)
                del at
                return None if failed else sum(bytes(states).translate(bytes(b & 1 for b in range(256)))) * mmap.PAGESIZE
    except (OSError, ValueError):
        return None


def drop(path):
    """Out of the page cache; returns what stayed."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
    return cached(path)


def disk_rate(path, most=3.0):
    """Bytes per second of 8 threads that read a dropped file, for at most so many seconds."""
    size, piece, done = os.stat(path).st_size, 16 * MiB, [0] * 8
    end = time.monotonic() + most

    def read(which):
        fd = os.open(path, os.O_RDONLY)
        for at in range(which * piece, size, 8 * piece):
            if time.monotonic() > end:
                break
            done[which] += len(os.pread(fd, piece, at))
        os.close(fd)

    drop(path)
    begin, threads = time.monotonic(), [threading.Thread(target=read, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return sum(done) / (time.monotonic() - begin)


def files(run, fig):
    shape = main_shape(run)
    size = nbytes_of(shape)
    child = run.bare("alone")
    loaded = child.ask(f"load {shape} seed 1", 120)
    facts = run.state["facts"] = {k: loaded.get(k) for k in ("device", "torch", "free", "total")}
    facts |= {"weights_bytes": size, "host_available_bytes": available_memory(), "cpus": os.cpu_count()}
    fig["start_s"] = {"import_torch": seconds(child.spawned, loaded["times"]["imported"]),
                      "context": seconds(loaded["times"]["imported"], loaded["times"]["context"])}
    wrong = []
    fig["resident_ttft_s"] = {}
    for tokens in TOKENS:
        first, *again = [ask(child, tokens) for _ in range(4)]
        need(first["finite"], "the logits are not finite")
        for got in (first, *again):
            reference(run, shape, 1, tokens, got, wrong)
        row(run, shape, tokens)["resident"] = fig["resident_ttft_s"][tokens] = median([g["ttft"] for g in again])
    # Written into the page cache here; a thread brings it to the disk while other cases run.
    run.files = Path(tempfile.mkdtemp(prefix="spillway-weights.", dir=run.a.files))
    room = os.statvfs(run.files)
    room = room.f_bavail * room.f_frsize - 2 * GiB
    facts["filesystem"] = filesystem(run.files.resolve())
    path = run.files / "weights"
    if room < 256 * MiB and size > room:
        fig["file"] = f"none: {run.a.files} has no space"
    else:
        saved = child.ask(f"save {path} {20 if run.a.quick else 60} {room}", 90)
        fig["file"] = {"bytes": saved["bytes"], "complete": saved["complete"], "write_GBps": rate(saved["bytes"], saved["seconds"])}
        if not saved["complete"]:
            fig["file"]["note"] = "shorter than the model: cold starts read it again and again until they have as many bytes"
        run.state |= {"path": path, "complete": saved["complete"], "synced": threading.Event()}

        def sync():
            fd = os.open(path, os.O_RDONLY)
            begin = time.monotonic()
            try:
                os.fsync(fd)
                facts["fsync_s"] = round(time.monotonic() - begin, 2)
            except OSError as why:
                facts["fsync_failed"] = str(why)
            finally:
                os.close(fd)
                run.state["synced"].set()

        threading.Thread(target=sync, daemon=True).start()
    child.ask(f"load {shape} seed 2", 60)
    for tokens in TOKENS:
        reference(run, shape, 2, tokens, ask(child, tokens), wrong)
    child.end()
    need(not wrong, "the model alone does not repeat itself: " + "; ".join(wrong))


def cold_start(run, fig, key, shape, tokens, dropped, size):
    """A new process, from its start to the first token."""
    path, facts = run.state["path"], {}
    if dropped:
        left = drop(path)
        facts["still_cached_MiB"] = left and left // MiB
    else:
        facts["cached_MiB"] = (cached(path) or 0) // MiB
    short = not run.state["complete"] or size > os.stat(path).st_size
    child = run.bare(f"cold-{key}")
    child.say(f"load {shape} file {path}" + (" drop" if dropped and short else ""))
    child.say(f"ask {tokens} {ANSWER}")
    loaded, got = child.answer(400), child.answer(60)
    facts |= {"ttft_s": seconds(child.spawned, got["first"]), "import_torch_s": seconds(child.spawned, loaded["times"]["imported"]),
              "context_s": seconds(loaded["times"]["imported"], loaded["times"]["context"]), "read_s": round(loaded["fill_s"], 3),
              "read_GBps": rate(size, loaded["fill_s"]), "first_token_s": seconds(loaded["times"]["loaded"], got["first"])}
    fig[key] = facts
    run.trace(f"cold start {key}: {facts}")
    child.end()
    return facts, got, short


def cold(run, fig):
    if "path" not in run.state:
        raise Skipped("there is no file of weights: case files has to go before")
    shape, wrong = main_shape(run), []
    size = nbytes_of(shape)
    for tokens in TOKENS:
        run.enough(10, "a cold start from the page cache")
        warm, got, short = cold_start(run, fig, f"page_cache_{tokens}", shape, tokens, False, size)
        row(run, shape, tokens)["cold_cached"] = warm["ttft_s"]
        if not short:
            reference(run, shape, 1, tokens, got, wrong)
        run.write()
        if run.state["facts"]["filesystem"].startswith(("tmpfs", "ramfs")):
            fig["dropped"] = f"skipped: {run.a.files} is in memory (name a folder on a disk by --files)"
            continue
        if "disk_GBps" not in fig:
            begin = time.monotonic()
            fig["synced"] = run.state["synced"].wait(max(1, min(120, run.left() - 30)))
            fig["waited_for_sync_s"] = round(time.monotonic() - begin, 2)
            fig["disk_GBps"] = run.state["facts"]["disk_GBps"] = round(disk_rate(run.state["path"]) / 1e9, 3)
        took = size / 1e9 / max(fig["disk_GBps"], 0.001)
        if run.left() < warm["ttft_s"] + took * 1.2 + 4:
            fig[f"disk_{tokens}"] = (f"not measured: it takes about {warm['ttft_s'] + took:.0f} s, {run.left():.0f} s are left; computed "
                                     f"from the disk's rate: {warm['ttft_s'] - warm['read_s'] + max(took, warm['read_s']):.1f} s")
            run.trace(fig[f"disk_{tokens}"])
            continue
        facts, got, short = cold_start(run, fig, f"disk_{tokens}", shape, tokens, True, size)
        row(run, shape, tokens)["cold_disk"] = facts["ttft_s"]
        if not short:
            reference(run, shape, 1, tokens, got, wrong)
        drop_back = cached(run.state["path"])  # what reading brought back is what the next one starts with
        fig[f"cached_after_{tokens}_MiB"] = drop_back and drop_back // MiB
    need(not wrong, "; ".join(wrong))


# ------------------------------------------------------------------ under Spillway

def moved(before, after):
    """What a workload's figures say of the moves since."""
    told = {}
    for way in ("out", "in"):
        if after[f"swaps_{way}"] > before[f"swaps_{way}"]:
            nbytes, took = after[f"bytes_{way}"] - before[f"bytes_{way}"], after[f"last_{way}_seconds"]
            told |= {f"{way}_bytes": nbytes, f"{way}_s": round(took, 4), f"{way}_GBps": rate(nbytes, took)}
            if after[f"swaps_{way}"] - before[f"swaps_{way}"] > 1:
                told[f"{way}_moves"] = after[f"swaps_{way}"] - before[f"swaps_{way}"]
    return told


def limits(run, shapes, capacity=None):
    """(limit of each, capacity): so that only the largest fits, and the contexts of all."""
    sizes = [nbytes_of(s) for s in shapes]
    slack = [min(3 * GiB, max(CONTEXT, n // 4)) for n in sizes]
    each = [(n + more) // (2 * MiB) * 2 * MiB for n, more in zip(sizes, slack)]
    capacity = capacity or max(each) + CONTEXT * (len(shapes) - 1)
    if not ON_CPU:
        if capacity >= sum(sizes):
            raise Skipped(f"all {len(shapes)} models fit into {capacity / GiB:.1f} GiB")
        free, host = run.state.get("facts", {}).get("free"), available_memory()
        if free and free + sizes[0] < capacity:
            raise Skipped(f"needs {capacity / GiB:.1f} GiB of the device, {(free + sizes[0]) / GiB:.1f} are free")
        if host < sum(sizes) + 4 * GiB:
            raise Skipped(f"needs {(sum(sizes) + 4 * GiB) / GiB:.0f} GiB of host memory for what is swapped out, {host / GiB:.0f} are available")
    return each, int(capacity)


def small_request(capacity, each):
    """Far below what a model uses, so that all are borrowers, and what all request together fits."""
    return min(GiB, capacity // (2 * len(each)) // MiB * MiB, *each)


def daemon(run, capacity, *flags):
    return Daemon(run, "--capacity", f"{capacity}B", "--reserve", "0", "--turn", "500ms", "--growth-wait", "60s", *flags)


def take_turns(run, fig, members, rounds, budget):
    """`members`: (workload, shape, seed, how to load). Every model is asked in turn; returns what was wrong."""
    each, capacity = limits(run, [m[1] for m in members])
    fig["capacity_GiB"], fig["limit_GiB"] = round(capacity / GiB, 2), [round(n / GiB, 2) for n in each]
    node, wrong, children = daemon(run, capacity), [], {}
    end = time.monotonic() + min(budget, run.left())
    for (name, *_), limit in zip(members, each):
        children[name] = node.child_of(name, small_request(capacity, each), limit)
    before, fig["loading"] = {}, {}
    for name, shape, seed, how in members:
        got = children[name].ask(f"load {shape} {how}", 150)
        told = fig["loading"][name] = {"load_s": seconds(got["asked"], got["times"]["loaded"])}
        for tokens in TOKENS:  # kernels are loaded at first use
            answer = ask(children[name], tokens)
            told[f"first_ttft_{tokens}"] = answer["ttft"]
            told[f"resident_ttft_{tokens}"] = ask(children[name], tokens)["ttft"]
            reference(run, shape, seed, tokens, answer, wrong)
        time.sleep(GAP)
        now = {n: node.workload(n) for n, *_ in members if n in before or n == name}
        for other in before:  # room was made: the first move, with what is prepared only once
            what = moved(before[other], now[other])
            if what:
                fig["loading"][other].setdefault("first_move", what)
        before = now
        shares = now[name]["devices"] or [{}]
        told |= {"overhead_MiB": shares[0].get("overhead_bytes", 0) // MiB, "pinned_MiB": shares[0].get("pinned_bytes", 0) // MiB,
                 "used_GiB": round(now[name]["used_bytes"] / GiB, 2), "not_swappable": now[name]["not_swappable"] or None}
        run.trace(f"{name} is loaded: {told}")
        need(not told["not_swappable"], f"{name} cannot be swapped: {told['not_swappable']}")
    exchanges = fig["exchanges"] = []
    for turn in range(rounds):
        for tokens in TOKENS:
            for name, shape, seed, _ in members:
                if time.monotonic() > end and turn:
                    fig["note"] = f"ended after {len(exchanges)} exchanges: the time was over"
                    break
                got = ask(children[name], tokens)
                time.sleep(GAP)
                now = {n: node.workload(n) for n, *_ in members}
                told = {"round": turn, "model": name, "tokens": tokens, "ttft_s": got["ttft"],
                        "equal": reference(run, shape, seed, tokens, got, wrong), **moved(before[name], now[name])}
                left = [moved(before[n], now[n]) for n, *_ in members if n != name]
                told |= {f"others_{k}": v for other in left for k, v in other.items() if k.startswith("out")}
                before = now
                exchanges.append(told)
                run.trace(f"exchange {told}")
                if not ON_CPU and "in_s" not in told:
                    told["note"] = "it was still resident"
    swaps = [e for e in exchanges if "in_s" in e or ON_CPU]
    need(swaps, "no exchange moved anything")
    for shape in dict.fromkeys(m[1] for m in members):
        for tokens in TOKENS:
            mine = [e for e in swaps if e["tokens"] == tokens and dict((m[0], m[1]) for m in members)[e["model"]] == shape]
            if mine:
                later = [e for e in mine if e["round"]] or mine
                entry = row(run, shape, tokens)
                entry["swap_first"], entry["swap"] = mine[0]["ttft_s"], median([e["ttft_s"] for e in later])
                entry["in_GBps"] = median([e.get("in_GBps") for e in later])
                entry["out_GBps"] = median([e.get("others_out_GBps") for e in later])
                entry["turns"] = len(mine)
                entry["equal"] = all(e["equal"] for e in mine)
    run.write()
    # Into room that is free already: evicted by the operator, then asked.
    fig["free_room"] = []
    for name, shape, seed, _ in reversed(members[-2:]):
        for tokens in TOKENS:
            if time.monotonic() > end + 10:
                break
            for n, *_ in members:
                if node.workload(n)["state"] == "resident":
                    done = node.evict(n)
                    fig["free_room"].append({"evicted": n, "GBps": rate(done["bytes"], done["seconds"])})
            was = node.workload(name)
            got = ask(children[name], tokens)
            time.sleep(0.1)
            told = {"model": name, "tokens": tokens, "ttft_s": got["ttft"], "equal": reference(run, shape, seed, tokens, got, wrong),
                    **moved(was, node.workload(name))}
            fig["free_room"].append(told)
            run.trace(f"free room {told}")
            row(run, shape, tokens)["swap_free"] = got["ttft"]
            time.sleep(GAP)
    for child in children.values():
        child.end()
    node.close()
    return wrong


def turns(run, fig):
    shape = main_shape(run)
    # The second one's weights come from a seed, so that one file is enough.
    first = f"file {run.state['path']}" if run.state.get("complete") else "seed 1"
    wrong = take_turns(run, fig, [("mistral-a", shape, 1, first), ("mistral-b", shape, 2, "seed 2")],
                       2 if run.a.quick else 5, 60 if run.a.quick else 120)
    need(not wrong, f"{len(wrong)} answers differ: " + "; ".join(wrong[:4]))


def big(run, fig):
    large, small = ("tiny", "tiny") if run.a.scale == "small" else ("30B", main_shape(run))
    size = nbytes_of(large)
    limits(run, [large, small])
    run.enough(120, "two models of 61 and 14.5 GB")
    child, wrong = run.bare("big-alone"), []
    fig["alone_load_s"] = round(child.ask(f"load {large} seed 3", 120)["fill_s"], 2)
    for tokens in TOKENS:
        first, again = ask(child, tokens), ask(child, tokens)
        reference(run, large, 3, tokens, first, wrong)
        row(run, large, tokens)["resident"] = again["ttft"]
    child.end()
    wrong += take_turns(run, fig, [("big", large, 3, "seed 3"), ("small", small, 1, "seed 1")], 2, max(60, run.left() - 90))
    disk = run.state.get("facts", {}).get("disk_GBps")
    for tokens in reversed(TOKENS):
        if "path" not in run.state:
            fig["cold"] = "skipped: no file of weights"
        elif not disk or run.left() < size / 1e9 / disk * 1.2 + 20:
            fig[f"disk_{tokens}"] = f"not measured: {size / 1e9:.0f} GB at {disk} GB/s take longer than the {run.left():.0f} s that are left"
        else:  # the file of the small one, read again and again: as many bytes from the disk
            facts, _, _ = cold_start(run, fig, f"disk_{tokens}", large, tokens, True, size)
            row(run, large, tokens)["cold_disk"] = facts["ttft_s"]
    need(not wrong, f"{len(wrong)} answers differ: " + "; ".join(wrong[:4]))


def trio(run, fig):
    """The same sequence of requests twice: three models that all fit, then on what one and a half of the largest need."""
    shapes = ["tiny"] * 3 if run.a.scale == "small" else ["3B", main_shape(run), "12B"]
    names = ["three", "seven", "twelve"]
    sizes = [nbytes_of(s) for s in shapes]
    each, _ = limits(run, shapes)
    narrow = int(1.5 * max(each))
    limits(run, shapes, narrow)
    run.enough(90, "three models, twice")
    luck, plan = random.Random(7), []
    for _ in range(8 if run.a.quick else 24):  # bursts: one model is asked a few times, then another
        plan.append((luck.randrange(3), luck.randint(2, 6), luck.choice(TOKENS)))
    wrong, walls = [], {}
    fig |= {"bursts": len(plan), "requests": sum(n for _, n, _ in plan), "weights_GB": [round(n / 1e9, 1) for n in sizes]}
    for kind, capacity in (("resident", sum(each) + 3 * CONTEXT), ("shared", narrow)):
        free = run.state.get("facts", {}).get("free")
        if kind == "resident" and free and free + sizes[1] < capacity:
            fig[kind] = f"skipped: needs {capacity / GiB:.1f} GiB"
            continue
        node = daemon(run, capacity)
        children = [node.child_of(f"{kind}-{n}", small_request(capacity, each), limit) for n, limit in zip(names, each)]
        for i, child in enumerate(children):
            child.ask(f"load {shapes[i]} seed {i + 1}", 120)
            for tokens in TOKENS:
                reference(run, shapes[i], i + 1, tokens, ask(child, tokens), wrong)
        first, count, begin = [], 0, time.monotonic()
        for which, number, tokens in plan:
            if run.left() < 15:
                fig[f"{kind}_note"] = f"cut short after {count} requests"
                break
            for _ in range(number):
                got = ask(children[which], tokens)
                reference(run, shapes[which], which + 1, tokens, got, wrong)
                first.append(got["ttft"])
                count += 1
            time.sleep(0.3)
        walls[kind] = (time.monotonic() - begin) / max(count, 1)
        first.sort()
        told = fig[kind] = {"capacity_GiB": round(capacity / GiB, 1), "requests": count, "seconds": round(walls[kind] * count, 2),
                            "ttft_p50_s": first[len(first) // 2], "ttft_p99_s": first[min(len(first) - 1, len(first) * 99 // 100)],
                            "tokens_per_s": round(ANSWER / walls[kind], 1),
                            "swaps_in": sum(node.workload(f"{kind}-{n}")["swaps_in"] for n in names)}
        run.trace(f"{kind}: {told}")
        for child in children:
            child.end()
        node.close()
    if len(walls) == 2:
        fig["throughput_of_resident"] = round(walls["resident"] / walls["shared"], 3)
    need(not wrong, f"{len(wrong)} answers differ: " + "; ".join(wrong[:4]))


def render(run):
    facts = run.state.get("facts", {})
    show = lambda v, unit="": "not measured" if v is None else f"{v:.2f}{unit}" if isinstance(v, float) else f"{v}{unit}"
    text = ["# Cold start against swap-in\n"]
    if ON_CPU or run.a.scale == "small":
        text.append("**A test of the script, no measurement.**\n")
    if facts:
        text.append(f"{facts.get('device')}, PyTorch {facts.get('torch')}. Weights: random bf16; the file lies on {facts.get('filesystem')}, "
                    f"read at {show(facts.get('disk_GBps'), ' GB/s')} by 8 threads when it is not in the page cache.\n")
    text.append("| model | input tokens | cold start, file on disk (s) | cold start, file in page cache (s) | swap-in, the other leaves first (s) "
                "| first such turn (s) | swap-in into free memory (s) | resident (s) | disk / swap-in | page cache / swap-in | in GB/s | out GB/s "
                "| turns | equal |\n|" + " --- |" * 14)
    for (shape, tokens), r in run.state.get("table", {}).items():
        swap, ratio = r.get("swap"), lambda v: "not measured" if not v or not r.get("swap") else f"{v / r['swap']:.1f}x"
        text.append("| " + " | ".join([title(shape), str(tokens), show(r.get("cold_disk")), show(r.get("cold_cached")), show(swap),
                                       show(r.get("swap_first")), show(r.get("swap_free")), "not measured" if r.get("resident") is None else
                                       f"{r['resident']:.3f}", ratio(r.get("cold_disk")), ratio(r.get("cold_cached")), show(r.get("in_GBps")),
                                       show(r.get("out_GBps")), str(r.get("turns", 0)), {True: "bit for bit", False: "**no**", None: ""}[
                                           r.get("equal")]]) + " |")
    text.append("\nSeconds to the first token. Cold start: from the start of a new process (import of PyTorch, whose own files are in the page "
                "cache; context; the weights read by 8 threads through pinned buffers) to the token. No container starts, nothing is compiled, "
                "no graph is captured: servers take longer. Swap-in: the model is loaded in a process under Spillway and on the host, and is "
                "asked; median without the first round. Resident: asked again, nothing has to move. GB/s: as spillwayd measured them.\n")
    text.append("| case | result | |\n| --- | --- | --- |")
    text += [f"| {c['name']} | {c['result']} | {c['reason']} |" for c in run.cases]
    return "\n".join(text) + "\n"


CASES = {"files": files, "turns": turns, "cold": cold, "trio": trio, "big": big}

if __name__ == "__main__":
    sys.exit(main("models", __doc__, CASES, ["files", "turns", "cold"], render))
