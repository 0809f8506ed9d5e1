"""Make Silero VAD, which finds speech; synthetic speech as samples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
from _packages import Zoo
from _samples import Feeds, Rng, Run, Samples, open_session


def silero_vad(zoo: Zoo, model: Path) -> Samples:
    """Make Silero VAD: If subgraphs by sample rate, Conv1d and LSTM, the state carried from window to window."""
    model.write_bytes(zoo.member("silero-vad", "silero_vad/data/silero_vad.onnx"))
    calib, _ = audio_feeds(open_session(model), np.random.default_rng(0))
    test, spoken = audio_feeds(open_session(model), np.random.default_rng(1))

    def figure(run: Run) -> str:
        score = run(test)[0].reshape(-1)
        return f"speech probability {score[spoken].mean():.2f} in phrases, {score[~spoken].mean():.2f} in pauses"

    return Samples(calib, test, figure)


def audio_feeds(session: ort.InferenceSession, rng: Rng, count: int = 64) -> tuple[Feeds, np.ndarray]:
    """Make `count` windows of 512 samples after 64 of context, each with its state.

    Returns them, and which of them are speech, bool [count].
    """
    audio, spoken = synthetic_speech(rng, count * 512)
    padded = np.concatenate([np.zeros(64, np.float32), audio])
    inputs = np.stack([padded[None, i * 512 : i * 512 + 576] for i in range(count)])
    rate, states = np.int64(16000), [np.zeros((2, 1, 128), np.float32)]
    for window in inputs[:-1]:
        states.append(session.run(["stateN"], {"input": window, "state": states[-1], "sr": np.array(rate)})[0])
    feeds = {"input": inputs, "state": np.stack(states), "sr": np.full(count, rate)}
    return feeds, spoken.reshape(count, 512).mean(1) > 0.5


def synthetic_speech(rng: Rng, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Synthesize phrases of syllables between pauses with a faint noise at 16 kHz.

    Returns the sound, float32 [length], and where the phrases are, bool [length].
    """
    audio, spoken = rng.normal(0, 1e-3, length), np.zeros(length, bool)
    at = 3000
    while at < length:
        pitch, end = rng.uniform(100, 220), at + int(rng.uniform(0.5, 0.9) * 16000)
        while at < min(end, length):
            sound = syllable(rng, pitch * rng.uniform(0.9, 1.1))[: length - at]
            audio[at : at + len(sound)] += sound
            spoken[at : at + len(sound)] = True
            at += len(sound)
        at += int(rng.uniform(0.4, 0.6) * 16000)
    return audio.astype(np.float32), spoken


def syllable(rng: Rng, pitch: float) -> np.ndarray:
    """Synthesize a hiss, then a vowel: pulses at a gliding pitch (Hz) that ring three formants."""
    vowels = [(730, 1090, 2440), (270, 2290, 3010), (300, 870, 2240), (530, 1840, 2480), (570, 840, 2410)]
    length, hiss = int(rng.uniform(0.12, 0.22) * 16000), int(rng.uniform(0.02, 0.06) * 16000)
    phase = np.cumsum(pitch * np.linspace(1.1, 0.9, length) / 16000) + rng.normal(0, 0.01, length).cumsum() * 0.02
    pulses = np.diff(np.floor(phase), prepend=0).clip(0) + rng.normal(0, 0.01, length)
    t = np.arange(400) / 16000
    formants = zip(vowels[rng.integers(len(vowels))], (1, 0.6, 0.3), (80, 100, 140), strict=True)
    ring = sum(a * np.exp(-np.pi * b * t) * np.sin(2 * np.pi * f * t) for f, a, b in formants)
    vowel = np.convolve(pulses, ring)[:length] * np.hanning(length) ** 0.5
    vowel *= rng.uniform(0.1, 0.3) / np.abs(vowel).max()
    noise = np.diff(rng.normal(0, 0.015, hiss + 1)) * np.hanning(hiss)
    return np.concatenate([noise, vowel])
