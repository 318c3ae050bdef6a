"""Time on a device and on its host: by events on a GPU, by a clock on an emulated device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from mlpcore.backends.cuda.device import CudaDevice, Launch

Run = Callable[[], object]
ONE = Launch((1, 1), (1, 1))
SPIN = """
template <int> __global__ void spin(long long nanoseconds) {
  long long begin, now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(begin));
  do asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now)); while (now - begin < nanoseconds);
}
"""


def is_gpu(device: CudaDevice) -> bool:
    """Return True for a GPU, False for a device emulated on the CPU."""
    return hasattr(device.xp, "cuda")


def wait(device: CudaDevice) -> None:
    """Wait for all work on the GPU."""
    if is_gpu(device):
        device.xp.cuda.runtime.deviceSynchronize()


def host_and_wall(device: CudaDevice, run: Run, count: int) -> tuple[float, float]:
    """Return microseconds per run of `count`: until all are launched, until the device is done."""
    wait(device)
    begin = time.perf_counter()
    for _ in range(count):
        run()
    asked = time.perf_counter()
    wait(device)
    return (asked - begin) / count * 1e6, (time.perf_counter() - begin) / count * 1e6


def microseconds(device: CudaDevice, run: Run, count: int = 1, repeats: int = 7) -> float:
    """Return the device's microseconds per run, of `count`, as the median of `repeats`.

    A waiting kernel goes first, so that the host can launch all runs ahead. A few thousand launches
    fill the queue, and then the host's time counts as well.
    """
    host, wall = host_and_wall(device, run, count)
    if not is_gpu(device):
        return wall
    cuda, spin = device.xp.cuda, device.kernel(SPIN, "spin<0>")
    host = min(host, host_and_wall(device, run, count)[0])  # the first runs may compile
    ahead = int(1.5e3 * host * count) + 100_000
    times = []
    for _ in range(repeats):
        start, stop = cuda.Event(), cuda.Event()
        device.launch(spin, ONE, [ahead])
        start.record()
        for _ in range(count):
            run()
        stop.record()
        stop.synchronize()
        times.append(cuda.get_elapsed_time(start, stop) * 1e3 / count)
    return statistics.median(times)
