#!/usr/bin/env python3
"""What else brings an idle model off a GPU and back, measured with the same model: for comparison with gpu-models.py.

    gpu-peers.py --base ARCHIVE --out DIR [--seconds 420] [--quick] [--scale small] [CASE ...]

Run by gpu-check. Needs PyTorch with CUDA; without it every case is skipped. No Spillway is involved. Cases:
  reload      the application does it itself: its process stays, weights go to pinned host memory and back
  checkpoint  the driver does it: cuCheckpointProcess*, from another process (driver 570 and later)
  managed     weights in managed memory, prefetched to the host and back; never more than nine tenths of what is free
Logits are compared with those from before, bit for bit. Writes DIR/peers.json and DIR/peers.md after every case.
Exit code 1 if one failed.
"""
import ctypes as C, subprocess, sys, time
sys.dont_write_bytecode = True
from gpu_llm import ANSWER, ON_CPU, GiB, Skipped, available_memory, main, main_shape, median, nbytes_of, need, rate, seconds, title

TOKENS = (128, 2048)


def start(run, fig, name, how="seed 1"):
    """The model in a process, asked once; returns (child, {tokens: logits})."""
    shape = main_shape(run)
    child = run.bare(name)
    loaded = child.ask(f"load {shape} {how}", 120)
    run.state["facts"] = {k: loaded.get(k) for k in ("device", "torch", "free", "total")}
    known, fig["resident_ttft_s"] = {}, {}
    for tokens in TOKENS:
        known[tokens] = child.ask(f"ask {tokens} {ANSWER}", 90)["sha256"]
        got = child.ask(f"ask {tokens} {ANSWER}", 90)
        need(got["sha256"] == known[tokens], "the model does not repeat itself")
        fig["resident_ttft_s"][tokens] = seconds(got["asked"], got["first"])
    return child, known


def host_has(shape):
    wanted = nbytes_of(shape) + 4 * GiB
    if not ON_CPU and available_memory() < wanted:
        raise Skipped(f"needs {wanted / GiB:.0f} GiB of host memory, {available_memory() / GiB:.0f} are available")


def result(run, name, fig, key="rounds"):
    """The row of the table: the first round apart, since it pins."""
    rounds = fig[key]
    later = rounds[1:] or rounds
    run.state.setdefault("table", []).append({
        "peer": name, "first_out_s": rounds[0]["out_s"], "out_s": median([r["out_s"] for r in later]),
        "in_s": median([r["in_s"] for r in later]), "out_GBps": median([r["out_GBps"] for r in later]),
        "in_GBps": median([r["in_GBps"] for r in later]),
        **{f"ttft_{t}": median([r["ttft_s"] for r in later if r["tokens"] == t]) for t in TOKENS}})


def reload(run, fig):
    host_has(main_shape(run))
    child, known = start(run, fig, "reload")
    rounds = fig["rounds"] = []
    for tokens in (TOKENS[0], *TOKENS * (1 if run.a.quick else 3)):
        out = child.ask("sleep", 120)
        time.sleep(0.2)
        back = child.ask("wake", 60)
        got = child.ask(f"ask {tokens} {ANSWER}", 60)
        rounds.append({"tokens": tokens, "out_s": round(out["seconds"], 4), "pin_s": round(out["pin_s"], 4), "in_s": round(back["seconds"], 4),
                       "out_GBps": rate(out["bytes"], out["copy_s"]), "in_GBps": rate(back["bytes"], back["seconds"]),
                       "ttft_s": seconds(back["asked"], got["first"]), "equal": got["sha256"] == known[tokens]})
        run.trace(f"{rounds[-1]}")
    child.end()
    result(run, "reload by the application", fig)
    need(all(r["equal"] for r in rounds), "the logits differ after the reload")


# ------------------------------------------------------------------ the driver's checkpoint

# Run in a process of its own, so that a call that hangs can be ended: prints the seconds of each step.
STEP = r"""
import ctypes as C, json, sys, time
cuda, pid = C.CDLL("libcuda.so.1"), int(sys.argv[1])
begin = time.monotonic()
code = cuda.cuInit(0)
if code:
    sys.exit(f"cuInit: {code}")
told = {"init_s": time.monotonic() - begin}
for step in sys.argv[2:]:
    lock = (C.c_uint64 * 8)()
    lock[0] = 10000  # timeoutMs, of the lock alone
    state = C.c_int(-1)
    begin = time.monotonic()
    if step == "State":
        code = cuda.cuCheckpointProcessGetState(C.c_int(pid), C.byref(state))
        told["state"] = state.value
    else:
        arguments = lock if step == "Lock" else (C.c_uint64 * 16)()
        told["at"] = time.monotonic_ns()
        code = getattr(cuda, "cuCheckpointProcess" + step)(C.c_int(pid), C.byref(arguments))
    told[step] = time.monotonic() - begin
    if code:
        name = C.c_char_p()
        cuda.cuGetErrorName(code, C.byref(name))
        told["failed"] = f"cuCheckpointProcess{step}: {code} {(name.value or b'').decode()}"
        break
print(json.dumps(told))
"""


def step(run, pid, *steps, timeout=60):
    import json
    begin = time.monotonic_ns()
    try:
        got = subprocess.run([sys.executable, "-c", STEP, str(pid), *steps], capture_output=True, text=True, timeout=run.bound(timeout),
                             env=run.env)
    except subprocess.TimeoutExpired:
        return {"failed": f"{' '.join(steps)}: not done within {timeout} s"}
    if got.returncode:
        return {"failed": (got.stderr.strip().splitlines() or [f"ended with {got.returncode}"])[-1]}
    return {**json.loads(got.stdout), "began": begin}


