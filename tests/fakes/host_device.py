"""A CUDA device played on the CPU: memory that knows where it lies, and a stream that runs late.

What is enqueued runs when somebody waits for it, so a buffer that is overwritten or freed too early shows.
"""

from __future__ import annotations

import weakref

import torch


class HostDevice:
    """See ``runners.tensorrt.device.Device``. With ``hold`` the stream waits for ``flush`` even after ``end``."""

    def __init__(self, compute_capability=(9, 0)):
        self.description, self.stream, self.compute_capability = "a stand-in for a GPU", 7, compute_capability
        self.allocations = []  # (weak reference, address, bytes, "device" or "host")
        self.queue, self.recording, self.hold = [], None, False

    def device_tensor(self, shape, dtype):
        return self._allocate(shape, dtype, "device")

    def host_tensor(self, shape, dtype):
        return self._allocate(shape, dtype, "host")

    def copy(self, target, source):
        assert target.numel() == source.numel()
        assert target.dtype == source.dtype
        self.enqueue(lambda: target.copy_(source))

    def mark(self):
        return HostMark(self)

    def begin(self):
        pass

    def end(self):
        if not self.hold:
            self.flush()

    def new_graph(self):
        return HostGraph(self)

    def enqueue(self, task):
        (self.queue if self.recording is None else self.recording).append(task)

    def flush(self):
        tasks, self.queue = self.queue, []
        for task in tasks:
            task()

    def find(self, address, num_bytes):
        """What kind of memory holds ``num_bytes`` from ``address`` on; None if none does, or it was freed."""
        self.allocations = [a for a in self.allocations if a[0]() is not None]
        for _, start, size, kind in self.allocations:
            if start <= address and address + num_bytes <= start + size:
                return kind
        return None

    def size_from(self, address):
        """Bytes from ``address`` to the end of its allocation."""
        return next(s + n - address for r, s, n, _ in self.allocations if r() is not None and s <= address < s + n)

    def adopt(self, tensor):
        """Counts a tensor on the host as memory of this device's."""
        self.allocations.append((weakref.ref(tensor), tensor.data_ptr(), tensor.nbytes, "host"))

    def _allocate(self, shape, dtype, kind):
        count = torch.Size(shape).numel() * dtype.itemsize
        raw = torch.zeros(count + 256, dtype=torch.uint8)
        shift = -raw.data_ptr() % 256
        tensor = raw[shift : shift + count].view(dtype).view(shape)
        self.allocations.append((weakref.ref(tensor), tensor.data_ptr(), count, kind))
        return tensor


class HostMark:
    def __init__(self, device):
        self._device = device

    def wait(self):
        self._device.flush()

    def seconds_since(self, earlier):
        return 0.0


class HostGraph:
    captures = 0

    def __init__(self, device):
        self._device, self._tasks = device, []

    def capture(self, run):
        type(self).captures += 1
        self._device.recording = self._tasks
        run()
        self._device.recording = None

    def replay(self):
        for task in self._tasks:
            self._device.enqueue(task)
