"""The bodies of requests, and what they ask of the engine. Nothing in one is dropped in silence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from elastic_decode.core import Prompt, Request, SamplingParams
from elastic_decode.server.options import ServerOptions, policy_for

MAX_SAMPLES = 128  # of one prompt, as the OpenAI API has it

# Nothing in an answer depends on these, so they are taken and forgotten.
_IGNORED = ("user", "metadata", "safety_identifier", "prompt_cache_key", "service_tier")
# Fields of the OpenAI API for what this server has not: taken where they ask for nothing.
_NOTHING: dict[str, tuple[Any, ...]] = {
    "tools": (None, []),
    "tool_choice": (None, "none"),
    "parallel_tool_calls": (None, True, False),
    "functions": (None, []),
    "function_call": (None, "none"),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "store": (None, False),
    "suffix": (None, ""),
    "echo": (None, False),
    "best_of": (None, 1),
}
_INSTEAD = {
    "reasoning_effort": "how long a request thinks is thinking_token_budget, in tokens",
    "echo": "the prompt is not given back",
    "suffix": "text is only continued at its end",
    "best_of": "send n and choose among the samples",
    "store": "nothing is stored",
    "tools": "this server calls no tools",
    "response_format": "output is not constrained to a grammar",
}
# Arguments of apply_chat_template that are not the template's own: how it is called is not for a request.
_TEMPLATE_RESERVED = frozenset(
    {"conversation", "chat_template", "tokenize", "add_generation_prompt", "continue_final_message"}
    | {"padding", "truncation", "max_length", "return_tensors", "return_dict", "tokenizer_kwargs"}
    | {"return_assistant_tokens_mask"}
)
# Of SamplingParams, as they are.
_SAMPLING = frozenset(
    {"temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids", "stop_in_thinking"}
    | {"ignore_eos", "min_tokens", "presence_penalty", "frequency_penalty", "repetition_penalty"}
)

Count = Annotated[int, Field(ge=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: bool | None = None  # it would pad chunks; ignored


class Message(BaseModel):
    """A turn. `content` may be a list of text parts; fields for tools must be empty."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: str
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    reasoning_content: str | None = None

    @model_validator(mode="after")
    def _only_text(self) -> Message:
        for name, value in (self.model_extra or {}).items():
            if value not in (None, [], {}):
                raise ValueError(f"{name!r} is not supported in a message: it takes role, content and name")
        if isinstance(self.content, list):
            for part in self.content:
                if part.get("type") not in ("text", "refusal") or set(part) != {"type", part["type"]}:
                    raise ValueError(f"content parts must be of type 'text', got {part.get('type')!r}")
        return self

    def for_template(self) -> dict[str, str]:
        """The turn as chat templates read it."""
        text = self.content or ""
        if isinstance(text, list):
            text = "".join(part[part["type"]] for part in text)
        turn = {"role": self.role, "content": text}
        for name in ("name", "reasoning_content"):
            if (value := getattr(self, name)) is not None:
                turn[name] = value
        return turn


class _Decoding(_Strict):
    """What both endpoints take. None is not said: the server's own default holds."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    thinking_token_budget: Count | None = None
    solution_token_budget: Count | None = None

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    stop_in_thinking: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None

    @model_validator(mode="before")
    @classmethod
    def _set_aside(cls, body: Any) -> Any:
        """Fields without an effect go; those that ask for what is not there are refused by name."""
        if not isinstance(body, dict):
            raise ValueError("the body must be a JSON object")
        kept = {}
        for name, value in body.items():
            if name in _IGNORED:
                continue
            if name in _NOTHING and value in _NOTHING[name]:
                continue
            if name in _NOTHING or (name in _INSTEAD and value is not None):
                why = f": {_INSTEAD[name]}" if name in _INSTEAD else ""
                raise ValueError(f"{name} {value!r} is not supported{why}")
            if name not in _INSTEAD:
                kept[name] = value
        return kept

    @model_validator(mode="after")
    def _usage_of_a_stream(self) -> _Decoding:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options goes with stream: true")
        return self

    @field_validator("logit_bias")
    @classmethod
    def _token_ids(cls, given: dict[str, float] | None) -> dict[str, float] | None:
        for token in given or ():
            if not token.isdecimal():
                raise ValueError(f"keys must be token ids, got {token!r}")
        return given

    def total(self) -> int | None:
        return self.max_tokens

    def sampling(self, default: SamplingParams) -> SamplingParams:
        """The server's defaults with what the request says. Raises ConfigError."""
        said = {name: value for name in _SAMPLING if (value := getattr(self, name)) is not None}
        if self.logit_bias is not None:
            said["logit_bias"] = {int(token): value for token, value in self.logit_bias.items()}
        return replace(default, **said)

    def requests_for(self, prompts: Sequence[Prompt], options: ServerOptions, **how: Any) -> list[Request]:
        """A request a prompt. Raises BudgetError and ConfigError."""
        budget = policy_for(
            options.policy,
            think=self.thinking_token_budget,
            solve=self.solution_token_budget,
            total=self.total(),
        )
        sampling = self.sampling(options.sampling)
        return [Request(prompt, budget=budget, sampling=sampling, n=self.n or 1, **how) for prompt in prompts]


class ChatRequest(_Decoding):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @field_validator("top_logprobs")
    @classmethod
    def _no_others(cls, given: int | None) -> int | None:
        if given:
            raise ValueError("only the drawn token's log-probability is known; send 0 or leave it out")
        return given

    @field_validator("chat_template_kwargs")
    @classmethod
    def _the_templates_own(cls, given: dict[str, Any] | None) -> dict[str, Any] | None:
        taken = sorted(_TEMPLATE_RESERVED & set(given or ()))
        if taken:
            raise ValueError(f"{', '.join(taken)} cannot be set by a request")
        return given

    @model_validator(mode="after")
    def _one_total(self) -> ChatRequest:
        pair = (self.max_tokens, self.max_completion_tokens)
        if None not in pair and pair[0] != pair[1]:
            raise ValueError(f"max_tokens {pair[0]} and max_completion_tokens {pair[1]} are the same thing")
        return self

    def total(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def requests(self, options: ServerOptions) -> list[Request]:
        chat = [message.for_template() for message in self.messages]
        return self.requests_for([chat], options, chat_template_kwargs=self.chat_template_kwargs)


class CompletionRequest(_Decoding):
    """`prompt`: a string, token ids, or a list of either; `logprobs` 0 asks for the drawn token's."""

    prompt: Any
    logprobs: Literal[0] | None = None

    @field_validator("logprobs", mode="before")
    @classmethod
    def _no_others(cls, given: Any) -> Any:
        if given is not None and (given != 0 or isinstance(given, bool)):
            raise ValueError("only the drawn token's log-probability is known; send 0 or leave it out")
        return given

    @field_validator("prompt")
    @classmethod
    def _prompts(cls, given: Any) -> list[Prompt]:
        prompts = [given] if isinstance(given, str) or _is_ids(given) else given
        if (
            not isinstance(prompts, list)
            or not prompts
            or not all((isinstance(p, str) and p) or _is_ids(p) for p in prompts)
        ):
            raise ValueError("must be a string, a list of token ids, or a list of those, none of them empty")
        return prompts

    def requests(self, options: ServerOptions) -> list[Request]:
        return self.requests_for(self.prompt, options)


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)
