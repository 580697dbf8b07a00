"""COCO-Stuff's 182 classes -> the 27 of its label hierarchy (12 of things, 15 of stuff), numbered as IIC, PiCIE and
STEGO report them."""

NAMES = (  # of the 27, in order
    *("electronic-things", "appliance-things", "food-things", "furniture-things", "indoor-things", "kitchen-things"),
    *("accessory-things", "animal-things", "outdoor-things", "person-things", "sports-things", "vehicle-things"),
    *("ceiling-stuff", "floor-stuff", "food-stuff", "furniture-stuff", "rawmaterial-stuff", "textile-stuff"),
    *("wall-stuff", "window-stuff", "building-stuff", "ground-stuff", "plant-stuff", "sky-stuff", "solid-stuff"),
    *("structural-stuff", "water-stuff"),
)
# fmt: off
_COARSE = (  # of index 0, 1, ... 181 of the "stuffthingmaps": 0 person, 1 bicycle, ..., 91 banner, ..., 181 wood
    9, 11, 11, 11, 11, 11, 11, 11, 11, 8, 8, 8, 8, 8, 8, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 6, 6, 6, 6, 6, 6, 6, 6, 10, 10,
    10, 10, 10, 10, 10, 10, 10, 10, 5, 5, 5, 5, 5, 5, 5, 5, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3, 3,
    3, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 4, 4, 4, 4, 4, 4, 4, 4,
    17, 17, 22, 20, 20, 22, 15, 25, 16, 13, 12, 12, 17, 17, 23, 15, 15, 17, 15, 21, 15, 25, 13, 13, 13, 13, 13, 22,
    26, 14, 14, 15, 22, 21, 21, 24, 20, 22, 15, 17, 16, 15, 22, 24, 21, 17, 25, 16, 21, 17, 22, 16, 21, 21, 25, 21,
    26, 21, 24, 20, 17, 14, 21, 26, 15, 23, 20, 21, 24, 15, 24, 22, 25, 15, 20, 17, 17, 22, 14, 18, 18, 18, 18, 18,
    18, 18, 26, 26, 19, 19, 24,
)
# fmt: on
TABLE = (*_COARSE, *[-1] * (255 - len(_COARSE)), 255)  # [256]: index -> class; -1 = there is no such index
