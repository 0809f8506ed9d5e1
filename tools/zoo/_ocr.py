"""Make the models of PP-OCR: reading, finding and turning text; drawn lines and pages as samples."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import onnx
from _lee_corpus import lee_documents
from _packages import Zoo
from _samples import Rng, Run, Samples, top1
from PIL import Image, ImageDraw, ImageFont


def ppocr_rec(zoo: Zoo, model: Path) -> Samples:
    """Make the text recogniser of PP-OCRv4: convolutions and attention, weights in Constant nodes, CTC output."""
    model.write_bytes(zoo.member("rapidocr-onnxruntime", "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx"))
    facts = {p.key: p.value for p in onnx.load(model).metadata_props}
    characters = ["", *facts["character"].splitlines(), " "]
    calib, _ = text_lines(zoo, 64, 320, seed=0)
    test, texts = text_lines(zoo, 64, 320, seed=1)

    def read(scores: np.ndarray) -> str:
        """Decode by greedy CTC: the best class of each step, repeats merged, blank (class 0) dropped."""
        best = scores.argmax(-1)
        return "".join(characters[c] for i, c in enumerate(best) if i == 0 or best[i - 1] != c)

    def figure(run: Run) -> str:
        words = [read(scores) for scores in run({"x": test})[0]]
        right = np.mean([a.replace(" ", "") == b.replace(" ", "") for a, b in zip(words, texts, strict=True)])
        return f"{right:.0%} of lines read exactly, such as {words[0]!r} and {words[1]!r}"

    return Samples({"x": calib}, {"x": test}, figure)


def ppocr_det(zoo: Zoo, model: Path) -> Samples:
    """Make the text detector of PP-OCRv4: a convolutional pyramid with ConvTranspose, one probability per pixel."""
    model.write_bytes(zoo.member("rapidocr-onnxruntime", "rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx"))
    calib, _ = text_pages(zoo, 16, seed=0)
    test, boxes = text_pages(zoo, 8, seed=1)

    def figure(run: Run) -> str:
        maps = run({"x": test})[0][:, 0]
        found = [maps[page, (y0 + y1) // 2, x0:x1].mean() > 0.5 for page, x0, y0, x1, y1 in boxes]
        return f"{sum(found)} of {len(found)} drawn lines found; {(maps > 0.3).mean():.1%} of pixels called text"

    return Samples({"x": calib}, {"x": test}, figure)


def ppocr_cls(zoo: Zoo, model: Path) -> Samples:
    """Make the direction classifier of PP-OCR: a line of text is upright (0) or upside down (1)."""
    name = "ch_ppocr_mobile_v2.0_cls_infer.onnx"
    model.write_bytes(zoo.member("rapidocr-onnxruntime", f"rapidocr_onnxruntime/models/{name}"))
    calib, _ = text_lines(zoo, 64, 192, seed=2, turn_odd=True)
    test, _ = text_lines(zoo, 64, 192, seed=3, turn_odd=True)
    return Samples({"x": calib}, {"x": test}, *top1("x", test, np.arange(64) % 2))


def text_lines(zoo: Zoo, count: int, width: int, *, seed: int, turn_odd: bool = False) -> tuple[np.ndarray, list[str]]:
    """Draw lines of text as RapidOCR prepares them.

    turn_odd: turn every other line upside down

    Returns the lines, [count, 3, 48, width] of -1 to 1 and 0 at the right, and their texts.
    """
    rng, words = np.random.default_rng(seed), vocabulary(zoo)
    lines, texts = np.zeros((count, 3, 48, width), np.float32), []
    for i in range(count):
        image, text = draw_line(rng, words, width / 48)
        if turn_odd and i % 2:
            image = image.transpose(Image.Transpose.ROTATE_180)
        image = image.resize((min(width, math.ceil(48 * image.width / image.height)), 48), Image.Resampling.BILINEAR)
        lines[i, :, :, : image.width] = bgr_plus_minus_one(image)
        texts.append(text)
    return lines, texts


def text_pages(zoo: Zoo, count: int, *, seed: int, size: int = 736) -> tuple[np.ndarray, list[tuple[int, ...]]]:
    """Draw pages as RapidOCR prepares them: [count, 3, size, size], and the boxes of text (page, x0, y0, x1, y1)."""
    rng, words = np.random.default_rng(seed), vocabulary(zoo)
    pages, boxes = np.zeros((count, 3, size, size), np.float32), []
    for page in range(count):
        image, ink = paper(rng, size, size)
        y = int(rng.integers(10, 60))
        while y < size - 70:
            font = ImageFont.load_default(size=int(rng.integers(18, 46)))
            text, x = " ".join(rng.choice(words, rng.integers(2, 5))), int(rng.integers(10, 200))
            ImageDraw.Draw(image).text((x, y), text, ink, font)
            box = [int(b) for b in font.getbbox(text)]
            boxes.append((page, x + box[0], y + box[1], min(size, x + box[2]), y + box[3]))
            y += box[3] + int(rng.integers(12, 60))
        pages[page] = bgr_plus_minus_one(image)
    return pages, boxes


def draw_line(rng: Rng, words: list[str], ratio: float) -> tuple[Image.Image, str]:
    """Draw a line of as many words as keep its width under `ratio` heights; return the image and the text."""
    font, margin = ImageFont.load_default(size=int(rng.integers(20, 44))), int(rng.integers(3, 8))
    text = rng.choice(words)
    while fits(font, longer := f"{text} {rng.choice(words)}", margin, ratio):
        text = longer
    box = font.getbbox(text)
    size = (int(box[2] - box[0]) + 2 * margin, int(box[3] - box[1]) + 2 * margin)
    image, ink = paper(rng, *size)
    ImageDraw.Draw(image).text((margin - box[0], margin - box[1]), text, ink, font)
    return image, str(text)


def fits(font: ImageFont.FreeTypeFont, text: str, margin: int, ratio: float) -> bool:
    """Tell whether a text with its margin is at most `ratio` times as wide as high."""
    left, top, right, bottom = font.getbbox(text)
    return right - left + 2 * margin <= ratio * (bottom - top + 2 * margin)


def paper(rng: Rng, width: int, height: int) -> tuple[Image.Image, tuple[int, ...]]:
    """Make a shaded, grainy background, light or dark, and choose a colour that is seen on it."""
    low, high = ((0, 80), (170, 255))[:: 1 if (dark := rng.random() < 0.35) else -1]
    left, right = rng.uniform(*low, 3), rng.uniform(*low, 3)
    shade = left + (right - left) * np.linspace(0, 1, width)[None, :, None]
    grain = rng.normal(0, rng.uniform(0, 8), (height, width, 1))
    rules = 12 * (np.arange(height) // 9 % 2)[:, None, None] * (rng.random() < 0.25) * (1 if dark else -1)
    image = Image.fromarray(np.clip(shade + grain + rules, 0, 255).astype(np.uint8))
    return image, tuple(int(c) for c in rng.uniform(*high, 3))


def bgr_plus_minus_one(image: Image.Image) -> np.ndarray:
    """Convert an image to float32 [3, H, W] of -1 to 1, blue first."""
    return (np.asarray(image, np.float32)[:, :, ::-1].transpose(2, 0, 1) / 255 - 0.5) / 0.5


def vocabulary(zoo: Zoo) -> list[str]:
    """List words and numbers to draw."""
    text = " ".join(lee_documents(zoo, "lee_background.cor"))
    return sorted(set(re.findall(r"\b[A-Za-z]{3,9}\b", text))) + [str(n * n) for n in range(11, 311)]
