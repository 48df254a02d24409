"""Prompts as users write them -> token ids and the phase they start in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, NamedTuple, TypeVar

from elastic_decode.core import Phase, Prompt
from elastic_decode.delimiters import Delimiters, start_phase
from elastic_decode.errors import ConfigError
from elastic_decode.vocabulary import Vocabulary

T = TypeVar("T")


def _is_ids(value: Any) -> bool:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and len(value) > 0
        and all(isinstance(item, Integral) and not isinstance(item, bool) for item in value)
    )


def _is_chat(value: Any) -> bool:
    return isinstance(value, Sequence) and len(value) > 0 and all(isinstance(item, Mapping) for item in value)


def as_prompt_list(prompts: Any) -> list[Prompt]:
    """One prompt or a list of them -> a list. A prompt is a string, a list of token ids, or a chat (a list of
    dicts).
    """
    if hasattr(prompts, "tolist"):
        prompts = prompts.tolist()
    if isinstance(prompts, str) or _is_ids(prompts) or _is_chat(prompts):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise ConfigError(
            f"prompts must be a string, a list of token ids, a chat (list of dicts) or a list of those, got "
            f"{type(prompts).__name__}"
        )
    listed: list[Prompt] = []
    for index, given in enumerate(prompts):
        prompt = given.tolist() if hasattr(given, "tolist") else given
        if not (isinstance(prompt, str) or _is_ids(prompt) or _is_chat(prompt)):
            raise ConfigError(
                f"prompts[{index}] must be a string, a non-empty list of token ids or a chat (list of "
                f"dicts), got {given!r}"
            )
        listed.append(prompt)
    return listed


def one_each(name: str, given: Any, default: T, kinds: Any, count: int) -> list[T]:
    """One value for all prompts, or one a prompt."""
    if given is None:
        return [default] * count
    if isinstance(given, kinds):
        return [given] * count
    if not isinstance(given, Sequence) or isinstance(given, str):
        wanted = " or ".join(kind.__name__ for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))
        raise ConfigError(f"{name} must be a {wanted}, or a list of one a prompt, got {given!r}")
    if len(given) != count:
        raise ConfigError(
            f"{name} has {len(given)} entries for {count} prompts; give one value, or one a prompt"
        )
    for index, value in enumerate(given):
        if not isinstance(value, kinds):
            raise ConfigError(f"{name}[{index}] is {value!r}, which is no {name}")
    return list(given)


def _chat_ids(
    tokenizer: Any, chat: Sequence[Mapping[str, Any]], template_kwargs: Mapping[str, Any]
) -> tuple[list[int], list[int]]:
    """(ids of the templated chat, ids of what the template adds after the last message).

    A chat that ends in an assistant turn is continued; then the second part is that turn's own text.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise ConfigError(
            "the prompt is a chat, but the tokenizer has no chat_template; pass a string or token ids, or "
            "set tokenizer.chat_template"
        )
    messages = [dict(message) for message in chat]

    def render(history: list[dict[str, Any]], **how: Any) -> str:
        try:
            return tokenizer.apply_chat_template(history, tokenize=False, **how, **template_kwargs)
        except Exception as error:  # jinja raises whatever a template asks it to
            raise ConfigError(f"the chat template rejected the chat: {error}") from error

    if messages[-1].get("role") == "assistant":
        text = render(messages, continue_final_message=True)
        tail = str(messages[-1].get("content") or "")
    else:
        text = render(messages, add_generation_prompt=True)
        plain = render(messages, add_generation_prompt=False)
        differing = (at for at, (ours, theirs) in enumerate(zip(text, plain, strict=False)) if ours != theirs)
        shared = next(differing, min(len(text), len(plain)))
        if text == plain:  # a template that opens the answer whether it is asked to or not
            last = str(messages[-1].get("content") or "")
            shared = text.rfind(last) + len(last) if last else shared
        tail = text[shared:]

    def encode(part: str) -> list[int]:
        return list(tokenizer(part, add_special_tokens=False)["input_ids"])

    return encode(text), encode(tail)


class Encoded(NamedTuple):
    """A prompt's ids, the phase its markers leave it in, and the ids that may have begun a delimiter."""

    ids: list[int]
    phase: Phase
    tail: list[int]


def encode_prompt(
    tokenizer: Any,
    prompt: Prompt,
    delimiters: Delimiters,
    *,
    vocab_size: int,
    vocabulary: Vocabulary,
    template_kwargs: Mapping[str, Any] | None = None,
) -> Encoded:
    """Token ids of a prompt and the phase its markers leave it in.

    Strings get the tokenizer's special tokens, templated chats do not. For ids and strings the last marker
    decides; for chats only what the template adds after the last message is looked at, so no old turn and no
    user's text opens or closes anything.
    """
    if isinstance(prompt, str):
        ids = tail = list(tokenizer(prompt)["input_ids"])
    elif _is_chat(prompt):
        ids, tail = _chat_ids(tokenizer, prompt, template_kwargs or {})  # type: ignore[arg-type]
    else:
        ids = tail = [int(token) for token in prompt]  # type: ignore[arg-type]
    outside = next((token for token in ids if not 0 <= token < vocab_size), None)
    if outside is not None:
        raise ConfigError(
            f"prompt token id {outside} is outside the model's vocabulary of {vocab_size}; a tokenizer with "
            "added tokens needs a model resized for them"
        )
    if not ids:
        raise ConfigError(f"the prompt {prompt!r} has no tokens; there is nothing to continue")
    return Encoded(ids, start_phase(tail, delimiters, vocabulary), tail)
