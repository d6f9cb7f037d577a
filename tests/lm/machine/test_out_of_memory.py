"""Whatever library says that memory ran out is understood, and told with what it wanted, what there is and a key."""

import errno

import pytest
import torch

from kltune.errors import DataError, OutOfMemory, is_out_of_memory
from kltune.lm.machine.out_of_memory import SAMPLING, UPDATING, asked_for, phase

CPU = torch.device("cpu")
RAN_OUT = (
    MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"),
    RuntimeError("CUDA error: out of memory"), RuntimeError("HIP out of memory. Tried to allocate 20.00 MiB"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), RuntimeError("std::bad_alloc"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried "
                 "to allocate 8000000000 bytes. Error code 12 (Cannot allocate memory)"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8000000000 bytes."),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    RuntimeError("cudaErrorMemoryAllocation: out of memory"), RuntimeError("CUSOLVER_STATUS_ALLOC_FAILED"),
)


@pytest.mark.parametrize("error", RAN_OUT, ids=str)
def test_every_library_is_understood(error):
    assert is_out_of_memory(error)
    words = r"while updating: .*of [\d.]+ GB that cpu has; lower optim.micro_batch_size"
    with pytest.raises(OutOfMemory, match=words) as told, phase(UPDATING, CPU):
        raise error
    assert told.value.exit_code == 74
    assert told.value.__cause__ is error


@pytest.mark.parametrize("error", [
    DataError("row 3 says: out of memory"), RuntimeError("shape mismatch"), ValueError("bad value"), KeyError("memory"),
])
def test_nothing_else_is_taken_for_it(error):
    with pytest.raises(type(error)) as told, phase(SAMPLING, CPU):
        raise error
    assert told.value is error


def test_the_innermost_phase_is_the_one_that_is_told():
    with pytest.raises(OutOfMemory, match="while sampling"), phase(UPDATING, CPU), phase(SAMPLING, CPU):
        raise MemoryError


@pytest.mark.parametrize(("text", "gigabytes"), [
    ("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 23.64 GiB", "21.47"),
    ("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8000000000 bytes.", "8.00"),
    ("Tried to allocate 512.00 MiB", "0.54"),
])
def test_what_was_asked_for_is_read_off_the_error(text, gigabytes):
    assert asked_for(RuntimeError(text)) == f"{gigabytes} GB more were wanted, "
    assert asked_for(RuntimeError("std::bad_alloc")) == ""
