"""PNG and .npz files: codes are read back or encoded, and damaged files are reported one by one."""

import os
import random
import shutil
import stat

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from ospo_fast import records
from ospo_fast.config import ImagesConfig
from ospo_fast.errors import Failure
from ospo_fast.models import load_model
from ospo_fast.stages import image_files
from ospo_fast.stages.image_files import (
    ImageFiles,
    image_codes,
    is_finished,
    load_codes,
    pair_codes,
    save_codes,
    save_image,
    stack_codes,
)


@pytest.fixture(scope="module")
def model(tiny):
    return load_model(tiny)


@pytest.fixture
def path(model, tmp_path):
    path = tmp_path / "base_0.png"
    codes = torch.randint(model.num_codes, (36,), generator=torch.Generator().manual_seed(0))
    save_image(path, model.decode_codes(codes[None])[0], codes, {"prompt": "a red circle", "seed": 3})
    return path


def test_a_failed_image_has_the_reason_of_the_engine(model, tmp_path):
    hook = model.head.register_forward_hook(lambda module, inputs, logits: logits * torch.nan)
    path = tmp_path / "a.png"
    try:
        with ImageFiles(model, ImagesConfig()) as files:
            failed = files.generate([model.image_prompt("a red circle")], {path: {"seed": 1}})
            files.wait_for([path])
    finally:
        hook.remove()
    assert failed == {path: Failure("the logits are not finite at token 0")}
    assert not path.exists()


@pytest.mark.parametrize("writes", [0, 1])
def test_an_image_that_replaces_another_is_not_finished_before_its_codes_are(model, path, monkeypatch, writes):
    """A process that is killed between the two files leaves no image of one prompt under the settings of another."""
    settings, done = {"prompt": "a red circle", "seed": 3}, []
    assert is_finished(path, settings)

    def write(target, data):
        if len(done) == writes:
            raise KeyboardInterrupt
        done.append(target)
        records.write_atomic(target, data)

    monkeypatch.setattr(image_files, "write_atomic", write)
    codes = torch.zeros(36, dtype=torch.long)
    with pytest.raises(KeyboardInterrupt):
        save_image(path, model.decode_codes(codes[None])[0], codes, {"prompt": "a blue square", "seed": 3})
    assert done == [path][:writes]
    assert not is_finished(path, settings)


