#!/usr/bin/env python3
"""Asks an NVIDIA GPU what the design depends on and no documentation says. Needs only python3 and the driver.

    python3 gpu-facts.py [--out DIR] [--api NAMES.csv] [--limit SECONDS] [--total SECONDS] [SECTION ...]

Each section runs in a process of its own with a time limit, so that an error in one cannot spoil the next.
Writes DIR/gpu-facts.json and DIR/gpu-facts.md after every section. No section asks for more than half of the
free device memory, none changes a setting of the card. Times are wall-clock medians; rates are GB/s (10^9
bytes). Exit code 1 if a section failed. On the simulator the figures mean nothing; the answers about rules do.
"""
import argparse, csv, ctypes as C, json, os, signal, statistics, subprocess, sys, threading, time
sys.dont_write_bytecode = True

from processes import end_by_signal

MiB, GiB = 1 << 20, 1 << 30
u64, sz, vp, i32, u32 = C.c_ulonglong, C.c_size_t, C.c_void_p, C.c_int, C.c_uint


class Loc(C.Structure):
    _fields_ = [("type", i32), ("id", i32)]


class Prop(C.Structure):  # CUmemAllocationProp
    _fields_ = [("type", i32), ("handles", i32), ("loc", Loc), ("win32", vp), ("flags", C.c_ubyte * 8)]


class Access(C.Structure):
    _fields_ = [("loc", Loc), ("flags", i32)]


PTX = b"""
.version 7.0
.target sm_70
.address_size 64
.visible .entry fill_u32(.param .u64 p, .param .u64 n, .param .u32 v)
{
 .reg .pred %q; .reg .b32 %r<8>; .reg .b64 %d<8>;
 ld.param.u64 %d1,[p]; ld.param.u64 %d2,[n]; ld.param.u32 %r5,[v];
 cvta.to.global.u64 %d1,%d1;
 mov.u32 %r1,%ctaid.x; mov.u32 %r2,%ntid.x; mov.u32 %r3,%tid.x;
 mad.lo.u32 %r4,%r1,%r2,%r3; cvt.u64.u32 %d3,%r4;
 mov.u32 %r6,%nctaid.x; mul.lo.u32 %r7,%r6,%r2; cvt.u64.u32 %d4,%r7;
L: setp.ge.u64 %q,%d3,%d2; @%q bra E;
 shl.b64 %d5,%d3,2; add.u64 %d6,%d1,%d5; st.global.u32 [%d6],%r5;
 add.u64 %d3,%d3,%d4; bra L;
E: ret;
}
.visible .entry sum4(.param .u64 p, .param .u64 n, .param .u64 o)
{
 .reg .pred %q; .reg .b32 %r<16>; .reg .b64 %d<8>;
 ld.param.u64 %d1,[p]; ld.param.u64 %d2,[n]; ld.param.u64 %d7,[o];
 cvta.to.global.u64 %d1,%d1; cvta.to.global.u64 %d7,%d7;
 mov.u32 %r1,%ctaid.x; mov.u32 %r2,%ntid.x; mov.u32 %r3,%tid.x;
 mad.lo.u32 %r4,%r1,%r2,%r3; cvt.u64.u32 %d3,%r4;
 mov.u32 %r6,%nctaid.x; mul.lo.u32 %r7,%r6,%r2; cvt.u64.u32 %d4,%r7; mov.u32 %r12,0;
L: setp.ge.u64 %q,%d3,%d2; @%q bra E;
 shl.b64 %d5,%d3,4; add.u64 %d6,%d1,%d5; ld.global.v4.u32 {%r8,%r9,%r10,%r11},[%d6];
 add.u32 %r12,%r12,%r8; add.u32 %r12,%r12,%r9; add.u32 %r12,%r12,%r10; add.u32 %r12,%r12,%r11;
 add.u64 %d3,%d3,%d4; bra L;
E: red.global.add.u32 [%d7],%r12; ret;
}
.visible .entry spin_ns(.param .u64 c)
{
 .reg .pred %q; .reg .b64 %d<5>;
 ld.param.u64 %d1,[c]; mov.u64 %d2,%globaltimer;
L: mov.u64 %d3,%globaltimer; sub.u64 %d4,%d3,%d2; setp.lt.u64 %q,%d4,%d1; @%q bra L;
 ret;
}
"""  # fill_u32 and spin_ns are also kernels that the simulator has built in; sum4 is not


class CudaError(Exception):
    pass


