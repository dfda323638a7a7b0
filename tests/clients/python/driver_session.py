"""One session with the CUDA driver API, by NVIDIA's own Python bindings: whatever it prints is the same on every
run, on a bare driver and under anything that claims to be transparent. It prints no addresses, no memory totals
and no IPC capability.

    driver_session.py KERNELS.ptx

With DRIVER_SESSION_STEPS=1 it prints a line `#step NAME` between every two steps after the first allocation and
waits for a line on standard input: whoever drives it may do something to it there. `#step NAME capturing` says
that a stream capture is open.
"""

import ctypes
import hashlib
import os
import random
import sys

from cuda.bindings import driver as cu

STEPS = os.environ.get("DRIVER_SESSION_STEPS") == "1"
KIB, MIB = 1 << 10, 1 << 20
allocated = False


def show(name, *values):
    print(name + ":", *values)


def call(function, *arguments):
    """Calls the driver; a failure ends the session. Returns what the call returns besides its status."""
    status, *values = function(*arguments)
    if int(status) != 0:
        show(f"{function.__name__} failed", int(status))
        sys.exit(1)
    return values[0] if len(values) == 1 else tuple(values)


def code(function, *arguments):
    """Calls the driver and returns its status alone."""
    return int(function(*arguments)[0])


def step(name, capturing=False):
    if STEPS and allocated:
        print("#step", name, "capturing" if capturing else "", flush=True)
        if not sys.stdin.readline():
            sys.exit(3)
    else:
        sys.stdout.flush()


def pattern(count, seed):
    return random.Random(seed).randbytes(count)


def digest(data):
    return f"{len(data)} bytes {hashlib.sha256(data).hexdigest()[:16]}"


def from_device(pointer, count):
    data = ctypes.create_string_buffer(count)
    call(cu.cuMemcpyDtoH, ctypes.addressof(data), pointer, count)
    return data.raw


def at(pointer, offset):
    return cu.CUdeviceptr(int(pointer) + offset)


