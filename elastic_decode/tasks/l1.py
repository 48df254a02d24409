"""The words by which L1 (cmu-l3/l1, arXiv 2503.04697) tells a model its number of tokens."""

from __future__ import annotations

from collections.abc import Mapping

from elastic_decode.core import Prompt
from elastic_decode.errors import ConfigError


def l1_suffix(tokens: int, *, exact: bool = True) -> str:
    """What L1 (cmu-l3/l1) appends to the question: "Think for 512 tokens.", or for L1-Max "… maximum 512 …".

    The paper's suffix behind its instruction, with a space before it. ConfigError unless tokens > 0.
    """
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise ConfigError(f"L1 asks for a number of tokens >= 1, got {tokens!r}")
    return f" Think for {tokens} tokens." if exact else f" Think for maximum {tokens} tokens."


def with_l1_suffix(prompt: Prompt, tokens: int, *, exact: bool = True) -> Prompt:
    """The prompt (a string or a chat) with L1's suffix behind it; in a chat, behind the last user message.

    ConfigError for token ids, and for a chat without a user message whose content is a string.
    """
    suffix = l1_suffix(tokens, exact=exact)
    if isinstance(prompt, str):
        return prompt + suffix
    messages = [message for message in prompt if isinstance(message, Mapping)]
    if not messages or len(messages) != len(prompt):
        raise ConfigError(
            "L1's budget is said in words: the prompt must be a string or a chat, not token ids"
        )
    for place in reversed(range(len(messages))):
        content = messages[place].get("content")
        if messages[place].get("role") == "user" and isinstance(content, str):
            return [
                *messages[:place],
                {**messages[place], "content": content + suffix},
                *messages[place + 1 :],
            ]
    raise ConfigError("L1's budget goes behind the last user message, and this chat has none with a string")
