"""The decoder on a live Hugging Face module's own parameters, without a copy where dtype and device agree."""

from __future__ import annotations

import warnings
from dataclasses import replace

import torch

from elastic_decode.errors import UnsupportedModel, WeightsRebound
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
    """Weights tied to a module. `weights`: the decoder's. `shared`: nothing had to be copied."""

    def __init__(
        self, module: torch.nn.Module, weights: Weights, targets: dict[str, torch.Tensor], tied: bool
    ) -> None:
        self.weights = weights
        # A child replaced as a whole takes its parameters along, so the path to each owner is checked too.
        self._links = [
            (parent._modules, key, child, f"{path}.{key}" if path else key)
            for path, parent in module.named_modules()
            for key, child in parent.named_children()
        ]
        self._pointers: list[tuple[str, _Owner, str, int]] = []
        self._copies: list[tuple[str, _Owner, str, torch.Tensor]] = []
        for name, target in targets.items():
            owner, key = _owner(module, name)
            parameter = owner[key]
            if parameter is not None and parameter.data_ptr() == target.data_ptr():
                self._pointers.append((name, owner, key, target.data_ptr()))
            else:
                self._copies.append((name, owner, key, target))
        self._tie = (_owner(module, EMBED), _owner(module, LM_HEAD)) if tied else None

    @property
    def shared(self) -> bool:
        return not self._copies

    def verify(self, *, modules: bool = True) -> None:
        """Raises WeightsRebound naming a parameter that no longer points into the decoder's tensors.

        modules=False leaves out whether whole submodules were replaced, for checks between two decode steps.
        """
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
    def sync(self) -> None:
        """Takes over the module's present values: a check where shared, one cast copy where not."""
        self.verify()
        for name, owner, key, target in self._copies:
            parameter = owner.get(key)
            if parameter is None or parameter.shape != target.shape:
                raise WeightsRebound(
                    f"parameter {name!r} is gone or changed its shape since the engine was made"
                )
            target.copy_(parameter.detach())


def share_module(
    module: torch.nn.Module, config: ModelConfig, dtype: torch.dtype, device: torch.device | str
) -> SharedWeights:
    """The decoder's weights as the parameters of `module`, a Hugging Face causal LM of the shape `config`.

    Parameters of `dtype` on `device` are shared: single ones as they are; query/key/value and gate/up are
    moved into one buffer and re-pointed as views of it (the Parameter objects stay, so optimizers and
    `save_pretrained` go on working). Others are copied, at once and again at every `sync()`. Raises
    UnsupportedModel naming a parameter that is missing, surplus, misshapen or of a kind that cannot be
    shared.
    """
    device = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0", as parameters have it
    parameters = dict(module.named_parameters(remove_duplicate=False))
    tied = LM_HEAD not in parameters or parameters[LM_HEAD] is parameters.get(EMBED)
    config = replace(
        config, tie_embeddings=tied
    )  # what the module does counts, not what its configuration says
    layouts = [outer_layout(config), *(layer_layout(config, index) for index in range(config.num_layers))]
    _check(parameters, layouts, tied)

    targets: dict[str, torch.Tensor] = {}
    groups: list[dict[str, torch.Tensor]] = []
    with torch.no_grad():
        for layout in layouts:
            fields: dict[str, torch.Tensor] = {}
            for t in layout:
                fields[t.field] = _fuse(t, parameters, dtype, device)
                targets.update(t.views(fields[t.field]))
            groups.append(fields)
    for name, buffer in module.named_buffers():
        if name.endswith("rotary_emb.inv_freq") and buffer.dtype != torch.float32:
            warnings.warn(
                f"{name} of the module is {buffer.dtype}: it rotates by rounded frequencies, the engine "
                "does not, so their log-probabilities differ. Load with dtype=..., not .to(dtype) or .half()",
                stacklevel=2,
            )
    return SharedWeights(module, assemble(groups[0], groups[1:]), targets, tied and LM_HEAD in parameters)


def _owner(module: torch.nn.Module, name: str) -> tuple[_Owner, str]:
    path, _, key = name.rpartition(".")
    return module.get_submodule(path)._parameters, key


def _check(parameters: dict[str, torch.nn.Parameter], layouts: list[list[Fused]], tied: bool) -> None:
    shapes = {name: (rows, *t.shape[1:]) for layout in layouts for t in layout for name, rows in t.parts}
    for name, shape in shapes.items():
        if name not in parameters:
            raise UnsupportedModel(f"the module has no parameter {name!r}, which its configuration calls for")
        parameter = parameters[name]
        if tuple(parameter.shape) != shape:
            raise UnsupportedModel(f"parameter {name!r} has shape {tuple(parameter.shape)}, expected {shape}")
        if parameter.is_meta or type(parameter.data) is not torch.Tensor:
            raise UnsupportedModel(
                f"parameter {name!r} is on the meta device or sharded ({type(parameter.data).__name__}); "
                "materialise the whole module on this process first"
            )
    surplus = sorted(set(parameters) - set(shapes) - ({LM_HEAD} if tied else set()))
    if surplus:
        raise UnsupportedModel(
            f"parameter {surplus[0]!r} has no place in the decoder; merge adapters and unwrap first"
        )
    seen: dict[int, str] = {}
    for name in shapes:
        twin = seen.setdefault(id(parameters[name]), name)
        if twin != name:
            raise UnsupportedModel(
                f"parameters {twin!r} and {name!r} are one; only embeddings and head can be tied"
            )


def _fuse(
    fused: Fused, parameters: dict[str, torch.nn.Parameter], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """The tensor of `fused`: the parameters' own storage where it lies so, else a new buffer for them."""
    parts = [parameters[name] for name, _ in fused.parts]
    agree = [p.dtype == dtype and p.device == device for p in parts]
    if all(agree) and (present := _adjacent(parts, fused.shape)) is not None:
        return present
    buffer = empty(fused.shape, dtype, device)
    for (_, view), parameter, shares in zip(fused.views(buffer), parts, agree, strict=True):
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
