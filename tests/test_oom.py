"""Out of memory in all its forms, and parts that become smaller until they fit."""

import logging

import pytest
import torch

from ospo_fast.errors import OspoError
from ospo_fast.oom import BatchSizeLimit, out_of_memory


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("draw_codes: cudaErrorMemoryAllocation"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        MemoryError("std::bad_alloc"),
        MemoryError(),
    ],
)
def test_every_form_of_it_is_recognised(error: Exception) -> None:
    assert out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("something else"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("out of resource: shared memory, Required: 300000, Hardware limit: 232448"),
    ],
)
def test_other_errors_are_not(error: Exception) -> None:
    assert not out_of_memory(error)


def test_an_error_on_top_of_it_counts() -> None:
    """As the end of a capture fails where memory ran out in its midst."""

    def capture() -> None:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    with pytest.raises(RuntimeError) as caught:
        capture()
    assert out_of_memory(caught.value)


def test_parts_are_halved_and_later_ones_no_larger(caplog: pytest.LogCaptureFixture) -> None:
    tried: list[tuple[int, int]] = []

    def work(part: slice) -> list[int]:
        tried.append((part.start, part.stop))
        if part.stop - part.start > 3:
            raise MemoryError
        return list(range(part.start, part.stop))

    limit = BatchSizeLimit(8, "image")
    with caplog.at_level(logging.WARNING):
        found = list(limit.run(11, work))
    assert [i for _, part in found for i in part] == list(range(11))
    assert [part for part, _ in found] == [slice(i, min(i + 2, 11)) for i in range(0, 11, 2)]
    assert tried[:3] == [(0, 8), (0, 4), (0, 2)]
    assert "out of memory with 8 images at once; going on with 4" in caplog.text
    del tried[:]
    assert list(limit.run(3, work)) == [(slice(0, 2), [0, 1]), (slice(2, 3), [2])]
    assert len(tried) == 2
    assert list(limit.run(0, work)) == []


def test_an_item_that_does_not_fit_is_an_error_with_a_remedy() -> None:
    def never(part: slice) -> None:
        raise RuntimeError("CUDA error: out of memory\nand more lines")

    with pytest.raises(
        OspoError, match=r"^not even one image fits the memory \(CUDA error: out of memory\); buy some$"
    ):
        list(BatchSizeLimit(4, "image", "buy some").run(2, never))

    def wrong(part: slice) -> None:
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        list(BatchSizeLimit(4, "image").run(2, wrong))
