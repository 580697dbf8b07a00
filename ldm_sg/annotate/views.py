"""What g and f see of a batch of images: `data.images.show` says what of each, here they become tensors."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ldm_sg.annotate.features import resize
from ldm_sg.data.images import Shown, to_float


@dataclass(frozen=True)
class Views:
    """B images as g sees them, in [-1, 1]."""

    squares: Tensor  # [B, 3, H, W]: the centre squares
    size: int  # pixels of the squares that are trained on, and of masks
    wholes: Sequence[Tensor | None]  # B uncropped images [3, h, w] at g's scale; None = the square is all there is
    crops: Tensor  # [B, 4] the squares as shares of the uncropped images' sides

    @classmethod
    def of_squares(cls, images: Tensor) -> "Views":
        """Images [B, 3, H, H] of which there are no more pixels: samples, reconstructions."""
        n = len(images)
        return cls(images, images.shape[-1], [None] * n, torch.tensor([[0.0, 0, 1, 1]]).expand(n, 4))

    @classmethod
    def of(cls, squares: Tensor, shown: Sequence[Shown]) -> "Views":
        """`squares` [B, 3, size, size] in [-1, 1] of the same images that are `shown`."""

        def pixels(image: np.ndarray | None) -> Tensor | None:
            return None if image is None else to_float(torch.from_numpy(image).to(squares.device))

        size, views = squares.shape[-1], [pixels(image.view) for image in shown]
        larger = next((view.shape[-1] for view in views if view is not None), None)
        if larger is not None:
            squares = torch.stack([resize(s[None], larger)[0] if v is None else v for s, v in zip(squares, views)])
        return cls(squares, size, [pixels(image.whole) for image in shown], torch.tensor([s.crop for s in shown]))

    def by_shape(self, patch: int | None) -> Iterator[tuple[Tensor, Tensor | list[Tensor]]]:
        """(places [n] of the images, their pixels) of all squares without a whole image, and of the whole images that fill
        the same rows and columns of patches."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, whole in enumerate(self.wholes):
            shape = () if whole is None else tuple(-(-n // (patch or 1)) for n in whole.shape[1:])
            groups.setdefault(shape, []).append(i)
        for shape, chosen in groups.items():
            places = torch.tensor(chosen)
            wholes = [whole for whole in (self.wholes[i] for i in chosen) if whole is not None]
            yield places, wholes if shape else self.squares[places.to(self.squares.device)]
