"""The picture of `show`: colors, outlines and words at the pixels where they belong, and every refused input."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

import ospo_fast
from ospo_fast.errors import OpError
from ospo_fast.report.overlay import GAP, LINE, PANEL, PER_ROW, show

SIDE = 240  # px of a panel for an image of 48 px, which is enlarged five times
WHITE = (255, 255, 255)


@pytest.fixture
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8))


def panels(picture, count, width=SIDE, height=SIDE):
    """The pixels (height, width, 3) of the first row of panels."""
    pixels = np.asarray(picture)
    lefts = [GAP + n * (width + GAP) for n in range(count)]
    return [pixels[GAP : GAP + height, left : left + width] for left in lefts]


def luminance(pixels):
    return pixels.astype(float) @ (0.2126, 0.7152, 0.0722)


def test_the_first_panel_is_the_image(image):
    first, second = panels(show(image, torch.rand(1, 6, 6), ["cat"]), 2)
    np.testing.assert_array_equal(first, np.asarray(image.resize((SIDE, SIDE), Image.Resampling.NEAREST)))
    assert np.abs(first.astype(int) - second).mean() > 20


def test_brighter_colors_are_higher_values_in_steps_that_look_equal():
    """Lightness L* of CIE Lab rises with the value, by nearly the same amount over each eighth of the range."""
    values = torch.linspace(0, 1, 64).view(1, 8, 8)
    panel = panels(show(Image.new("RGB", (48, 48), "gray"), 3 * values - 1, ["cat"]), 2)[1]
    centers = panel[15::30, 15::30].reshape(64, 3)
    light = 116 * np.cbrt(luminance((centers / 255) ** 2.2)) - 16
    assert (np.diff(light) > 0).all()
    steps = np.diff(light[::9])
    assert steps.max() / steps.min() < 2


@pytest.mark.parametrize("grid", [(6, 6), (3, 5), (24, 24)])
def test_outlines_are_the_borders_of_object_masks(image, grid):
    maps = torch.rand(2, *grid, generator=torch.Generator().manual_seed(1)) ** 3
    found = panels(show(image, maps, ["cat", "dog"]), 3)[1:]
    rows, columns = grid
    for panel, mask in zip(found, ospo_fast.object_masks(maps[None]).masks[0].bool().numpy(), strict=True):
        assert 0 < mask.mean() < 1
        line = (panel == WHITE).all(-1)
        for r in range(rows):
            for c in range(columns):
                middle = line[(2 * r + 1) * SIDE // (2 * rows), (2 * c + 1) * SIDE // (2 * columns)]
                assert not middle
                if c + 1 < columns:
                    x = round((c + 1) * SIDE / columns)
                    edge = line[(2 * r + 1) * SIDE // (2 * rows), x - 1 : x + 2].any()
                    assert edge == (mask[r, c] != mask[r, c + 1])
                if r + 1 < rows:
                    y = round((r + 1) * SIDE / rows)
                    edge = line[y - 1 : y + 2, (2 * c + 1) * SIDE // (2 * columns)].any()
                    assert edge == (mask[r, c] != mask[r + 1, c])
            for c, x in ((0, slice(0, 3)), (columns - 1, slice(SIDE - 3, SIDE))):  # the border of the image
                assert line[(2 * r + 1) * SIDE // (2 * rows), x].any() == mask[r, c]


def test_images_and_maps_of_every_form_give_the_same_picture(image, tmp_path):
    array, maps = np.array(image), torch.rand(2, 6, 6)
    expected = show(image, maps, ["cat", "dog"]).tobytes()
    image.save(tmp_path / "image.png")
    array.flags.writeable = False
    as_float = torch.tensor(array).permute(2, 0, 1) / 255
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for form in (tmp_path / "image.png", str(tmp_path / "image.png"), array, torch.tensor(array), as_float):
            assert show(form, maps, ["cat", "dog"]).tobytes() == expected
        assert show(array[::-1], maps, ["cat", "dog"]).tobytes() != expected
    for form in (maps[None], maps.numpy(), maps.clone().requires_grad_(), maps.numpy()[::-1, ::-1].copy()[::-1, ::-1]):
        assert show(image, form, ("cat", "dog")).tobytes() == expected


def test_maps_of_half_precision_are_accepted(image):
    maps = torch.rand(1, 6, 6).bfloat16()
    assert show(image, maps, ["cat"]).tobytes() == show(image, maps.float(), ["cat"]).tobytes()


def test_a_constant_map_has_no_outline_and_says_so(image):
    picture = show(image, torch.ones(1, 6, 6), ["cat"])
    assert not (panels(picture, 2)[1] == WHITE).all(-1).any()
    drawn = (np.asarray(picture)[GAP + SIDE + GAP // 2 + LINE :] < 200).all(-1)
    expected = Image.new("RGB", picture.size, "white")
    font = ImageFont.load_default(15)
    ImageDraw.Draw(expected).text((2 * GAP + SIDE, 0), "mask: empty, the map is constant", "#5f636b", font=font)
    np.testing.assert_array_equal(drawn, (np.asarray(expected)[: len(drawn)] < 200).all(-1))


LONG = "Rindfleischetikettierungsueberwachungsaufgabenuebertragungsgesetz"


def test_many_and_long_words_are_whole_and_apart(image):
    words = ["cat", "a very long noun phrase that needs more than one line", LONG, *"defgh"]
    picture = np.asarray(show(image, torch.rand(len(words), 6, 6), words))
    pitch = SIDE + GAP
    assert picture.shape[1] == GAP + PER_ROW * pitch
    for n in range(PER_ROW + 1):  # nothing is in the gaps between the columns
        assert (picture[:, n * pitch + 2 : n * pitch + GAP - 2] == 255).all()
    # Black words below the first row of panels; their notes are gray. The lines of the long word have all of its ink.
    below = (picture < 80).all(-1)[GAP + SIDE : GAP + SIDE + GAP // 2 + 3 * LINE]
    columns = [below[:, GAP + n * pitch : GAP + n * pitch + SIDE] for n in range(PER_ROW)]
    used = [int(np.ptp(np.flatnonzero(part.any(1)))) if part.any() else 0 for part in columns]
    assert used[0] == 0
    assert 0 < used[1] < LINE
    assert LINE < used[2] < 2 * LINE
    assert LINE < used[3] < 2 * LINE
    alone = Image.new("RGB", (1000, 40), "white")
    ImageDraw.Draw(alone).text((0, 0), LONG, fill="black", font=ImageFont.load_default(15))
    ink = (np.asarray(alone) < 80).all(-1).sum()
    assert columns[3].sum() == pytest.approx(ink, rel=0.1)


def test_characters_without_a_glyph_are_shown_as_escapes(image):
    maps = torch.rand(1, 6, 6)
    for word, escaped in (("caf\u00e9", r"caf\xe9"), ("\u732b", r"\u732b"), ("a\n b", "a b")):
        assert show(image, maps, [word]).tobytes() == show(image, maps, [escaped]).tobytes()
    assert show(image, maps, ["caf\u00e9"]).tobytes() != show(image, maps, ["cafe"]).tobytes()


def test_large_and_oblong_images_are_scaled_to_the_panel():
    picture = show(Image.new("RGB", (600, 300), "blue"), torch.rand(2, 12, 24), ["cat", "dog"])
    assert picture.width == GAP + 3 * (PANEL + GAP)
    assert (panels(picture, 3, PANEL, PANEL // 2)[0] == (0, 0, 255)).all()
    cells = show(Image.new("RGB", (600, 600)), torch.rand(1, 200, 200), ["cat"])
    assert cells.width == GAP + 2 * (400 + GAP)  # two pixels for each cell


@pytest.mark.parametrize(
    ("maps", "words", "message"),
    [
        (torch.rand(2, 6, 6), ["cat"], "words has length 1, maps have 2; give one word for each map"),
        (torch.rand(1, 6, 6), [], "words has length 0"),
        (torch.rand(1, 6, 6), "cat", r"expected a list of strings; write \['cat'\]"),
        (torch.rand(1, 6, 6), [" "], r"words\[0\] is ' ', expected a string that is not blank"),
        (torch.rand(1, 6, 6), [3], r"words\[0\] is 3"),
        (torch.rand(2, 2, 6, 6), ["cat", "dog"], r"of one image; give maps\[b\]"),
        (torch.rand(2, 36), ["cat", "dog"], r"no grid: give AttentionCapture grid=\(h, w\), or use maps.view"),
        (torch.rand(2, 2, 36), ["cat", "dog"], r"no grid: give AttentionCapture grid=\(h, w\), or use maps.view"),
        (torch.rand(1, 1, 36), ["cat"], "no grid"),
        (torch.rand(0, 6, 6), [], "each at least 1"),
        (torch.ones(1, 6, 6, dtype=torch.long), ["cat"], r"int64 \(1, 6, 6\), expected float"),
        ([[1.0]], ["cat"], "maps is list, expected an"),
        (np.array([["a"]]), ["cat"], "maps is an array of <U1"),
        (torch.tensor([[[0.0, torch.nan], [0, 1]]]), ["cat"], "the map of 'cat' holds NaN or infinity"),
        (torch.tensor([[[0.0, 1], [0, 1]], [[torch.inf, 0], [0, 1]]]), ["cat", "dog"], "the map of 'dog' holds NaN"),
    ],
)
def test_wrong_maps_and_words_are_refused(image, maps, words, message):
    with pytest.raises(OpError, match=f"^show: .*{message}"):
        show(image, maps, words)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (5, "image is int, expected a Pillow image, a path, or an array or tensor"),
        ("missing.png", "cannot read the image 'missing.png'"),
        (__file__, "cannot read the image"),
        (torch.rand(48, 48, 3), r"\(48, 48, 3\) and torch.float32, expected \(3, H, W\)"),
        (torch.zeros(3, 48, 48, dtype=torch.uint8), r"expected \(H, W, 3\)"),
        (torch.rand(1, 3, 48, 48), r"or give image\[b\] of a batch"),
        (2 * torch.rand(3, 48, 48) - 1, r"expected \[0, 1\]; scale them"),
        (torch.full((3, 4, 4), torch.nan), r"expected \[0, 1\]"),
        (torch.zeros(48, 48, 3, dtype=torch.long), "int64, expected uint8 or float"),
        (Image.new("I;16", (4, 4)), "mode 'I;16', expected 8 bits"),
    ],
)
def test_wrong_images_are_refused(given, message):
    with pytest.raises(OpError, match=f"^show: .*{message}"):
        show(given, torch.rand(1, 6, 6), ["cat"])


def test_images_that_pillow_cannot_read_are_refused(tmp_path):
    path = tmp_path / "noise.png"
    Image.effect_noise((200, 200), 90).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    closed = Image.new("RGB", (4, 4))
    closed.save(tmp_path / "closed.png")
    closed = Image.open(tmp_path / "closed.png")
    closed.close()
    Image.new("RGB", (40, 40)).save(tmp_path / "eps.png", "EPS")
    for image in (path, Image.open(path), tmp_path / "eps.png", tmp_path, closed, Image.new("La", (40, 40))):
        with pytest.raises(OpError, match="show: cannot read the image"):
            show(image, torch.rand(1, 6, 6), ["cat"])
    with pytest.raises(OpError, match=r"size \(0, 5\), expected at least 1 x 1"):
        show(Image.new("RGB", (0, 5)), torch.rand(1, 6, 6), ["cat"])


@pytest.mark.parametrize(
    ("maps", "words", "message"),
    [
        (np.ones((1, 6, 6), ">f4"), ["cat"], "maps is an array of >f4"),
        (torch.ones(1, 6, 6).to(torch.float8_e4m3fn), ["cat"], "maps is torch.float8_e4m3fn"),
        (torch.ones(1, 6, 6).to_sparse(), ["cat"], "layout torch.sparse_coo"),
        (torch.ones(1, 6, 6), None, r"words are NoneType, expected a list of strings; use list\(words\)"),
        (torch.ones(1, 6, 6), np.array("cat"), r"words are ndarray, expected a list"),
        (torch.ones(1, 6, 6), (word for word in ["cat"]), "words are generator"),
        (torch.ones(1, 6, 6), "cat", r"write \['cat'\] for one word"),
    ],
)
def test_unusual_arrays_and_words_are_refused(maps, words, message):
    with pytest.raises(OpError, match=message):
        show(Image.new("RGB", (48, 48)), maps, words)
