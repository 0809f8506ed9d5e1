"""Make lines of text and the tokenizer of their few words."""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = tuple(
    "the quick brown fox jumps over a lazy dog while seven small cats sleep in warm sun".split()  # noqa: SIM905
)
LINES = [" ".join(WORDS[i % 9 : i % 9 + 3 + i % 6]) for i in range(48)]


def a_tokenizer() -> Tokenizer:
    """Make a tokenizer of WORDS, each a token, with [PAD] 0, [CLS] 1, [SEP] 2 and [UNK] 3."""
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return tokenizer
