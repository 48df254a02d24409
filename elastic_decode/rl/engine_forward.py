"""The trainer's forward pass on the engine's own kernels: log-probabilities equal a rollout's bit for bit.

The decoder that decodes is run over whole packed samples, as one prefill into pages of its own, with
operators that have gradients (gradients.py). Its kernels give a token the same bits in whatever batch and
chunk it is computed, so what it finds for a token is what the engine found when it emitted it under the same
weights. That holds for values; derivatives are PyTorch's. There is no dropout, as there is none in rollouts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from elastic_decode.errors import ConfigError
from elastic_decode.kernels import registry
from elastic_decode.kernels.sample import Sampled, make_table
from elastic_decode.llm import Engine
from elastic_decode.models.decoder import Decoder, ForwardBatch
from elastic_decode.models.layout import Fused, LayerWeights, Weights, assemble, layer_layout, outer_layout
from elastic_decode.models.rope import cos_sin_table
from elastic_decode.models.sharing import share_module
from elastic_decode.rl.attention_gradient import Sequences
from elastic_decode.rl.gradients import Grad, Kernel, fused, low_rank, operators
from elastic_decode.rl.logprobs import Packed
from elastic_decode.rl.lora import Adapters


@dataclass(frozen=True, slots=True)
class _Module:
    """A module, the fused buffers its weights lie in, and its parameters by their names in a checkpoint."""

    module: torch.nn.Module  # held, so that its id stays its own
    weights: Weights
    parameters: dict[str, torch.nn.Parameter]
    verify: Callable[[], None]  # raises where a parameter left its buffer


class EngineForward:
    """`token_logprobs` (logprobs.py) by the kernels, sizes and dtype of `engine`.

    adapters: those that the engine is fed. Each pass merges them anew into the engine's buffers, or leaves
    them out where they are switched off; so several updates may be made before the `sync_weights` that the
    next rollout needs as ever.

    Raises ConfigError for an engine whose decoding it could not repeat: one with another dtype for keys and
    values than for weights, or whose bits depend on the batch.
    """

    def __init__(self, engine: Engine, adapters: Adapters | None = None) -> None:
        config = engine.config
        if not config.batch_invariant:
            raise ConfigError(
                "the engine's forward pass repeats a rollout's bits only where they do not depend on the "
                "batch; set engine.batch_invariant=true"
            )
        self._config = engine.model_config
        self._backends = dict(engine.backends)
        self._head = _HeadKernels.of(self._backends)
        self._page_size = config.page_size
        self._max_positions = engine.max_model_len
        self._kv_dtype = config.kv_dtype
        self._device = torch.empty(0, device=config.device).device
        self._cos_sin = cos_sin_table(
            self._config.rope, self._config.head_dim, self._max_positions, self._device
        )
        self._modules: dict[int, _Module] = {}
        self._adapters = adapters
        self._adapted: dict[str, torch.Tensor] = {}  # the engine's rows of each adapted matrix
        if adapters is not None:
            parameters = dict(adapters.base.named_parameters(remove_duplicate=False))
            named = {name.replace(".base_layer", ""): each for name, each in parameters.items()}
            found = _Module(adapters.model, engine.weights, named, lambda: None)
            self._modules[id(adapters.model)] = found
            for each, holder in self._layout(found.weights):
                rows = dict(each.views(getattr(holder, each.field)))
                self._adapted |= {name: rows[name] for name in rows.keys() & set(adapters.names)}

    def token_logprobs(
        self, model: Any, packed: Packed, *, chunk: int = 1024, entropy: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As logprobs.token_logprobs: float32 [M], equal to the engine's `logprobs`; entropies float32 [M].

        model: the Hugging Face module the engine was made from, or a copy of it; its parameters get the
        gradients. Raises ConfigError for a sample longer than the engine's sequences may be.
        """
        weights = self._weights(model)
        lengths = _lengths(packed.position_ids)
        if max(lengths) > self._max_positions:
            raise ConfigError(
                f"a sample has {max(lengths)} tokens, the engine's sequences at most {self._max_positions}"
            )
        sequences = Sequences.of(lengths, self._page_size, self._device)
        decoder = Decoder(
            self._config,
            weights,
            backend=self._backends,
            max_positions=self._max_positions,
            operators=operators(self._backends, sequences),
            cos_sin=self._cos_sin,
        )
        hidden = decoder.forward_with_grad(
            packed.input_ids[0].int(),
            _batch(packed.position_ids[0], sequences),
            self._pages(sequences, weights.dtype),
            rows=packed.predicts.int(),
        )
        logprobs, entropies = _Head.apply(
            self._head, hidden, weights.lm_head, packed.targets, packed.temperature, chunk, entropy
        )
        return logprobs, entropies

    def _weights(self, model: Any) -> Weights:
        """The decoder's tensors of `model`, as functions of its parameters."""
        found = self._modules.get(id(model))
        if found is None:
            found = self._modules[id(model)] = self._share(model)
        found.verify()
        adapters = self._adapters if self._adapters is not None and model is self._adapters.model else None
        if adapters is not None:
            with torch.no_grad():
                for name, whole in adapters.merged():
                    self._adapted[name].copy_(whole)

        def part(name: str) -> torch.Tensor:
            if adapters is not None and name in self._adapted:
                return low_rank(*adapters.factors(name), found.weights.dtype)
            return found.parameters[name]

        outer: dict[str, torch.Tensor] = {}
        layers: list[dict[str, torch.Tensor]] = [{} for _ in found.weights.layers]
        fields = {id(layer): own for layer, own in zip(found.weights.layers, layers, strict=True)}
        for each, holder in self._layout(found.weights):
            parts = [part(name) for name, _ in each.parts]
            fields.get(id(holder), outer)[each.field] = fused(getattr(holder, each.field), parts)
        return assemble(outer, layers)

    def _layout(self, weights: Weights) -> Iterator[tuple[Fused, Weights | LayerWeights]]:
        """Every fused tensor, and what has it as a field."""
        config = replace(self._config, tie_embeddings=weights.lm_head is weights.embed)
        yield from ((each, weights) for each in outer_layout(config))
        for index, layer in enumerate(weights.layers):
            yield from ((each, layer) for each in layer_layout(config, index))

    def _share(self, module: Any) -> _Module:
        parameters = dict(module.named_parameters(remove_duplicate=False))
        dtype = next(iter(parameters.values())).dtype
        shared = share_module(module, self._config, dtype, self._device)
        if not shared.shared:
            raise ConfigError(
                f"the module's parameters are not all {dtype} on {self._device}: the kernels cannot take "
                "them as they are"
            )
        return _Module(module, shared.weights, parameters, partial(shared.verify, modules=False))

    def _pages(self, sequences: Sequences, dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
        config = self._config
        if self._kv_dtype not in ("auto", str(dtype).removeprefix("torch.")):
            raise ConfigError(
                f"engine.kv_dtype={self._kv_dtype!r}: the engine's forward pass needs keys and values in the "
                f"weights' dtype, {dtype}; set it to 'auto'"
            )
        shape = (sequences.pages, self._page_size, config.num_kv_heads, config.head_dim)

        def empty() -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=self._device)

        return [(empty(), empty()) for _ in range(config.num_layers)]


