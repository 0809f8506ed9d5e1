"""Make samples for a model that has none: procedural pictures, text of a bundled page, tokens, noise.

tools/bench/synthetic.py measures what each kind costs against real samples; the warnings say its figures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import resources

import numpy as np

from comq_onnx.errors import ComqError
from comq_onnx.options.samples import PICTURE_OPTIONS, SampleOptions
from comq_onnx.samples.images.drawing import draw_pictures, one_over_f
from comq_onnx.samples.images.guess import guess_preprocess, to_grey
from comq_onnx.samples.images.pixels import channels_last, geometry, to_input
from comq_onnx.samples.images.preprocess import Preprocess, find_preprocess
from comq_onnx.samples.language_inputs import complete, lacks_samples, role_of, token_inputs
from comq_onnx.samples.model_folder import find_beside
from comq_onnx.samples.next_token import find_logits, runner
from comq_onnx.samples.samples import AnyArray, Clues, Feeds, ModelInput
from comq_onnx.samples.text import texts_wanted, tokenize

# where the model leaves them free: the sides of pictures, the length of texts
SIDE, FREE_TOKENS = 224, 32
MOST_DRAWN = 512  # pictures; beyond these they are used again
MOST_TEXTS = 72  # drawn from a model: each takes as many runs as it has tokens
# the figures of tools/bench/synthetic.py: EfficientNet-Lite0 and MiniLM, 128 samples of each kind, measured on real
# ones; of SmolLM2: effort fast, 24 samples of 32 tokens, measured on 8 texts of 64
TELL = "the comparison is made on them too; give real samples with --calib"
PICTURE_WARNING = (
    "calibrated on synthetic pictures, with which EfficientNet-Lite0 kept 99.0% of its answers at 8 bits and 94.5% "
    f"at 4 (with photos 99.0% and 96.0%, with white noise 96.5% and 48.0%): {TELL}"
)
TEXT_WARNING = (
    "calibrated on synthetic text, a page of old prose, with which MiniLM kept cosine 0.9935 at 8 bits and 0.9712 at 4 "
    f"(with real sentences 0.9938 and 0.9821): {TELL}"
)
TOKEN_WARNING = (
    "calibrated on synthetic tokens, with which MiniLM kept cosine 0.9934 at 8 bits and 0.9613 at 4 (with real "
    f"sentences 0.9938 and 0.9821); a tokenizer.json beside the model makes text of them: {TELL}"
)
DRAWN_WARNING = (
    "calibrated on synthetic tokens that the model itself finds likely, with which SmolLM2-135M kept 7.7 dB at 4 bits "
    "weight-only (with real text 10.4 dB, with random tokens 0.2 dB); a tokenizer.json beside the model makes text of "
    f"them: {TELL}"
)
NOISE_WARNING = (
    "calibrated on synthetic noise, which costs most: with it EfficientNet-Lite0 kept 96.5% of its answers at 8 "
    f"bits and 48.0% at 4 (with photos 99.0% and 96.0%): {TELL}"
)


def synthesize(
    inputs: Sequence[ModelInput], options: SampleOptions, count: int, seed: int, clues: Clues
) -> tuple[dict[str, AnyArray], list[str], list[str]]:
    """Make `count` samples for a model of these inputs: (arrays by input name, notes, warnings).

    Inputs of 1 or 3 channels get pictures, preprocessed as the options or a configuration beside the model say, else as
    suits the model best. Token ids get text of a page where there is a tokenizer.json, else tokens that the model
    itself predicts, where it predicts any, else random ones. Masks get ones, all other inputs normal noise.
    """
    pictures = [i for i in inputs if _takes_pictures(i, options, clues)]
    tokens = token_inputs(inputs)
    used = [*(PICTURE_OPTIONS if pictures else ()), *(("tokenizer", "length") if tokens else ())]
    options.only(used, "synthetic samples of this model")
    notes: list[str] = []
    rng = np.random.default_rng(seed)
    if tokens and not pictures and _has_tokenizer(options, clues):
        arrays, found = tokenize(page_texts(texts_wanted(inputs, count, clues), seed), inputs, options, clues, count)
        return arrays, found, [TEXT_WARNING]
    made: dict[str, AnyArray] = {}
    language = {"mask", "segments", "positions", "past", "flag", "logits"} if tokens else set()
    apart = [i for i in inputs if not (tokens and lacks_samples(i) and role_of(i.name) in language)]
    batched = all(i.dims is not None and len(i.dims) > 0 and i.dims[0] in (None, 1) for i in apart)
    for info in inputs:
        dims = _guess_dims(info, options)
        shape = (count, *dims[1:]) if batched else (count, *dims)
        if info in pictures:
            made[info.name] = _make_pictures(info, shape, options, seed, clues, notes)
        elif not (batched and role_of(info.name) in language):
            made[info.name] = _make_noise(info, shape, rng, clues.token_limits.get(info.name))
    _fill_lengths(made, inputs, clues)
    if pictures:
        return made, notes, [PICTURE_WARNING]
    if not tokens:
        return made, notes, [NOISE_WARNING]
    made, drawn = _fill_tokens(made, tokens, inputs, clues, rng) if batched else (made, False)
    if not drawn:
        return made, notes, [TOKEN_WARNING]
    return made, [*notes, "synthetic tokens drawn from the model's own predictions of the next one"], [DRAWN_WARNING]


# Pictures
# ----------------------------------------------------------------------------------------------------------


def _takes_pictures(info: ModelInput, options: SampleOptions, clues: Clues) -> bool:
    """Tell whether an input takes pictures: rank 4, 1 or 3 channels, sides of 8 pixels or more."""
    if (
        info.dims is None
        or len(info.dims) != 4
        or info.dtype.kind not in "fu"
        or role_of(info.name) in ("past", "mask")
    ):
        return False
    last = channels_last(info, options.layout, clues.channels_last.get(info.name))
    channels, sides = (info.dims[3], info.dims[1:3]) if last else (info.dims[1], info.dims[2:])
    return channels in (None, 1, 3) and all(side is None or side >= 8 for side in sides)


def _make_pictures(
    info: ModelInput, shape: tuple[int, ...], options: SampleOptions, seed: int, clues: Clues, notes: list[str]
) -> AnyArray:
    """Draw pictures and preprocess them to an array of this shape [..., channels and sides]; adds to `notes`."""
    last = clues.channels_last.get(info.name)
    found = find_preprocess(options, clues.folder, info.dtype.kind in "iu")
    _, _, _, (height, width) = geometry(info, found.preprocess if found else Preprocess(), last)
    # where each sample is a batch it would take minutes to draw them all
    wanted = int(np.prod(shape[:-3]))
    drawn = draw_pictures(min(wanted, MOST_DRAWN), height, width, seed)
    if found is None:
        found = guess_preprocess(drawn, info, last, clues)
    if found.note:
        notes.append(found.note)
    values = np.stack([to_input(to_grey(p, info, found.preprocess, last), info, found.preprocess, last) for p in drawn])
    return np.resize(values, (*shape[:-3], *values.shape[1:]))


# Tokens and the rest
# ---------------------------------------------------------------------------------------------------------


def page_texts(count: int, seed: int) -> list[str]:
    """Draw with `seed` `count` stretches of 4 to 90 words from a page.

    The page is of works in the public domain (Carroll 1865, Austen 1813, Darwin 1859, the Declaration of Independence,
    Lincoln 1863, Melville 1851, Conan Doyle 1891, Wells 1895, Dickens 1843 and 1859, Proust 1913, Goethe 1808,
    Cervantes 1605), with a few sentences made for it.
    """
    page = resources.files("comq_onnx.samples").joinpath("page.txt").read_text(encoding="utf-8")
    words = page.split()
    rng = np.random.default_rng(seed)
    lengths = np.rint(np.exp(rng.uniform(np.log(4), np.log(90), count))).astype(int)
    starts = rng.integers(0, len(words) - 90, count)
    return [" ".join(words[s : s + n]) for s, n in zip(starts, lengths, strict=True)]


def _fill_tokens(
    made: dict[str, AnyArray],
    tokens: Sequence[ModelInput],
    inputs: Sequence[ModelInput],
    clues: Clues,
    rng: np.random.Generator,
) -> tuple[dict[str, AnyArray], bool]:
    """Make all inputs of a language model: (arrays, whether the model drew the tokens itself).

    made: the arrays so far, with random tokens, which stay where the model draws none
    """

    def fill(ids: AnyArray) -> dict[str, AnyArray]:
        given = {name: array[: len(ids)] for name, array in made.items()}
        given |= {i.name: ids.astype(i.dtype) for i in tokens}
        return complete(given, inputs, ids, np.ones(ids.shape, np.int64), np.zeros(ids.shape, np.int64))

    ids, run = made[tokens[0].name], runner(inputs, clues)
    drawn = _draw_tokens(run, fill, ids[:MOST_TEXTS], rng) if run is not None else None
    return fill(ids if drawn is None else drawn), drawn is not None


def _draw_tokens(
    run: Callable[[Feeds], Feeds], fill: Callable[[AnyArray], Feeds], ids: AnyArray, rng: np.random.Generator
) -> AnyArray | None:
    """Draw tokens that a model finds likely; None where the model does not predict the next token.

    run: the model
    fill: makes all inputs from token ids
    ids: random tokens [n, tokens]; the first of each text stays, and each later one is drawn from the prediction of
        the model for those before it
    """
    try:
        name = find_logits(run, fill, ids[:2])
        if name is None:
            return None
        ids = ids.copy()
        for start in range(0, len(ids), 16):
            part = ids[start : start + 16]
            for width in range(1, part.shape[1]):
                logits = run(fill(part[:, :width]))[name][:, -1].astype(np.float64)
                # the greatest of logits with Gumbel noise is a draw from their softmax
                part[:, width] = (logits + rng.gumbel(size=logits.shape)).argmax(axis=-1)
    except ComqError:  # the model takes other feeds than these
        return None
    return ids


def _has_tokenizer(options: SampleOptions, clues: Clues) -> bool:
    return options.tokenizer is not None or bool(clues.folder and find_beside(clues.folder, ("tokenizer.json",)))


def _guess_dims(info: ModelInput, options: SampleOptions) -> tuple[int, ...]:
    """Return the dimensions of an input with a guess for each that is free."""
    if info.dims is None:
        return (1, 3, SIDE, SIDE)
    free = SIDE if len(info.dims) == 4 else options.length or FREE_TOKENS
    return tuple(d if d is not None else (1 if axis == 0 else free) for axis, d in enumerate(info.dims))


def _fill_lengths(made: dict[str, AnyArray], inputs: Sequence[ModelInput], clues: Clues) -> None:
    """Make the lengths of sequences among `made` as long as the sequences are."""
    ranks = {i.name: len(i.dims) for i in inputs if i.dims is not None}
    for name, (source, axis) in clues.step_axes.items():
        if name in made and source in made and source in ranks:
            steps = made[source]
            # complete tensors have an axis of samples in front
            made[name] = np.full_like(made[name], steps.shape[steps.ndim - ranks[source] + axis])


def _make_noise(info: ModelInput, shape: tuple[int, ...], rng: np.random.Generator, limit: int | None) -> AnyArray:
    """Make noise for an input by its name and type; limit: whole numbers stay below it, below 2 where it is None."""
    if info.dtype == object:
        return np.full(shape, "text", dtype=object)
    if info.dtype == np.bool_ or "mask" in info.name.lower():
        return np.ones(shape, info.dtype)
    if info.dtype.kind in "iu":
        return rng.integers(0, limit or 2, shape).astype(info.dtype)
    if len(shape) >= 4 and min(shape[-2:]) >= 8:
        made = np.empty(shape, np.float32)
        for index in np.ndindex(*shape[:-2]):
            made[index] = one_over_f(shape[-2], shape[-1], rng)
        return made.astype(info.dtype)
    return rng.standard_normal(shape).astype(info.dtype)
