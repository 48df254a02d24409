"""Streamed text: pieces joined are the whole text, no character is shown by halves, stops are found wherever
they lie.
"""

from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from elastic_decode.assets import tiny_model_path
from elastic_decode.engine.text import REPLACEMENT, StopScanner, TextStream, decode, text_of

LETTERS = "abcxyz .,ENDéß漢字日本語😀🎉\n"


def byte_fallback() -> PreTrainedTokenizerFast:
    """Sentencepiece's kind: `▁` for a space, what is not in the vocabulary as <0xNN> pieces."""
    vocab = {"<unk>": 0, "</s>": 1, **{f"<0x{byte:02X}>": 2 + byte for byte in range(256)}}
    for symbol in "▁abcxyzEND.,":
        vocab[symbol] = len(vocab)
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


@pytest.fixture(params=["byte level", "byte fallback", "words"])
def tokenizer(request, byte_tokenizer):
    if request.param == "words":
        return AutoTokenizer.from_pretrained(tiny_model_path())
    return byte_tokenizer if request.param == "byte level" else byte_fallback()


def texts(tokenizer, count: int) -> list[list[int]]:
    rng = random.Random(0)
    words = [word for word in tokenizer.get_vocab() if not word.startswith("<")]
    out = []
    for _ in range(count):
        if len(tokenizer) < 200:
            text = " ".join(rng.choice(words) for _ in range(rng.randint(1, 90)))
        else:
            text = "".join(rng.choice(LETTERS) for _ in range(rng.randint(1, 90)))
        out.append(tokenizer(text, add_special_tokens=False)["input_ids"])
    return out


def test_pieces_join_to_the_whole_text(tokenizer):
    for ids in texts(tokenizer, 60):
        stream = TextStream(tokenizer)
        pieces = [stream.push(token) for token in ids]
        assert all(REPLACEMENT not in piece for piece in pieces)
        assert "".join(pieces) + stream.flush() == decode(tokenizer, ids) == text_of(tokenizer, ids)


def test_an_output_cut_within_a_character_reads_the_same_streamed_or_not(tokenizer):
    for ids in texts(tokenizer, 40):
        for end in (len(ids) // 3, len(ids) // 2):
            stream = TextStream(tokenizer)
            pieces = [stream.push(token) for token in ids[:end]] + [stream.flush()]
            assert "".join(pieces) == text_of(tokenizer, ids[:end])


def test_bytes_that_are_no_characters_hold_nothing_up_for_long(byte_tokenizer):
    rng = random.Random(1)
    ids = [rng.randrange(128, 256) for _ in range(400)] + [ord("x")] * 3
    stream = TextStream(byte_tokenizer)
    pieces = [stream.push(token) for token in ids]
    assert pieces[-1] == "x"
    assert "".join(pieces).count(REPLACEMENT) > 100


def test_invisible_tokens_do_not_lose_the_space_before_the_next_word():
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path())
    word, eos = tokenizer.convert_tokens_to_ids("16"), tokenizer.eos_token_id
    ids = [word] * 30 + [eos] * 12 + [word] * 3
    stream = TextStream(tokenizer)
    assert "".join([stream.push(token) for token in ids]) + stream.flush() == decode(tokenizer, ids)


@pytest.mark.parametrize("stop", ["END", "字", "日本", ". E", "\n"])
@pytest.mark.parametrize("kind", ["byte level", "byte fallback"])
def test_stops_are_found_wherever_tokens_split_them(byte_tokenizer, kind, stop):
    tokenizer = byte_tokenizer if kind == "byte level" else byte_fallback()
    for ids in texts(tokenizer, 60):
        whole = decode(tokenizer, ids)
        stream, scanner = TextStream(tokenizer), StopScanner([stop, "zzzz"])
        shown = "".join(scanner.push(stream.push(token)) for token in ids)
        shown += scanner.push(stream.flush()) + scanner.flush()
        cut = min((at for at in (whole.find(stop), whole.find("zzzz")) if at >= 0), default=len(whole))
        assert shown == whole[:cut]
        assert scanner.stopped == (stop in whole or "zzzz" in whole)
