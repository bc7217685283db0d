"""Files of any origin: paths stay in the folders of the user, and no content raises an error of another package."""

import contextlib
import os
import struct
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import ospo_fast.files as files
from ospo_fast.errors import Failure, OspoError, attempt
from ospo_fast.files import load_npz, load_tensors, locate, no_link, open_image, read_yaml, regular


@pytest.fixture
def run(tmp_path):
    """A run folder next to a folder of others."""
    for name in ("run/images", "run/iter2/images", "others"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").touch()
    for name in ("run/images/a.png", "run/iter2/images/a.png", "others/a.png"):
        Image.new("RGB", (8, 8), "red").save(tmp_path / name)
    (tmp_path / "run" / "out.png").symlink_to(tmp_path / "others" / "a.png")
    (tmp_path / "run" / "folder").symlink_to(tmp_path / "others")
    (tmp_path / "run" / "inside.png").symlink_to("images/a.png")
    (tmp_path / "run" / "loop").symlink_to("loop")
    return tmp_path / "run"


def test_paths_below_the_run_folder_are_read(run, monkeypatch):
    for path in ("images/a.png", "images//a.png", "./images/../images/a.png", "inside.png", str(run / "images/a.png")):
        assert open_image(locate(path, run)).size == (8, 8)
    for path in ("images/a.png", "../images/a.png", str(run / "images" / "a.png")):  # of the run, or of its iteration
        assert open_image(locate(path, run / "iter2")).size == (8, 8)
    monkeypatch.chdir(run)
    assert open_image(locate("images/a.png", None)).size == (8, 8)


ESCAPES = [
    "../others/a.png", "images/../../others/a.png", "/etc/passwd", "//etc/passwd", "/dev/zero", "/proc/self/mem",
    "/proc/self/environ", "out.png", "folder/a.png", "folder", ".", "images/..", "/", "..", 3000 * "../" + "etc/passwd",
]  # fmt: skip


@pytest.mark.parametrize("path", ESCAPES, ids=range(len(ESCAPES)))
def test_paths_that_leave_the_run_folder_are_refused(run, monkeypatch, path):
    monkeypatch.chdir(run)
    for out in (run, None, run / "iter2"):
        if out != run / "iter2" or not path.startswith((".", "f", "o", "i")):
            with pytest.raises(OspoError, match=r"leads out of the folders .* read_from="):
                locate(path, out)


@pytest.mark.parametrize("path", ["a\0b.png", "", None, 5, ["a.png"]])
def test_what_is_no_path_is_refused(run, path):
    with pytest.raises(OspoError, match="correct the record"):
        locate(path, run)


def test_a_name_too_long_or_a_loop_cannot_be_read(run):
    for path in (5000 * "a" + ".png", "loop", "loop/a.png", 3000 * "a/" + "b.png"):
        with pytest.raises(OspoError, match="Cannot read the image") as caught:
            open_image(locate(path, run))
        assert len(str(caught.value)) < 1000


def test_the_user_names_further_folders(run):
    others = run.parent / "others"
    for path in (str(others / "a.png"), "../others/a.png", "out.png", "folder/a.png"):
        assert open_image(locate(path, run, [str(others)])).size == (8, 8)
    with pytest.raises(OspoError, match="leads out"):
        locate("/etc/passwd", run, [str(others)])


def test_only_the_folder_of_an_iteration_reaches_the_folder_above_it(run, tmp_path):
    (run / "config.yaml").unlink()
    with pytest.raises(OspoError, match="leads out"):
        locate("../images/a.png", run / "iter2")


def refuse(path, reason):
    with pytest.raises(OspoError, match=rf"^Cannot read the image .*{path.name}: .*{reason}.*; replace it by one PNG"):
        open_image(path)


def write(path, mode="RGB", **options):
    Image.new(mode, options.pop("size", (8, 8))).save(path, **options)
    return path


def png(width, height, *chunks):
    """A PNG of the header, these chunks and no pixels."""
    header = ("IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    body = b"".join(
        struct.pack(">I", len(data)) + (kind.encode() + data) + struct.pack(">I", zlib.crc32(kind.encode() + data))
        for kind, data in (header, *chunks, ("IDAT", zlib.compress(b"")), ("IEND", b""))
    )
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "LA", "P", "1"])
def test_images_of_8_bits_are_read(tmp_path, mode):
    for suffix in ("png", "webp", "bmp", "jpg"):
        if suffix != "png":
            mode = "RGB"
        assert open_image(write(tmp_path / f"a.{suffix}", mode)).mode == "RGB"
    assert open_image(write(tmp_path / "cmyk.jpg", "CMYK")).mode == "RGB"
    assert open_image(write(tmp_path / "clear.png", "P", transparency=0)).mode == "RGB"


