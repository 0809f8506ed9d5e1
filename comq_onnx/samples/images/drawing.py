"""Draw procedural pictures with the statistics of photographs, for calibrating without any.

Dead leaves (Lee, Mumford and Huang 2001): shapes of power-law sizes that cover each other give the edges and the
occlusions of natural scenes. Each has a texture of its own (1/f noise, whose spectrum is that of photographs, gratings
or none), shading, and a colour of the small palette of the scene. White noise has none of that: the first filters of a
network average it away, and every later layer sees ranges that photographs never give.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

Floats = npt.NDArray[np.float32]
# of photographs: the mean colour (0..1), and the deviation of the level from picture to picture
COLOUR, LEVEL_SPREAD = (0.49, 0.46, 0.41), 0.06
TEXTURES = 12


def draw_pictures(count: int, height: int, width: int, seed: int) -> npt.NDArray[np.uint8]:
    """Draw `count` pictures [count, height, width, 3] in RGB, the same for the same seed."""
    bank = [one_over_f(height, width, np.random.default_rng([seed, 0, i]), (0.8, 1.6)) for i in range(TEXTURES)]
    return np.stack([_draw(height, width, np.random.default_rng([seed, 1, i]), bank) for i in range(count)])


def one_over_f(height: int, width: int, rng: np.random.Generator, powers: tuple[float, float] = (1.0, 1.0)) -> Floats:
    """Make noise [height, width] of mean 0 and deviation 1, its amplitudes falling as 1/f^p with p between `powers`."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    spectrum = np.fft.rfft2(rng.standard_normal((height, width))) / frequency ** rng.uniform(*powers)
    noise = np.asarray(np.fft.irfft2(spectrum, (height, width)), np.float32)
    return np.asarray(noise / max(float(noise.std()), 1e-12), np.float32)


def _draw(height: int, width: int, rng: np.random.Generator, bank: list[Floats]) -> npt.NDArray[np.uint8]:
    palette = _palette(rng)
    canvas = _surface(height, width, palette[0], rng, bank)
    short = min(height, width)
    busy = int(rng.choice([10, 25, 60, 120]))
    # as many in every octave of sizes; the large ones first, for they would hide the small ones
    for radius in np.sort(short * np.exp(rng.uniform(np.log(0.015), np.log(0.7), busy)))[::-1]:
        _leaf(canvas, float(radius), palette[rng.integers(len(palette))], rng, bank)
    light = 1 + rng.uniform(0, 0.35) * _slope(height, width, rng)[..., None]
    picture = np.clip(canvas * light, 0, 1) * np.float32(255)
    picture += rng.standard_normal(picture.shape, np.float32) * np.float32(rng.uniform(0, 6))
    image = Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(float(rng.choice([0.0, 0.3, 0.6, 1.0]) * short / 224))))


def _palette(rng: np.random.Generator) -> Floats:
    """Draw two to seven colours around one: their lightness differs more than their hue, as in photographs."""
    count = int(rng.integers(2, 8))
    middle = np.add(COLOUR, rng.normal(0, LEVEL_SPREAD)) + rng.normal(0, 0.05, 3)
    # evenly spread, so that one picture has both dark and light surfaces
    lightness = rng.permutation(np.linspace(-1, 1, count))[:, None] * rng.uniform(0.2, 0.5)
    hue = rng.normal(0, rng.uniform(0.01, 0.14), (count, 3))
    return np.clip(middle + lightness + hue, 0.01, 0.99).astype(np.float32)


def _surface(height: int, width: int, colour: Floats, rng: np.random.Generator, bank: list[Floats]) -> Floats:
    """Draw a textured and shaded surface [height, width, 3] of one colour."""
    texture = bank[rng.integers(len(bank))]
    texture = np.roll(texture, tuple(rng.integers(0, n) for n in texture.shape), (0, 1))[:height, :width]
    if rng.random() < 0.2:
        texture = np.sin(_slope(height, width, rng) * rng.uniform(10, 120) + texture).astype(np.float32)
    strength = rng.choice([0.0, 0.05, 0.12, 0.2])
    tint = 1 + rng.normal(0, 0.15, 3)
    shade = rng.uniform(0, 0.2) * _slope(height, width, rng)
    return np.asarray(colour + (strength * texture + shade)[..., None] * tint, np.float32)


def _slope(height: int, width: int, rng: np.random.Generator) -> Floats:
    """Make a plane [height, width] from about -1 to 1 in a random direction."""
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.linspace(-1, 1, height, dtype=np.float32), np.linspace(-1, 1, width, dtype=np.float32)
    return (np.float32(np.sin(angle)) * y[:, None] + np.float32(np.cos(angle)) * x[None]).astype(np.float32)


def _leaf(canvas: Floats, radius: float, colour: Floats, rng: np.random.Generator, bank: list[Floats]) -> None:
    """Cover a part of the canvas with one shape: an ellipse, a box or an irregular outline."""
    height, width = canvas.shape[:2]
    x, y = rng.uniform(0, width), rng.uniform(0, height)
    corners = {0: 24, 1: 4, 2: int(rng.integers(3, 9))}[kind := int(rng.integers(3))]
    angles = np.arange(corners) * 2 * np.pi / corners + (np.pi / 4 if kind == 1 else 0)
    reach = radius * (rng.uniform(0.5, 1.3, corners) if kind == 2 else np.ones(corners))
    turn, flat = rng.uniform(0, 2 * np.pi), rng.uniform(0.3, 1)
    px, py = reach * np.cos(angles), reach * np.sin(angles) * flat
    px, py = x + px * np.cos(turn) - py * np.sin(turn), y + px * np.sin(turn) + py * np.cos(turn)
    left, top = max(0, int(px.min())), max(0, int(py.min()))
    right, bottom = min(width, int(px.max()) + 2), min(height, int(py.max()) + 2)
    if right <= left or bottom <= top:
        return
    mask = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(mask).polygon(list(zip((px - left).tolist(), (py - top).tolist(), strict=True)), fill=255)
    covered = (np.asarray(mask, np.float32) / 255)[..., None]
    surface = _surface(bottom - top, right - left, colour, rng, bank)
    part: Any = canvas[top:bottom, left:right]
    part += covered * (surface - part)
