"""Decoding of every kind of picture that folders hold, and the one crop."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_sg.data.images import (
    BadImage,
    crop_resize,
    crop_resize_index,
    decode,
    decode_index,
    to_float,
    to_tensor,
    to_uint8,
)

RGB = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def smooth(width: int, height: int) -> Image.Image:
    """Red grows to the right, green downwards: lossy formats keep it to a few levels."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 0 * x + 64], -1).astype(np.uint8))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_come_out_exactly(kind):
    assert np.array_equal(np.asarray(decode(encoded(Image.fromarray(RGB), kind))), RGB)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "AVIF"])
def test_lossy_formats_come_out_nearly(kind):
    image = smooth(64, 48)
    got = decode(encoded(image, kind, quality=95))
    assert got.mode == "RGB" and got.size == (64, 48)
    assert np.abs(np.asarray(got, int) - np.asarray(image, int)).mean() < 4


def test_every_exif_orientation_comes_out_upright():
    upright = smooth(40, 24)
    undo = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,  # stored turned left, shown turned right
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    for orientation, how in undo.items():
        stored = upright if how is None else upright.transpose(how)
        exif = Image.Exif()
        exif[0x0112] = orientation
        for kind in ("PNG", "TIFF"):
            got = decode(encoded(stored, kind, exif=exif))
            assert np.array_equal(np.asarray(got), np.asarray(upright)), (kind, orientation)


def test_damaged_exif_does_not_cost_the_picture():
    data = encoded(smooth(16, 16), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7fgarbage")
    assert decode(data).size == (16, 16)


def test_grey_palette_cmyk_and_bilevel():
    grey = decode(encoded(Image.fromarray(RGB[..., 0])))
    assert np.array_equal(np.asarray(grey), np.repeat(RGB[..., :1], 3, -1))
    assert np.array_equal(np.asarray(decode(encoded(smooth(8, 8).convert("1")))).max(), 255)
    palette = smooth(32, 32).quantize(16)
    assert np.array_equal(np.asarray(decode(encoded(palette))), np.asarray(palette.convert("RGB")))
    cmyk = decode(encoded(smooth(32, 32).convert("CMYK"), "JPEG", quality=95))
    assert np.abs(np.asarray(cmyk, int) - np.asarray(smooth(32, 32), int)).mean() < 4


def test_sixteen_bit_grey_is_scaled_not_clipped():
    deep = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    want = np.arange(256).reshape(16, 16, 1).repeat(3, -1)
    for kind in ("PNG", "TIFF"):
        assert np.array_equal(np.asarray(decode(encoded(Image.fromarray(deep), kind))), want)


def test_floating_point_tiff_only_with_a_known_white():
    ramp = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    assert np.asarray(decode(encoded(Image.fromarray(ramp), "TIFF"))).max() == 255
    with pytest.raises(BadImage, match="floating-point"):
        decode(encoded(Image.fromarray(ramp * 1000), "TIFF"))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_lies_on_white(mode):
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    image.putpixel((0, 0), (0, 0, 0, 255))
    if mode == "P":
        flat = Image.new("P", (4, 4), 1)
        flat.putpalette([0, 0, 0, 200, 10, 10])
        flat.putpixel((0, 0), 0)
        data = encoded(flat, "PNG", transparency=1)
    else:
        data = encoded(image.convert(mode))
    got = np.asarray(decode(data))
    assert got[0, 0].tolist() == [0, 0, 0] and got[3, 3].tolist() == [255, 255, 255]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_animations_give_their_first_frame(kind):
    first, second = Image.new("RGB", (8, 8), (200, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 200))
    data = encoded(first, kind, save_all=True, append_images=[second], **({"lossless": True} if kind == "WEBP" else {}))
    assert np.asarray(decode(data))[0, 0].tolist() == [200, 0, 0]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"hello, I am a text file called photo.jpg", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not an image"),  # would start Ghostscript
        (b"\xff\xd8\xff\xe0", "cannot be decoded|not an image"),
    ],
)
def test_what_is_not_an_image(data, reason):
    with pytest.raises(BadImage, match=reason):
        decode(data, "key7")
    with pytest.raises(BadImage, match=r"^key7: "):
        decode(data, "key7")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])
def test_truncated_images_are_refused(kind):
    data = encoded(Image.fromarray(RGB).resize((200, 200)), kind)
    for share in (0.3, 0.6, 0.95):
        with pytest.raises(BadImage):
            decode(data[: int(len(data) * share)])


