"""The memory of a device: how much there is, what a model holds of it, and the most that was in use."""

import os
import re
import resource
from pathlib import Path

import torch
from torch import nn

from kltune.core import ranks

SHARE = 0.8             # of the memory is planned with unless told otherwise; the rest is for kernels and fragments
TRAINED_BYTES = 24      # float32 gradient, its sum in float64 and Adam's moments per trained number; a frozen copy too
MEMINFO = "/proc/meminfo"
CGROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of a container: v2, v1


def free_bytes(model: nn.Module, device: torch.device, fraction: float = SHARE) -> float:
    """The bytes planned to be free on a device beside a model and its optimizer; may be negative.

    Other models on the device, as a reward model with weights of its own, are not known here.
    """
    return planned_bytes(device, fraction) - held_bytes(model)


def planned_bytes(device: torch.device, fraction: float) -> float:
    """The bytes of a device that this process plans with; a CPU's memory is that of all processes beside it too."""
    return fraction * device_bytes(device) / (ranks.beside() if device.type == "cpu" else 1)


def held_bytes(model: nn.Module) -> int:
    """The bytes of a model's weights, with gradients and optimizer of those that are trained."""
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
    return weights + TRAINED_BYTES * sum(tensor.numel() for tensor in model.parameters() if tensor.requires_grad)


def peak_bytes(device: torch.device) -> int:
    """The most memory in use: on a GPU in tensors, since this was last asked; else of the process, since it began."""
    if device.type != "cuda":
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak


def device_name(device: torch.device) -> str:
    """What a device is called: a GPU by its maker, a CPU with the threads that compute."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device}, {torch.get_num_threads()} threads"


def device_bytes(device: torch.device) -> int:
    """All the memory of a device; on the CPU what the machine or its container has."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    limits = [Path(path).read_text().strip() for path in CGROUPS if os.path.exists(path)]
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([machine, *(int(limit) for limit in limits if limit != "max")])


def available_bytes() -> int:
    """What of the machine's or container's memory a new process could have: files that are kept there make room."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    if os.path.exists(MEMINFO):
        found = re.search(r"^MemAvailable:\s+(\d+) kB$", Path(MEMINFO).read_text(), re.MULTILINE)
        free = free if found is None else 1024 * int(found[1])
    return min(free, device_bytes(torch.device("cpu")))
