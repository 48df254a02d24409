"""`elastic-decode info --check`: every op that can run on a device compared with its reference."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from elastic_decode.cli import options
from elastic_decode.config import DTYPES, KV_DTYPES, EngineConfig, ModelConfig, RopeConfig
from elastic_decode.errors import ConfigError
from elastic_decode.kernels import registry

if TYPE_CHECKING:
    from elastic_decode.kernels.selfcheck import Outcome

# What is checked without --model: a little of everything, quick on any device.
SMALL = ModelConfig(
    architecture="none",
    vocab_size=5003,
    hidden_size=320,
    intermediate_size=712,
    num_layers=2,
    num_heads=10,
    num_kv_heads=2,
    head_dim=64,
    max_position_embeddings=4096,
    rope=RopeConfig(),
    attention_bias=True,
    qk_norm=True,
    sliding_window=(None, 1024),
)


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what --check checks")
    group.add_argument(
        "--backend",
        type=options.backend,
        default=None,
        metavar="NAME|OP=NAME,…",
        help="(default: all but reference)",
    )
    group.add_argument("--device", default=None, help="cpu or cuda[:i] (default: the GPU if there is one)")
    group.add_argument("--dtype", default="auto", choices=DTYPES, help="(default: the model's)")
    group.add_argument("--kv-dtype", default="auto", choices=KV_DTYPES, help="(default: --dtype)")
    group.add_argument("--page-size", type=int, default=16, help="(default: 16)")


def candidates(backend: str | dict[str, str] | None, device_type: str) -> list[tuple[str, str]]:
    """(op, backend) to check: those that `backend` means, or else all that can run on such a device, but for
    the reference, which the others are compared with.
    """
    if backend is None:
        names = [name for name in registry.BACKENDS if name != "reference"]
        pairs = ((op, name) for op in registry.OPS for name in names)
        usable = [(op, name) for op, name in pairs if registry.why_not_on(op, name, device_type) is None]
        return [(op, name) for op, name in usable if name not in registry.COMPARISON_ONLY.get(op, ())]
    try:
        chosen = registry.choose(backend, device_type)
    except ValueError as error:
        raise ConfigError(f"--backend: {error}") from error
    for op, name in chosen.items():
        reason = registry.why_not_on(op, name, device_type)
        if reason is not None:
            raise ConfigError(f"--backend: {op} cannot run on {name!r} here: {reason}")
    return list(chosen.items())


def outcomes(arguments: argparse.Namespace) -> Iterator[Outcome]:
    """Op by op, as they are done. Raises ConfigError for what cannot be checked here."""
    import torch

    from elastic_decode.engine.build import check_device
    from elastic_decode.engine.proof import on_device, shapes_of
    from elastic_decode.kernels import selfcheck
    from elastic_decode.models import hub
    from elastic_decode.models.weights import choose_dtype

    name = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    EngineConfig(device=name, page_size=arguments.page_size)  # refuses what they cannot be
    check_device(name)
    device = torch.device(name)
    model = SMALL
    if arguments.model is not None:
        model = ModelConfig.from_hf(hub.resolve(options.checkpoint(arguments.model)))
    dtype = choose_dtype(arguments.dtype, model.dtype, device)
    kv_dtype = choose_dtype(arguments.kv_dtype, str(dtype).removeprefix("torch."), device)
    shapes = shapes_of(model, dtype, kv_dtype, arguments.page_size)
    pairs = candidates(arguments.backend, device.type)
    with on_device(device):
        for op, backend in pairs:
            # The interpreter multiplies with NumPy, whose bits depend on the other rows of a tile.
            interpreted = backend == "triton" and device.type == "cpu"
            invariant = not interpreted and backend not in registry.NOT_BATCH_INVARIANT.get(op, ())
            yield selfcheck.check(op, backend, shapes, device, batch_invariant=invariant)


def as_json(outcome: Outcome) -> dict[str, Any]:
    worst = outcome.worst
    return {
        "op": outcome.op,
        "backend": outcome.backend,
        "ok": outcome.ok,
        "findings": outcome.findings,
        "worst": None if worst is None else {"what": worst.what, "error": worst.error, "bound": worst.bound},
        "problem": outcome.problem,
        "milliseconds": round(1000 * outcome.seconds, 1),
    }


def run(arguments: argparse.Namespace) -> int:
    """0 where every op is as its reference, else 1."""
    good = True
    found = []
    for outcome in outcomes(arguments):
        good = good and outcome.ok
        if arguments.json:
            found.append(as_json(outcome))
        else:
            said = "ok   " if outcome.ok else "ERROR"
            name = f"{outcome.op:15} {outcome.backend:10}"
            print(f"{name} {said} {1000 * outcome.seconds:7.1f} ms  {outcome.summary()}", flush=True)
    if arguments.json:
        print(json.dumps({"ok": good, "checks": found}, indent=2))
    return 0 if good else 1