def launch(kernel, words, stream, types, values):
    blocks = max(1, min(64, (words + 255) // 256))
    call(cu.cuLaunchKernel, kernel, blocks, 1, 1, 256, 1, 1, 0, stream, (values, types), 0)


def checksum(kernels, pointer, words, stream):
    out = call(cu.cuMemAlloc, 8)
    # In the same stream: a memset does not wait, and a non-blocking stream does not wait for it.
    call(cu.cuMemsetD32Async, out, 0, 2, stream)
    launch(kernels["checksum_u32"], words, stream, (ctypes.c_uint64,) * 3, (int(pointer), words, int(out)))
    call(cu.cuStreamSynchronize, stream)
    value = int.from_bytes(from_device(out, 8), "little")
    call(cu.cuMemFree, out)
    return f"{value:016x}"


def devices_and_contexts():
    call(cu.cuInit, 0)
    show("driver", call(cu.cuDriverGetVersion))
    show("devices", call(cu.cuDeviceGetCount))
    device = call(cu.cuDeviceGet, 0)
    attribute = cu.CUdevice_attribute
    for wanted in (
        attribute.CU_DEVICE_ATTRIBUTE_WARP_SIZE,
        attribute.CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK,
        attribute.CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING,
        attribute.CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED,
        attribute.CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED,
    ):
        show(wanted.name, call(cu.cuDeviceGetAttribute, wanted, device))
    show("name length", len(call(cu.cuDeviceGetName, 64, device).rstrip(b"\0")) > 0)
    show("no context yet", code(cu.cuMemAlloc, 4096))
    primary = call(cu.cuDevicePrimaryCtxRetain, device)
    call(cu.cuCtxSetCurrent, primary)
    show("current is primary", int(call(cu.cuCtxGetCurrent)) == int(primary))
    show("state", call(cu.cuDevicePrimaryCtxGetState, device))
    show("api version", call(cu.cuCtxGetApiVersion, primary) > 0)
    free, total = call(cu.cuMemGetInfo)
    show("free within total", 0 < free <= total <= call(cu.cuDeviceTotalMem, device))
    return device, primary


def plain_memory():
    global allocated
    sizes = [1, 513, 64 * KIB, MIB - 1, 2 * MIB, 5 * MIB + 12]
    pointers = [call(cu.cuMemAlloc, size) for size in sizes]
    allocated = True
    step("allocated")
    show("aligned", all(int(p) % 256 == 0 for p in pointers))
    for number, (pointer, size) in enumerate(zip(pointers, sizes)):
        data = pattern(size, number)
        call(cu.cuMemcpyHtoD, pointer, data, size)
    step("copied in")
    for number, (pointer, size) in enumerate(zip(pointers, sizes)):
        show("read back", size, from_device(pointer, size) == pattern(size, number))
    step("copied out")
    for pointer, size in zip(pointers, sizes):
        base, bytes_ = call(cu.cuMemGetAddressRange, at(pointer, size // 2))
        show("range", int(base) == int(pointer), bytes_)
    call(cu.cuMemcpyDtoD, pointers[5], pointers[4], 2 * MIB)
    step("copied across")
    show("across", digest(from_device(pointers[5], 5 * MIB + 12)))
    call(cu.cuMemcpy, pointers[2], pointers[3], 64 * KIB)
    show("unified", digest(from_device(pointers[2], 64 * KIB)))
    pitched, pitch = call(cu.cuMemAllocPitch, 1000, 37, 4)
    show("pitch", pitch >= 1000, pitch % 4)
    call(cu.cuMemsetD2D8, pitched, pitch, 0x5A, 1000, 37)
    step("pitched")
    rows = [from_device(at(pitched, row * pitch), 1000) for row in (0, 36)]
    show("rows", [digest(row) for row in rows])
    call(cu.cuMemFree, pitched)
    return pointers, sizes


def memsets(pointers):
    call(cu.cuMemsetD8, pointers[3], 0xA7, MIB - 1)
    call(cu.cuMemsetD16, pointers[2], 0x1234, 32 * KIB)
    call(cu.cuMemsetD32, pointers[4], 0xDEADBEEF, MIB // 2)
    step("memset")
    show("D8", digest(from_device(pointers[3], MIB - 1)))
    show("D16", digest(from_device(pointers[2], 64 * KIB)))
    show("D32", digest(from_device(pointers[4], 2 * MIB)))


def attributes(pointers, sizes, primary, device):
    kind = cu.CUpointer_attribute
    for pointer, size in zip(pointers, sizes):
        inside = at(pointer, size // 3)
        ask = lambda what: call(cu.cuPointerGetAttribute, what, inside)
        show(
            "attributes",
            int(ask(kind.CU_POINTER_ATTRIBUTE_CONTEXT)) == int(primary),
            int(ask(kind.CU_POINTER_ATTRIBUTE_MEMORY_TYPE)),
            int(ask(kind.CU_POINTER_ATTRIBUTE_DEVICE_POINTER)) - int(inside),
            int(ask(kind.CU_POINTER_ATTRIBUTE_IS_MANAGED)),
            int(ask(kind.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL)) == int(device),
            int(ask(kind.CU_POINTER_ATTRIBUTE_RANGE_START_ADDR)) == int(pointer),
            int(ask(kind.CU_POINTER_ATTRIBUTE_RANGE_SIZE)),
            int(ask(kind.CU_POINTER_ATTRIBUTE_MAPPED)),
        )
    ids = [int(call(cu.cuPointerGetAttribute, kind.CU_POINTER_ATTRIBUTE_BUFFER_ID, p)) for p in pointers]
    show("buffer ids differ", len(set(ids)) == len(ids))
    many = [kind.CU_POINTER_ATTRIBUTE_MEMORY_TYPE, kind.CU_POINTER_ATTRIBUTE_IS_MANAGED]
    show("several at once", [int(v) for v in call(cu.cuPointerGetAttributes, 2, many, pointers[0])])
    data = ctypes.create_string_buffer(64)
    show("host pointer", code(cu.cuPointerGetAttribute, kind.CU_POINTER_ATTRIBUTE_MEMORY_TYPE, ctypes.addressof(data)))


def streams_and_events(pointers):
    size = 2 * MIB
    stream = call(cu.cuStreamCreate, cu.CUstream_flags.CU_STREAM_NON_BLOCKING)
    other = call(cu.cuStreamCreateWithPriority, cu.CUstream_flags.CU_STREAM_NON_BLOCKING, 0)
    before = call(cu.cuEventCreate, cu.CUevent_flags.CU_EVENT_DEFAULT)
    after = call(cu.cuEventCreate, cu.CUevent_flags.CU_EVENT_DEFAULT)
    pinned = call(cu.cuMemHostAlloc, size, cu.CU_MEMHOSTALLOC_PORTABLE)
    ctypes.memmove(pinned, pattern(size, 99), size)
    call(cu.cuCtxSynchronize)
    step("pinned")
    call(cu.cuEventRecord, before, stream)
    call(cu.cuMemcpyHtoDAsync, pointers[4], pinned, size, stream)
    call(cu.cuEventRecord, after, stream)
    call(cu.cuStreamWaitEvent, other, after, 0)
    call(cu.cuMemcpyDtoDAsync, pointers[5], pointers[4], size, other)
    step("in flight")
    call(cu.cuMemsetD8Async, pointers[4], 1, 1000, other)
    call(cu.cuStreamSynchronize, other)
    call(cu.cuEventSynchronize, after)
    # Its event is over; that the stream is, too, is another question.
    call(cu.cuStreamSynchronize, stream)
    show("queries", code(cu.cuEventQuery, after), code(cu.cuStreamQuery, stream), code(cu.cuStreamQuery, other))
    show("elapsed", call(cu.cuEventElapsedTime, before, after) >= 0)
    ctypes.memset(pinned, 0, size)
    call(cu.cuMemcpyDtoHAsync, pinned, pointers[5], size, stream)
    call(cu.cuStreamSynchronize, stream)
    show("through pinned", ctypes.string_at(pinned, size) == pattern(size, 99))
    step("events")
    call(cu.cuMemcpyDtoHAsync, pinned, pointers[4], size, stream)
    call(cu.cuCtxSynchronize)
    show("head overwritten", digest(ctypes.string_at(pinned, size)))
    own = ctypes.create_string_buffer(size + 8192)
    start = (ctypes.addressof(own) + 4095) & ~4095
    call(cu.cuMemHostRegister, start, size, 0)
    call(cu.cuMemcpyDtoHAsync, start, pointers[5], size, stream)
    call(cu.cuStreamSynchronize, stream)
    show("registered", ctypes.string_at(start, size) == pattern(size, 99))
    call(cu.cuMemHostUnregister, start)
    call(cu.cuMemFreeHost, pinned)
    call(cu.cuEventDestroy, before)
    call(cu.cuEventDestroy, after)
    call(cu.cuStreamDestroy, other)
    return stream


def ordered_memory(stream):
    first = call(cu.cuMemAllocAsync, 3 * MIB, stream)
    second = call(cu.cuMemAllocAsync, 700, stream)
    call(cu.cuMemsetD32Async, first, 0x01020304, 3 * MIB // 4, stream)
    call(cu.cuMemsetD8Async, second, 0x77, 700, stream)
    step("ordered")
    call(cu.cuMemcpyDtoDAsync, at(first, 1 * MIB), second, 700, stream)
    call(cu.cuMemFreeAsync, second, stream)
    third = call(cu.cuMemAllocAsync, 700, stream)
    call(cu.cuMemsetD8Async, third, 0x11, 700, stream)
    step("freed in order")
    call(cu.cuStreamSynchronize, stream)
    show("ordered", digest(from_device(first, 3 * MIB)), digest(from_device(third, 700)))
    kind = cu.CUpointer_attribute.CU_POINTER_ATTRIBUTE_MEMORY_TYPE
    show("ordered type", int(call(cu.cuPointerGetAttribute, kind, first)))
    call(cu.cuMemFreeAsync, first, stream)
    call(cu.cuMemFree, third)
    call(cu.cuStreamSynchronize, stream)
    step("ordered memory gone")


def modules_and_kernels(ptx, pointers, stream):
    module = call(cu.cuModuleLoadData, ptx)
    kernels = {
        name: call(cu.cuModuleGetFunction, module, name.encode())
        for name in ("fill_u32", "checksum_u32", "axpy_f32", "spin_ns")
    }
    show("no such kernel", code(cu.cuModuleGetFunction, module, b"no_such_kernel"))
    step("module")
    words = 2 * MIB // 4
    launch(kernels["fill_u32"], words, stream, (ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint32),
           (int(pointers[4]), words, 0xCAFEBABE))
    step("launched")
    launch(kernels["spin_ns"], 1, stream, (ctypes.c_uint64,), (2_000_000,))
    show("filled", checksum(kernels, pointers[4], words, stream))
    floats = (ctypes.c_float * 1024)(*range(1024))
    call(cu.cuMemcpyHtoD, pointers[2], ctypes.addressof(floats), 4096)
    call(cu.cuMemcpyHtoD, pointers[5], ctypes.addressof(floats), 4096)
    # A copy from pageable memory may return before it has arrived; the stream does not wait for it.
    call(cu.cuCtxSynchronize)
    step("vectors")
    launch(kernels["axpy_f32"], 1024, stream, (ctypes.c_uint64, ctypes.c_float, ctypes.c_uint64, ctypes.c_uint64),
           (1024, 2.5, int(pointers[2]), int(pointers[5])))
    call(cu.cuStreamSynchronize, stream)
    show("axpy", digest(from_device(pointers[5], 4096)))
    library = call(cu.cuLibraryLoadData, ptx, [], [], 0, [], [], 0)
    kernel = call(cu.cuLibraryGetKernel, library, b"fill_u32")
    function = call(cu.cuKernelGetFunction, kernel)
    step("library")
    launch(function, 256, stream, (ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint32), (int(pointers[2]), 256, 7))
    call(cu.cuStreamSynchronize, stream)
    show("by library", digest(from_device(pointers[2], 4096)))
    call(cu.cuLibraryUnload, library)
    return module, kernels


def graphs(kernels, pointers, stream):
    words = 2 * MIB // 4
    call(cu.cuStreamBeginCapture, stream, cu.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED)
    call(cu.cuMemsetD32Async, pointers[4], 5, words, stream)
    step("captured a memset", capturing=True)
    launch(kernels["fill_u32"], words // 2, stream, (ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint32),
           (int(pointers[4]), words // 2, 9))
    graph = call(cu.cuStreamEndCapture, stream)
    show("nodes", call(cu.cuGraphGetNodes, graph, 0)[-1])
    step("captured")
    executable = call(cu.cuGraphInstantiate, graph, 0)
    step("instantiated")
    for _ in range(2):
        call(cu.cuMemsetD8Async, pointers[4], 0, 2 * MIB, stream)
        call(cu.cuGraphLaunch, executable, stream)
        call(cu.cuStreamSynchronize, stream)
        show("by graph", checksum(kernels, pointers[4], words, stream))
        step("graph launched")
    call(cu.cuGraphExecDestroy, executable)
    call(cu.cuGraphDestroy, graph)


def virtual_memory(device):
    prop = cu.CUmemAllocationProp()
    prop.type = cu.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    prop.location.type = cu.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    prop.location.id = int(device)
    minimum = cu.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
    size = call(cu.cuMemGetAllocationGranularity, prop, minimum)
    show("granularity", size)
    address = call(cu.cuMemAddressReserve, size, 0, 0, 0)
    handle = call(cu.cuMemCreate, size, prop, 0)
    call(cu.cuMemMap, address, size, 0, handle, 0)
    access = cu.CUmemAccessDesc()
    access.location = prop.location
    access.flags = cu.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
    call(cu.cuMemSetAccess, address, size, [access], 1)
    call(cu.cuMemcpyHtoD, address, pattern(4096, 3), 4096)
    step("mapped")
    show("mapped", from_device(address, 4096) == pattern(4096, 3))
    call(cu.cuMemUnmap, address, size)
    call(cu.cuMemRelease, handle)
    call(cu.cuMemAddressFree, address, size)


def another_context(device, primary):
    context = call(cu.cuCtxCreate, 0, device)
    show("new is current", int(call(cu.cuCtxGetCurrent)) == int(context))
    mine = call(cu.cuMemAlloc, 3 * MIB)
    small = call(cu.cuMemAlloc, 100)
    call(cu.cuMemcpyHtoD, mine, pattern(4096, 8), 4096)
    call(cu.cuMemsetD8, small, 0x42, 100)
    step("another context")
    show("its memory", from_device(mine, 4096) == pattern(4096, 8), digest(from_device(small, 100)))
    show("popped", int(call(cu.cuCtxPopCurrent)) == int(context))
    show("primary again", int(call(cu.cuCtxGetCurrent)) == int(primary))
    step("popped")
    call(cu.cuCtxDestroy, context)
    kind = cu.CUpointer_attribute.CU_POINTER_ATTRIBUTE_MEMORY_TYPE
    show("its memory is gone", code(cu.cuPointerGetAttribute, kind, mine), code(cu.cuMemFree, mine))
    step("destroyed")


def refusals(pointers):
    show("nothing asked", code(cu.cuMemAlloc, 0))
    show("too much", code(cu.cuMemAlloc, 1 << 45))
    show("still works", code(cu.cuMemsetD8, pointers[0], 1, 1))
    show("unknown pointer", code(cu.cuMemFree, at(pointers[4], 512)))
    call(cu.cuMemFree, pointers[1])
    show("twice", code(cu.cuMemFree, pointers[1]))
    call(cu.cuMemFree, pointers[5])
    show("twice", code(cu.cuMemFree, pointers[5]))
    step("refused")


def main():
    with open(sys.argv[1], "rb") as file:
        ptx = file.read() + b"\0"
    device, primary = devices_and_contexts()
    pointers, sizes = plain_memory()
    step("plain memory")
    memsets(pointers)
    step("memsets")
    attributes(pointers, sizes, primary, device)
    step("attributes")
    stream = streams_and_events(pointers)
    step("streams")
    ordered_memory(stream)
    module, kernels = modules_and_kernels(ptx, pointers, stream)
    step("kernels")
    graphs(kernels, pointers, stream)
    virtual_memory(device)
    step("virtual memory")
    another_context(device, primary)
    refusals(pointers)
    for number in (0, 2, 3, 4):
        show("at the end", digest(from_device(pointers[number], sizes[number])))
        call(cu.cuMemFree, pointers[number])
        step("freed")
    call(cu.cuModuleUnload, module)
    call(cu.cuStreamDestroy, stream)
    call(cu.cuDevicePrimaryCtxRelease, device)
    show("done")


main()
