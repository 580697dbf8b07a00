"""Image bytes -> the one RGB square that every verb sees, and what g sees of the image beside it. Torch is imported only
where tensors are made, so that decoding processes start in a fraction of a second."""

import io
import math
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ldm_sg.errors import one_line

if TYPE_CHECKING:
    from torch import Tensor

# Formats that are pixels and nothing else: Pillow would also run Ghostscript on an EPS that is called .jpg.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
MAX_SIDE = 8192  # pixels of a square that images are cropped to
LARGE = 2**25  # pixels, 0.1 GB as RGB and up to four times that while it is decoded: one at a time over all decoders
MAX_ASPECT = 4  # of whole images that g sees: beyond it they are made smaller, to bound its patches
MAX_PIXELS = 2**27  # 134 megapixels, 0.4 GB as RGB: more than cameras make; beyond it a header is taken for an attack
Size = int | tuple[int, int]  # pixels of an image's side where it is square, else its width and height
_ORIENTATION = 0x0112  # the EXIF tag
_UPRIGHT = {  # EXIF orientation -> what brings the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Pillow warns of odd EXIF blocks and of sizes below our own limit; what matters here is an error, not a warning.
warnings.filterwarnings("ignore", module=r"PIL\.")


_large: AbstractContextManager[Any] = threading.Lock()


def share_large(lock: AbstractContextManager[Any]) -> None:
    """The lock under which large images are decoded: one for all processes of a pool."""
    global _large
    _large = lock


class BadImage(Exception):
    """An image that cannot be used; `reason` is one line for skipped.jsonl."""

    def __init__(self, reason: str, key: str = ""):
        super().__init__(f"{key}: {reason}" if key else reason)
        self.reason = reason


def read_bytes(path: str | Path, what: str = "") -> bytes:
    """A file's content; BadImage where it cannot be read."""
    if Path(path).is_char_device():
        raise BadImage(f"{what}cannot be read: a device, which has no end")
    try:
        return Path(path).read_bytes()
    except OSError as err:
        raise BadImage(f"{what}cannot be read: {err.strerror or err}") from err


def decode(data: bytes, key: str = "", least: int = 0) -> Image.Image:
    """Bytes of an image file -> RGB, upright (EXIF), first frame, transparency over white. A JPEG whose sides stay above `least`
    pixels, where that is given, is made smaller by 2, 4 or 8 while it is decoded: seven times as fast for a camera's photos,
    and nothing that a person sees where `least` is twice the pixels that are kept. Raises BadImage."""
    if not data:
        raise BadImage("empty file", key)
    with _opened(data, FORMATS, f"not an image ({', '.join(FORMATS)})", key=key) as image:
        if least:
            image.draft(image.mode, (least, least))
        with _large if image.width * image.height > LARGE else nullcontext():
            rgb = to_rgb(image)
        turn = _UPRIGHT.get(_orientation(image))  # not before it is loaded: Pillow turns TIFFs itself
    return rgb if turn is None else rgb.transpose(turn)


@contextmanager
def _opened(data: bytes, formats: Sequence[str], unknown: str, what: str = "", key: str = "") -> Iterator[Image.Image]:
    """An image file of at most MAX_PIXELS; all that goes wrong with it within `with` is a BadImage."""
    claims = f"{what or 'its header '}claims"
    try:
        with Image.open(io.BytesIO(data), formats=formats) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BadImage(f"{claims} {image.width} x {image.height} pixels, more than {MAX_PIXELS:,}", key)
            yield image
    except BadImage:
        raise
    except Image.DecompressionBombError:  # Pillow's own limit, for headers far beyond ours
        raise BadImage(f"{claims} more than {MAX_PIXELS:,} pixels", key) from None
    except Image.UnidentifiedImageError:
        raise BadImage(unknown, key) from None
    except Exception as err:  # damaged files make Pillow raise OSError, ValueError, SyntaxError, struct.error ...
        raise BadImage(f"{what}cannot be decoded: {one_line(err)}", key) from err


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # EXIF is free text of thousands of programs; a damaged block does not damage the pixels
        return 1


def to_rgb(image: Image.Image) -> Image.Image:
    image.load()
    if image.mode.startswith("I"):  # 16-bit greyscale ("I;16...", or "I" from 32-bit containers)
        grey = np.asarray(image).astype(np.float64) / 257.0
        return Image.fromarray(grey.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        grey = np.asarray(image)
        if not (np.isfinite(grey).all() and grey.min() >= 0 and grey.max() <= 1):
            raise BadImage("floating-point pixels outside [0, 1]: their white is unknown")
        return Image.fromarray((grey * 255).round().astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def crop_resize(image: Image.Image, size: Size, within: int | None = None) -> Image.Image:
    """Centre square -> `size` x `size`, antialiased bicubic: THE preprocessing of training and reference images. With
    `within`, the centre of `size` pixels of what crop_resize(image, within) would be. With a width and a height, the largest
    centre part of that shape.

    Pixel-identical when that part is already `size` (or `within`) wide."""
    return _resized(image, size, part_of(*image.size, size, within))


def sides(size: Size) -> tuple[int, int]:
    """Width and height."""
    return size if isinstance(size, tuple) else (size, size)


def nearest_shape(width: int, height: int, shapes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Of `shapes` (width, height) the one of which an image loses least: that of the nearest aspect ratio."""
    return min(shapes, key=lambda shape: abs(math.log(width / height * shape[1] / shape[0])))


def part_of(width: int, height: int, size: Size, within: int | None = None) -> tuple[float, float, float, float]:
    """Left, top, right, bottom, in an image's pixels, of what `crop_resize` takes."""
    if isinstance(size, tuple):
        scale = min(width / size[0], height / size[1])
        w, h = min(size[0] * scale, width), min(size[1] * scale, height)  # rounding must not lead out of the image
        left, top = (width - w) // 2, (height - h) // 2
        return left, top, left + w, top + h
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    if within is None:
        return left, top, left + side, top + side
    margin, part = side * ((within - size) // 2) / within, side * size / within
    return left + margin, top + margin, left + margin + part, top + margin + part


def enlarges(width: int, height: int, size: Size) -> bool:
    """Whether `crop_resize` makes that part larger."""
    left, _, right, _ = part_of(width, height, size)
    return right - left < sides(size)[0]


def _resized(image: Image.Image, size: Size, part: tuple[float, float, float, float]) -> Image.Image:
    new = sides(size)
    if (part[2] - part[0], part[3] - part[1]) == new:
        return image if image.size == new else image.crop(part)  # type: ignore[arg-type]
    return image.resize(new, Image.Resampling.BICUBIC, box=part)


def fitted(width: int, height: int, size: int) -> tuple[int, int]:
    """Width and height of an uncropped image whose short side becomes `size`."""
    short = min(width, height)
    return max(1, round(width * size / short)), max(1, round(height * size / short))


def fit_resize(image: Image.Image, size: int) -> Image.Image:
    """The whole image, its short side `size`, antialiased bicubic; pixel-identical when it is already."""
    wanted = fitted(*image.size, size)
    return image if image.size == wanted else image.resize(wanted, Image.Resampling.BICUBIC)


def crop_or_fit(image: Image.Image, size: Size, crop: bool) -> Image.Image:
    """`crop_resize`, or without `crop` `fit_resize`: what is packed. Raises BadImage where a side would be too long to store."""
    if not crop and max(fitted(*image.size, size)) > MAX_SIDE:
        said = f"{image.width} x {image.height} pixels"
        raise BadImage(f"{said}: --size {size} makes its long side longer than {MAX_SIDE}")
    return crop_resize(image, size) if crop else fit_resize(image, size)


@dataclass(frozen=True)
class Shown:
    """What is shown of one image, uint8 [3, height, width] each."""

    square: np.ndarray  # to the autoencoder; of a bucket's image all of it
    view: np.ndarray | None  # to g: the (centre) square at g's own size; None = `square`, which g resizes
    whole: np.ndarray | None  # to LOST: the uncropped image at the view's scale; None = what g sees
    crop: tuple[float, ...]  # left, top, right, bottom of the square, as shares of the image's sides


def show(
    image: Image.Image, size: Size, within: int | None = None, view: int | None = None, whole: bool = False
) -> Shown:
    """THE rule of what networks see. The autoencoder: the `size`-pixel centre square (`crop_resize`). g, whose input is
    `view` pixels wide: the same square straight from the image's own pixels where it has more than `size` of them, and
    otherwise the very square. With `whole`, what finds boxes sees the uncropped image, at the same scale.

    With a width and a height, an image of a bucket: the autoencoder sees all of it, g its centre square. BadImage where it
    has another size."""
    if isinstance(size, tuple):
        if image.size != size:
            said = "{} x {} pixels, the first image of its shard has {} x {}".format(*image.size, *size)
            raise BadImage(f"{said}: buckets=true reads what `pack --buckets` wrote")
        centre = show(image, min(size), view=view)
        return replace(centre, square=to_array(image), view=centre.square if centre.view is None else centre.view)
    part = part_of(*image.size, size, within)
    left, top, right, bottom = part
    pixels = to_array(_resized(image, size, part))
    closer = to_array(_resized(image, view, part)) if view not in (None, size) and right - left > size else None
    crop = (left / image.width, top / image.height, right / image.width, bottom / image.height)
    uncropped = None
    if whole and view is not None and crop != (0, 0, 1, 1):
        longest = max(image.size) / min(image.size)
        uncropped = to_array(fit_resize(image, max(1, round(view * min(1, MAX_ASPECT / longest)))))
    return Shown(pixels, closer, uncropped, crop)


def crop_resize_index(mask: Image.Image, size: Size, crop: bool = True) -> Image.Image:
    """`crop_resize`, or without `crop` `fit_resize`, for index images (segmentation masks): nearest neighbour, indices
    untouched."""
    if not crop:
        return mask.resize(fitted(*mask.size, size), Image.Resampling.NEAREST)
    return mask.resize(sides(size), Image.Resampling.NEAREST, box=part_of(*mask.size, size))


def squares(images: "Tensor") -> "Tensor":
    """The centre squares of images [..., H, W]."""
    height, width = images.shape[-2:]
    left, top, right, bottom = part_of(width, height, min(width, height))
    return images[..., int(top) : int(bottom), int(left) : int(right)]


def to_array(image: Image.Image) -> np.ndarray:
    """RGB image -> uint8 [3, H, W]."""
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def to_tensor(image: Image.Image) -> "Tensor":
    """RGB image -> uint8 tensor [3, H, W]."""
    import torch

    return torch.from_numpy(to_array(image))


def to_float(images: "Tensor") -> "Tensor":
    """uint8 [..., 3, H, W] -> float32 in [-1, 1]."""
    return images.float().div_(127.5).sub_(1.0)


def to_uint8(images: "Tensor") -> "Tensor":
    """Float in [-1, 1] (clipped) -> uint8, the inverse of `to_float`."""
    import torch

    return images.detach().float().add(1.0).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)


def decode_index(data: bytes, size: tuple[int, int] | None = None) -> Image.Image:
    """An index PNG (segmentation mask), which belongs to an image of `size` -> its indices, mode P or L. Raises BadImage."""
    with _opened(data, ("PNG",), "its mask cannot be decoded: it is no PNG", "its mask ") as mask:
        if size is not None and mask.size != size:
            raise BadImage(f"its mask is {mask.size[0]} x {mask.size[1]}, the image {size[0]} x {size[1]}")
        if mask.mode not in ("P", "L"):
            raise BadImage(f"its mask has mode {mask.mode}: an index image is 8-bit greyscale or palette")
        if mask.mode == "L" and data[24] != 8:  # its indices would be stretched to 0 .. 255
            raise BadImage(f"its mask has {data[24]}-bit greys: an index image is 8-bit greyscale or palette")
        mask.load()
        return mask.copy()
