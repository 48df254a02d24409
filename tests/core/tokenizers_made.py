"""Small real tokenizers, built in memory: one of each kind that reasoning models use."""

from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

WORDS = ["think", "thin", "Wait", "Final", "Answer", "the", "so", "line"]


def _byte_level_model(texts: Sequence[str]) -> models.BPE:
    """Byte-level BPE that holds every byte and, by merges from the left, each of `texts`."""
    alphabet = sorted(ByteLevel.alphabet())
    vocab = {symbol: i for i, symbol in enumerate(alphabet)}
    merges: list[tuple[str, str]] = []
    for text in texts:
        (word, _), *_ = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
        for end in range(2, len(word) + 1):
            if word[:end] not in vocab:
                vocab[word[:end]] = len(vocab)
                merges.append((word[: end - 1], word[end - 1]))
    return models.BPE(vocab=vocab, merges=merges)


def byte_level(
    texts: Sequence[str] = WORDS,
    added: Sequence[str] = (),
    special: Sequence[str] = ("<|eos|>",),
    **options: object,
) -> PreTrainedTokenizerFast:
    """Byte-level BPE (GPT-2, Qwen, Llama 3). added: tokens with special=False; special: special ones, the
    first is EOS.
    """
    tokenizer = Tokenizer(_byte_level_model(texts))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in added])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special[0], **options)


def qwen_like(**options: object) -> PreTrainedTokenizerFast:
    return byte_level(added=["<think>", "</think>"], special=["<|im_end|>", "<|endoftext|>"], **options)


def merging(**options: object) -> PreTrainedTokenizerFast:
    """No delimiter is a token, and the close's text merges with what stands beside it."""
    pieces = [
        "<think",
        "</",
        ".</",
        "\n</",
        "think",
        "think>",
        ">\n\n",
        "k>\n",
        "ink",
        "</thi",
        "<",
        "x<",
        "nk>.",
    ]
    return byte_level(pieces, **options)


def gpt_oss_like(**options: object) -> PreTrainedTokenizerFast:
    special = ["<|return|>", "<|start|>", "<|end|>", "<|channel|>", "<|message|>", "<|call|>"]
    return byte_level([*WORDS, "assistant", "analysis", "final"], special=special, **options)


def sentencepiece_like(added: Sequence[str] = (), **options: object) -> PreTrainedTokenizerFast:
    """BPE over `▁` with byte fallback (Llama 2, Mistral)."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    for symbol in "▁</>[]thinkTHINKWaswerFl:.o":
        vocab.setdefault(symbol, len(vocab))
    merges = []
    for word in ["▁</", "</", "think", "▁think", "▁Wait", "Wait", "Fin", "▁Fin"]:
        for end in range(2, len(word) + 1):
            if word[:end] not in vocab:
                vocab[word[:end]] = len(vocab)
                merges.append((word[: end - 1], word[end - 1]))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in added])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>", **options)


def word_level(
    words: Sequence[str] = ("<think>", "</think>", "1", "2", "+", "ok"),
) -> PreTrainedTokenizerFast:
    """One token a word, none of them added but EOS: the tokenizer of a toy model."""
    vocab = {word: i for i, word in enumerate(["<eos>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")
