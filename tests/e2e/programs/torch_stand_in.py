"""In the place of scripts/gpu-torch-child.py where there is no PyTorch: it answers the same lines, and uses the driver as
the mode and the allocator's setting ask, so that gpu-torch.py's case `traces` can be tried on the simulator.

What goes wrong is asked for by STAND_IN: `silent` uses no CUDA, `cut` cuts its trace in the middle of a line,
`early` has no file descriptor for it any more after the first step, `graphless` captures nothing.
"""
import argparse, ctypes as C, json, os, sys

PTX = b"""
.version 6.0
.target sm_50
.address_size 64
.visible .entry nothing()
{
    ret;
}
"""
WRONG = os.environ.get("STAND_IN", "")


class Driver:
    """Functions by their exported names, as dlsym finds them; a refusal ends the program."""

    def __init__(self):
        self.lib = C.CDLL("libcuda.so.1")

    def __call__(self, name, *arguments):
        code = getattr(self.lib, name)(*arguments)
        if code != 0:
            sys.exit(f"Error: {name} answers {code}")

    def made(self, name, *arguments, kind=C.c_void_p):
        value = kind()
        self(name, C.byref(value), *arguments)
        return value


class Workload:
    def __init__(self, mode, setting):
        self.driver, self.mode, self.setting = Driver(), mode, setting
        self.driver("cuInit", 0)
        context = self.driver.made("cuDevicePrimaryCtxRetain", 0)
        self.driver("cuCtxSetCurrent", context)
        module = self.driver.made("cuModuleLoadData", PTX)
        self.kernel = self.driver.made("cuModuleGetFunction", module, b"nothing")
        self.stream = self.driver.made("cuStreamCreate", 1)
        self.graph = None
        if "expandable" in setting:
            self.map()
        elif "Async" in setting:
            self.memory = self.driver.made("cuMemAllocAsync", C.c_size_t(1 << 20), self.stream, kind=C.c_uint64)
        else:
            self.memory = self.driver.made("cuMemAlloc_v2", C.c_size_t(1 << 20), kind=C.c_uint64)
        if mode == "graphs" and WRONG != "graphless":
            self.driver("cuStreamBeginCapture_v2", self.stream, 2)
            self.launch()
            graph = C.c_void_p()
            self.driver("cuStreamEndCapture", self.stream, C.byref(graph))
            self.graph = self.driver.made("cuGraphInstantiateWithFlags", graph, C.c_ulonglong(0))

    def map(self):
        """A segment as PyTorch's expandable ones are made."""
        nbytes = C.c_size_t(2 << 20)
        self.memory = self.driver.made("cuMemAddressReserve", nbytes, C.c_size_t(0), C.c_uint64(0), C.c_ulonglong(0), kind=C.c_uint64)
        prop = (C.c_int * 8)(1, 0, 1, 0)  # pinned, no handle type, on device 0
        handle = self.driver.made("cuMemCreate", nbytes, prop, C.c_ulonglong(0), kind=C.c_uint64)
        self.driver("cuMemMap", self.memory, nbytes, C.c_size_t(0), handle, C.c_ulonglong(0))
        self.driver("cuMemSetAccess", self.memory, nbytes, (C.c_int * 3)(1, 0, 3), C.c_size_t(1))

    def launch(self):
        self.driver("cuLaunchKernel", self.kernel, 1, 1, 1, 1, 1, 1, 0, self.stream, None, None)

    def step(self):
        if self.graph:
            self.driver("cuGraphLaunch", self.graph, self.stream)
        self.launch()
        self.driver("cuStreamSynchronize", self.stream)


def spoil():
    path = os.environ["SPILLWAY_TRACE"]
    if WRONG == "cut":
        os.truncate(path, os.stat(path).st_size - 10)
    elif WRONG == "early":
        # The library says so, and records no more.
        for fd in os.listdir("/proc/self/fd"):
            try:
                if os.readlink(f"/proc/self/fd/{fd}") == path:
                    os.close(int(fd))
            except OSError:
                pass


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--mode")
    a, _ = ap.parse_known_args()
    workload = None if WRONG == "silent" else Workload(a.mode, os.environ.get("PYTORCH_CUDA_ALLOC_CONF", ""))
    say = lambda word, **what: print(word, json.dumps(what), flush=True)
    say("ready", seconds=0.0)
    for line in sys.stdin:
        verb = line.split()[0]
        if verb == "quit":
            break
        if verb in ("step", "infer"):
            if workload:
                workload.step()
            if verb == "infer":
                spoil()
            say("done", seconds=0.0)
        else:
            if WRONG == "cut":
                spoil()
            say("outcome", steps=1)


if __name__ == "__main__":
    main()
