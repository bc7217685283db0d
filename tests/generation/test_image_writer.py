import threading
import time
from collections.abc import Iterable

import pytest
import torch
from PIL import Image
from torch import Tensor

from ospo_fast.generation.image_writer import Background, ImageWriter
from ospo_fast.models.janus import JanusUnifiedModel


def test_items_are_worked_on_in_order_beside_the_caller() -> None:
    done: list[int] = []
    gate = threading.Event()

    def work(item: int) -> None:
        gate.wait()
        done.append(item)

    with Background(work, depth=8) as background:
        for item in range(5):
            background.put(item)
        assert done == []
        gate.set()
    assert done == list(range(5))


def test_the_caller_can_wait_for_a_part_of_the_work() -> None:
    done: list[int] = []
    gates = [threading.Event() for _ in range(3)]

    def work(item: int) -> None:
        gates[item].wait()
        if item == 2:
            raise OSError("no space left")
        done.append(item)

    def run() -> None:
        with Background(work) as background:
            for item in range(3):
                background.put(item)
            background.wait(lambda: True)
            assert done == []
            gates[0].set()
            background.wait(lambda: 0 in done)
            assert done == [0]
            for gate in gates:
                gate.set()
            background.wait(lambda: 2 in done)  # which never comes

    with pytest.raises(OSError, match="no space left"):
        run()
    assert done == [0, 1]


def test_an_error_reaches_the_caller_and_ends_the_work() -> None:
    done: list[int] = []

    def work(item: int) -> None:
        if item == 2:
            raise OSError("no space left")
        done.append(item)

    def put(items: Iterable[int]) -> None:
        with Background(work) as background:
            for item in items:
                background.put(item)
                time.sleep(0.001)

    with pytest.raises(OSError, match="no space left"):
        put(range(100))
    assert done == [0, 1]
    with pytest.raises(OSError, match="no space left"):
        put([2])


def test_finished_work_is_kept_when_the_caller_fails() -> None:
    done: list[int] = []

    def put() -> None:
        with Background(done.append) as background:
            background.put(1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        put()
    assert done == [1]


def test_finished_images_are_saved(tiny: JanusUnifiedModel) -> None:
    saved: dict[int, tuple[Tensor, Image.Image]] = {}
    codes = torch.randint(tiny.num_codes, (3, 36))

    def save(index: int, row: Tensor, image: Image.Image) -> None:
        saved[index] = (row, image)

    with ImageWriter(tiny, save) as writer:
        writer.take([4, 1], codes[:2])
        writer.take([], codes[:0])
        writer.take([0], codes[2:])
    expected = dict(zip([4, 1, 0], zip(codes, tiny.decode_codes(codes), strict=True), strict=True))
    assert saved.keys() == expected.keys()
    for index, (row, image) in expected.items():
        assert torch.equal(saved[index][0], row)
        assert saved[index][1].tobytes() == image.tobytes()
