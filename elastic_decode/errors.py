"""The errors a user can meet. Each message names what was wrong, what was expected and what to do."""


class ElasticDecodeError(Exception):
    """Base of every error of this library that is not a plain ValueError or TypeError."""


class ConfigError(ElasticDecodeError, ValueError):
    """A configuration value or option that cannot be used."""


class UnsupportedModel(ElasticDecodeError, ValueError):
    """An architecture, rope type or feature that no model family here covers."""


class CheckpointError(ElasticDecodeError, ValueError):
    """A checkpoint that is missing, truncated, or whose tensors do not fit its configuration."""


class DelimiterError(ElasticDecodeError, ValueError):
    """A thinking delimiter or EOS id that cannot be resolved: a budget would silently do nothing."""


class BudgetError(ElasticDecodeError, ValueError):
    """A budget or phase program that can never fit or is not well formed."""


class CapacityError(ElasticDecodeError, ValueError):
    """A request that could never be admitted, or a table that is too small for it."""


class BackendUnproven(ElasticDecodeError, RuntimeError):
    """A kernel disagreed with its reference on this device and will not be used."""


class NonFiniteLogits(ElasticDecodeError, RuntimeError):
    """A row's logits held no finite candidate to draw from."""

    request_id: str | None = None  # the one request that this ends


class WeightsRebound(ElasticDecodeError, RuntimeError):
    """A parameter of the shared module no longer points into the engine's buffers."""


class WeightsIncomplete(ElasticDecodeError, RuntimeError):
    """Taking over new weights broke off: the engine holds old ones beside new ones."""


class RankError(ElasticDecodeError, RuntimeError):
    """Another process of a distributed run failed, or cannot be reached."""


class EngineBusy(ElasticDecodeError, RuntimeError):
    """Something that needs an idle engine was asked of one with requests in flight."""


class EngineAsleep(ElasticDecodeError, RuntimeError):
    """The engine was asked to decode between `sleep()` and `wake()`."""


class RewardError(ElasticDecodeError, RuntimeError):
    """A reward function raised, or returned what is no reward."""


class StorageError(ElasticDecodeError, OSError):
    """A checkpoint or a file of a run that could not be written: a full disk, a quota, a lost mount. `errno`
    is the system's.
    """

    def __str__(self) -> str:
        return str(self.strerror)


class EngineClosed(ElasticDecodeError, RuntimeError):
    """The engine was used after `close()`."""
