"""JPEG pictures: the same pixels whichever library decodes, framed as whole pictures would be, damage told."""

import io

import numpy as np
import PIL.Image
import pytest
import torch

from data_shards.decoding import jpeg
from data_shards.decoding.jpeg import decode_jpeg, decode_jpegs
from data_shards.errors import DataError
from data_shards.framing import CropBox, Framing, apply_framing
from data_shards.transforms import evaluation_framings, training_framing
from tests.data_shards.videos import pictures

LIBRARIES = ["simplejpeg", "pil"]


def encode(picture: np.ndarray, *, mode: str = "RGB", **options: object) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(picture).convert(mode).save(file, "JPEG", **{"quality": 90, **options})
    return file.getvalue()


def ramps(height: int, width: int) -> np.ndarray:
    """uint8 (H, W, 3): red tells the column and green the row, so that a wrong cut or scale shows."""
    picture = np.zeros((height, width, 3), dtype=np.uint8)
    picture[..., 0] = np.linspace(0, 255, width)
    picture[..., 1] = np.linspace(0, 255, height)[:, None]
    return picture


@pytest.fixture(params=LIBRARIES)
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "pil":
        monkeypatch.setattr(jpeg, "_simplejpeg", lambda: None)
    else:
        pytest.importorskip("simplejpeg")
    return request.param


@pytest.mark.parametrize(
    "options",
    [{}, {"subsampling": 0}, {"subsampling": 1}, {"quality": 30}, {"progressive": True}, {"mode": "L"}],
    ids=["420", "444", "422", "low_quality", "progressive", "gray"],
)
@pytest.mark.parametrize("size", [(48, 64), (37, 51), (1, 1)])
def test_pixels_are_those_of_libjpeg_whichever_library_decodes(library, options, size):
    payload = encode(pictures(1, 48, 64)[0][: size[0], : size[1]], **options)
    expected = np.asarray(PIL.Image.open(io.BytesIO(payload)).convert("RGB"))
    for given in (payload, memoryview(payload)):
        picture = decode_jpeg(given)
        assert picture.dtype == np.uint8
        assert np.array_equal(picture, expected)


def test_four_inks_become_rgb(library):
    payload = encode(pictures(1, 48, 64)[0], mode="CMYK")
    assert np.array_equal(decode_jpeg(payload), np.asarray(PIL.Image.open(io.BytesIO(payload)).convert("RGB")))


def test_framing_equals_framing_of_whole_pictures(library):
    payloads = [encode(picture) for picture in pictures(3, 96, 130)]
    whole = torch.from_numpy(decode_jpegs(payloads))
    framings = [
        training_framing(
            96, 130, crop_size=40, short_side=44, multi_scale_crop=seed % 2 == 0, generator=np.random.default_rng(seed)
        )
        for seed in range(8)
    ]
    for framing in framings:
        framed = decode_jpegs(payloads, framing)
        assert framed.flags.c_contiguous
        assert np.array_equal(framed, apply_framing(whole, framing).numpy())


@pytest.mark.parametrize("multi_scale_crop", [True, False])
@pytest.mark.parametrize("size", [(250, 333), (1024, 500)])
def test_fast_scaling_shows_the_same_part_of_the_picture(library, multi_scale_crop, size):
    payloads = [encode(ramps(*size))] * 2
    for seed in range(12):
        framing = training_framing(
            *size,
            crop_size=56,
            short_side=64,
            multi_scale_crop=multi_scale_crop,
            generator=np.random.default_rng(seed),
        )
        exact = decode_jpegs(payloads, framing).astype(int)
        fast = decode_jpegs(payloads, framing, scaling="fast").astype(int)
        assert fast.shape == exact.shape
        half_a_pixel = 255 * 0.5 * jpeg._reduction(framing) / min(size)
        assert np.abs(fast - exact).max() <= half_a_pixel + 2
        assert (library == "pil") == np.array_equal(fast, exact)


def test_pictures_shown_at_more_than_half_their_size_are_never_reduced():
    (framing,) = evaluation_framings(111, 150, crop_size=56, short_side=56, num_crops=1)
    assert jpeg._reduction(framing) == 1
    (framing,) = evaluation_framings(112, 150, crop_size=56, short_side=56, num_crops=1)
    assert jpeg._reduction(framing) == 2
    wide = Framing(
        height=224,
        width=64,
        scaled_height=224,
        scaled_width=64,
        box=CropBox(top=0, left=0, height=224, width=64),
        size=56,
    )
    assert jpeg._reduction(wide) == 1  # four times in one direction, not in the other


def test_boxes_are_cut_at_the_nearest_pixels_of_reduced_pictures():
    box = CropBox(top=7, left=3, height=100, width=109)
    framing = Framing(height=121, width=160, scaled_height=121, scaled_width=160, box=box, size=10)
    reduced = jpeg._reduce(framing, 8)
    assert (reduced.height, reduced.width) == (16, 20)
    assert reduced.box == CropBox(top=1, left=0, height=12, width=14)


@pytest.mark.parametrize("damage", ["empty", "text", "png", "header_only", "cut", "no_end", "hole"])
def test_damage_is_a_data_error(damage):
    pytest.importorskip("simplejpeg")
    whole = encode(pictures(1, 200, 200)[0])
    png = io.BytesIO()
    PIL.Image.new("RGB", (8, 8)).save(png, "PNG")
    payload = {
        "empty": b"",
        "text": b"not a picture\n" * 40,
        "png": png.getvalue(),
        "header_only": whole[:300],
        "cut": whole[: len(whole) // 2],
        "no_end": whole[:-2],
        "hole": whole[:2000] + b"\xff\xd9" * 20 + whole[2100:],
    }[damage]
    with pytest.raises(DataError, match="damaged, or no JPEG file"):
        decode_jpeg(payload)


@pytest.mark.parametrize("payload", [b"", b"not a picture\n" * 40, b"\xff\xd8\xff\xe0" + bytes(50)])
def test_what_is_no_picture_is_a_data_error_without_simplejpeg(payload, monkeypatch):
    monkeypatch.setattr(jpeg, "_simplejpeg", lambda: None)
    with pytest.raises(DataError, match="damaged, or no JPEG file"):
        decode_jpeg(payload)


def test_a_size_that_changes_is_refused(library):
    payloads = [encode(pictures(1, 48, 64)[0]), encode(pictures(1, 40, 64)[0])]
    with pytest.raises(DataError, match="changes within the sample, from 64x48 to 64x40"):
        decode_jpegs(payloads)


def test_a_framing_for_another_size_is_refused(library):
    framing = training_framing(
        100, 100, crop_size=20, short_side=24, multi_scale_crop=True, generator=np.random.default_rng(0)
    )
    for scaling in ("exact", "fast"):
        with pytest.raises(DataError, match="the manifest says"):
            decode_jpegs([encode(pictures(1, 48, 64)[0])], framing, scaling=scaling)
