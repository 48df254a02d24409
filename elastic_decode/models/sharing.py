"""The decoder on a live Hugging Face module's own parameters, without a copy where dtype and device agree.

What the module does not hold as the decoder wants it (matrices with adapters beside them, shards) is *fed*:
the decoder has buffers of its own for it, filled by `copy_in` from (checkpoint name, tensor) pairs.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

import torch

from elastic_decode.errors import ConfigError, UnsupportedModel, WeightsRebound
from elastic_decode.model_config import ModelConfig
from elastic_decode.models.layout import (
    EMBED,
    LM_HEAD,
    Fused,
    Weights,
    assemble,
    empty,
    layer_layout,
    outer_layout,
)

_Owner = dict[str, torch.nn.Parameter | None]  # a module's own parameters by their last name


class SharedWeights:
    """Weights tied to a module. `weights`: the decoder's. `shared`: nothing had to be copied or fed.

    fed: checkpoint name -> the decoder's own buffer of each tensor that only `sync(weights)` brings.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        weights: Weights,
        targets: dict[str, torch.Tensor],
        tied: bool,
        fed: Collection[str],
    ) -> None:
        self.weights = weights
        self.fed = {name: targets[name] for name in targets if name in fed}
        self._hungry = bool(self.fed)  # until the first `sync` its buffers hold nothing
        # A child replaced as a whole takes its parameters along, so the path to each owner is checked too.
        self._links = [
            (parent._modules, key, child, f"{path}.{key}" if path else key)
            for path, parent in module.named_modules()
            for key, child in parent.named_children()
        ]
        self._pointers: list[tuple[str, _Owner, str, int]] = []
        self._copies: list[tuple[str, _Owner, str, torch.Tensor]] = []
        places = _places(module)
        for name, target in targets.items():
            if name in self.fed:
                continue
            owner, key = places[name]
            parameter = owner[key]
            if parameter is not None and parameter.data_ptr() == target.data_ptr():
                self._pointers.append((name, owner, key, target.data_ptr()))
            else:
                self._copies.append((name, owner, key, target))
        self._tie = (places[EMBED], places[LM_HEAD]) if tied else None

    @property
    def shared(self) -> bool:
        return not self._copies and not self.fed

    def verify(self, *, modules: bool = True) -> None:
        """Raises WeightsRebound naming a parameter that no longer points into the decoder's tensors, and
        ConfigError where fed tensors have not come yet.

        modules=False leaves out whether whole submodules were replaced, for checks between two decode steps.
        """
        if self._hungry:
            raise ConfigError(
                f"the engine has no values yet for {_some(self.fed)}, which it was made to be fed; call "
                "sync_weights(weights) first"
            )
        for children, key, child, path in self._links if modules else ():
            if children.get(key) is not child:
                raise WeightsRebound(
                    f"module {path!r} was replaced after the engine shared its weights; "
                    "make a new engine with Engine.from_model"
                )
        for name, owner, key, pointer in self._pointers:
            parameter = owner.get(key)
            if parameter is None or parameter.data_ptr() != pointer:
                raise WeightsRebound(
                    f"parameter {name!r} no longer points into the engine's weights "
                    "(load_state_dict(assign=True), .to() and resize_token_embeddings re-bind parameters); "
                    "copy into parameters in place, or make a new engine with Engine.from_model"
                )
        if self._tie is not None:
            (embed, embed_key), (head, head_key) = self._tie
            if embed.get(embed_key) is not head.get(head_key):
                raise WeightsRebound(
                    f"parameter {LM_HEAD!r} was tied to {EMBED!r} and is no longer; "
                    "make a new engine with Engine.from_model"
                )

    @torch.no_grad()
    def sync(self, weights: Iterable[tuple[str, torch.Tensor]] | None = None) -> None:
        """Takes over the module's present values: a check where shared, one cast copy where not, and
        `weights` for what is fed: all of it, each time. Raises ConfigError where something is missing or not
        fed.
        """
        if self.fed and weights is None:
            raise ConfigError(
                f"sync_weights() without weights: {_some(self.fed)} would keep old values; give (name, "
                "tensor) pairs of all that the engine was made to be fed"
            )
        if weights is not None:
            came = copy_in(self.fed, weights)
            if missing := [name for name in self.fed if name not in came]:
                self._hungry = True  # old and new values side by side
                raise ConfigError(f"sync_weights(weights) brought no {_some(missing)}")
        self._hungry = False
        self.verify()
        for name, owner, key, target in self._copies:
            parameter = owner.get(key)
            if parameter is None or parameter.shape != target.shape:
                raise WeightsRebound(
                    f"parameter {name!r} is gone or changed its shape since the engine was made"
                )
            target.copy_(parameter.detach())


