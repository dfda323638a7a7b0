"""A short numba-cuda program: arrays to the device and back, a kernel, streams, events, pinned and managed memory.

    numba_session.py

The kernel does nothing: the simulator runs none that computes but its own. What is copied must come back as it was.
"""

import numpy as np
from numba import cuda


@cuda.jit("void(float32[:], float32)")
def nothing(array, value):
    return


def main():
    print("device", cuda.get_current_device().compute_capability[0] > 0)
    free, total = cuda.current_context().get_memory_info()
    print("memory", 0 < free <= total)
    host = np.arange(1 << 18, dtype=np.float32)
    device = cuda.to_device(host)
    print("copied", np.array_equal(device.copy_to_host(), host))
    other = cuda.device_array_like(host)
    other.copy_to_device(device)
    print("across", np.array_equal(other.copy_to_host(), host))
    stream = cuda.stream()
    begun, done = cuda.event(), cuda.event()
    pinned = cuda.pinned_array(1 << 16, dtype=np.uint8)
    pinned[:] = 7
    begun.record(stream)
    async_ = cuda.to_device(pinned, stream=stream)
    nothing[64, 256, stream](device, 1.0)
    done.record(stream)
    done.synchronize()
    print("elapsed", cuda.event_elapsed_time(begun, done) >= 0)
    back = async_.copy_to_host(stream=stream)
    stream.synchronize()
    print("pinned", int(back.sum()) == 7 * (1 << 16))
    managed = cuda.managed_array(1000, dtype=np.int32)
    managed[:] = 3
    cuda.synchronize()
    print("managed", int(managed.sum()) == 3000)
    with cuda.pinned(host):
        again = cuda.to_device(host, stream=stream)
        stream.synchronize()
        print("registered", np.array_equal(again.copy_to_host(), host))
    part = device[1000:2000]
    print("part", part.size)
    for _ in range(5):
        nothing[4, 256](part, 2.0)
        cuda.synchronize()
    del device, other, async_, again, part, managed
    cuda.synchronize()
    cuda.current_context().deallocations.clear()
    print("done")


main()
