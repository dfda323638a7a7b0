#!/usr/bin/env python3
"""A causal language model of a given shape in plain PyTorch, driven by lines. Started by gpu-models.py and gpu-peers.py.

Random bf16 weights; RMSNorm, rotary positions, grouped-query attention, SwiGLU, a KV cache. Nothing is downloaded.

One JSON object per command on stdout; a step-by-step trace with times on stderr. Commands:
  load SHAPE seed N              weights made on the device from a seed
  load SHAPE file PATH [drop]    weights read from a file; a file that is shorter is read again and again;
                                 with `drop` what was read leaves the page cache at once
  load SHAPE managed N           as seed, but all weights in managed memory, where it fits into free memory
  save PATH SECONDS BYTES        writes the weights to a file, for at most so long, and at most so many
  ask N M                        a prompt of N tokens, M tokens of answer, greedy
  sleep, wake                    moves everything to pinned host memory and back, as an application would
  prefetch host|device           moves managed weights
  quit
Times are time.monotonic_ns, comparable between the processes of a machine.
"""
import time
STARTED = time.monotonic_ns()
import ctypes as C, faulthandler, hashlib, json, mmap, os, queue, sys, threading, traceback

faulthandler.enable()
faulthandler.dump_traceback_later(60, repeat=True)
PIECE = 32 << 20  # of a file, per read
THREADS = min(8, os.cpu_count() or 1)
ALIGN = 512
POSITIONS = 2048 + 64

# layers, hidden, heads, KV heads, head size, intermediate, vocabulary
SHAPES = {
    "3B": (28, 3072, 24, 8, 128, 8192, 32768),
    "7B": (32, 4096, 32, 8, 128, 14336, 32768),  # Mistral-7B
    "12B": (40, 5120, 32, 8, 128, 14336, 131072),
    "30B": (60, 6144, 48, 8, 128, 22528, 32768),
    "tiny": (2, 256, 8, 2, 32, 512, 1024),
}


def shape_of(name):
    """NAME or NAME/LAYERS."""
    name, _, layers = name.partition("/")
    shape = SHAPES[name]
    return (int(layers), *shape[1:]) if layers else shape


def parameters(shape):
    """(name, dimensions) of all weights, in the order of the file."""
    layers, hidden, heads, kv, head, inter, vocab = shape
    yield "embed", (vocab, hidden)
    for i in range(layers):
        yield f"{i}.norm1", (hidden,)
        yield f"{i}.q", (heads * head, hidden)
        yield f"{i}.k", (kv * head, hidden)
        yield f"{i}.v", (kv * head, hidden)
        yield f"{i}.o", (hidden, heads * head)
        yield f"{i}.norm2", (hidden,)
        yield f"{i}.gate", (inter, hidden)
        yield f"{i}.up", (inter, hidden)
        yield f"{i}.down", (hidden, inter)
    yield "norm", (hidden,)
    yield "head", (vocab, hidden)


