"""What a picture of a planet looks like, in numbers: measured on its disc, whatever planet it is.

brightness  mean luminance, 0..1
red, green  mean share of the channel in the sum of all three
texture     standard deviation of the luminance less its surroundings (Gaussian of 2 pixels), 0..1
size        radius, share of the picture's side
"""

from __future__ import annotations

import numpy as np

from vlmscope.data.orrery.scene import SIDE, Scene

APPEARANCE = ("brightness", "red", "green", "texture", "size")
_LUMINANCE = np.array([0.2126, 0.7152, 0.0722])


def appearance(scene: Scene) -> np.ndarray:
    """[5] float64, in the order of `APPEARANCE`, of a scene of one planet."""
    from scipy.ndimage import gaussian_filter

    assert scene.image is not None and "box" in scene.facts, "a scene of a planet has a picture and a box"
    left, top, right, bottom = np.asarray(scene.facts["box"], np.float64) * SIDE
    radius = max(right - left, bottom - top) / 2  # a box that the picture's edge cuts is narrower on that side
    grid = np.arange(SIDE) + 0.5
    x, y = np.meshgrid(grid - (left + right) / 2, grid - (top + bottom) / 2)
    disc = x**2 + y**2 < (radius - 1) ** 2
    pixels = scene.image.astype(np.float64) / 255.0
    luminance = pixels @ _LUMINANCE
    detail = luminance - gaussian_filter(luminance, 2.0)
    total = pixels[disc].sum(-1).mean()
    red, green = pixels[disc].mean(0)[:2] / max(total, 1e-6)
    return np.array([luminance[disc].mean(), red, green, detail[disc].std(), radius / SIDE])
