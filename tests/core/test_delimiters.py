"""Delimiters and EOS of every family, where the output begins, and the bytes of the tokens."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig

from elastic_decode.core import Phase
from elastic_decode.delimiters import Delimiters, Marker, resolve, start_phase, vocabulary_bytes
from elastic_decode.errors import DelimiterError
from elastic_decode.vocabulary import Vocabulary


def encode(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


def close_of(tokenizer, **options):
    return resolve(tokenizer, **options).close


# -- resolve


@pytest.mark.parametrize(
    "pair",
    [
        ("<think>", "</think>"),
        ("<seed:think>", "</seed:think>"),
        ("[THINK]", "[/THINK]"),
        ("<|START_THINKING|>", "<|END_THINKING|>"),
    ],
)
@pytest.mark.parametrize("special", [False, True])
def test_added_tokens_of_any_id(made, pair, special):
    tokens = {"special": ["<|eos|>", *pair]} if special else {"added": ["<pad>", *pair]}
    tokenizer = made.byte_level(**tokens)
    found = resolve(tokenizer)
    assert found.open == Marker((tokenizer.convert_tokens_to_ids(pair[0]),))
    assert found.close == Marker((tokenizer.convert_tokens_to_ids(pair[1]),))


def test_sentencepiece_with_added_tokens(made):
    tokenizer = made.sentencepiece_like(added=["[THINK]", "[/THINK]"])
    assert close_of(tokenizer) == Marker((tokenizer.convert_tokens_to_ids("[/THINK]"),))


def test_tokens_of_a_word_level_model_need_not_be_added(made):
    tokenizer = made.word_level()
    assert resolve(tokenizer) == Delimiters(Marker((2,)), Marker((3,)), (0,))


@pytest.mark.parametrize(
    ("template", "pair"),
    [
        ("{{ message }}<|assistant|><think>\n", ("<think>", "</think>")),
        ("{% if '</think>' in content %}…{% endif %}", ("<think>", "</think>")),
        ("Draft your thinking: [THINK]…[/THINK]", ("[THINK]", "[/THINK]")),
        ("◁think▷", ("◁think▷", "◁/think▷")),
    ],
)
@pytest.mark.parametrize("kind", ["merging", "sentencepiece_like"])
def test_text_named_by_the_chat_template(made, kind, template, pair):
    for tokenizer, given_template in (
        (getattr(made, kind)(chat_template=template), None),
        (getattr(made, kind)(chat_template={"default": "x", "think": template}), None),
        (getattr(made, kind)(), template),
    ):
        found = resolve(tokenizer, chat_template=given_template)
        vocabulary = vocabulary_bytes(tokenizer)
        for marker, text in zip((found.open, found.close), pair, strict=True):
            assert marker.text == text
            assert vocabulary.join(marker.ids) == text.encode()


def test_an_open_may_be_a_token_and_its_close_a_text(made):
    tokenizer = made.byte_level(["</think"], added=["<think>"], chat_template="<think>")
    found = resolve(tokenizer)
    assert found.open.text is None
    assert found.close.text == "</think>"


def test_gpt_oss_closes_with_a_sequence(made):
    tokenizer = made.gpt_oss_like()
    found = resolve(tokenizer)
    close = ["<|end|>", "<|start|>", "assistant", "<|channel|>", "final", "<|message|>"]
    assert found.open == Marker(
        tuple(tokenizer.convert_tokens_to_ids(["<|channel|>", "analysis", "<|message|>"]))
    )
    assert found.close == Marker(tuple(tokenizer.convert_tokens_to_ids(close)))


def test_the_chat_template_decides_between_several_pairs(made):
    pairs = ["<think>", "</think>", "[THINK]", "[/THINK]"]
    tokenizer = made.byte_level(added=pairs)
    with pytest.raises(
        DelimiterError, match=r"ambiguous: <think> … </think>, \[THINK\] … \[/THINK\] all are tokens"
    ):
        resolve(tokenizer)
    assert close_of(tokenizer, chat_template="…[THINK]") == Marker(
        (tokenizer.convert_tokens_to_ids("[/THINK]"),)
    )
    with pytest.raises(DelimiterError, match="ambiguous"):
        resolve(tokenizer, chat_template="<think> or [THINK]")
    with pytest.raises(DelimiterError, match="all appear in the chat template"):
        resolve(made.merging(), chat_template="<think> or [THINK]")


def test_nothing_found_says_what_was_looked_for(made):
    with pytest.raises(DelimiterError) as caught:
        resolve(made.byte_level(chat_template="{{ messages }}"))
    for part in ("<seed:think>", "[/THINK]", "<|channel|>", "(14 characters)", "think_close=", "Delimiters("):
        assert part in str(caught.value)
    with pytest.raises(DelimiterError, match="there is none"):
        resolve(made.byte_level())


# -- what the user gives


def test_given_strings(made):
    tokenizer = made.qwen_like()
    vocabulary = vocabulary_bytes(tokenizer)
    think, close = (tokenizer.convert_tokens_to_ids(token) for token in ("<think>", "</think>"))
    assert close_of(tokenizer, think_close="</think>") == Marker((close,))
    text = close_of(tokenizer, think_close="</thinking>")
    assert text == Marker(tuple(encode(tokenizer, "</thinking>")), "</thinking>")
    assert vocabulary.join(text.ids) == b"</thinking>"
    # One token of the vocabulary, but a longer one may hold it: a text.
    assert close_of(tokenizer, think_close="thi") == Marker(tuple(encode(tokenizer, "thi")), "thi")
    assert len(encode(tokenizer, "thi")) == 1
    # Between added tokens nothing can merge: ids. Otherwise it is a text.
    both = close_of(tokenizer, think_close="</think>so<think>")
    assert both == Marker((close, *encode(tokenizer, "so"), think))
    assert close_of(tokenizer, think_close="so</think>").text == "so</think>"


def test_given_ids_and_markers(made):
    tokenizer = made.qwen_like()
    assert close_of(tokenizer, think_close=5) == Marker((5,))
    assert close_of(tokenizer, think_close=[5, 6]) == Marker((5, 6))
    assert close_of(tokenizer, think_close=Marker((5,), "x")) == Marker((5,), "x")
    with pytest.raises(DelimiterError, match=r"think_close has token id 999, the tokenizer has ids 0 … 280"):
        resolve(tokenizer, think_close=999)
    with pytest.raises(DelimiterError, match="at least one token id"):
        resolve(tokenizer, think_close=[])
    with pytest.raises(DelimiterError, match=">= 0"):
        resolve(tokenizer, think_close=-1)
    with pytest.raises(DelimiterError, match="empty string"):
        resolve(tokenizer, think_close="")
    with pytest.raises(DelimiterError, match="must not be empty"):
        Marker((1,), "")


def test_the_other_half_is_its_partner(made):
    tokenizer = made.byte_level()
    assert resolve(tokenizer, think_close="</think>").open.text == "<think>"
    assert resolve(tokenizer, think_open="[THINK]").close.text == "[/THINK]"
    assert resolve(tokenizer, think_close="###").open is None
    with pytest.raises(DelimiterError, match="no known close: pass think_close="):
        resolve(tokenizer, think_open="###")
    with pytest.raises(DelimiterError, match="the same tokens"):
        resolve(tokenizer, think_open="###", think_close="###")


def test_the_unknown_token_is_no_delimiter(made):
    for close in ("</thought>", "1 </thought>", "<unk>"):
        with pytest.raises(DelimiterError, match="the unknown token among them"):
            resolve(made.word_level(), think_close=close)


# -- EOS


@pytest.mark.parametrize(
    ("config", "eos"),
    [
        (None, (277,)),
        ({"eos_token_id": 278}, (277, 278)),
        ({"eos_token_id": [278, 277]}, (277, 278)),
        ({}, (277,)),
        (GenerationConfig(eos_token_id=[278, 3]), (3, 277, 278)),
        (GenerationConfig(), (277,)),
    ],
)
def test_eos_is_the_union(made, config, eos):
    tokenizer = made.qwen_like()
    assert resolve(tokenizer, generation_config=config).eos_ids == eos
    assert resolve(tokenizer, generation_config=config, eos_ids=5).eos_ids == (5,)
    assert resolve(tokenizer, generation_config=config, eos_ids=[7, 6, 6]).eos_ids == (6, 7)


def test_no_eos_raises(made):
    tokenizer = made.qwen_like()
    tokenizer.eos_token = None
    with pytest.raises(DelimiterError, match="no EOS id: neither generation_config"):
        resolve(tokenizer)
    with pytest.raises(DelimiterError, match="no EOS id"):
        resolve(tokenizer, eos_ids=[])
    assert resolve(tokenizer, generation_config={"eos_token_id": 3}).eos_ids == (3,)


# -- where the output begins


@pytest.mark.parametrize(
    ("prompt", "phase"),
    [
        ("", Phase.THINK),
        ("so the line", Phase.THINK),
        ("<think>", Phase.THINK),
        ("<think>\n", Phase.THINK),
        ("<think>so</think>", Phase.SOLVE),
        ("<think>\n\n</think>\n\n", Phase.SOLVE),
        ("</think>", Phase.SOLVE),
        ("<think></think>the line<think>", Phase.THINK),
        ("</think></think", Phase.SOLVE),
        ("</thin", Phase.THINK),
        ("x.</think>\n\nso", Phase.SOLVE),
    ],
)
@pytest.mark.parametrize("kind", ["qwen_like", "merging"])
def test_the_last_marker_decides(made, kind, prompt, phase):
    tokenizer = getattr(made, kind)(chat_template="<think>")
    delimiters = resolve(tokenizer)
    assert (delimiters.close.text is None) == (kind == "qwen_like")
    assert start_phase(encode(tokenizer, prompt), delimiters, vocabulary_bytes(tokenizer)) is phase


def test_a_sequence_decides_only_when_complete(made):
    tokenizer = made.gpt_oss_like()
    delimiters = resolve(tokenizer)
    close = "<|end|><|start|>assistant<|channel|>final<|message|>"
    again = "<|end|><|start|>assistant<|channel|>analysis<|message|>"
    for prompt, phase in {
        "<|start|>assistant": Phase.THINK,
        "<|channel|>analysis<|message|>so": Phase.THINK,
        f"<|channel|>analysis<|message|>so{close}": Phase.SOLVE,
        f"<|channel|>analysis<|message|>so{close}the{again}": Phase.THINK,
        "<|end|><|start|>assistant<|channel|>final": Phase.THINK,
    }.items():
        assert start_phase(encode(tokenizer, prompt), delimiters) is phase


def test_a_marker_inside_a_later_one_does_not_decide():
    vocabulary = Vocabulary([b"<eos>", b"think", b"/", b"x"])
    delimiters = Delimiters(Marker((1,), "think"), Marker((2, 1), "/think"), (0,))
    assert start_phase([1, 3], delimiters, vocabulary) is Phase.THINK
    assert start_phase([1, 2, 1], delimiters, vocabulary) is Phase.SOLVE
    assert start_phase([2, 1, 3, 1], delimiters, vocabulary) is Phase.THINK
    assert start_phase([9, 2, 1, 3], delimiters, vocabulary) is Phase.SOLVE


def test_without_an_open_only_a_close_decides():
    delimiters = Delimiters(None, Marker((2, 1)), (0,))
    assert start_phase([1, 1], delimiters) is Phase.THINK
    assert start_phase([2, 1, 1], delimiters) is Phase.SOLVE


def test_textual_markers_need_the_vocabulary(made):
    delimiters = resolve(made.merging(chat_template="<think>"))
    with pytest.raises(DelimiterError, match="needs the vocabulary"):
        start_phase([1], delimiters)


# -- the bytes of the tokens


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=20))
@pytest.mark.parametrize("kind", ["qwen_like", "merging", "gpt_oss_like", "sentencepiece_like"])
def test_tokens_print_their_text(made, kind, text):
    tokenizer = getattr(made, kind)()
    vocabulary = vocabulary_bytes(tokenizer)
    printed = vocabulary.join(encode(tokenizer, text)).decode()
    if kind == "sentencepiece_like":
        text = f" {text.replace('▁', ' ')}" if text else text
    assert printed == text


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=12), cut=st.integers(0, 3))
@pytest.mark.parametrize("kind", ["qwen_like", "merging", "sentencepiece_like"])
def test_bytes_are_spelled_exactly(made, kind, text, cut):
    vocabulary = vocabulary_bytes(getattr(made, kind)())
    data = text.encode()[cut:]  # may begin inside a character
    ids = vocabulary.spell(data)
    assert ids is not None
    assert vocabulary.join(ids) == data


def test_text_is_spelled_as_the_tokenizer_would(made):
    for tokenizer in (made.qwen_like(), made.merging()):
        for text in ("think", "Wait", "so the line.\n"):
            assert list(vocabulary_bytes(tokenizer).spell(text.encode())) == encode(tokenizer, text)
    tokenizer = made.sentencepiece_like()
    vocabulary = vocabulary_bytes(tokenizer)
    assert tokenizer.convert_ids_to_tokens(vocabulary.spell(b"Wait")) == ["Wait"]
    assert tokenizer.convert_ids_to_tokens(vocabulary.spell(b" Wait")) == ["▁Wait"]
    assert tokenizer.convert_ids_to_tokens(vocabulary.spell("é".encode()[1:])) == ["<0xA9>"]


def test_what_tokens_cannot_spell(made):
    vocabulary = vocabulary_bytes(made.word_level())
    assert vocabulary.spell(b"ok1") == (7, 4)
    assert vocabulary.spell(b"no") is None
    # Added tokens are not put together to spell a text.
    assert Vocabulary([b"ab", b"a", b"b"], excluded=[0]).spell(b"ab") == (1, 2)


def test_the_vocabulary_has_the_models_size(made):
    tokenizer = made.qwen_like()
    full = vocabulary_bytes(tokenizer)
    assert len(full) == len(tokenizer)
    assert full[tokenizer.convert_tokens_to_ids("</think>")] == b"</think>"
    padded = vocabulary_bytes(tokenizer, len(full) + 7)
    assert list(padded) == [*full, *[b""] * 7]
    assert list(vocabulary_bytes(tokenizer, 100)) == list(full[:100])


def test_word_pieces_and_unknown_decoders(made):
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    pieces = Tokenizer(models.WordPiece(vocab={"[UNK]": 0, "think": 1, "##ing": 2}, unk_token="[UNK]"))
    pieces.decoder = decoders.WordPiece()
    assert list(vocabulary_bytes(PreTrainedTokenizerFast(tokenizer_object=pieces))) == [
        b" [UNK]",
        b" think",
        b"ing",
    ]
    pieces.decoder = decoders.BPEDecoder()
    with pytest.raises(ValueError, match="no bytes are known for tokens of a"):
        vocabulary_bytes(PreTrainedTokenizerFast(tokenizer_object=pieces))
    with pytest.raises(DelimiterError, match="a textual delimiter needs the bytes"):
        resolve(PreTrainedTokenizerFast(tokenizer_object=pieces), think_close="thinking", eos_ids=0)


def test_a_tokenizer_without_a_backend_is_read_by_its_marks():
    class Slow:
        def __init__(self, *tokens):
            self.tokens = tokens

        def get_vocab(self):
            return {token: i for i, token in enumerate(self.tokens)}

        def get_added_vocab(self):
            return {"<think>": 3}

        def encode(self, text, add_special_tokens):
            raise AssertionError("not asked")

    assert list(vocabulary_bytes(Slow("Ġa", "Ċ", "é", "<think>"))) == [b" a", b"\n", b"\xe9", b"<think>"]
    assert list(vocabulary_bytes(Slow("▁a", "<0x0A>", "é", "<think>"))) == [
        b" a",
        b"\n",
        "é".encode(),
        b"<think>",
    ]
    assert list(vocabulary_bytes(Slow("a", "<0x0A>", "é", "<think>")))[1:3] == [b"<0x0A>", "é".encode()]
