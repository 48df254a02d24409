"""Small random checkpoints of every family, and a loop that drives the decoder over pages by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from elastic_decode.kernels import registry
from elastic_decode.model_config import ModelConfig
from elastic_decode.models.decoder import Decoder, ForwardBatch
from elastic_decode.models.layout import Weights

PAGE = 4
SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def hf_model(family: str, **changes: Any) -> transformers.PreTrainedModel:
    """A random float32 model with logits of order one, norms and biases away from their trivial start."""
    config = transformers.AutoConfig.for_model(family, **{**SMALL, **changes})
    torch.manual_seed(sum(map(ord, family)))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.3)
            elif name == "model.embed_tokens.weight":
                parameter.normal_(0, 0.3 if config.tie_word_embeddings else 1.0)
            else:
                parameter.normal_(0, 1.5 / parameter.shape[1] ** 0.5)
    return model.eval()


def to_hub_form(folder: Path) -> None:
    """Rewrites config.json as hub files have it: rope_theta, rope_scaling with `type`, torch_dtype."""
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    config["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    config["torch_dtype"] = config.pop("dtype")
    for key in ("layer_types", "transformers_version"):
        config.pop(key, None)
    (folder / "config.json").write_text(json.dumps(config))


class Session:
    """Rows of one decoder over shuffled, NaN-filled pages; `step` computes the next chunk of each row."""

    def __init__(
        self, config: ModelConfig, weights: Weights, backend: str, rows: int = 3, positions: int = 64
    ) -> None:
        self.decoder = Decoder(config, weights, backend=backend, max_positions=positions)
        pages = -(-positions // PAGE)
        order = torch.randperm(rows * pages, generator=torch.Generator().manual_seed(1))
        self.page_table = order.view(rows, pages).to(torch.int32)
        shape = (rows * pages, PAGE, config.num_kv_heads, config.head_dim)
        self.kv = [
            (
                torch.full(shape, torch.nan, dtype=weights.dtype),
                torch.full(shape, torch.nan, dtype=weights.dtype),
            )
            for _ in range(config.num_layers)
        ]
        self.lengths = [0] * rows

    def step(self, chunks: Sequence[Sequence[int]], last_only: bool = False) -> list[torch.Tensor]:
        """Float32 logits a row, [len(chunk), vocab] or [1, vocab] with `last_only`; empty chunks idle."""
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        starts = [0]
        for row, chunk in enumerate(chunks):
            for position, token in enumerate(chunk, start=self.lengths[row]):
                ids.append(token)
                positions.append(position)
                slots.append(int(self.page_table[row, position // PAGE]) * PAGE + position % PAGE)
            self.lengths[row] += len(chunk)
            starts.append(len(ids))
        lens = [n if chunk else 0 for n, chunk in zip(self.lengths, chunks, strict=True)]

        def i32(values: list[int]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32)

        batch = ForwardBatch(i32(positions), i32(slots), self.page_table, i32(lens), i32(starts))
        wanted = [end - 1 for end, chunk in zip(starts[1:], chunks, strict=True) if chunk]
        rows = i32(wanted) if last_only else None
        logits = self.decoder.logits(self.decoder.forward(i32(ids), batch, self.kv, rows=rows))
        assert logits.dtype == torch.float32
        counts = [min(len(chunk), 1) if last_only else len(chunk) for chunk in chunks]
        return list(logits.split(counts))

    def greedy(self, prompts: Sequence[Sequence[int]], steps: int) -> list[list[int]]:
        """`steps` greedy tokens a prompt, decoded as one batch."""
        output: list[list[int]] = [[] for _ in prompts]
        chunks: Sequence[Sequence[int]] = prompts
        for _ in range(steps):
            tokens = [int(row[-1].argmax()) for row in self.step(chunks, last_only=True)]
            for row, token in zip(output, tokens, strict=True):
                row.append(token)
            chunks = [[token] for token in tokens]
        return output


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """These matrices are too small to share: on a busy machine threads would mostly wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def make_model() -> Callable[..., transformers.PreTrainedModel]:
    return hf_model


@pytest.fixture(scope="session")
def hub_form() -> Callable[[Path], None]:
    return to_hub_form


@pytest.fixture(scope="session")
def session() -> type[Session]:
    return Session


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`backend`: every backend that has all the ops of a forward pass on CPU tensors here."""
    if "backend" in metafunc.fixturenames:
        ops = ("linear", "rms_norm", "rope", "silu_mul", "paged_attention")
        names = [
            b for b in ("reference", "cpu") if all(registry.why_unavailable(op, b) is None for op in ops)
        ]
        metafunc.parametrize("backend", names)
