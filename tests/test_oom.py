"""Recognizing out-of-memory errors, and halving batches until they fit."""

import logging

import pytest
import torch

from ospo_fast.errors import OspoError
from ospo_fast.oom import BatchSizeLimit, out_of_memory, release


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("MPS backend out of memory (MPS allocated: 17.00 GB, other allocations: 1.00 GB)"),
        RuntimeError("sample_codes: cudaErrorMemoryAllocation"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        MemoryError("std::bad_alloc"),
        MemoryError(),
    ],
)
def test_out_of_memory_errors_are_recognized(error: Exception) -> None:
    assert out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("something else"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("out of resource: shared memory, Required: 300000, Hardware limit: 232448"),
    ],
)
def test_other_errors_are_not_recognized(error: Exception) -> None:
    assert not out_of_memory(error)


def test_an_error_raised_from_one_is_recognized() -> None:
    """A capture in which memory runs out fails with another error at its end."""

    def capture() -> None:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    with pytest.raises(RuntimeError) as caught:
        capture()
    assert out_of_memory(caught.value)


def test_unused_memory_of_mps_is_released(monkeypatch: pytest.MonkeyPatch) -> None:
    released: list[str] = []
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "empty_cache", lambda: released.append("mps"))
    release()
    assert released == ["mps"]


def test_batches_are_halved_and_later_ones_no_larger(caplog: pytest.LogCaptureFixture) -> None:
    tried: list[int] = []

    def function(batch: list[int]) -> int:
        tried.append(len(batch))
        if len(batch) > 3:
            raise MemoryError
        return sum(batch)

    limit = BatchSizeLimit(8, "image")
    with caplog.at_level(logging.WARNING):
        found = list(limit.run([list(range(11)), [20, 21, 22], []], function))
    batches = [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10], [20, 21], [22]]
    assert found == [(batch, sum(batch)) for batch in batches]
    assert tried[:3] == [8, 4, 2]
    assert "out of memory with 8 images per batch; continuing with 4" in caplog.text
    assert limit.max_size == 2


def test_an_item_that_does_not_fit_is_an_error_with_a_remedy() -> None:
    def never(batch: list[int]) -> None:
        raise RuntimeError("CUDA error: out of memory\nand more lines")

    with pytest.raises(OspoError, match=r"^one image does not fit the memory \(CUDA error: out of memory\); buy some$"):
        list(BatchSizeLimit(4, "image", "buy some").run([[1, 2]], never))

    def wrong(batch: list[int]) -> None:
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        list(BatchSizeLimit(4, "image").run([[1, 2]], wrong))
