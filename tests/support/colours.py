"""Colours as people see them: contrast, and how far apart two colours are for people who are colour-blind."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import numpy as np

RGB = tuple[float, float, float]
"""Red, green and blue, from 0 to 1, as sRGB."""

# Machado, Oliveira and Fernandes (2009), severity 1.0, for linear RGB.
VISIONS = {
    "full": np.eye(3),
    "without red cones": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "without green cones": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "without blue cones": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}
_TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
_WHITE = _TO_XYZ.sum(axis=1)


def of_css(colour: str) -> RGB:
    """``rgb(…)`` or ``#rrggbb``."""
    if colour.startswith("#"):
        red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    else:
        red, green, blue = (
            float(c) / 255 for c in colour[colour.index("(") + 1 : -1].replace(",", " ").split("/")[0].split()[:3]
        )
    return red, green, blue


def luminance(colour: RGB) -> float:
    """WCAG 2.2's relative luminance."""
    return float(np.array([0.2126, 0.7152, 0.0722]) @ _linear(colour))


def contrast(one: RGB, other: RGB) -> float:
    """WCAG 2.2's contrast ratio, from 1 to 21."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def distance(one: RGB, other: RGB, vision: str = "full") -> float:
    """The distance in CIELAB of what people of a vision see; 2 can just be told apart."""
    return float(np.linalg.norm(_lab(one, vision) - _lab(other, vision)))


def closest(colours: Iterable[RGB]) -> float:
    """The least distance of any two of the colours, for any vision."""
    pairs = list(itertools.combinations(colours, 2))
    return min(distance(one, other, vision) for one, other in pairs for vision in VISIONS)


def _linear(colour: RGB) -> np.ndarray:
    c = np.array(colour)
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def _lab(colour: RGB, vision: str) -> np.ndarray:
    seen = np.clip(VISIONS[vision] @ _linear(colour), 0, 1)
    x = (_TO_XYZ @ seen) / _WHITE
    f = np.where(x > (6 / 29) ** 3, np.cbrt(x), x / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])
