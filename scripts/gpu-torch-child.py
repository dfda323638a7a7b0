#!/usr/bin/env python3
"""A PyTorch program that gpu-torch.py drives by lines: it trains and asks a small model, and says what came out.

    gpu-torch-child.py --mode eager|graphs|callables|compile|compile-graphs|loader|limit [--seed N] [--layers N]

    step N    -> done {"seconds"}   N steps of training, queued without a wait between them
    infer N   -> done {"seconds"}   N answers of the model
    info      -> info {...}         what PyTorch and the driver say about memory
    limit     -> limit {...}        (mode limit) fills memory up to the limit, and goes on after the error
    outcome   -> outcome {...}      SHA-256 of losses, answers, parameters, optimizer, random state, ballast
    quit      -> (ends; so does the end of stdin)

First it prints `ready {...}`, when it has its model and did two steps and one answer; `skip TEXT` when the mode
cannot work here. Everything is deterministic: two runs of the same lines have the same outcome bit for bit.
stderr has a trace of every line with times; stacks of all threads when something takes long, and at SIGUSR1.
"""
import argparse, ctypes, faulthandler, hashlib, json, os, shutil, signal, sys, sysconfig, time

MiB = 1 << 20
BEGAN = time.monotonic()
LONG = 25  # seconds for a command before stacks are written

# What libraries print shall not come between our lines.
LINES = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)
faulthandler.enable(all_threads=True)
faulthandler.register(signal.SIGUSR1, all_threads=True)


def trace(text):
    print(f"child {time.monotonic() - BEGAN:8.3f} {text}", file=sys.stderr, flush=True)


def say(word, **what):
    LINES.write(f"{word} {json.dumps(what)}\n")
    trace(f"> {word}")


def digest(tensors):
    """SHA-256 over the bytes of tensors, in order."""
    h = hashlib.sha256()
    for t in tensors:
        t = t.detach().cpu().contiguous()
        h.update(f"{t.dtype}{tuple(t.shape)}".encode())
        h.update(ctypes.string_at(t.data_ptr(), t.numel() * t.element_size()))
    return h.hexdigest()


trace("imports torch")
import torch
from torch import nn
trace(f"torch {torch.__version__}")


