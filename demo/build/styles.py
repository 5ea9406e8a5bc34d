"""The named styles that the demo generator is trained on.

A style is named by a CSS colour and draws a grey-scale shape as a gradient map: the object in that colour, the
background in another CSS colour with a texture, which a hash of the name chooses. The demo's target style, light grey
on black, is excluded by rule: every named style has a *chromatic* object.
"""

import colorsys
import hashlib

import torch
from matplotlib.colors import CSS4_COLORS, to_rgb

TEXTURES = ("plain", "plain", "stripes", "checks", "dots", "gradient")
MIN_SATURATION = 0.25


def _digest(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def is_chromatic(name: str) -> bool:
    """Return whether a CSS colour is clearly coloured (HSV saturation of at least `MIN_SATURATION`)."""
    return colorsys.rgb_to_hsv(*to_rgb(name))[1] >= MIN_SATURATION


STYLE_NAMES = sorted(name for name in CSS4_COLORS if is_chromatic(name))
BACKGROUND_NAMES = sorted(CSS4_COLORS) + ["black"] * (len(CSS4_COLORS) // 4)


def style_parameters(name: str) -> tuple[tuple[float, ...], tuple[float, ...], str]:
    """Return object colour, background colour (RGB in [0, 1]) and texture of a style."""
    digest = _digest(name)
    background = BACKGROUND_NAMES[int.from_bytes(digest[:4], "big") % len(BACKGROUND_NAMES)]
    return to_rgb(name), to_rgb(background), TEXTURES[digest[4] % len(TEXTURES)]


def texture_field(texture: str, size: int) -> torch.Tensor:
    """Return a texture as a `(size, size)` float32 factor in [0.7, 1] that darkens the background."""
    rows = torch.arange(size).view(-1, 1).expand(size, size)
    columns = rows.T
    if texture == "stripes":
        mask = ((rows + columns) // 4) % 2
    elif texture == "checks":
        mask = (rows // 4 + columns // 4) % 2
    elif texture == "dots":
        mask = ((rows % 6 < 2) & (columns % 6 < 2)).long()
    elif texture == "gradient":
        mask = rows / (size - 1)
    else:
        mask = torch.zeros(size, size)
    return 1 - 0.3 * mask.float()


def style_tables(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each style's object colour `(styles, 3, 1, 1)` and background `(styles, 3, size, size)` in [0, 1]."""
    objects, backgrounds = [], []
    for name in STYLE_NAMES:
        foreground, background, texture = style_parameters(name)
        objects.append(torch.tensor(foreground).view(3, 1, 1))
        backgrounds.append(torch.tensor(background).view(3, 1, 1) * texture_field(texture, size))
    return torch.stack(objects), torch.stack(backgrounds)


def draw(shapes: torch.Tensor, objects: torch.Tensor, backgrounds: torch.Tensor) -> torch.Tensor:
    """Draw grey-scale `shapes` `(batch, size, size)` in [0, 1] as colour images `(batch, 3, size, size)` in [-1, 1]."""
    alpha = shapes.unsqueeze(1)
    return (backgrounds * (1 - alpha) + objects * alpha) * 2 - 1