class Gpu:
    """The public driver API by ctypes: call(name, ...) raises on an error, code(name, ...) returns it."""

    def __init__(self, context=True):
        self.lib = C.CDLL("libcuda.so.1")
        self.call("cuInit", 0)
        dev = i32()
        self.call("cuDeviceGet", C.byref(dev), 0)
        self.dev = dev.value
        if context:
            self.ctx = vp()
            self.call("cuDevicePrimaryCtxRetain", C.byref(self.ctx), self.dev)
            self.call("cuCtxSetCurrent", self.ctx)

    def code(self, name, *a):
        return getattr(self.lib, name)(*a)

    def call(self, name, *a):
        r = self.code(name, *a)
        if r:
            raise CudaError(f"{name} -> {r}")

    def attr(self, n):
        v = i32()
        return v.value if self.code("cuDeviceGetAttribute", C.byref(v), n, self.dev) == 0 else None

    def free(self):
        f, t = sz(), sz()
        self.call("cuMemGetInfo_v2", C.byref(f), C.byref(t))
        return f.value

    def share(self, most, part=4):
        """At most `most` bytes and a part of what is free, in whole granules."""
        return max(2 * MiB, min(most, self.free() // part) // (2 * MiB) * (2 * MiB))

    def stream(self):
        s = vp()
        self.call("cuStreamCreate", C.byref(s), 1)
        return s

    def prop(self, loc_type=1, loc_id=None):
        return Prop(1, 0, Loc(loc_type, self.dev if loc_id is None else loc_id), None)

    def granularity(self, prop):
        g = sz()
        self.call("cuMemGetAllocationGranularity", C.byref(g), C.byref(prop), 0)
        return g.value

    def reserve(self, n):
        va = u64()
        self.call("cuMemAddressReserve", C.byref(va), sz(n), sz(0), u64(0), u64(0))
        return va.value

    def create(self, n, prop=None):
        h = u64()
        p = prop or self.prop()
        self.call("cuMemCreate", C.byref(h), sz(n), C.byref(p), u64(0))
        return h

    def map(self, va, n, h):
        self.call("cuMemMap", u64(va), sz(n), sz(0), h, u64(0))

    def access(self, va, n):
        a = Access(Loc(1, self.dev), 3)
        self.call("cuMemSetAccess", u64(va), sz(n), C.byref(a), sz(1))

    def unmap(self, va, n):
        self.call("cuMemUnmap", u64(va), sz(n))

    def release(self, h):
        self.call("cuMemRelease", h)

    def mapped(self, n, chunk=None):
        chunk = chunk or n
        va, hs = self.reserve(n), []
        for o in range(0, n, chunk):
            h = self.create(chunk)
            self.map(va + o, chunk, h)
            hs.append(h)
        self.access(va, n)
        return va, hs

    def pinned(self, n):
        p = vp()
        self.call("cuMemHostAlloc", C.byref(p), sz(n), 1)
        return p.value

    def sync(self, s=None):
        self.call("cuStreamSynchronize", s) if s is not None else self.call("cuCtxSynchronize")

    def kernels(self):
        m = vp()
        self.call("cuModuleLoadData", C.byref(m), PTX + b"\0")
        out = {}
        for k in ("fill_u32", "sum4", "spin_ns"):
            f = vp()
            self.call("cuModuleGetFunction", C.byref(f), m, k.encode())
            out[k] = f
        return out

    def launch(self, f, stream, *args, blocks=1056, threads=256):
        ptrs = (vp * len(args))(*[C.cast(C.pointer(a), vp) for a in args])
        self.call("cuLaunchKernel", f, blocks, 1, 1, threads, 1, 1, 0, stream, ptrs, None)


def timed(f, n=1):
    t = time.perf_counter()
    for _ in range(n):
        f()
    return (time.perf_counter() - t) / n


def med(f, reps=5):
    return statistics.median(timed(f) for _ in range(reps))


# ------------------------------------------------------------------ sections: each returns a dict
def device():
    g = Gpu()
    v, name = i32(), C.create_string_buffer(100)
    g.call("cuDriverGetVersion", C.byref(v))
    g.call("cuDeviceGetName", name, 100, g.dev)

    t = sz()
    g.call("cuDeviceTotalMem_v2", C.byref(t), g.dev)
    return {"name": name.value.decode(), "driver_cuda": v.value, "total_MiB": t.value // MiB, "free_MiB": g.free() // MiB,
            "multiprocessors": g.attr(16), "copy_engines": g.attr(40), "vmm": g.attr(102), "host_numa_vmm": g.attr(141),
            "rdma_with_vmm": g.attr(110), "granularity": g.granularity(g.prop()), "cpus": os.cpu_count(),
            "kernel": os.uname().release}


def addresses(api):
    """Does cuGetProcAddress hand out the exported addresses?"""
    g = Gpu()
    same = differ = missing = 0
    bad = []
    if not os.path.exists(api):
        return {"not asked": f"{api} is missing: name the list of entry points with --api"}
    with open(api) as f:
        lines = [line for line in f if not line.startswith("#")]
    names = ["exported_symbol", "base_name", "gpa_version", "per_thread_variant"]
    if lines[0].startswith(names[0]):  # the list may have a first line with the names of its columns
        names = None
    for r in csv.DictReader(lines, names):
        try:
            exported = C.cast(getattr(g.lib, r["exported_symbol"]), vp).value
        except AttributeError:
            missing += 1
            continue
        p, status = vp(), i32()
        flags = 2 if r["per_thread_variant"] else 0
        if not r["gpa_version"] or g.code("cuGetProcAddress_v2", r["base_name"].encode(), C.byref(p), int(r["gpa_version"]), u64(flags), C.byref(status)):
            continue
        if p.value == exported:
            same += 1
        else:
            differ += 1
            bad.append(r["exported_symbol"])
    return {"same": same, "differ": differ, "not_exported_here": missing, "differing": bad[:40]}


def vmm_cost():
    g = Gpu()
    rows = {}
    for size in (2 * MiB, 16 * MiB, 64 * MiB, 128 * MiB, 256 * MiB, 512 * MiB, GiB):
        n = max(4, min(128, g.free() // 2 // size))
        if n * size > g.free() // 2:
            continue
        va = g.reserve(size * n)
        hs = []
        t = {"create": timed(lambda: hs.append(g.create(size)), n)}
        it = iter(range(n))
        t["map"] = timed(lambda: (lambda i: g.map(va + i * size, size, hs[i]))(next(it)), n)
        t["set_access_all_at_once"] = timed(lambda: g.access(va, size * n)) / n
        it2 = iter(range(n))
        t["unmap"] = timed(lambda: g.unmap(va + next(it2) * size, size), n)
        it3 = iter(range(n))
        t["map_again"] = timed(lambda: (lambda i: g.map(va + i * size, size, hs[i]))(next(it3)), n)
        it4 = iter(range(n))
        t["set_access_each"] = timed(lambda: g.access(va + next(it4) * size, size), n)
        for i in range(n):
            g.unmap(va + i * size, size)
        it5 = iter(hs)
        t["release"] = timed(lambda: g.release(next(it5)), n)
        g.call("cuMemAddressFree", u64(va), sz(size * n))
        us = {k: round(v * 1e6, 2) for k, v in t.items()}
        us["ms_per_GiB_in"] = round((t["create"] + t["map"] + t["set_access_all_at_once"]) * 1e3 * GiB / size, 3)
        us["ms_per_GiB_out"] = round((t["unmap"] + t["release"]) * 1e3 * GiB / size, 3)
        rows[f"{size // MiB} MiB"] = us
    p = u64()
    big = min(GiB, g.free() // 4)
    rows["cuMemAlloc_v2+free us"] = {}
    for s in (4096, MiB, 64 * MiB, big):
        def pair():
            g.call("cuMemAlloc_v2", C.byref(p), sz(s)); g.call("cuMemFree_v2", p)
        rows["cuMemAlloc_v2+free us"][str(s)] = round(med(pair, 20) * 1e6, 1)
    return rows


def vmm_two_processes():
    """Do two processes' mapping phases slow each other down?"""
    me = [sys.executable, os.path.abspath(__file__), "--section", "vmm_loop"]

    def together(count):
        """Each waits for a line before it begins to measure, so that start-up does not count."""
        ps = [subprocess.Popen(me, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
              for _ in range(count)]
        try:
            for p in ps:
                if p.stdout.readline().strip() != "ready":
                    raise CudaError("vmm_loop did not start: " + p.stderr.read()[-300:])
            for p in ps:
                p.stdin.write("go\n"); p.stdin.flush()
            return [json.loads(p.communicate(timeout=60)[0])["seconds"] for p in ps]
        finally:
            for p in ps:
                p.kill(); p.wait()
    one, two = together(1)[0], together(2)
    return {"alone_s": one, "two_at_once_s": two, "slowdown": round(max(two) / one, 2)}


def vmm_loop():
    g = Gpu()
    size, n = 64 * MiB, 16
    while n * size > g.free() // 4 and size > 2 * MiB:  # two of these run at once
        size //= 2
    va = g.reserve(size * n)

    def body():
        hs = [g.create(size) for _ in range(n)]
        for i, h in enumerate(hs):
            g.map(va + i * size, size, h)
        g.access(va, size * n)
        for i, h in enumerate(hs):
            g.unmap(va + i * size, size); g.release(h)
    body()
    print("ready", flush=True)
    sys.stdin.readline()
    return {"seconds": round(timed(body, 20), 5)}


def zeroed():
    """Is memory from cuMemCreate zero, after it was dirtied and released?"""
    g = Gpu()
    n, total = g.share(256 * MiB), 0
    host = g.pinned(n)
    view = (C.c_ubyte * n).from_address(host)
    rounds = max(1, min(8, g.free() // 2 // n))
    va = g.reserve(n * rounds)
    hs = []
    for i in range(rounds):
        h = g.create(n); g.map(va + i * n, n, h); hs.append(h)
    g.access(va, n * rounds)
    g.call("cuMemsetD8_v2", u64(va), C.c_ubyte(0xAB), sz(n * rounds)); g.sync()
    for i, h in enumerate(hs):
        g.unmap(va + i * n, n); g.release(h)
    dirty = 0
    for i in range(rounds):
        h = g.create(n); g.map(va + i * n, n, h); g.access(va + i * n, n)
        g.call("cuMemcpyDtoH_v2", vp(host), u64(va + i * n), sz(n))
        dirty += n - bytes(view).count(0)
        total += n
    return {"bytes_checked": total, "nonzero_bytes": dirty}


def copies():
    g = Gpu()
    n = g.share(GiB)
    h1, h2 = g.pinned(n), g.pinned(n)
    va, _ = g.mapped(2 * n)
    s1, s2 = g.stream(), g.stream()
    out = {}

    def run(chunk, h2d, d2h):
        for o in range(0, n, chunk):
            if h2d:
                g.call("cuMemcpyHtoDAsync_v2", u64(va + o), vp(h1 + o), sz(min(chunk, n - o)), s1)
            if d2h:
                g.call("cuMemcpyDtoHAsync_v2", vp(h2 + o), u64(va + n + o), sz(min(chunk, n - o)), s2)
        g.sync(s1); g.sync(s2)
    for chunk in sorted({c for c in (256 * 1024, MiB, 2 * MiB, 4 * MiB, 16 * MiB, 64 * MiB) if c < n} | {n}):
        run(chunk, 1, 1)
        out[f"{chunk / MiB:g} MiB"] = {
            "h2d": round(n / med(lambda: run(chunk, 1, 0)) / 1e9, 2), "d2h": round(n / med(lambda: run(chunk, 0, 1)) / 1e9, 2),
            "both_total": round(2 * n / med(lambda: run(chunk, 1, 1)) / 1e9, 2)}
    m = min(256 * MiB, n)
    big = (C.c_ubyte * m)()
    C.memset(C.addressof(big), 1, m)
    out[f"pageable {m // MiB} MiB"] = {
        "h2d": round(m / med(lambda: g.call("cuMemcpyHtoD_v2", u64(va), C.byref(big), sz(m)), 3) / 1e9, 2),
        "d2h": round(m / med(lambda: g.call("cuMemcpyDtoH_v2", C.byref(big), u64(va), sz(m)), 3) / 1e9, 2)}
    return out


def registration():
    """Seconds per GiB to populate and to register each kind of host memory, and the copy rate from it."""
    g = Gpu()
    n = g.share(GiB, 2)
    va, _ = g.mapped(n)
    s = g.stream()
    per_gib = GiB / n
    libc = C.CDLL(None, use_errno=True)
    libc.mmap.restype = vp
    libc.mmap.argtypes = [vp, sz, i32, i32, i32, C.c_long]
    out = {}

    def kind(name, flags, fd=-1, huge=False):
        p = libc.mmap(None, n, 3, flags, fd, 0)
        if p in (None, 2**64 - 1, -1):
            out[name] = "mmap failed"; return
        if flags == 0x22:  # plain pages are to be plain, whatever the system's setting for huge ones
            libc.madvise(vp(p), sz(n), 14 if huge else 15)
        try:
            t_pop = timed(lambda: C.memset(p, 1, n))
            t_reg = timed(lambda: g.call("cuMemHostRegister_v2", vp(p), sz(n), 1))
            def go():
                g.call("cuMemcpyHtoDAsync_v2", u64(va), vp(p), sz(n), s); g.sync(s)
            rate = n / med(go) / 1e9
            t_un = timed(lambda: g.call("cuMemHostUnregister", vp(p)))
            out[name] = {"populate_s": round(t_pop * per_gib, 3), "register_s": round(t_reg * per_gib, 3),
                         "unregister_s": round(t_un * per_gib, 3), "h2d_GBps": round(rate, 1)}
        except CudaError as e:
            out[name] = str(e)
        libc.munmap(vp(p), sz(n))
    kind("anonymous 4 KiB", 0x22)
    kind("anonymous huge (THP)", 0x22, huge=True)
    kind("anonymous hugetlb", 0x22 | 0x40000)
    fd = os.memfd_create("facts"); os.ftruncate(fd, n)
    kind("memfd", 0x01, fd); os.close(fd)
    try:
        fd = os.memfd_create("facts", os.MFD_HUGETLB); os.ftruncate(fd, n); kind("memfd hugetlb", 0x01, fd); os.close(fd)
    except (OSError, AttributeError) as e:
        out["memfd hugetlb"] = str(e)
    out["cuMemHostAlloc_s"] = round(timed(lambda: g.pinned(n)) * per_gib, 3)
    return out


def host_remap():
    """An address first backed by device memory, then by host memory: do copies and kernels still reach it?"""
    g = Gpu()
    k, s, n = g.kernels(), g.stream(), g.share(256 * MiB)
    o = u64(); g.call("cuMemAlloc_v2", C.byref(o), sz(4096))
    va = g.reserve(n)
    h = g.create(n); g.map(va, n, h); g.access(va, n)

    def total():
        # The memset is on the legacy stream, which a non-blocking stream does not wait for.
        g.call("cuMemsetD32_v2", o, u32(0), sz(1)); g.sync()
        g.launch(k["sum4"], s, u64(va), u64(n // 16), o); g.sync(s)
        r = u32(); g.call("cuMemcpyDtoH_v2", C.byref(r), o, sz(4))
        return r.value
    g.launch(k["fill_u32"], s, u64(va), u64(n // 4), u32(3)); g.sync(s)
    try:
        want, out = total(), {}
    except CudaError as e:
        if "801" not in str(e):
            raise
        return {"not asked": "this driver does not run the kernel: the simulator does not have it built in"}
    t_dev = med(lambda: total())
    out["device_read_GBps"] = round(n / t_dev / 1e9, 1)
    host = g.pinned(n)
    g.call("cuMemcpyDtoH_v2", vp(host), u64(va), sz(n))
    g.unmap(va, n); g.release(h)
    for name, t, i in (("HOST_NUMA", 3, 0), ("HOST", 2, 0)):
        hh, mapped = None, False
        try:
            p = g.prop(t, i)
            hh = g.create(n, p)
            g.map(va, n, hh); mapped = True
            a = (Access * 1)(Access(Loc(1, g.dev), 3))
            g.call("cuMemSetAccess", u64(va), sz(n), a, sz(1))
            g.call("cuMemcpyHtoD_v2", u64(va), vp(host), sz(n))
            ok = want != 0 and total() == want
            out[name] = {"granularity": g.granularity(p), "kernel_reads_right": ok, "kernel_read_GBps": round(n / med(total) / 1e9, 1)}
        except CudaError as e:
            out[name] = str(e)
        # What one kind leaves behind must not spoil the next.
        if mapped:
            g.code("cuMemUnmap", u64(va), sz(n))
        if hh is not None:
            g.code("cuMemRelease", hh)
    return out


def graph_after_remap():
    """Is a captured graph (kernel, copy and memset nodes) valid after its memory left and came back at the same address?"""
    g = Gpu()
    k, s, out = g.kernels(), g.stream(), {}
    n = 64 * MiB
    third = n // 4
    for chunk in (64 * MiB, 16 * MiB):
        va, hs = g.mapped(n, chunk)
        g.call("cuStreamBeginCapture_v2", s, 0)
        g.launch(k["fill_u32"], s, u64(va), u64(third // 4), u32(7))
        g.call("cuMemcpyDtoDAsync_v2", u64(va + third), u64(va), sz(third), s)
        g.call("cuMemsetD32Async", u64(va + 2 * third), u32(9), sz(third // 4), s)
        graph, ex = vp(), vp()
        g.call("cuStreamEndCapture", s, C.byref(graph))
        g.call("cuGraphInstantiateWithFlags", C.byref(ex), graph, u64(0))
        g.call("cuGraphLaunch", ex, s); g.sync(s)
        for i, h in enumerate(hs):
            g.unmap(va + i * chunk, chunk); g.release(h)
        for i in range(n // chunk):
            h = g.create(chunk); g.map(va + i * chunk, chunk, h)
        g.access(va, n)
        g.call("cuMemsetD8_v2", u64(va), C.c_ubyte(0), sz(n)); g.sync()
        r = g.code("cuGraphLaunch", ex, s)
        r2 = g.code("cuStreamSynchronize", s)
        b = (u32 * (n // 4))()
        r3 = g.code("cuMemcpyDtoH_v2", C.byref(b), u64(va), sz(n))
        q = third // 4
        out[f"handles of {chunk // MiB} MiB"] = {"launch, sync, one copy over all handles": [r, r2, r3],
                                                "kernel node right": b[5] == 7 and b[q - 1] == 7, "copy node right": b[q + 5] == 7 and b[2 * q - 1] == 7,
                                                "memset node right": b[2 * q + 5] == 9 and b[3 * q - 1] == 9}
    return out


def waits():
    """Which calls wait for an unrelated kernel of about a second that is running?"""
    g = Gpu()
    k, s, n, out = g.kernels(), g.stream(), 64 * MiB, {}
    spin_time = u64(1_000_000_000)

    def ask(name, prepare, call):
        x = prepare()
        g.sync()
        g.launch(k["spin_ns"], s, spin_time, blocks=1, threads=1)
        time.sleep(0.05)
        t = time.perf_counter(); r = call(x); dt = time.perf_counter() - t
        running = g.code("cuStreamQuery", s)
        g.sync(s)
        out[name] = {"result": r, "ms": round(dt * 1e3, 2), "kernel still running after it": running == 600}

    def alloc():
        p = u64(); g.call("cuMemAlloc_v2", C.byref(p), sz(n)); return p

    def mapping():
        return g.mapped(n)
    ask("cuMemFree", alloc, lambda p: g.code("cuMemFree_v2", p))
    ask("cuMemAlloc", lambda: None, lambda _: g.code("cuMemAlloc_v2", C.byref(u64()), sz(n)))
    ask("cuMemUnmap+cuMemRelease", mapping, lambda m: g.code("cuMemUnmap", u64(m[0]), sz(n)) or g.code("cuMemRelease", m[1][0]))
    ask("cuMemCreate", lambda: None, lambda _: g.code("cuMemCreate", C.byref(u64()), sz(n), C.byref(g.prop()), u64(0)))

    def unmapped():
        return g.reserve(n), g.create(n)
    a = Access(Loc(1, g.dev), 3)
    ask("cuMemMap+cuMemSetAccess", unmapped, lambda m: g.code("cuMemMap", u64(m[0]), sz(n), sz(0), m[1], u64(0)) or g.code("cuMemSetAccess", u64(m[0]), sz(n), C.byref(a), sz(1)))
    ask("cuMemHostAlloc", lambda: None, lambda _: g.code("cuMemHostAlloc", C.byref(vp()), sz(n), 1))
    return out


def context_end():
    """Does VMM memory outlive its primary context's reset? Does plain memory?"""
    g = Gpu()
    n = g.share(512 * MiB)
    out, before = {"each_MiB": n // MiB}, g.free()
    va, hs = g.mapped(n)
    p = u64(); g.call("cuMemAlloc_v2", C.byref(p), sz(n))
    out["taken_MiB"] = (before - g.free()) // MiB
    out["reset"] = g.code("cuDevicePrimaryCtxReset_v2", g.dev)
    g.call("cuDevicePrimaryCtxRetain", C.byref(g.ctx), g.dev); g.call("cuCtxSetCurrent", g.ctx)
    out["still_taken_MiB"] = (before - g.free()) // MiB
    out["VMM address usable"] = g.code("cuMemsetD8_v2", u64(va), C.c_ubyte(1), sz(2 * MiB))
    out["unmap, release"] = [g.code("cuMemUnmap", u64(va), sz(n)), g.code("cuMemRelease", hs[0])]
    return out


def capture():
    """Which calls fail while a stream captures in GLOBAL mode: here, in another thread, in a relaxed thread; does the capture survive?"""
    g = Gpu()
    other, n = g.stream(), 2 * MiB
    host = g.pinned(n)
    va2, _ = g.mapped(n)
    ev = vp(); g.call("cuEventCreate", C.byref(ev), 0)

    def fresh(need):
        """An operation's own material, made before the capture begins."""
        st = {}
        if need == "memory":
            st["p"] = u64(); g.call("cuMemAlloc_v2", C.byref(st["p"]), sz(n))
        if need in ("range", "mapped"):
            st["va"] = u64(g.reserve(n))
        if need in ("range", "handle", "mapped"):
            st["h"] = g.create(n)
        if need == "mapped":
            g.map(st["va"].value, n, st["h"])
        return st
    a, f, t, pr = Access(Loc(1, g.dev), 3), sz(), sz(), g.prop()
    ops = {  # name: (what it needs, the call)
        "cuMemAlloc": (None, lambda st: g.code("cuMemAlloc_v2", C.byref(u64()), sz(n))),
        "cuMemFree": ("memory", lambda st: g.code("cuMemFree_v2", st["p"])),
        "cuMemAddressReserve": (None, lambda st: g.code("cuMemAddressReserve", C.byref(u64()), sz(n), sz(0), u64(0), u64(0))),
        "cuMemCreate": (None, lambda st: g.code("cuMemCreate", C.byref(u64()), sz(n), C.byref(pr), u64(0))),
        "cuMemMap": ("range", lambda st: g.code("cuMemMap", st["va"], sz(n), sz(0), st["h"], u64(0))),
        "cuMemSetAccess": ("mapped", lambda st: g.code("cuMemSetAccess", st["va"], sz(n), C.byref(a), sz(1))),
        "cuMemUnmap": ("mapped", lambda st: g.code("cuMemUnmap", st["va"], sz(n))),
        "cuMemRelease": ("handle", lambda st: g.code("cuMemRelease", st["h"])),
        "cuMemcpyHtoDAsync other stream": (None, lambda st: g.code("cuMemcpyHtoDAsync_v2", u64(va2), vp(host), sz(n), other)),
        "cuMemcpyDtoH synchronous": (None, lambda st: g.code("cuMemcpyDtoH_v2", vp(host), u64(va2), sz(n))),
        "cuStreamSynchronize other": (None, lambda st: g.code("cuStreamSynchronize", other)),
        "cuEventRecord other": (None, lambda st: g.code("cuEventRecord", ev, other)),
        "cuEventQuery": (None, lambda st: g.code("cuEventQuery", ev)),
        "cuMemGetInfo": (None, lambda st: g.code("cuMemGetInfo_v2", C.byref(f), C.byref(t))),
        "cuCtxSynchronize": (None, lambda st: g.code("cuCtxSynchronize")),
    }

    def attempt(need, call, how):
        s, graph, box, st = g.stream(), vp(), {}, fresh(need)
        g.call("cuStreamBeginCapture_v2", s, 0)

        def body():
            g.call("cuCtxSetCurrent", g.ctx)
            if how == "relaxed thread":
                m = i32(2); g.call("cuThreadExchangeStreamCaptureMode", C.byref(m))
            box["r"] = call(st)
        if how == "same thread":
            body()
        else:
            th = threading.Thread(target=body); th.start(); th.join()
        return [box.get("r"), g.code("cuStreamEndCapture", s, C.byref(graph))]
    return {"each: [result, cuStreamEndCapture]": {name: {how: attempt(need, call, how) for how in ("same thread", "other thread", "relaxed thread")}
                                                   for name, (need, call) in ops.items()}}


def queries():
    """What address queries and IPC say of memory that is one reservation of several handles."""
    g = Gpu()
    n, c = 64 * MiB, 16 * MiB
    va, hs = g.mapped(n, c)
    base, size = u64(), sz()
    g.call("cuMemGetAddressRange_v2", C.byref(base), C.byref(size), u64(va + c + 5))
    out = {"cuMemGetAddressRange": [base.value - va, size.value]}
    for nm, at in (("RANGE_START_ADDR", 11), ("RANGE_SIZE", 12), ("MAPPED", 13), ("IS_LEGACY_CUDA_IPC_CAPABLE", 10), ("MEMORY_TYPE", 2)):
        v = u64()
        r = g.code("cuPointerGetAttribute", C.byref(v), at, u64(va + c + 5))
        out[nm] = [r, v.value - va if nm == "RANGE_START_ADDR" and not r else v.value]
    ipc = (C.c_ubyte * 64)()
    out["cuIpcGetMemHandle"] = g.code("cuIpcGetMemHandle", C.byref(ipc), u64(va))
    h = u64()
    out["cuMemRetainAllocationHandle"] = [g.code("cuMemRetainAllocationHandle", C.byref(h), vp(va + c)), "same" if h.value == hs[1].value else "other"]
    out["cuMemUnmap of two handles in one call"] = g.code("cuMemUnmap", u64(va), sz(2 * c))
    return out


def uuid():
    """The first device's name for NVML; asked in a process of its own, since it needs cuInit."""
    g, raw = Gpu(False), (C.c_ubyte * 16)()
    g.call("cuDeviceGetUuid_v2", raw, g.dev)
    h = bytes(raw).hex()
    return {"uuid": f"GPU-{h[:8]}-{h[8:12]}-{h[12:16]}-{h[16:20]}-{h[20:]}"}


class Watch:
    """What NVML says of CUDA's first device: used by all, and by this process (None: it does not say)."""

    class Mem(C.Structure):
        _fields_ = [("total", u64), ("free", u64), ("used", u64)]

    class Process(C.Structure):  # nvmlProcessInfo_v2_t
        _fields_ = [("pid", u32), ("used", u64), ("gi", u32), ("ci", u32)]

    def __init__(self):
        self.nv, self.d = C.CDLL("libnvidia-ml.so.1"), vp()
        if self.nv.nvmlInit_v2():
            raise CudaError("nvmlInit_v2 failed")
        # CUDA's first device need not be NVML's: CUDA_VISIBLE_DEVICES and the order differ.
        probe = subprocess.run([sys.executable, os.path.abspath(__file__), "--section", "uuid"], capture_output=True, text=True)
        text = json.loads(probe.stdout)["uuid"]
        if self.nv.nvmlDeviceGetHandleByUUID(text.encode(), C.byref(self.d)):
            raise CudaError(f"NVML does not know {text}")

    def used(self):
        m = self.Mem()
        if self.nv.nvmlDeviceGetMemoryInfo(self.d, C.byref(m)):
            raise CudaError("nvmlDeviceGetMemoryInfo failed")
        return m.used // MiB

    def own(self):
        """None: this process is not in the list; a list of pids: it is not, and these are."""
        n, all_ = u32(64), (self.Process * 64)()
        r = self.nv.nvmlDeviceGetComputeRunningProcesses_v3(self.d, C.byref(n), all_)
        if r:
            return f"error {r}"
        mine = [p.used // MiB for p in all_[:n.value] if p.pid == os.getpid()]
        return mine[0] if mine else [p.pid for p in all_[:n.value]]


def overhead():
    """Device memory that a context and a module take, by NVML, in MiB: of the device, of this process."""
    w = Watch()
    a = w.used()
    g = Gpu(False)
    b = w.used()
    ctx = vp(); t = timed(lambda: g.call("cuDevicePrimaryCtxRetain", C.byref(ctx), g.dev)); g.call("cuCtxSetCurrent", ctx)
    c, own = w.used(), w.own(); g.kernels(); e = w.used()
    return {"before_MiB": a, "after_cuInit": b, "after_context": c, "this_process": own, "after_module": e, "context_s": round(t, 3)}


def limits():
    """MiB that a raised limit takes at once, and with the first launch after it: by cuMemGetInfo, NVML's device, this process."""
    out, w = {}, Watch()
    g = Gpu(); k, s = g.kernels(), g.stream()
    va, _ = g.mapped(2 * MiB)

    def look():
        return g.free() // MiB, w.used(), w.own()

    def go():
        g.launch(k["fill_u32"], s, u64(va), u64(1024), u32(1)); g.sync()
    go()
    for name, number, value in (("STACK_SIZE 1 KiB", 0, 1024), ("STACK_SIZE 16 KiB", 0, 16384), ("STACK_SIZE 1 KiB again", 0, 1024),
                                ("PRINTF_FIFO_SIZE 64 MiB", 1, 64 * MiB), ("MALLOC_HEAP_SIZE 512 MiB", 2, 512 * MiB),
                                ("DEV_RUNTIME_PENDING_LAUNCH_COUNT 65536", 4, 65536)):
        before, had = look(), sz()
        g.code("cuCtxGetLimit", C.byref(had), number)
        r = g.code("cuCtxSetLimit", number, sz(value))
        after = look(); go(); then = look()
        diff = lambda x: [before[0] - x[0], x[1] - before[1], x[2] - before[2] if isinstance(x[2], int) and isinstance(before[2], int) else None]
        out[name] = {"was": had.value, "result": r, "at once": diff(after), "after a launch": diff(then)}
    return out


def managed():
    """1 GiB of managed memory: what of it cuMemGetInfo, NVML's device and process figures show, in MiB, and how fast a kernel reads it."""
    w, out = Watch(), {}
    g = Gpu(); k, s = g.kernels(), g.stream()
    n = min(GiB, g.share(GiB))
    p, o = u64(), u64()
    g.call("cuMemAlloc_v2", C.byref(o), sz(4))
    look = lambda: (g.free() // MiB, w.used(), w.own())
    base = look()

    def note(label):
        now = look()
        out[label] = [base[0] - now[0], now[1] - base[1], now[2] - base[2] if isinstance(now[2], int) and isinstance(base[2], int) else now[2]]

    def rate():
        try:
            return round(n / timed(lambda: (g.launch(k["sum4"], s, p, u64(n // 16), o), g.sync())) / 1e9, 1)
        except CudaError as why:  # the simulator has no such kernel
            return str(why)
    g.call("cuMemAllocManaged", C.byref(p), sz(n), 1)
    note("allocated")
    g.launch(k["fill_u32"], s, p, u64(n // 4), u32(3)); g.sync()
    note("written by a kernel")
    out["kernel_read_GBps"] = [rate() for _ in range(3)]
    C.memset(p.value, 1, n)
    note("written by the CPU")
    out["kernel_read_after_CPU_GBps"] = rate()
    note("read by a kernel")
    v = u64()
    r = g.code("cuMemAlloc_v2", C.byref(v), sz(n))
    note("and as much allocated plainly"); out["that answered"] = r
    if r == 0:
        g.call("cuMemFree_v2", v)
    g.call("cuMemFree_v2", p)
    note("freed")
    return out


def answers():
    """What the driver answers where its documentation leaves it open: [error, value]."""
    g, out = Gpu(), {}
    on, off, v = u32(1), u32(0), u64()
    p = u64(); g.call("cuMemAlloc_v2", C.byref(p), sz(4 * MiB))
    va, hs = g.mapped(4 * MiB)
    prop = g.prop(); prop.flags[1] = 1  # gpuDirectRDMACapable
    r = g.reserve(4 * MiB); h = u64()
    rdma = g.code("cuMemCreate", C.byref(h), sz(4 * MiB), C.byref(prop), u64(0))
    out["cuMemCreate with gpuDirectRDMACapable"] = rdma
    places = [("cuMemAlloc", p.value), ("cuMemMap", va)]
    if rdma == 0:
        g.map(r, 4 * MiB, h); g.access(r, 4 * MiB)
        places.append(("cuMemMap with gpuDirectRDMACapable", r))
    for name, at in places:
        out["SYNC_MEMOPS set on " + name] = g.code("cuPointerSetAttribute", C.byref(on), 6, u64(at))
        out["SYNC_MEMOPS cleared on " + name] = g.code("cuPointerSetAttribute", C.byref(off), 6, u64(at))
    again = g.reserve(8 * MiB)
    out["cuMemUnmap of what is reserved"] = g.code("cuMemUnmap", u64(again), sz(4 * MiB))
    out["cuMemUnmap of what is not reserved"] = g.code("cuMemUnmap", u64(0x600000000000), sz(4 * MiB))
    out["cuMemUnmap of cuMemAlloc's"] = g.code("cuMemUnmap", p, sz(4 * MiB))
    h2 = g.create(4 * MiB); g.map(again, 4 * MiB, h2)
    out["cuMemUnmap of mapped and unmapped"] = g.code("cuMemUnmap", u64(again), sz(8 * MiB))
    out["cuMemMap with an offset"] = g.code("cuMemMap", u64(again + 4 * MiB), sz(2 * MiB), sz(2 * MiB), hs[0], u64(0))
    out["cuMemMap with flags"] = g.code("cuMemMap", u64(again + 4 * MiB), sz(4 * MiB), sz(0), hs[0], u64(1))
    mode = i32(17)
    out["cuThreadExchangeStreamCaptureMode(17), and the mode then"] = [g.code("cuThreadExchangeStreamCaptureMode", C.byref(mode))]
    mode2 = i32(0); g.code("cuThreadExchangeStreamCaptureMode", C.byref(mode2))
    out["cuThreadExchangeStreamCaptureMode(17), and the mode then"].append(mode2.value)
    # Entry points of before CUDA 3.2, which have 32-bit addresses and sizes.
    p32, free32, total32 = u32(0xabababab), u32(0), u32(0)
    for name, args in (("cuMemGetInfo", (C.byref(free32), C.byref(total32))), ("cuMemAlloc", (C.byref(p32), u32(4 * MiB))),
                       ("cuDeviceTotalMem", (C.byref(total32), g.dev)), ("cuMemsetD8", (p32, C.c_ubyte(1), u32(MiB))), ("cuMemFree", (p32,))):
        try:
            code = g.code(name, *args)
        except AttributeError:
            code = "not exported"
        out[f"{name} of the first version"] = [code, p32.value if name == "cuMemAlloc" else free32.value if "Info" in name else total32.value if "Total" in name else None]
    # Stream-ordered memory freed by cuMemFree: when does the pool's figure go down?
    pool, used = vp(), u64()
    g.call("cuDeviceGetDefaultMemPool", C.byref(pool), g.dev)
    s, q = g.stream(), u64()
    g.call("cuMemAllocAsync", C.byref(q), sz(16 * MiB), s); g.sync(s)

    def figure():
        g.call("cuMemPoolGetAttribute", pool, 7, C.byref(used)); return used.value
    row = [figure(), g.code("cuMemFree_v2", q), figure()]
    g.sync(); row.append(figure()); g.sync(s); row.append(figure())
    g.call("cuMemAllocAsync", C.byref(q), sz(2 * MiB), s); g.call("cuMemFreeAsync", q, s); g.sync(s); row.append(figure())
    out["pool's used: at first, [cuMemFree], at once, context, stream synchronised, after another"] = row
    return out


def green():
    """MiB that green contexts take: by cuMemGetInfo, NVML's device, this process."""
    g, w, out = Gpu(), Watch(), {}
    if not hasattr(g.lib, "cuGreenCtxCreate"):
        return {"green contexts": "not in this driver"}
    look = lambda: (g.free() // MiB, w.used(), w.own())
    sm, n, desc = (C.c_ubyte * 144)(), u32(1), vp()
    out["cuDeviceGetDevResource"] = g.code("cuDeviceGetDevResource", g.dev, C.byref(sm), 1)
    part, rest = (C.c_ubyte * 144)(), (C.c_ubyte * 144)()
    out["cuDevSmResourceSplitByCount"] = g.code("cuDevSmResourceSplitByCount", C.byref(part), C.byref(n), C.byref(sm), C.byref(rest), 0, 16)
    out["cuDevResourceGenerateDesc"] = g.code("cuDevResourceGenerateDesc", C.byref(desc), C.byref(part), 1)
    had, made = look(), []
    for i in range(3):
        c = vp()
        r = g.code("cuGreenCtxCreate", C.byref(c), desc, g.dev, 1)
        now = look(); made.append(c)
        out[f"cuGreenCtxCreate {i + 1}"] = [r, had[0] - now[0], now[1] - had[1], now[2] if not isinstance(now[2], int) else now[2] - had[2]]
        if r:
            break
        ctx = vp(); s = vp()
        r2 = g.code("cuCtxFromGreenCtx", C.byref(ctx), c); r3 = g.code("cuGreenCtxStreamCreate", C.byref(s), c, 1, 0)
        now = look(); out[f"with a context and a stream {i + 1}"] = [r2, r3, had[0] - now[0], now[1] - had[1]]
    for c in made:
        if c.value:
            g.code("cuGreenCtxDestroy", c)
    now = look(); out["destroyed"] = [had[0] - now[0], now[1] - had[1]]
    return out


def checkpoint():
    """cuCheckpointProcess* on this process: with data in place, and with the data already paged out."""
    out, g = {}, Gpu()
    if not hasattr(g.lib, "cuCheckpointProcessLock"):
        return {"cuCheckpointProcess": "not in this driver"}
    n, p = g.share(4 * GiB, 2), u64()
    g.call("cuMemAlloc_v2", C.byref(p), sz(n)); g.call("cuMemsetD8_v2", p, C.c_ubyte(5), sz(n)); g.sync()
    for label in (f"{n // MiB} MiB allocated", "context only"):
        row, locked = {}, False
        for f in ("Lock", "Checkpoint", "Restore", "Unlock"):
            args = (C.c_ubyte * 256)()
            t = time.perf_counter()
            r = g.code("cuCheckpointProcess" + f, os.getpid(), C.byref(args))
            row[f] = [r, round(time.perf_counter() - t, 3)]
            locked = f != "Unlock" and (locked or r == 0)
            if r:
                break
        out[label] = row
        if any(v[0] for v in row.values()):
            # While locked every call of this process would hang: no more questions.
            if locked:
                row["Unlock after the error"] = g.code("cuCheckpointProcessUnlock", os.getpid(), C.byref((C.c_ubyte * 256)()))
            break
        if p.value:
            g.call("cuMemFree_v2", p); p = u64()
    return out



SECTIONS = dict(device=device, addresses=addresses, vmm_cost=vmm_cost, vmm_two_processes=vmm_two_processes, zeroed=zeroed, copies=copies,
                registration=registration, host_remap=host_remap, graph_after_remap=graph_after_remap, waits=waits, context_end=context_end, capture=capture, queries=queries,
                overhead=overhead, answers=answers, limits=limits, managed=managed, green=green, checkpoint=checkpoint)


# Parts of sections that need a process of their own.
HELPERS = dict(vmm_loop=vmm_loop, uuid=uuid)


def default_api():
    """The list of entry points: beside this file, or where the source tree has it."""
    here = os.path.dirname(os.path.abspath(__file__))
    places = [os.path.join(here, "driver_api.csv"), os.path.join(here, "../interposer/core/table/cuda_h_13_5.csv")]
    return next((p for p in places if os.path.exists(p)), places[0])


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("sections", nargs="*", metavar="SECTION", help="one or more of: " + ", ".join(SECTIONS))
    ap.add_argument("--out", default=".", help="folder for the two files [.]")
    ap.add_argument("--api", default=default_api(), help="list of entry points, for the section addresses")
    ap.add_argument("--limit", type=int, default=90, help="seconds for one section [90]")
    ap.add_argument("--total", type=int, default=0, help="seconds for all of them; the rest is left out [no limit]")
    ap.add_argument("--section", help=argparse.SUPPRESS)
    a = ap.parse_args()
    if a.section:
        f = {**SECTIONS, **HELPERS}[a.section]
        print(json.dumps(f(a.api) if a.section == "addresses" else f()))
        return 0
    unknown = [name for name in a.sections if name not in SECTIONS]
    if unknown:
        ap.error(f"no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    end_by_signal()
    res, began = {}, time.time()
    os.makedirs(a.out, exist_ok=True)
    for name in a.sections or SECTIONS:
        t = time.time()
        limit = min(a.limit, a.total - (t - began)) if a.total else a.limit
        if limit < 5:
            res[name] = {"failed": f"left out: the {a.total} s for all sections are over"}
        else:
            res[name] = run_section(name, a.api, limit)
        print(f"## {name} ({time.time() - t:.1f} s)\n{json.dumps(res[name], indent=1)}", flush=True)
        with open(os.path.join(a.out, "gpu-facts.json"), "w") as f:
            json.dump(res, f, indent=1)
        with open(os.path.join(a.out, "gpu-facts.md"), "w") as f:
            for n, r in res.items():
                f.write(f"## {n}\n\n{(SECTIONS[n].__doc__ or '').strip()}\n\n```json\n{json.dumps(r, indent=1)}\n```\n\n")
    failed = [name for name, r in res.items() if "failed" in r]
    print(f"{len(res) - len(failed)} answered, {len(failed)} failed" + (": " + ", ".join(failed) if failed else ""))
    return 1 if failed else 0


def run_section(name, api, limit):
    me = [sys.executable, os.path.abspath(__file__), "--section", name, "--api", api]
    # A group of its own: a section's own children must not outlive its time.
    p = subprocess.Popen(me, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        out, err = p.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(p.pid, signal.SIGKILL)
        out, err = p.communicate()
        return {"failed": f"no end in {limit:.0f} s", "stderr": err[-600:]}
    finally:
        if p.poll() is None:  # ended from outside
            os.killpg(p.pid, signal.SIGKILL)
            p.wait()
    if p.returncode != 0 or not out.strip():
        return {"failed": p.returncode, "stderr": err[-600:]}
    return json.loads(out)


if __name__ == "__main__":
    sys.exit(main())