@torch.no_grad()
def copy_in(targets: Mapping[str, torch.Tensor], weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
    """Copy (checkpoint name, tensor) pairs into `targets`, cast, one at a time as they come; their names.

    Raises ConfigError for a name that is not among the targets, one that comes twice, or another shape, with
    the pairs before it copied.
    """
    came: set[str] = set()
    for name, tensor in weights:
        target = targets.get(name)
        if target is None or name in came:
            why = "came twice" if name in came else "is none of the tensors that the engine holds by itself"
            raise ConfigError(f"sync_weights(weights): {name!r} {why} ({_some(targets) or 'there are none'})")
        if tensor.shape != target.shape:
            shape = tuple(tensor.shape)
            raise ConfigError(
                f"sync_weights(weights): {name!r} has shape {shape}, expected {tuple(target.shape)}"
            )
        target.copy_(tensor.detach())
        came.add(name)
    return came


def share_module(
    module: torch.nn.Module,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    fed: Collection[str] = (),
) -> SharedWeights:
    """The decoder's weights as the parameters of `module`, a Hugging Face causal LM of the shape `config`.

    Parameters of `dtype` on `device` are shared: single ones as they are; query/key/value and gate/up are
    moved into one buffer and re-pointed as views of it (the Parameter objects stay, so optimizers and
    `save_pretrained` go on working). Others are copied, at once and again at every `sync()`.

    fed: checkpoint names of parameters left alone, for which the decoder has buffers of its own that only
    `sync(weights)` fills; they may be sharded or on the meta device, and the module that holds one may have
    further parameters (of an adapter). peft's `base_layer` is seen through: names are the checkpoint's.

    Raises UnsupportedModel naming a parameter that is missing, surplus, misshapen or of a kind that cannot be
    shared, ConfigError for a name in `fed` that the decoder has not.
    """
    device = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0", as parameters have it
    parameters = {
        name: parameter
        for name, (owner, key) in _places(module).items()
        if (parameter := owner[key]) is not None
    }
    tied = LM_HEAD not in parameters or parameters[LM_HEAD] is parameters.get(EMBED)
    config = replace(
        config, tie_embeddings=tied
    )  # what the module does counts, not what its configuration says
    layouts = [outer_layout(config), *(layer_layout(config, index) for index in range(config.num_layers))]
    _check(parameters, layouts, tied, fed)

    targets: dict[str, torch.Tensor] = {}
    groups: list[dict[str, torch.Tensor]] = []
    with torch.no_grad():
        for layout in layouts:
            fields: dict[str, torch.Tensor] = {}
            for t in layout:
                fields[t.field] = _fuse(t, parameters, dtype, device, fed)
                targets.update(t.views(fields[t.field]))
            groups.append(fields)
    for name, buffer in module.named_buffers():
        if name.endswith("rotary_emb.inv_freq") and buffer.dtype != torch.float32:
            warnings.warn(
                f"{name} of the module is {buffer.dtype}: it rotates by rounded frequencies, the engine "
                "does not, so their log-probabilities differ. Load with dtype=..., not .to(dtype) or .half()",
                stacklevel=2,
            )
    weights = assemble(groups[0], groups[1:])
    return SharedWeights(module, weights, targets, tied and LM_HEAD in parameters, fed)


def _places(module: torch.nn.Module) -> dict[str, tuple[_Owner, str]]:
    """Where each parameter is held, by its name in a checkpoint: a layer that peft wraps is `base_layer`."""
    found: dict[str, tuple[_Owner, str]] = {}
    for path, owner in module.named_modules(remove_duplicate=False):
        whole = ".".join(part for part in path.split(".") if part and part != "base_layer")
        for key, parameter in owner._parameters.items():
            if parameter is not None:
                found[f"{whole}.{key}" if whole else key] = (owner._parameters, key)
    return found


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - 1} more" if len(listed) > 1 else ""
    return f"{listed[0]!r}{more}" if listed else ""