def checkpoint(run, fig):
    try:
        cuda = C.CDLL("libcuda.so.1")
        cuda.cuCheckpointProcessLock
    except (OSError, AttributeError) as why:
        raise Skipped(f"no cuCheckpointProcess* here: {why}") from None
    host_has(main_shape(run))
    child, known = start(run, fig, "checkpoint")
    pid, size, rounds = child.child.pid, nbytes_of(main_shape(run)), []
    fig["rounds"] = rounds
    try:
        for tokens in TOKENS if run.a.quick else (TOKENS[0], *TOKENS * 2):
            out = step(run, pid, "Lock", "Checkpoint", timeout=90)
            if "failed" in out:
                fig["failed"] = out
                if not rounds and any(w in out["failed"] for w in ("NOT_SUPPORTED", "NOT_PERMITTED")):
                    raise Skipped(f"the driver does not do it here: {out['failed']}")
                need(False, out["failed"])
            # Nothing of the process is on the device now; it is asked once all of it is back.
            back = step(run, pid, "Restore", "Unlock", timeout=90)
            need("failed" not in back, f"{back.get('failed')}")
            got = child.ask(f"ask {tokens} {ANSWER}", 60)
            out_s, in_s = out["Lock"] + out["Checkpoint"], back["Restore"] + back["Unlock"]
            rounds.append({"tokens": tokens, "out_s": round(out_s, 4), "in_s": round(in_s, 4), "lock_s": round(out["Lock"], 4),
                           "unlock_s": round(back["Unlock"], 4), "out_GBps": rate(size, out["Checkpoint"]), "in_GBps": rate(size, back["Restore"]),
                           # Without the start of the process that calls the driver.
                           "ttft_s": round(in_s + seconds(got["asked"], got["first"]), 4), "equal": got["sha256"] == known[tokens]})
            run.trace(f"{rounds[-1]}")
    finally:
        state = step(run, pid, "State", timeout=10)
        fig["state_at_end"] = state.get("state", state.get("failed"))
        if fig["state_at_end"] in (1, 2):  # locked, checkpointed: it could not even be ended in good order
            fig["put_back"] = step(run, pid, *(("Restore", "Unlock") if state["state"] == 2 else ("Unlock",)), timeout=30)
    child.end()
    result(run, "checkpoint by the driver", fig)
    need(all(r["equal"] for r in rounds), "the logits differ after the restore")


def managed(run, fig):
    if ON_CPU:
        raise Skipped("no managed memory on a CPU")
    host_has(main_shape(run))
    child, known = start(run, fig, "managed", "managed 1")
    rounds = fig["rounds"] = []
    for tokens in (TOKENS[0], *TOKENS * (1 if run.a.quick else 3)):
        out = child.ask("prefetch host", 120)
        back = child.ask("prefetch device", 120)
        got = child.ask(f"ask {tokens} {ANSWER}", 60)
        rounds.append({"tokens": tokens, "out_s": round(out["seconds"], 4), "in_s": round(back["seconds"], 4),
                       "out_GBps": rate(out["bytes"], out["seconds"]), "in_GBps": rate(back["bytes"], back["seconds"]),
                       "ttft_s": seconds(back["asked"], got["first"]), "equal": got["sha256"] == known[tokens]})
        run.trace(f"{rounds[-1]}")
    result(run, "managed memory, prefetched", fig)
    # And without a prefetch: every page comes by a fault.
    child.ask("prefetch host", 120)
    got = child.ask(f"ask {TOKENS[0]} {ANSWER}", 120)
    fig["by_faults"] = {"tokens": TOKENS[0], "ttft_s": seconds(got["asked"], got["first"]), "equal": got["sha256"] == known[TOKENS[0]]}
    run.state["table"].append({"peer": "managed memory, by faults", f"ttft_{TOKENS[0]}": fig["by_faults"]["ttft_s"]})
    child.end()
    need(all(r["equal"] for r in (*rounds, fig["by_faults"])), "the logits differ after the moves")


def render(run):
    facts, show = run.state.get("facts", {}), lambda v: "not measured" if v is None else f"{v:.2f}"
    text = ["# Other ways off the GPU and back\n"]
    if ON_CPU or run.a.scale == "small":
        text.append("**A test of the script, no measurement.**\n")
    text.append(f"{facts.get('device')}, PyTorch {facts.get('torch')}, {title(main_shape(run))}. Medians without the first round.\n")
    text.append("| way | TTFT, 128 tokens (s) | TTFT, 2,048 tokens (s) | in (s) | out (s) | first out (s) | in GB/s | out GB/s |\n|" + " --- |" * 8)
    for r in run.state.get("table", []):
        text.append("| " + " | ".join([r["peer"], *(show(r.get(k)) for k in ("ttft_128", "ttft_2048", "in_s", "out_s", "first_out_s", "in_GBps",
                                                                            "out_GBps"))]) + " |")
    text.append("\nTTFT: from the order to come back to the first token, into memory that is free.\n")
    text.append("| case | result | |\n| --- | --- | --- |")
    text += [f"| {c['name']} | {c['result']} | {c['reason']} |" for c in run.cases]
    return "\n".join(text) + "\n"


CASES = {"reload": reload, "checkpoint": checkpoint, "managed": managed}

if __name__ == "__main__":
    sys.exit(main("peers", __doc__, CASES, list(CASES), render))
