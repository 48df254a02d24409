"""The decoder on a live Hugging Face module's own parameters, without a copy where dtype and device agree."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from elastic_decode.errors import UnsupportedModel, WeightsRebound
from elastic_decode.model_config import ModelConfig
from elastic_decode.models.layout import (
    EMBED,
    LM_HEAD,
    Fused,
    Weights,
    assemble,
    layer_layout,
    outer_layout,
)


class SharedWeights:
    """Weights tied to a module. `weights`: the decoder's. `shared`: nothing had to be copied."""

    def __init__(self, module: torch.nn.Module, weights: Weights, targets: dict[str, torch.Tensor]) -> None:
        self.weights = weights
        self._owners = [
            (name, module.get_submodule(name.rpartition(".")[0])._parameters, name.rpartition(".")[2])
            for name in targets
        ]
        # A child replaced as a whole takes its parameters along, so the path to each owner is checked too.
        self._links = [
            (parent._modules, key, child, path)
            for path, parent in module.named_modules()
            for key, child in parent.named_children()
        ]
        self._shared: list[tuple[str, dict[str, torch.nn.Parameter | None], str, int]] = []
        self._copied: list[tuple[str, dict[str, torch.nn.Parameter | None], str, torch.Tensor]] = []
        for (name, owner, key), target in zip(self._owners, targets.values(), strict=True):
            parameter = owner[key]
            assert parameter is not None
            if parameter.data_ptr() == target.data_ptr():
                self._shared.append((name, owner, key, target.data_ptr()))
            else:
                self._copied.append((name, owner, key, target))

    @property
    def shared(self) -> bool:
        return not self._copied

    def verify(self) -> None:
        """Raises WeightsRebound naming a parameter that no longer points into the decoder's tensors."""
        for children, key, child, path in self._links:
            if children.get(key) is not child:
                raise WeightsRebound(
                    f"module {f'{path}.{key}' if path else key!r} was replaced after the engine shared it; "
                    "make a new engine with Engine.from_model"
                )
        for name, owner, key, pointer in self._shared:
            parameter = owner.get(key)
            if parameter is None or parameter.data_ptr() != pointer:
                raise WeightsRebound(
                    f"parameter {name!r} no longer points into the engine's weights "
                    "(load_state_dict(assign=True), .to() and resize_token_embeddings re-bind parameters); "
                    "copy into parameters in place, or make a new engine with Engine.from_model"
                )

    @torch.no_grad()
    def sync(self) -> None:
        """Takes over the module's present values: a check where shared, one cast copy where not."""
        self.verify()
        for name, owner, key, target in self._copied:
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
    device = torch.device(device)
    parameters = dict(module.named_parameters(remove_duplicate=False))
    tied = LM_HEAD not in parameters or parameters[LM_HEAD] is parameters.get(EMBED)
    layouts = [
        [t for t in outer_layout(config) if t.field != "lm_head"],
        *(layer_layout(config, index) for index in range(config.num_layers)),
    ]
    if not tied:
        layouts[0].append(
            Fused("lm_head", (config.vocab_size, config.hidden_size), ((LM_HEAD, config.vocab_size),))
        )
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
    if tied and LM_HEAD in parameters:
        targets[LM_HEAD] = targets[EMBED]
    return SharedWeights(module, assemble(groups[0], groups[1:]), targets)


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
    buffer = torch.empty(fused.shape, dtype=dtype, device=device)
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
    return (
        first if len(parts) == 1 else first.as_strided(shape, first.new_empty(shape, device="meta").stride())
    )


def parameter_names(config: ModelConfig) -> Iterator[str]:
    """The checkpoint names of every parameter, as Hugging Face has them."""
    for layout in (
        outer_layout(config),
        *(layer_layout(config, index) for index in range(config.num_layers)),
    ):
        for t in layout:
            yield from (name for name, _ in t.parts)