def _check(
    parameters: dict[str, torch.nn.Parameter], layouts: list[list[Fused]], tied: bool, fed: Collection[str]
) -> None:
    shapes = {name: (rows, *t.shape[1:]) for layout in layouts for t in layout for name, rows in t.parts}
    if unknown := [name for name in fed if name not in shapes]:
        raise ConfigError(
            f"{_some(unknown)} cannot be fed: the decoder has no such tensor"
            + (f" (tied: feed {EMBED!r})" if LM_HEAD in unknown and tied else "")
        )
    for name, shape in shapes.items():
        if name not in parameters:
            raise UnsupportedModel(f"the module has no parameter {name!r}, which its configuration calls for")
        parameter = parameters[name]
        if tuple(parameter.shape) != shape:
            raise UnsupportedModel(f"parameter {name!r} has shape {tuple(parameter.shape)}, expected {shape}")
        if name not in fed and (parameter.is_meta or type(parameter.data) is not torch.Tensor):
            raise UnsupportedModel(
                f"parameter {name!r} is on the meta device or sharded ({type(parameter.data).__name__}); "
                "materialise the whole module on this process first"
            )
    surplus = sorted(set(parameters) - set(shapes) - ({LM_HEAD} if tied else set()))
    within = tuple(name.removesuffix("weight") for name in fed if name.endswith(".weight"))
    surplus = [name for name in surplus if not name.startswith(within)]
    if surplus:
        raise UnsupportedModel(
            f"parameter {surplus[0]!r} has no place in the decoder; merge adapters and unwrap first, or feed "
            "the engine what they come to (Engine.from_model(fed=...))"
        )
    seen: dict[int, str] = {}
    for name in shapes:
        twin = seen.setdefault(id(parameters[name]), name)
        if twin != name:
            raise UnsupportedModel(
                f"parameters {twin!r} and {name!r} are one; only embeddings and head can be tied"
            )


def _fuse(
    fused: Fused,
    parameters: dict[str, torch.nn.Parameter],
    dtype: torch.dtype,
    device: torch.device,
    fed: Collection[str],
) -> torch.Tensor:
    """The tensor of `fused`: the parameters' own storage where it lies so, else a new buffer for them."""
    parts = [parameters[name] for name, _ in fused.parts]
    agree = [
        name not in fed and p.dtype == dtype and p.device == device
        for (name, _), p in zip(fused.parts, parts, strict=True)
    ]
    if all(agree) and (present := _adjacent(parts, fused.shape)) is not None:
        return present
    buffer = empty(fused.shape, dtype, device)
    for (name, view), parameter, shares in zip(fused.views(buffer), parts, agree, strict=True):
        if name not in fed:
            view.copy_(parameter.detach())
        if shares:
            parameter.data = view
    return buffer


def _adjacent(parts: list[torch.nn.Parameter], shape: tuple[int, ...]) -> torch.Tensor | None:
    """The parts as one tensor where they follow each other in one storage: one part, or shared earlier."""
    first = parts[0].detach()
    offset = first.storage_offset()
    for part in parts:
        same = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not part.is_contiguous() or not same or part.storage_offset() != offset:
            return None
        offset += part.numel()
    return first if len(parts) == 1 else first.as_strided(shape, (*shape[1:], 1))