class Layer(nn.Module):
    """Attention and feed-forward, of plain matrix products: every kernel in it has one order of summation."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.drop = nn.Dropout(0.1)

    def forward(self, x):
        batch, length, width = x.shape
        q, k, v = (t.view(batch, length, self.heads, width // self.heads).transpose(1, 2)
                   for t in self.qkv(self.before(x)).chunk(3, -1))
        weights = torch.softmax(q @ k.transpose(-1, -2) * (width // self.heads) ** -0.5, -1)
        x = x + self.drop(self.out((weights @ v).transpose(1, 2).reshape(batch, length, width)))
        return x + self.drop(self.down(torch.nn.functional.gelu(self.up(self.between(x)))))


class Samples(torch.utils.data.Dataset):
    """Inputs and targets by number, made on the CPU."""

    def __init__(self, seed, shape, count):
        self.seed, self.shape, self.count = seed, shape, count

    def __len__(self):
        return self.count

    def __getitem__(self, number):
        made = torch.Generator().manual_seed(self.seed * 100_003 + number)
        return torch.randn(self.shape, generator=made), torch.randn(self.shape, generator=made)


class Workload:
    """A model in training. Each mode does the same by another part of PyTorch."""

    def __init__(self, a):
        self.mode, self.device = a.mode, torch.device(a.device)
        self.shape = (a.batch, a.length, a.width)
        torch.manual_seed(a.seed)
        trace("first use of the device")
        self.ballast = torch.randint(-2**31, 2**31 - 1, (a.ballast * MiB // 4,), dtype=torch.int32, device=self.device)
        torch.cuda.synchronize()
        trace("builds the model")
        self.model = nn.Sequential(*(Layer(a.width, a.width // 64) for _ in range(a.layers))).to(self.device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-4, capturable=a.mode == "graphs")
        self.x, self.y = (torch.zeros(self.shape, device=self.device) for _ in range(2))
        self.losses, self.answers, self.number = [], [], 0
        data = Samples(a.seed, self.shape, 100_000)
        if a.mode == "loader":
            loader = torch.utils.data.DataLoader(data, batch_size=None, num_workers=2, pin_memory=True,
                                                 multiprocessing_context="fork", persistent_workers=True)
            self.data = iter(loader)
            next(self.data)
            trace("two loader processes were forked")
        else:
            # Few different samples, made beforehand: the CPU is not what is measured.
            kept = [tuple(t.pin_memory() for t in data[i]) for i in range(4)]
            self.data = (kept[i % 4] for i in range(100_000))
        self.forward = self.model
        if a.mode == "compile":
            self.forward = torch.compile(self.model)
        elif a.mode == "compile-graphs":
            self.forward = torch.compile(self.model, mode="reduce-overhead")
        elif a.mode == "callables":
            trace("make_graphed_callables")
            self.forward = torch.cuda.make_graphed_callables(self.model, (self.x.clone(),))
        self.train_graph = self.infer_graph = None
        if a.mode == "graphs":
            self.capture()

    def work(self):
        self.optimizer.zero_grad(set_to_none=True)
        if self.mode == "compile-graphs":
            torch.compiler.cudagraph_mark_step_begin()
        loss = torch.nn.functional.mse_loss(self.forward(self.x), self.y)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def capture(self):
        """One graph for a whole step, one for an answer."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.work()
        torch.cuda.current_stream().wait_stream(side)
        trace("captures a step")
        graph = torch.cuda.CUDAGraph()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.cuda.graph(graph):
            self.graph_loss = self.work()
        self.train_graph = graph
        trace("captures an answer")
        self.model.eval()
        with torch.no_grad():
            self.model(self.x)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.graph_answer = self.model(self.x)
        self.model.train()
        self.infer_graph = graph
        torch.cuda.synchronize()
        trace("captured")

    def load(self):
        x, y = next(self.data)
        self.x.copy_(x, non_blocking=True)
        self.y.copy_(y, non_blocking=True)

    def step(self, count):
        for _ in range(count):
            self.load()
            if self.train_graph:
                self.train_graph.replay()
                loss = self.graph_loss
            else:
                loss = self.work()
            self.losses.append(loss.clone())

    def infer(self, count):
        self.model.eval()
        with torch.no_grad():
            for _ in range(count):
                self.load()
                if self.infer_graph:
                    self.infer_graph.replay()
                    answer = self.graph_answer
                else:
                    if self.mode == "compile-graphs":
                        torch.compiler.cudagraph_mark_step_begin()
                    answer = self.forward(self.x)
                self.answers.append(answer.clone())
        self.model.train()

    def outcome(self):
        state = [v for p in self.model.parameters() for v in self.optimizer.state[p].values() if torch.is_tensor(v)]
        found = {"losses": digest(self.losses), "answers": digest(self.answers), "optimizer": digest(state),
                 "parameters": digest(self.model.parameters()), "ballast": digest([self.ballast]),
                 "random": digest([torch.cuda.get_rng_state()])}
        values = [loss.item() for loss in self.losses]
        if not all(v == v and abs(v) < 1e6 for v in values):
            raise RuntimeError(f"losses are not numbers: {values[:8]}")
        return {**found, "steps": len(values), "loss_values": values}


def info():
    free, total = torch.cuda.mem_get_info()
    peak = {k: torch.cuda.memory_stats().get(f"{k}_bytes.all.peak", 0) for k in ("allocated", "reserved")}
    found = {"free": free, "total": total, "properties_total": torch.cuda.get_device_properties(0).total_memory,
             "allocated": torch.cuda.memory_allocated(), "reserved": torch.cuda.memory_reserved(),
             "peak_allocated": peak["allocated"], "peak_reserved": peak["reserved"],
             "backend": torch.cuda.get_allocator_backend()}
    summary = torch.cuda.memory_summary()
    found["summary_lines"] = len(summary.splitlines())
    trace("memory_summary:\n" + summary)
    if found["backend"] == "native":
        found["expandable"] = any(s.get("is_expandable") for s in torch.cuda.memory_snapshot())
    return found


