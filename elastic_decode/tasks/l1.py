"""The words by which L1 (cmu-l3/l1, arXiv 2503.04697) tells a model its number of tokens."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

from elastic_decode.core import Prompt
from elastic_decode.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Wish:
    """A number of tokens that every prompt asks for: any of low..high, drawn for each row by `seed`.

    words: what goes behind the prompt (of a chat: behind its last user message), with {tokens} for the
    number; L1-Exact's sentence unless given, and L1-Max's is " Think for maximum {tokens} tokens.". Rewards
    get the number as the column `target_tokens`.
    """

    low: int
    high: int
    words: str = " Think for {tokens} tokens."
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.low <= self.high:
            raise ConfigError(f"wish.low and high must be 1 <= low <= high, got {self.low} and {self.high}")
        if self.words.count("{tokens}") != 1:
            raise ConfigError(f"wish.words must have {{tokens}} in it, once, got {self.words!r}")

    def of(self, row: int) -> int:
        """The wish of a row."""
        return random.Random(f"wish {self.seed} {row}").randint(self.low, self.high)

    def said(self, prompt: Prompt, tokens: int) -> Prompt:
        """The prompt with the wish behind it. Raises ConfigError as `with_l1_suffix` does."""
        return _behind(prompt, self.words.replace("{tokens}", str(tokens)))


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
    return _behind(prompt, l1_suffix(tokens, exact=exact))


def _behind(prompt: Prompt, suffix: str) -> Prompt:
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
