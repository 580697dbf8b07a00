"""Pictures of spatial signals: boxes drawn on images, masks in colours that mean the same class everywhere."""

import colorsys

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ldm_sg.data.signals import Signals

FRAME = (255, 64, 129)


def palette(classes: int) -> np.ndarray:
    """uint8 [256, 3]: a colour for each of the first `classes` ids, neighbours far apart; light grey for the rest (void)."""
    colours = np.full((256, 3), 235, np.uint8)
    for i in range(min(classes, 255)):
        hue, shade = (i * 0.618034) % 1, (0.95, 0.7, 0.45)[i // 3 % 3]
        colours[i] = [round(255 * c) for c in colorsys.hsv_to_rgb(hue, 0.55 + 0.3 * (i % 2), shade)]
    return colours


def pictures(signals: Signals, size: int) -> Tensor | None:
    """uint8 [N, 3, size, size]: masks as colours, boxes as white areas on grey; None where nothing is spatial."""
    if signals.mask is not None:
        return coloured(signals.masks(), signals.spec.num_labels, size)
    if signals.box is not None:
        blank = torch.full((len(signals), 3, size, size), 110, dtype=torch.uint8)
        return with_boxes(blank, signals.box, fill=True)
    return None


def coloured(masks: Tensor, classes: int, size: int) -> Tensor:
    """Index masks uint8 [N, H, W] -> uint8 [N, 3, size, size]."""
    colours = torch.from_numpy(palette(classes))[masks.long()].permute(0, 3, 1, 2).float()
    return torch.nn.functional.interpolate(colours, (size, size), mode="nearest").byte()


def over(images: Tensor, masks: Tensor, classes: int, share: float = 0.55) -> Tensor:
    """Images uint8 [N, 3, H, W] with the colours of their masks [N, h, w] laid over them."""
    colours = coloured(masks, classes, images.shape[-1])
    return (images.float() * (1 - share) + colours.float() * share).byte()


def with_boxes(images: Tensor, boxes: Tensor, fill: bool = False, colour: tuple[int, int, int] = FRAME) -> Tensor:
    """Images uint8 [N, 3, H, W] with frames around their boxes [N, M, 4] (shares of the sides)."""
    drawn = []
    for image, own in zip(images, boxes, strict=True):
        canvas = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
        pen, side = ImageDraw.Draw(canvas), images.shape[-1]
        for x0, y0, x1, y1 in (own * side).tolist():
            if x1 > x0 and y1 > y0:
                corners = (x0, y0, max(x1 - 1, x0), max(y1 - 1, y0))
                pen.rectangle(corners, fill=(255, 255, 255) if fill else None, outline=colour, width=max(1, side // 64))
        drawn.append(torch.from_numpy(np.array(canvas)).permute(2, 0, 1))
    return torch.stack(drawn)