def fill(size, device):
    """Pieces of one size until there are no more, and the error's text."""
    kept = []
    try:
        while len(kept) < 1000:
            kept.append(torch.full((size,), len(kept) % 251, dtype=torch.uint8, device=device))
    except torch.OutOfMemoryError as why:
        return kept, str(why)
    return kept, None


def limit(device):
    """Beyond the limit is torch.OutOfMemoryError, and then the program goes on."""
    piece = 128 * MiB
    free, total = torch.cuda.mem_get_info()
    a = torch.randn(1024, 1024, device=device)
    values = lambda: digest([a @ a, a.view(torch.uint8).min(), a.view(torch.uint8).max()])
    first = values()
    kept, why = fill(piece, device)
    got = len(kept) * piece
    trace(f"{got // MiB} MiB of {free // MiB} MiB free, then: {why}")
    if why is not None:
        kept.pop()  # space for what the checks need themselves
    intact = all(int(t.min()) == i % 251 == int(t.max()) for i, t in enumerate(kept))
    again = values()
    del kept
    # What PyTorch keeps for itself is given back when one larger piece is asked for.
    large, error = 0, None
    try:
        large = torch.full((got * 3 // 4,), 7, dtype=torch.uint8, device=device)
        large = large.numel() if int(large.min()) == 7 == int(large.max()) else -1
    except torch.OutOfMemoryError as found:
        error = str(found)
    torch.cuda.empty_cache()
    return {"free": free, "total": total, "got": got, "raised": why is not None, "message": (why or "")[:400],
            "intact": intact, "goes_on": first == again == values(), "large": large, "large_error": error}


def unfit(mode):
    """Why torch.compile cannot work here, or None."""
    if not mode.startswith("compile"):
        return None
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc") or shutil.which("clang")):
        return "torch.compile needs a C compiler, and there is none on PATH"
    if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
        return f"torch.compile needs Python.h, and there is none in {sysconfig.get_path('include')}"
    try:
        import triton
        trace(f"triton {triton.__version__}")
    except Exception as why:
        return f"torch.compile needs triton: {why!r}"
    return None


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--mode", required=True)
    ap.add_argument("--device", default="cuda")
    for name, default in (("seed", 1), ("layers", 4), ("width", 1024), ("batch", 8), ("length", 256), ("ballast", 512)):
        ap.add_argument(f"--{name}", type=int, default=default)
    a = ap.parse_args()
    why = unfit(a.mode)
    if why:
        LINES.write(f"skip {why}\n")
        return
    faulthandler.dump_traceback_later(LONG, repeat=True)
    torch.use_deterministic_algorithms(True)
    began, workload = time.perf_counter(), None
    if a.mode == "limit":
        torch.zeros(1, device=a.device)
    else:
        workload = Workload(a)
        workload.step(2)
        workload.infer(1)
    torch.cuda.synchronize()
    faulthandler.cancel_dump_traceback_later()
    say("ready", seconds=round(time.perf_counter() - began, 3), device=torch.cuda.get_device_name(0), torch=torch.__version__)
    for line in sys.stdin:
        verb, _, rest = line.strip().partition(" ")
        trace(f"< {line.strip()}")
        if verb == "quit":
            break
        faulthandler.dump_traceback_later(LONG, repeat=True)
        began = time.perf_counter()
        if verb in ("step", "infer"):
            getattr(workload, verb)(int(rest))
            torch.cuda.synchronize()
            say("done", seconds=time.perf_counter() - began)
        elif verb == "info":
            say("info", **info())
        elif verb == "limit":
            say("limit", **limit(a.device))
        elif verb == "outcome":
            say("outcome", **workload.outcome())
        else:
            raise SystemExit(f"unknown line {line!r}")
        faulthandler.cancel_dump_traceback_later()
    trace("ends")
    if workload:
        workload.data = None  # ends the loader's processes


if __name__ == "__main__":
    main()
