"""gpu-torch.py's case `traces`: what PyTorch asks of the driver, recorded, so that it can be played where no GPU is.

A small model (one layer of width 128, batches of 2 x 32, 4 MiB of ballast) takes four steps of training and gives two
answers, with each of PyTorch's allocators and with CUDA graphs, under `SPILLWAY_TRACE=DIR/traces/NAME.jsonl`. A trace
has some thousand calls and less than 1 MiB is expected; one of more than 8 MiB fails, since it is meant to be kept.
Put them into tests/traces and play them: `scripts/bench replay FILE`. What is in them, and what is not: docs/trace.md.

A trace that is not there, is empty, is cut off, ends before the program does, or lacks the calls that it is recorded
for, fails, and says which.
"""
import json

SMALL = ("--width", "128", "--batch", "2", "--length", "32", "--ballast", "4")
BYTES_MAX = 8 << 20
QUOTA = {"request": 512 << 20, "limit": 2 << 30}
# Beginnings of the names of calls that must be in it, each one or another of a set.
LAUNCH = ("cuLaunchKernel",)
POOLS = ("cuMemAllocAsync", "cuMemAllocFromPoolAsync")


class Bad(Exception):
    """What is wrong with a trace."""


def need(condition, text):
    if not condition:
        raise Bad(text)


def read(path, wanted):
    """Figures of a whole trace that has these calls."""
    need(path.exists(), "no trace was made")
    data = path.read_bytes()
    need(data, "the trace is empty")
    need(len(data) <= BYTES_MAX, f"{len(data)} bytes, more than {BYTES_MAX}: too large to be kept")
    need(data.endswith(b"\n"), f"the trace is cut off after {len(data)} bytes")
    lines = []
    for number, line in enumerate(data.splitlines(), 1):
        try:
            lines.append(json.loads(line))
        except ValueError:
            raise Bad(f"line {number} is no JSON: {line[:60]!r}") from None
        need(isinstance(lines[-1], dict), f"line {number} is no object")
    need(lines[0].get("spillway_trace") == 1, f"it begins with {json.dumps(lines[0])[:80]}, which is no trace of version 1")
    need(any(line.get("devices") for line in lines[1:]), "it does not say what devices there are: cuInit is not in it")
    calls = [line for line in lines if "call" in line]
    done = [str(line["call"]) for line in calls if line.get("r") == 0]
    for names in wanted:
        need(any(call.startswith(names) for call in done), f"of {len(calls)} calls none is {' or '.join(names)}")
    return {"bytes": len(data), "calls": len(calls), "threads": len({line.get("th") for line in calls}),
            "launches": sum(call.startswith(LAUNCH) for call in done), "refused": len(calls) - len(done)}


def case(kinds, failed, tired):
    """The case for these kinds: name -> (mode of the child, environment, wanted calls); `failed` is raised."""
    def traces(run):
        folder = run.machine.out / "traces"
        folder.mkdir(exist_ok=True)
        made, found, problems = {}, {}, []
        for name, (mode, env, _) in kinds.items():
            path = folder / f"{name}.jsonl"
            path.unlink(missing_ok=True)  # one that is there is never written over
            made[name] = run.child("traces", name, mode, {**env, "SPILLWAY_TRACE": str(path)}, workload=f"traces-{name}", layers=1,
                                   more=SMALL, **QUOTA)
        for name, child in made.items():
            path = folder / f"{name}.jsonl"
            size = lambda: path.stat().st_size if path.exists() else 0
            try:
                child.answer("ready", 150)
                child.do("step 1", "done")
                child.do("infer 1", "done")
                before = size()
                child.do("step 1", "done")
                grown = size() > before
                child.do("outcome", "outcome")
                code = child.end(40)
                found[name] = read(path, kinds[name][2])
                need(grown, f"the trace ended after {before} bytes, before the program did")
                need(code == 0, f"the program ended with {code}: {child.last_words()}")
            except (Bad, failed, *tired) as why:
                said = [line for line in child.path.read_text(errors="replace").splitlines() if "SPILLWAY_TRACE" in line]
                problems.append(f"{name}: {why}" + (f" ({said[-1][:200]})" if said else ""))
        run.keep_figures("traces", found)
        if problems:
            raise failed("; ".join(problems))
        return found

    return traces