@pytest.mark.parametrize("kind", ["EPS", "GIF", "TIFF", "PPM", "PDF", "ICO", "PCX", "JPEG2000"])
def test_other_formats_are_refused_by_their_content(tmp_path, kind, monkeypatch):
    monkeypatch.setattr("subprocess.Popen", lambda *a, **k: pytest.fail("a program was called"))
    path = write(tmp_path / "a.png", size=(32, 32), format=kind)
    refuse(path, "it is none of PNG, JPEG, WEBP, BMP")


def test_limits_hold_before_an_image_is_decoded(tmp_path, monkeypatch):
    for number, size in enumerate([(11000, 11000), (2**14 + 1, 1), (1, 2**14 + 1), (2**31 - 1, 2**31 - 1)]):
        path = tmp_path / f"{number}.png"
        path.write_bytes(png(*size))
        with pytest.warns() if size[0] == 11000 else contextlib.nullcontext():
            refuse(path, "")
    path = write(tmp_path / "a.bmp", size=(100, 100))
    monkeypatch.setattr(files, "MAX_PIXELS", 9999)
    refuse(path, "100 x 100 pixels, expected 1 to 9999")
    monkeypatch.setattr(files, "MAX_PIXELS", 10000)
    assert open_image(path).size == (100, 100)
    monkeypatch.setattr(files, "MAX_SIDE", 99)
    refuse(path, "sides up to 99")
    monkeypatch.setattr(files, "MAX_BYTES", path.stat().st_size - 1)
    refuse(path, "bytes, expected 1 to")


def test_what_is_no_file_is_refused_and_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    for name in ("pipe", "folder", "zero"):
        refuse(tmp_path / f"{name}.png", "it is no regular file")
    (tmp_path / "empty.png").touch()
    refuse(tmp_path / "empty.png", "0 bytes")
    refuse(tmp_path / "none.png", "No such file")