@pytest.mark.parametrize(("deleted", "syncs"), [((".png", ".npz"), 1), ((".npz",), 2), ((".png",), 2), ((), 3)])
def test_the_names_of_an_image_are_on_disk_before_a_mark_could_be_that_of_the_old_one(
    model, path, monkeypatch, deleted, syncs
):
    """The folder is synced once the old mark is gone, and before the new one where the old image is left."""
    for suffix in deleted:
        path.with_suffix(suffix).unlink()
    sync, seen = os.fsync, []

    def fsync(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            seen.append(tuple(path.with_suffix(suffix).exists() for suffix in (".png", ".npz")))
        sync(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    codes = torch.zeros(36, dtype=torch.long)
    save_image(path, model.decode_codes(codes[None])[0], codes, {"prompt": "a blue square", "seed": 3})
    assert len(seen) == syncs
    assert seen[-1] == (True, True)
    if ".npz" not in deleted:
        assert seen[0] == (".png" not in deleted, False)
    if ".png" not in deleted:
        assert seen[-2] == (True, False)
    assert is_finished(path, {"prompt": "a blue square", "seed": 3})


@pytest.mark.parametrize("remake", [False, True])
@pytest.mark.parametrize("left", [(), (".png",), (".npz",)])
def test_files_are_written_without_an_operation_of_torch(model, path, remake, left):
    """Several threads write them. The first operations of two threads of a forked process can fail in torch."""
    codes = load_codes(path.with_suffix(".npz"))["codes"]
    (image,) = model.decode_codes(codes[None])
    for suffix in {".png", ".npz"} - set(left):
        path.with_suffix(suffix).unlink()
    files = ImageFiles(model, ImagesConfig(), remake=remake)
    files._paths, files._unwritten = [path], {path: {"prompt": "a red circle", "seed": 3}}

    class Refuse(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            assert op in (torch.ops.aten.detach.default, torch.ops.aten.lift_fresh.default)  # they compute nothing
            return op(*args, **(kwargs or {}))

    with Refuse():
        files._save_numbered(0, codes, image)
    assert is_finished(path, {"prompt": "a red circle", "seed": 3})


def test_codes_are_read_back_or_encoded(model, path):
    stored = load_codes(path.with_suffix(".npz"))
    assert (stored["prompt"], stored["seed"], stored["codes"].dtype) == ("a red circle", 3, torch.int64)
    assert torch.equal(image_codes(model, [path])[0], stored["codes"])
    path.with_suffix(".npz").unlink()
    (encoded,) = image_codes(model, [path])
    assert torch.equal(encoded, model.encode_images([Image.open(path).convert("RGB")])[0].cpu())


def test_codes_of_a_pair(model, path):
    pair = {"chosen": path.name, "rejected": path.name}
    codes, missing = pair_codes(model, [pair, {**pair, "rejected": "none.png"}], path.parent)
    assert torch.equal(codes, load_codes(path.with_suffix(".npz"))["codes"].expand(2, -1))
    assert "none.png" in missing.reason


@pytest.mark.parametrize("codes", [torch.zeros(35), torch.full((36,), 9999), torch.zeros(0)], ids=["35", "9999", "0"])
def test_codes_of_another_model(model, path, codes):
    save_codes(path.with_suffix(".npz"), codes.long())
    assert "another model" in image_codes(model, [path])[0].reason


def test_damaged_files_fail_alone(model, path):
    """A cut or a changed byte in an image or its codes gives a Failure, and the other images their codes."""
    (codes,) = image_codes(model, [path])
    rng = random.Random(0)
    paths = [path]
    for n in range(60):
        for suffix in (".png", ".npz"):
            data = bytearray(path.with_suffix(suffix).read_bytes())
            if n % 2:
                del data[rng.randrange(len(data)) :]
            else:
                data[rng.randrange(len(data))] ^= 0xFF
            damaged = path.with_name(f"{n}{suffix[1]}.png")
            damaged.write_bytes(path.read_bytes())
            damaged.with_suffix(suffix).write_bytes(data)
            paths.append(damaged)
    first, *others = image_codes(model, paths)
    assert torch.equal(first, codes)
    reasons = [found.reason for found in others if isinstance(found, Failure)]
    assert len(reasons) > 90
    assert all(reason.startswith("Cannot read the ") or "another model" in reason for reason in reasons)


@pytest.mark.parametrize(
    "changed",
    [
        {"codes": None},
        {"codes": np.zeros((6, 6), int)},
        {"codes": np.full(36, np.nan)},
        {"codes": np.full(36, 1.5)},
        {"codes": np.array("text")},
        {"codes": np.array(3)},
        {"seed": np.array([3, 4])},
        {"codes": np.full(36, -1)},
        {"codes": np.full(36, 2**63, np.uint64)},
    ],
)
def test_codes_of_wrong_content_are_refused(model, path, changed):
    """A setting of two values once ended in "truth value is ambiguous"."""
    values = {"codes": np.zeros(36, int), "prompt": "a red circle", "seed": 3} | changed
    np.savez(path.with_suffix(".npz"), **{name: value for name, value in values.items() if value is not None})
    (found,) = image_codes(model, [path])
    assert "base_0" in found.reason
    assert "codes" in found.reason
    assert is_finished(path, {"seed": 3}) == ("seed" not in changed and _is_list(values["codes"]))


def _is_list(codes):
    return codes is not None and codes.ndim == 1 and codes.dtype.kind in "iu"


def test_no_image_is_not_a_stack():
    assert stack_codes([]) == Failure("there is no image")


def test_images_and_codes_outside_of_the_run_folder_fail_alone(model, path, tmp_path):
    (tmp_path / "run").mkdir()
    image = shutil.copy(path, tmp_path / "run" / "linked.png")
    (tmp_path / "run" / "linked.npz").symlink_to(path.with_suffix(".npz"))
    inside = {"chosen": "inside.png", "rejected": "inside.png"}
    for suffix in (".png", ".npz"):
        shutil.copy(path.with_suffix(suffix), tmp_path / "run" / f"inside{suffix}")
    names = [str(path), "../base_0.png", str(image), "linked.png", "/dev/zero", "a\0b", 3000 * "a", None, 5]
    pairs = [inside, *({**inside, "rejected": name} for name in names)]
    good, *others = pair_codes(model, pairs, tmp_path / "run")
    assert good.shape == (2, 36)
    assert all(isinstance(found, Failure) for found in others)
    good, *others = pair_codes(model, pairs, tmp_path / "run", [str(tmp_path)])
    assert all(torch.equal(found, good) for found in others[:4])
    assert all(isinstance(found, Failure) for found in others[4:])
