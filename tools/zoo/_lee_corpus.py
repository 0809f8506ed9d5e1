"""Read the Lee corpus of news items (Lee, Pincombe and Welsh 2005) out of the package that carries it."""

from __future__ import annotations

import re

from _packages import Zoo
from _samples import Rng

LEE = "gensim/test/test_data/"


def lee_documents(zoo: Zoo, file: str) -> list[str]:
    """Read the news items of one file."""
    return zoo.member("gensim", LEE + file).decode("utf-8", "replace").splitlines()


def lee_sentences(zoo: Zoo, rng: Rng) -> list[str]:
    """List the different sentences of 5 to 60 words of the whole corpus, shuffled."""
    text = " ".join(lee_documents(zoo, "lee.cor") + lee_documents(zoo, "lee_background.cor"))
    sentences = sorted({s.strip() for s in re.split(r"(?<=[.!?])\s+", text) if 5 <= len(s.split()) <= 60})
    return [sentences[i] for i in rng.permutation(len(sentences))]