def layout(shape):
    """({name: (offset, bytes, dimensions)}, bytes of the file)."""
    at, places = 0, {}
    for name, dims in parameters(shape):
        count = 2
        for d in dims:
            count *= d
        places[name] = (at, count, dims)
        at += -(-count // ALIGN) * ALIGN
    return places, at


def trace(text):
    print(f"{(time.monotonic_ns() - STARTED) / 1e9:9.3f} {text}", file=sys.stderr, flush=True)


class Unavailable(Exception):
    """Why nothing can be done here."""


def start_torch():
    """Imports torch once, makes the context; returns (torch, device, times)."""
    global torch, device
    if "torch" not in globals():
        trace("import torch")
        try:
            import torch as module
        except Exception as why:  # a broken installation raises what it likes
            raise Unavailable(f"import torch: {type(why).__name__}: {why}") from None
        torch = module
        times["imported"] = time.monotonic_ns()
        trace(f"torch {torch.__version__}")
        device = os.environ.get("GPU_LLM_DEVICE", "cuda")
        if device == "cuda":
            try:
                torch.zeros(1, device="cuda")
                torch.cuda.synchronize()
            except Exception as why:
                raise Unavailable(f"CUDA by torch {torch.__version__}: {type(why).__name__}: {str(why).splitlines()[0]}") from None
        torch.set_grad_enabled(False)
        torch.backends.cuda.enable_cudnn_sdp(False)  # one attention kernel in all runs, whose results repeat
        times["context"] = time.monotonic_ns()
        trace(f"context is there; {memory()}")


def memory():
    if device != "cuda":
        return {}
    free, total = torch.cuda.mem_get_info()
    return {"free": free, "total": total, "reserved": torch.cuda.memory_reserved()}


def synchronize():
    if device == "cuda":
        torch.cuda.synchronize()


def raw(tensor):
    return tensor.view(-1).view(torch.uint8)


def bytes_at(tensor):
    """The bytes of a host tensor, writable, not copied."""
    return memoryview((C.c_char * tensor.numel()).from_address(tensor.data_ptr())).cast("B")


class Managed:
    """One range of managed memory as a tensor, by DLPack."""

    class Tensor(C.Structure):
        _fields_ = [("data", C.c_void_p), ("device_type", C.c_int32), ("device_id", C.c_int32), ("ndim", C.c_int32),
                    ("code", C.c_uint8), ("bits", C.c_uint8), ("lanes", C.c_uint16), ("shape", C.POINTER(C.c_int64)),
                    ("strides", C.POINTER(C.c_int64)), ("byte_offset", C.c_uint64), ("context", C.c_void_p), ("deleter", C.c_void_p)]

    def __init__(self, nbytes):
        self.cuda, self.nbytes, self.pointer = C.CDLL("libcuda.so.1"), nbytes, C.c_uint64()
        self.call("cuMemAllocManaged", C.byref(self.pointer), C.c_size_t(nbytes), C.c_uint(1))
        self.shape = (C.c_int64 * 1)(nbytes)
        self.managed = self.Tensor(self.pointer.value, 2, torch.cuda.current_device(), 1, 1, 8, 1, self.shape, None, 0, None, None)
        capsule = C.pythonapi.PyCapsule_New
        capsule.restype, capsule.argtypes = C.py_object, [C.c_void_p, C.c_char_p, C.c_void_p]
        self.name = b"dltensor"
        self.tensor = torch.utils.dlpack.from_dlpack(capsule(C.addressof(self.managed), self.name, None))

    def call(self, name, *a):
        code = getattr(self.cuda, name)(*a)
        if code:
            raise RuntimeError(f"{name}: {code}")

    def prefetch(self, to):
        self.call("cuMemPrefetchAsync", self.pointer, C.c_size_t(self.nbytes), C.c_int(-1 if to == "host" else 0), C.c_void_p(0))
        synchronize()


class Model:
    def __init__(self, name):
        self.shape = shape_of(name)
        self.places, self.bytes = layout(self.shape)
        self.managed = self.asleep = self.host = None
        layers, hidden, heads, kv, head, inter, vocab = self.shape
        self.w = {}
        self.cache = torch.empty(layers, 2, 1, kv, POSITIONS, head, dtype=torch.bfloat16, device=device)
        angle = torch.outer(torch.arange(POSITIONS, dtype=torch.float32),
                            1.0 / 10000 ** (torch.arange(0, head, 2, dtype=torch.float32) / head))
        self.cos, self.sin = (f(torch.cat((angle, angle), 1)).to(device, torch.bfloat16) for f in (torch.cos, torch.sin))

    def allocate(self, managed=False):
        if managed:
            free = memory()["free"]
            if self.bytes > free * 0.9:  # more would be moved by faults, which is another thing and can stop a machine
                raise RuntimeError(f"{self.bytes} bytes of managed memory are more than nine tenths of the {free} free bytes")
            self.managed = Managed(self.bytes)
            self.managed.prefetch("device")
        for name, (at, size, dims) in self.places.items():
            self.w[name] = (self.managed.tensor[at:at + size].view(torch.bfloat16).view(dims) if managed
                            else torch.empty(dims, dtype=torch.bfloat16, device=device))

    def fill(self, seed):
        random = torch.Generator(device=device)
        random.manual_seed(seed)
        for name, tensor in self.w.items():
            if tensor.dim() == 1:
                tensor.fill_(1)
            else:
                tensor.normal_(0, 0.02, generator=random)
        synchronize()

    def pieces(self):
        """(tensor, offset in it, offset in the file, bytes)."""
        for name, (at, size, _) in self.places.items():
            for o in range(0, size, PIECE):
                yield self.w[name], o, at + o, min(PIECE, size - o)

    def stream(self, fd, work, pieces):
        """`work(fd, buffer, piece)` for all, on threads with two pinned buffers each."""
        todo, failed = queue.SimpleQueue(), []
        for piece in pieces:
            todo.put(piece)

        def run():
            try:
                buffers = [torch.empty(PIECE, dtype=torch.uint8, pin_memory=device == "cuda") for _ in range(2)]
                side = torch.cuda.Stream() if device == "cuda" else None
                events, turn = [None, None], 0
                while not failed:
                    try:
                        piece = todo.get_nowait()
                    except queue.Empty:
                        break
                    if events[turn]:
                        events[turn].synchronize()
                    if side:
                        with torch.cuda.stream(side):
                            work(fd, buffers[turn], piece)
                            events[turn] = side.record_event()
                    else:
                        work(fd, buffers[turn], piece)
                    turn ^= 1
                if side:
                    side.synchronize()
            except Exception as why:
                failed.append(why)

        threads = [threading.Thread(target=run) for _ in range(THREADS)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        if failed:
            raise failed[0]

    def read(self, path, drop):
        fd = os.open(path, os.O_RDONLY)
        size = os.fstat(fd).st_size

        def work(fd, buffer, piece):
            tensor, o, at, n = piece
            if n > size:
                raise RuntimeError(f"{path} is too short: {size}")
            at = min(at % size, size - n)
            view, got = bytes_at(buffer)[:n], 0
            while got < n:
                more = os.preadv(fd, [view[got:]], at + got)
                if not more:
                    raise RuntimeError(f"{path} ends at {at + got}")
                got += more
            if drop:
                os.posix_fadvise(fd, at, n, os.POSIX_FADV_DONTNEED)
            raw(tensor)[o:o + n].copy_(buffer[:n], non_blocking=True)

        self.stream(fd, work, self.pieces())
        os.close(fd)
        synchronize()
        return size

    def save(self, path, seconds, most):
        """Returns the bytes written without a gap from the start."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        end, late, lock = time.monotonic() + seconds, [self.bytes], threading.Lock()

        def work(fd, buffer, piece):
            tensor, o, at, n = piece
            if time.monotonic() > end or at + n > most:
                with lock:
                    late[0] = min(late[0], at)
                return
            buffer[:n].copy_(raw(tensor)[o:o + n])
            view, put = bytes_at(buffer)[:n], 0
            while put < n:
                put += os.pwrite(fd, view[put:], at + put)

        try:
            self.stream(fd, work, self.pieces())
            os.ftruncate(fd, late[0])
        finally:
            os.close(fd)
        return late[0]

    def everything(self):
        return [("w", n) for n in self.w] + [("self", "cache")]

    def held(self, kind, name):
        return self.w[name] if kind == "w" else self.cache

    def sleep(self):
        """All of it to the host, and off the device, as an application would do it itself."""
        items, at = self.everything(), 0
        sizes = {item: self.held(*item).numel() * 2 for item in items}
        begin = time.monotonic_ns()
        if self.host is None:
            total = sum(-(-n // 4096) * 4096 for n in sizes.values())
            self.pages = mmap.mmap(-1, total, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                self.pages.madvise(mmap.MADV_HUGEPAGE)
            self.host = torch.frombuffer(self.pages, dtype=torch.uint8)
            if device == "cuda":
                code = torch.cuda.cudart().cudaHostRegister(self.host.data_ptr(), total, 0)
                if int(code):
                    raise RuntimeError(f"cudaHostRegister of {total} bytes: {code}")
        ready = time.monotonic_ns()
        self.asleep = {}
        for item in items:
            tensor = self.held(*item)
            self.host[at:at + sizes[item]].copy_(raw(tensor), non_blocking=True)
            self.asleep[item] = (at, tuple(tensor.shape))
            at += -(-sizes[item] // 4096) * 4096
        synchronize()
        copied = time.monotonic_ns()
        del tensor
        for item in items:
            self.put(item, None)
        if device == "cuda":
            torch.cuda.empty_cache()
        return {"bytes": sum(sizes.values()), "pin_s": (ready - begin) / 1e9, "copy_s": (copied - ready) / 1e9,
                "seconds": (time.monotonic_ns() - begin) / 1e9, **memory()}

    def put(self, item, tensor):
        if item[0] == "w":
            self.w[item[1]] = tensor
        else:
            self.cache = tensor

    def wake(self):
        begin, total = time.monotonic_ns(), 0
        for item, (at, dims) in self.asleep.items():
            tensor = torch.empty(dims, dtype=torch.bfloat16, device=device)
            n = tensor.numel() * 2
            raw(tensor).copy_(self.host[at:at + n], non_blocking=True)
            self.put(item, tensor)
            total += n
        synchronize()
        return {"bytes": total, "seconds": (time.monotonic_ns() - begin) / 1e9}

    def norm(self, x, weight):
        y = x.float()
        return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype) * weight

    def turn(self, x, at, n):
        """Rotary positions."""
        half = x.shape[-1] // 2
        rotated = torch.cat((-x[..., half:], x[..., :half]), -1)
        return x * self.cos[at:at + n] + rotated * self.sin[at:at + n]

    def forward(self, ids, at):
        """The logits of the last of `ids`, which begin at position `at`."""
        F = torch.nn.functional
        layers, hidden, heads, kv, head, _, _ = self.shape
        w, n = self.w, ids.shape[0]
        x = F.embedding(ids, w["embed"])
        for i in range(layers):
            y = self.norm(x, w[f"{i}.norm1"])
            q, k, v = (F.linear(y, w[f"{i}.{p}"]).view(n, -1, head).transpose(0, 1).unsqueeze(0) for p in "qkv")
            q, k = self.turn(q, at, n), self.turn(k, at, n)
            keys, values = self.cache[i]
            keys[:, :, at:at + n], values[:, :, at:at + n] = k, v
            y = F.scaled_dot_product_attention(q, keys[:, :, :at + n], values[:, :, :at + n], is_causal=n > 1, enable_gqa=True)
            x = x + F.linear(y.squeeze(0).transpose(0, 1).reshape(n, heads * head), w[f"{i}.o"])
            y = self.norm(x, w[f"{i}.norm2"])
            x = x + F.linear(F.silu(F.linear(y, w[f"{i}.gate"])) * F.linear(y, w[f"{i}.up"]), w[f"{i}.down"])
        return F.linear(self.norm(x[-1], w["norm"]), w["head"])

    def ask(self, tokens, answer):
        vocab, state, ids = self.shape[6], 12345, []
        for _ in range(tokens):
            state = (state * 1103515245 + 12345) % (1 << 31)
            ids.append((state >> 8) % vocab)
        at, logits, out, first = 0, [], [], None
        ids = torch.tensor(ids, device=device)
        for _ in range(answer):
            row = self.forward(ids, at)
            at += ids.shape[0]
            ids = row.argmax().view(1)
            out.append(int(ids.item()))
            first = first or time.monotonic_ns()
            logits.append(row)
        end = time.monotonic_ns()
        digest = hashlib.sha256()
        digests = []
        for row in logits:
            row = raw(row.contiguous()).cpu()
            digest.update(bytes(bytes_at(row)))
            digests.append(digest.hexdigest()[:16])
        # The digest after each token, so that answers of different lengths can be compared.
        return {"first": first, "end": end, "tokens": out, "sha256": digest.hexdigest(), "prefix": digests,
                "finite": bool(torch.isfinite(logits[0]).all())}


times = {"started": STARTED}
model = None


def command(words):
    global model
    start_torch()
    if words[0] == "load":
        begin, name, how = time.monotonic_ns(), words[1], words[2]
        model = None
        if device == "cuda":
            torch.cuda.empty_cache()
        model = Model(name)
        model.allocate(how == "managed")
        synchronize()
        allocated = time.monotonic_ns()
        trace(f"{model.bytes} bytes allocated; {memory()}")
        size = None
        if how == "file":
            size = model.read(words[3], "drop" in words[4:])
        else:
            model.fill(int(words[3]))
        times["loaded"] = time.monotonic_ns()
        return {"bytes": model.bytes, "file_bytes": size, "allocate_s": (allocated - begin) / 1e9,
                "fill_s": (times["loaded"] - allocated) / 1e9, "times": times, "torch": torch.__version__,
                "device": torch.cuda.get_device_name() if device == "cuda" else "cpu", **memory()}
    if model is None:
        raise RuntimeError("no model is loaded")
    if words[0] == "save":
        begin = time.monotonic()
        written = model.save(words[1], float(words[2]), int(words[3]))
        return {"bytes": written, "complete": written == model.bytes, "seconds": time.monotonic() - begin}
    if words[0] == "ask":
        return model.ask(int(words[1]), int(words[2]))
    if words[0] == "sleep":
        return model.sleep()
    if words[0] == "wake":
        return model.wake()
    if words[0] == "prefetch":
        begin = time.monotonic_ns()
        model.managed.prefetch(words[1])
        return {"bytes": model.bytes, "seconds": (time.monotonic_ns() - begin) / 1e9}
    raise RuntimeError(f"unknown command {words[0]}")


def main():
    if len(sys.argv) > 1 and sys.argv[1] == "--bytes":
        print(layout(shape_of(sys.argv[2]))[1])
        return 0
    for line in sys.stdin:
        words = line.split()
        if not words:
            continue
        received = time.monotonic_ns()
        faulthandler.dump_traceback_later(60, repeat=True)
        trace(f"> {line.strip()}")
        if words[0] == "quit":
            break
        try:
            answer = {"ok": True, "received": received, **command(words)}
        except Unavailable as why:
            answer = {"unavailable": str(why)}
        except Exception as why:
            traceback.print_exc()
            answer = {"error": f"{type(why).__name__}: {why}"}
        trace("< " + json.dumps(answer)[:300])
        print(json.dumps(answer), flush=True)
    trace("ends")
    sys.stderr.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