def _lengths(positions: torch.Tensor) -> list[int]:
    """Of the sequences whose positions are laid end to end, int64 [1, N]; each begins at 0."""
    starts = (positions[0] == 0).nonzero().flatten().tolist()
    return [stop - start for start, stop in pairwise([*starts, positions.shape[1]])]


def _batch(positions: torch.Tensor, sequences: Sequences) -> ForwardBatch:
    """The forward pass that prefills every sequence at once."""
    device = positions.device

    def ints(values: Iterable[int]) -> torch.Tensor:
        return torch.tensor(list(values), dtype=torch.int32, device=device)

    widest = -(-max(sequences.lengths) // sequences.page_size)
    pages = ints(sequences.first_pages).unsqueeze(1) + torch.arange(widest, dtype=torch.int32, device=device)
    return ForwardBatch(
        positions=positions.int(),
        slot_mapping=sequences.slots.int(),
        page_table=pages,  # past a short sequence's own, entries that nothing reads
        seq_lens=ints(sequences.lengths),
        query_start=ints(accumulate(sequences.lengths, initial=0)),
    )


@dataclass(frozen=True, slots=True)
class _HeadKernels:
    linear: Kernel
    sample: Callable[..., Sampled]

    @classmethod
    def of(cls, backends: Mapping[str, str]) -> _HeadKernels:
        # The engine draws by `draw`, whose backends take their log-sum-exp from `sample`.
        sample = registry.implementation("sample", backends["draw"])
        return cls(registry.implementation("linear", backends), sample)

    def lse(self, logits: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
        """logsumexp(logits / T), float32 [R], as `sample` has it; what is drawn besides is not looked at."""
        rows = torch.arange(len(logits), dtype=torch.int32, device=logits.device)
        table = make_table(len(logits), device=logits.device)._replace(temperature=temperature)
        return self.sample(logits, rows, torch.zeros_like(rows), table).lse


class _Head(torch.autograd.Function):
    """Hidden states to log_softmax(logits / T) at the targets, and entropies; a chunk of logits at a time.

    With p = softmax(z), z = logits / T: d logprob / dz = onehot - p and dH / dz = -p (log p + H). Where there
    are several chunks, logits are made again in the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        kernels: _HeadKernels,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        temperature: torch.Tensor,
        chunk: int,
        entropy: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        lse = temperature.new_empty(len(hidden))
        logprobs = torch.empty_like(lse)
        entropies = torch.empty_like(lse) if entropy else None
        logp = None
        keep = len(hidden) <= chunk and any(ctx.needs_input_grad)
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            logits = kernels.linear(hidden[part], weight, out_dtype=torch.float32)
            lse[part] = kernels.lse(logits, temperature[part])
            at = logits.gather(1, targets[part].unsqueeze(1)).squeeze(1)
            logprobs[part] = at / temperature[part] - lse[part]
            if keep or entropies is not None:
                logp = _normalised(logits, temperature[part], lse[part])
            if entropies is not None and logp is not None:
                entropies[part] = -(logp.exp() * logp).sum(1)
        ctx.save_for_backward(hidden, weight, targets, temperature, lse, entropies, logp if keep else None)
        ctx.kernels, ctx.chunk = kernels, chunk
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, to_entropy: torch.Tensor | None) -> tuple[Grad, ...]:
        hidden, weight, targets, temperature, lse, entropies, kept = ctx.saved_tensors
        to_hidden = torch.empty_like(hidden)
        to_weight = torch.zeros_like(weight) if ctx.needs_input_grad[2] else None
        for start in range(0, len(hidden), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            logp = kept
            if logp is None:
                logits = ctx.kernels.linear(hidden[part], weight, out_dtype=torch.float32)
                logp = _normalised(logits, temperature[part], lse[part])
            p = logp.exp()
            if entropies is None or to_entropy is None:
                to_z = p.mul_(-grad[part].unsqueeze(1))
            else:
                share = (logp + entropies[part].unsqueeze(1)).mul_(to_entropy[part].unsqueeze(1))
                to_z = p.mul_(share.add_(grad[part].unsqueeze(1)).neg_())
            to_z.scatter_add_(1, targets[part].unsqueeze(1), grad[part].unsqueeze(1))
            to_logits = to_z.div_(temperature[part].unsqueeze(1)).to(hidden.dtype)
            to_hidden[part] = to_logits @ weight
            if to_weight is not None:
                to_weight.addmm_(to_logits.T, hidden[part])
        return None, to_hidden, to_weight, None, None, None, None


def _normalised(logits: torch.Tensor, temperature: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """log_softmax(logits / T), in the memory of `logits`."""
    return logits.div_(temperature.unsqueeze(1)).sub_(lse.unsqueeze(1))
