"""The bytes of tokens, joined, are the text."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from service.demo.run import ASSETS
from service.engine.tokenizer import TextTokenizer
from tests.factories import byte_tokenizer

TEXTS = ["Hello, world", "größer als 5 €", "日本語 🙂👩‍👩‍👧 ok", " leading  spaces\n\ttabs ", "\u0100Ġ<0xE2>", ""]


def demo_tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(ASSETS / "base")


def sentencepiece_tokenizer() -> Any:
    """As Llama 2's is: pieces, spaces as ▁, and 256 tokens for the bytes of all other characters."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"Helo,wrdgßals5tbin", "He", "▁w"]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    bpe = models.BPE(vocab, [("H", "e"), ("▁", "w")], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("make", [byte_tokenizer, demo_tokenizer, sentencepiece_tokenizer])
@pytest.mark.parametrize("text", TEXTS)
def test_the_bytes_of_a_texts_tokens_are_the_text(make: Any, text: str) -> None:
    tokenizer = TextTokenizer(make(), vocabulary=10_000)
    prefix = " " if make is sentencepiece_tokenizer and text else ""  # it puts one before every text
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert b"".join(tokenizer.token_bytes(token) or b"" for token in ids).decode() == prefix + text
    assert all(tokenizer.token_bytes(token) is not None for token in range(10_000))


def test_special_tokens_are_spelled_as_they_read() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<｜end▁of▁turn｜>"]})
    own = TextTokenizer(tokenizer, vocabulary=272)
    assert own.token_bytes(tokenizer.eos_token_id) == b"<eos>"
    assert own.token_bytes(len(tokenizer) - 1) == "<｜end▁of▁turn｜>".encode()
    assert own.token_bytes(len(tokenizer)) == b""


def test_other_tokenizers_tell_where_a_token_is_text() -> None:
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2, "\ufffd": 3}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    own = TextTokenizer(PreTrainedTokenizerFast(tokenizer_object=tokenizer), vocabulary=4)
    assert [own.token_bytes(token) for token in (1, 3)] == [b"a", None]
