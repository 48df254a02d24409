"""Reward functions from their names in a configuration."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from elastic_decode.errors import ConfigError
from elastic_decode.rl import length_rewards
from elastic_decode.rl.config import REWARD_FACTORIES, RewardOptions
from elastic_decode.tasks import countdown
from elastic_decode.tasks.code_grader import CodeGrader
from elastic_decode.tasks.math import MathReward

Function = Callable[..., Any]
_FACTORIES: dict[str, Callable[..., Any]] = dict(
    zip(
        REWARD_FACTORIES,
        (
            length_rewards.L1Exact,
            length_rewards.L1Max,
            length_rewards.Long2Short,
            length_rewards.SoftOverlong,
            MathReward,
            CodeGrader,
        ),
        strict=True,
    )
)


def resolve(rewards: Sequence[RewardOptions]) -> dict[str, Function]:
    """Name -> function, in order. Raises ConfigError for what cannot be imported or made, or a name twice."""
    found: dict[str, Function] = {}
    for index, reward in enumerate(rewards):
        path = f"rewards.{index}"
        name = reward.label
        if name in found:
            raise ConfigError(f"{path}: there is a reward {name!r} already; give this one a name")
        found[name] = _function(reward.function, reward.options, path)
    return found


def _function(name: str, options: Mapping[str, Any], path: str) -> Function:
    if name in _FACTORIES:
        made = dict(options)
        if "correct" in made:
            made["correct"] = _function(str(made["correct"]), {}, f"{path}.options.correct")
        return _made(_FACTORIES[name], made, path)
    function = countdown.reward if name == "countdown" else _imported(name, path)
    return _made(function, options, path) if options or inspect.isclass(function) else function


def _imported(name: str, path: str) -> Function:
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ConfigError(f"{path}: {name!r} is no reward here; name one as module:function")
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{path}: {name} cannot be imported: {error}") from error
    if not callable(found):
        raise ConfigError(f"{path}: {name} is {found!r}, no function")
    function: Function = found
    return function


def _made(factory: Callable[..., Any], options: Mapping[str, Any], path: str) -> Function:
    """What a factory or class makes with the options."""
    try:
        made = factory(**options)
    except TypeError as error:
        raise ConfigError(f"{path}: options {dict(options)}: {error}") from error
    if not callable(made):
        raise ConfigError(f"{path}: made with {dict(options)} it is {made!r}, no function")
    function: Function = made
    return function