def png_header(width: int, height: int) -> bytes:
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    header = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    pixels = b"IDAT" + zlib.compress(b"\0" * 1000)
    return (
        b"\x89PNG\r\n\x1a\n"
        + header
        + struct.pack(">I", len(pixels) - 4)
        + pixels
        + struct.pack(">I", zlib.crc32(pixels))
    )


@pytest.mark.parametrize("side", [100_000, 12_000])  # beyond Pillow's limit, and between its warning and it
def test_huge_headers_are_refused_without_decoding(side, monkeypatch):
    monkeypatch.setattr("ldm_sg.data.images.to_rgb", lambda image: pytest.fail("decoded"))
    bmp = (
        b"BM"
        + struct.pack("<IHHI", 100, 0, 0, 54)
        + struct.pack("<IiiHHIIiiII", 40, side, side, 1, 24, 0, 0, 0, 0, 0, 0)
    )
    for data in (png_header(side, side), bmp):
        with pytest.raises(BadImage, match="claims"):
            decode(data)


def test_crop_is_the_centre_and_keeps_the_aspect():
    wide = Image.new("RGB", (300, 100), (255, 0, 0))
    wide.paste((0, 0, 255), (100, 0, 200, 100))
    for image in (wide, wide.transpose(Image.Transpose.ROTATE_90)):
        got = np.asarray(crop_resize(image, 50))
        assert got.shape == (50, 50, 3) and (got[3:-3, 3:-3] == [0, 0, 255]).all()
        whole = image.resize((150, 50) if image is wide else (50, 150), Image.Resampling.BICUBIC)
        assert np.array_equal(got, np.asarray(crop_resize(whole, 50)))  # resize, then crop


def test_crop_leaves_pixels_of_the_right_size_alone():
    square = Image.fromarray(RGB[:, :20])
    assert np.array_equal(np.asarray(crop_resize(square, 20)), RGB[:, :20])
    assert np.array_equal(np.asarray(crop_resize(Image.fromarray(RGB), 20)), RGB[:, 5:25])
    small = crop_resize(Image.fromarray(RGB), 16)
    assert np.array_equal(np.asarray(crop_resize(small, 16)), np.asarray(small))
    assert np.array_equal(np.asarray(crop_resize(square, 12, within=20)), RGB[4:16, 4:16])
    half = np.asarray(crop_resize(Image.fromarray(RGB), 8, within=10), int)
    assert np.abs(half - np.asarray(crop_resize(Image.fromarray(RGB), 10), int)[1:9, 1:9])[1:-1, 1:-1].max() <= 1


def test_resizing_is_antialiased():
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255  # finer than the result can show: must become grey, not a moire
    got = np.asarray(crop_resize(Image.fromarray(stripes), 48), int)[4:-4, 4:-4]
    assert np.abs(got - 127.5).max() < 8


def test_index_images_keep_their_indices():
    mask = Image.fromarray(np.random.default_rng(1).choice([0, 3, 255], (20, 30)).astype(np.uint8))
    got = crop_resize_index(decode_index(encoded(mask), (30, 20)), 10)
    assert got.size == (10, 10) and set(np.unique(np.asarray(got))) <= {0, 3, 255}
    palette = mask.convert("P")
    assert np.array_equal(np.asarray(decode_index(encoded(palette), (30, 20))), np.asarray(palette))
    with pytest.raises(BadImage, match="mask is 30 x 20"):
        decode_index(encoded(mask), (31, 20))
    with pytest.raises(BadImage, match="mode RGB"):
        decode_index(encoded(Image.fromarray(RGB)), (30, 20))
    with pytest.raises(BadImage, match="cannot be decoded"):
        decode_index(b"no", (30, 20))
    # 2-bit greys 0, 1, 2, 3, which Pillow makes 0 .. 255
    header = b"IHDR" + struct.pack(">IIBBBBB", 4, 1, 2, 0, 0, 0, 0)
    rows = b"IDAT" + zlib.compress(b"\0" + bytes([0b00011011]))
    parts = [
        struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part))
        for part in (header, rows, b"IEND")
    ]
    with pytest.raises(BadImage, match="2-bit greys"):
        decode_index(b"\x89PNG\r\n\x1a\n" + b"".join(parts), (4, 1))


def test_tensors_and_back():
    image = to_tensor(Image.fromarray(RGB))
    assert image.shape == (3, 20, 30) and image.dtype == torch.uint8
    floats = to_float(image)
    assert floats.min() >= -1 and floats.max() <= 1
    assert torch.equal(to_uint8(floats), image)
    assert to_uint8(torch.tensor([-9.0, 9.0])).tolist() == [0, 255]