def test_images_whose_values_would_change_are_refused(tmp_path):
    refuse(write(tmp_path / "a.png", "I;16"), "its mode is 'I;16', expected 8 bits")
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue", "green")]
    for name in ("b.png", "b.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        refuse(tmp_path / name, "an animation of 3 frames")
    frames[0].save(tmp_path / "c.jpg", "MPO", save_all=True, append_images=frames[1:])
    assert open_image(tmp_path / "c.jpg").size == (8, 8)


def test_chunks_that_unpack_to_much_are_refused_or_skipped(tmp_path):
    path = tmp_path / "a.png"
    bomb = zlib.compress(bytes(2**26))
    path.write_bytes(png(8, 8, ("zTXt", b"text\0\0" + bomb)))
    refuse(path, "too large")
    path.write_bytes(png(8, 8, ("iCCP", b"icc\0\0" + bomb)))
    refuse(path, "")
    path.write_bytes(png(8, 8, *[("tEXt", b"text\0" + bytes(2**20))] * 80))
    refuse(path, "")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp"])
def test_cut_images_are_refused(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.effect_noise((64, 64), 90).convert("RGB").save(path)
    data = path.read_bytes()
    for size in (1, 4, 12, 20, len(data) // 2, len(data) - 60):
        path.write_bytes(data[:size])
        refuse(path, "")


def npz(path, **members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return path


def npy(header, data=b"", version=b"\1\0"):
    text = header.encode() if isinstance(header, str) else repr(header).encode()
    return b"\x93NUMPY" + version + struct.pack("<H", len(text)) + text + data


def entry(shape, kind="<i8"):
    return {"descr": kind, "fortran_order": False, "shape": shape}


ARRAYS = {
    "empty": b"",
    "no magic": b"nothing",
    "cut": npy(entry((2,)))[:20],
    "too few bytes": npy(entry((2**40,))),
    "too many bytes": npy(entry((1,)), bytes(16)),
    "negative": npy(entry((-1, -1)), bytes(8)),
    "overflow": npy(entry((2**62, 4))),
    "without size": npy(entry((2**62,), "<U0")),
    "not a shape": npy(entry("abc")),
    "booleans": npy(entry((True, False))),
    "objects": npy(entry((1,), "|O"), bytes(8)),
    "fields": npy(entry((1,), [("a", "|O")]), bytes(8)),
    "code": npy("__import__('os').system('touch hacked')"),
    "nested": npy(5000 * "(" + 5000 * ")"),
    "long": npy(entry((1,)), bytes(8)).replace(b"}", b"}" + 60000 * b" "),
    "version": npy(entry((1,)), bytes(8), b"\3\0"),
    "not utf-8": npy(entry((1,)), bytes(8)).replace(b"descr", b"\xff\xfe\xff\xfe\xff"),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_damaged_arrays_are_refused(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OspoError, match=r"^Cannot read the codes .*a\.npz: .*; do this\.$"):
        load_npz("codes", npz(tmp_path / "a.npz", codes=ARRAYS[name]), "do this")
    assert not (tmp_path / "hacked").exists()


def test_an_archive_that_unpacks_to_much_is_refused(tmp_path, monkeypatch):
    path = npz(tmp_path / "a.npz", codes=npy(entry((2**20,)), bytes(2**23)))
    assert path.stat().st_size < 2**14
    assert load_npz("codes", path, "do this")["codes"].shape == (2**20,)
    monkeypatch.setattr(files, "MAX_BYTES", 2**22)
    with pytest.raises(OspoError, match="unpacks to 8388"):
        load_npz("codes", path, "do this")


def test_damaged_archives_are_refused(tmp_path):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, codes=np.arange(500), seed=3)
    data = path.read_bytes()
    assert load_npz("codes", path, "do this")["seed"] == 3
    rng = np.random.default_rng(0)
    refused = 0
    for n in range(300):
        changed = bytearray(data)
        changed[rng.integers(len(data))] ^= 1 << rng.integers(8)
        path.write_bytes(changed[: rng.integers(len(data))] if n % 2 else changed)
        found = attempt(load_npz, "codes", path, "do this")
        assert not isinstance(found, Failure) or found.reason.startswith("Cannot read the codes")
        refused += isinstance(found, Failure)
    assert refused > 150
    for content in (b"", b"PK", np.arange(3).tobytes()):
        path.write_bytes(content)
        with pytest.raises(OspoError, match="Cannot read the codes"):
            load_npz("codes", path, "do this")


def test_damaged_tensor_files_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.arange(300), "b": torch.zeros(3, dtype=torch.bfloat16)}, path)
    data = path.read_bytes()
    assert load_tensors("masks", path, "do this")["a"].shape == (300,)
    rng = np.random.default_rng(0)
    refused = 0
    for n in range(300):
        changed = bytearray(data)
        changed[rng.integers(160)] ^= 1 << rng.integers(8)
        path.write_bytes(changed[: rng.integers(len(data))] if n % 2 else changed)
        found = attempt(load_tensors, "masks", path, "do this")
        assert not isinstance(found, Failure) or found.reason.startswith("Cannot read the masks")
        refused += isinstance(found, Failure)
    assert refused > 150
    for header in (
        b"",
        b"[]",
        9000 * b'{"a":',
        b'{"a":{"dtype":"I64","shape":[4611686018427387904,4],"data_offsets":[0,0]}}',
    ):
        path.write_bytes(len(header).to_bytes(8, "little") + header)
        with pytest.raises(OspoError, match="Cannot read the masks"):
            load_tensors("masks", path, "do this")


def test_links_of_a_run_folder_are_refused(tmp_path):
    """Also dangling ones; who opens a path that cannot be looked up reports that."""
    (tmp_path / "file").touch()
    for name, target in (("link", "file"), ("dangling", "missing"), ("loop", "loop")):
        (tmp_path / name).symlink_to(target)
        with pytest.raises(OspoError, match=rf"{name} is a symbolic link, .*; copy the file in its place\.$"):
            no_link(tmp_path / name)
    for name in ("file", "missing", "file/inner", "x" * 300):
        assert no_link(tmp_path / name) == tmp_path / name
    (tmp_path / "run").symlink_to(tmp_path)
    assert no_link(tmp_path / "run" / "file").exists()  # the run folder itself may be a link


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "device").symlink_to("/dev/zero")
    for name in ("pipe", "folder", "device"):
        for call in (regular, lambda path: regular(path, missing_ok=True), read_yaml):
            with pytest.raises(OSError, match="it is no regular file"):
                call(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        regular(tmp_path / "missing")
    assert regular(tmp_path / "missing", missing_ok=True) == tmp_path / "missing"
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")
    assert regular(tmp_path / "link").read_bytes() == b""
