"""ImageWriter: order, errors, and what it keeps."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from ospo_fast.generation.image_writer import ImageWriter

if TYPE_CHECKING:
    from ospo_fast.models.janus import JanusUnifiedModel

# Decodes each code to itself.
MODEL: Any = SimpleNamespace(device=torch.device("cpu"), decode_codes=lambda codes: codes[:, 0].tolist())


def take(writer: ImageWriter, indices: Iterable[int]) -> None:
    for index in indices:
        writer.take([index], torch.tensor([[index]]))
        time.sleep(0.001)


def failing_at(index: int, saved: list[int]) -> Callable[[int, Tensor, Any], None]:
    def save(number: int, _: Tensor, image: Any) -> None:
        if number == index:
            raise OSError("no space left")
        saved.append(image)

    return save


def test_finished_images_are_saved(tiny: JanusUnifiedModel) -> None:
    saved: dict[int, tuple[Tensor, Image.Image]] = {}
    codes = torch.randint(tiny.num_codes, (3, 36))
    with ImageWriter(tiny, lambda index, row, image: saved.update({index: (row, image)})) as writer:
        writer.take([4, 1], codes[:2])
        writer.take([], codes[:0])
        writer.take([0], codes[2:])
    assert sorted(saved) == [0, 1, 4]
    for index, own, expected in zip([4, 1, 0], codes, tiny.decode_codes(codes), strict=True):
        row, image = saved[index]
        assert torch.equal(row, own)
        assert image.tobytes() == expected.tobytes()


def test_images_are_saved_in_the_background_and_a_part_can_be_waited_for() -> None:
    saved: list[int] = []
    gates = [threading.Event() for _ in range(3)]

    def save(index: int, *_: object) -> None:
        gates[index].wait()
        saved.append(index)

    with ImageWriter(MODEL, save) as writer:
        take(writer, range(3))
        writer.wait(lambda: True)
        assert saved == []
        gates[0].set()
        writer.wait(lambda: 0 in saved)
        assert saved == [0]
        for gate in gates:
            gate.set()
    assert saved == [0, 1, 2]


def test_images_of_a_batch_are_saved_at_the_same_time() -> None:
    """Each waits for the disk most of the time."""
    together, saved = threading.Barrier(3, timeout=30), []

    def save(index: int, *_: object) -> None:
        together.wait()
        saved.append(index)

    with ImageWriter(MODEL, save) as writer:
        writer.take([5, 6, 7], torch.tensor([[5], [6], [7]]))
    assert sorted(saved) == [5, 6, 7]


def test_images_of_the_batch_of_a_failed_one_are_saved_and_those_of_later_batches_are_not() -> None:
    saved: list[int] = []

    def run() -> None:
        with ImageWriter(MODEL, failing_at(2, saved)) as writer:
            for first in (0, 4, 8):
                writer.take(list(range(first, first + 4)), torch.arange(first, first + 4)[:, None])

    with pytest.raises(OSError, match="no space left"):
        run()
    assert sorted(saved) == [0, 1, 3]


@pytest.mark.parametrize("call", ["take", "wait", "leave"])
def test_an_error_reaches_the_caller_and_ends_the_work(call: str) -> None:
    saved: list[int] = []

    def run() -> None:
        with ImageWriter(MODEL, failing_at(2, saved), depth=8) as writer:
            take(writer, range(100 if call == "take" else 5))
            if call == "wait":
                writer.wait(lambda: 4 in saved)

    with pytest.raises(OSError, match="no space left"):
        run()
    assert saved == [0, 1]


def test_finished_images_are_kept_when_the_caller_fails() -> None:
    saved: list[int] = []

    def run() -> None:
        with ImageWriter(MODEL, failing_at(-1, saved)) as writer:
            take(writer, [1])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert saved == [1]


def test_images_that_wait_when_the_interpreter_ends_are_saved() -> None:
    """Of a generator of images, for example, that a script left half-read."""
    code = (
        "import os, time, torch; from types import SimpleNamespace\n"
        "from ospo_fast.generation.image_writer import ImageWriter\n"
        "def save(index, *_): time.sleep(0.05); os.write(1, b'%d\\n' % index)\n"  # print may join two lines
        "model = SimpleNamespace(device=torch.device('cpu'), decode_codes=lambda codes: codes[:, 0].tolist())\n"
        "writer = ImageWriter(model, save)\n"
        "for first in range(0, 12, 4): writer.take(list(range(first, first + 4)), torch.zeros(4, 1, dtype=int))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert sorted(map(int, done.stdout.split())) == list(range(12))
