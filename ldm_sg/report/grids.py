"""Pictures from uint8 images [N, 3, H, W]: plain grids, rows with captions, and the cluster picture."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from ldm_sg.folder import whole

PAPER, INK, FAINT = "#ffffff", "#1f2328", "#6e7781"
PAD = 2  # pixels between images
GAP = 24  # between groups of images: real members and samples


def grid(images: Tensor, columns: int, pad: int = PAD, scale: float = 1) -> Image.Image:
    """uint8 [N, 3, H, W] -> rows of `columns` images with `pad` pixels between them; an unfilled place stays white."""
    return _draw([[row] for row in images.split(min(columns, len(images)))], pad=pad, scale=scale)


def labelled_rows(
    captions: Sequence[str], rows: Sequence[Tensor], headers: Sequence[str] = (), scale: float = 2
) -> Image.Image:
    """A caption left of each row of images [N, 3, H, W]; `headers`, one a column, stand above."""
    return _draw([list(row.split(1)) for row in rows], captions, headers, gap=PAD, scale=scale)


def cluster_picture(
    ids: Sequence[int], real: Sequence[Tensor], samples: Sequence[Tensor], scale: float = 2
) -> Image.Image:
    """Each row one cluster: its id, real members on the left, a gap, samples on the right. [R, 3, H, W] and [S, 3, H, W]
    a row; clusters with fewer real members than others leave places empty."""
    rows = list(zip(real, samples, strict=True))
    return _draw(rows, [f"cluster {k}" for k in ids], ["real members", "samples"], scale=scale)


def strip(groups: Sequence[Tensor]) -> Image.Image:
    """One row of groups of images with a gap between them."""
    return _draw([groups], scale=1)


def best_scale(images: Tensor, target: int = 128) -> int:
    """The whole factor that brings small images near `target` pixels: 64 -> 2, 32 -> 4, 256 -> 1."""
    return max(1, round(target / images.shape[-1]))


def save(image: Image.Image, path: Path) -> Path:
    """A PNG, or WebP by its name, that appears when whole."""
    how = {"format": "WEBP", "quality": 85} if path.suffix == ".webp" else {"format": "PNG", "optimize": True}
    with whole(path) as new:
        image.save(new, **how)
    return path


def _draw(
    rows: Sequence[Sequence[Tensor]], captions: Sequence[str] = (), headers: Sequence[str] = (), pad: int = PAD,
    gap: int = GAP, scale: float = 1,
) -> Image.Image:  # fmt: skip
    """Rows of groups of images: captions on the left, a header above each group, `gap` pixels between groups."""
    for group in (group for row in rows for group in row):
        assert group.dtype == torch.uint8 and group.dim() == 4 and group.shape[1] == 3, (group.dtype, group.shape)
    height, width = (max(1, round(side * scale)) for side in rows[0][0].shape[-2:])
    font = ImageFont.load_default(max(12, min(26, height // 5)))
    assert isinstance(font, ImageFont.FreeTypeFont)  # what Pillow's wheels carry
    margin = pad + (max(int(font.getlength(text)) for text in captions) + 17 if captions else 0)
    top = pad + (round(font.size * 2) if headers else 0)
    places = [max(map(len, groups)) for groups in itertools.zip_longest(*rows, fillvalue=())]  # images wide, each group
    steps = [n * (width + pad) - pad + gap for n in places]
    *lefts, right = itertools.accumulate(steps, initial=margin)
    canvas = Image.new("RGB", (right - gap + pad, top + len(rows) * (height + pad)), PAPER)
    pen = ImageDraw.Draw(canvas)
    for text, left in zip(headers, lefts):
        pen.text((left, top / 2), text, FAINT, font, anchor="lm")
    for r, row in enumerate(rows):
        y = top + r * (height + pad)
        if captions:
            pen.text((margin - 10, y + height / 2), captions[r], INK, font, anchor="rm")
        for left, group in zip(lefts, row):
            for i, image in enumerate(group):
                canvas.paste(_tile(image, width, height), (left + i * (width + pad), y))
    return canvas


def _tile(image: Tensor, width: int, height: int) -> Image.Image:
    tile = to_pil_image(image)
    return tile if tile.size == (width, height) else tile.resize((width, height), Image.Resampling.LANCZOS)
