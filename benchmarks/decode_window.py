"""Decode of a large shape on a GPU: `make gpu-bench WHAT=decode`.

    make gpu-bench WHAT=decode ARGS="--batch 1 256 --horizon 32"

R1-Distill-Qwen-1.5B's shape, random bfloat16 weights made on the device, prompt 256 and output up to position
2,048, greedy, EOS ignored. Two kinds of rows:
- "step": one step's graph, replayed and timed with events, with the budget machine and without it;
- "decode": the engine's own tokens/s over the window in which every row decodes, for each horizon, and at the
  last of them with one thing changed: kernels that need not be batch-invariant, no budget, kernels launched
  early, other backends, keys and values in float8, no graphs.
Floors are at the device's ceilings, which are measured first; a window's is that of its middle position.
`--device cpu` runs the same on the CPU with a tiny shape: a check of this program, no measurement.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import decode_step
import floors
import harness
import shapes
import torch
import transformers
from timing import ceilings

from elastic_decode import Budget, Engine, EngineConfig, Request, SamplingParams, budgets
from elastic_decode.assets import tiny_model_path
from elastic_decode.delimiters import resolve
from elastic_decode.kernels import gpu, registry
from elastic_decode.models.layout import Weights, assemble, layer_layout, outer_layout


def random_weights(shape: str, dtype: torch.dtype, device: str, max_positions: int) -> Weights:
    """Made where they are to be: no checkpoint, no module, no copy."""
    config = shapes.config(shape, max_positions)
    torch.manual_seed(0)

    def made(fields: list[Any]) -> dict[str, torch.Tensor]:
        tensors = {}
        for field in fields:
            tensor = torch.empty(field.shape, dtype=dtype, device=device)
            spread = field.shape[-1] ** -0.5 if len(field.shape) == 2 else 0.1
            tensors[field.field] = tensor.fill_(1) if "norm" in field.field else tensor.normal_(0, spread)
        return tensors

    layers = [made(layer_layout(config, index)) for index in range(config.num_layers)]
    return assemble(made(outer_layout(config)), layers)


def make_engine(shape: str, weights: Weights, config: EngineConfig) -> Engine:
    """An engine over random weights with the bundled model's tokenizer, whose ids all exist in the shape."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model_path())
    model = shapes.config(shape, config.max_model_len or 4096)
    return Engine(model, weights, tokenizer, resolve(tokenizer), config, prefix_cache=False)


class ReplayClock:
    """Around the device's `replay`: how long recorded steps take, and how long it is from first to last."""

    def __init__(self, device: Any) -> None:
        self._device, self._replay = device, device.replay
        self.on_gpu = device.device.type == "cuda"
        self._marks: list[tuple[Any, Any]] = []

    def __enter__(self) -> ReplayClock:
        self._device.replay = self._timed
        return self

    def __exit__(self, *error: object) -> None:
        self._device.replay = self._replay

    def _mark(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _timed(self, recorded: Callable[[], object]) -> None:
        start = self._mark()
        self._replay(recorded)
        self._marks.append((start, self._mark()))

    def _seconds(self, start: Any, end: Any) -> float:
        return 1e-3 * start.elapsed_time(end) if self.on_gpu else end - start

    def share(self) -> float | None:
        """Of the time from the first replay's start to the last one's end; None without replays."""
        if not self._marks:
            return None
        if self.on_gpu:
            torch.cuda.synchronize()
        inside = sum(self._seconds(start, end) for start, end in self._marks)
        return inside / self._seconds(self._marks[0][0], self._marks[-1][1])


class Window(NamedTuple):
    tokens: int
    seconds: float
    graph_share: float | None  # of the window, from events; None where steps are not recorded
    waits: int
    idle_waits: int  # waits with nothing enqueued behind them

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


def decode_window(engine: Engine, prompts: list[list[int]], new: int, policy: Any) -> Window:
    """Decode; the window begins when a flight of decode steps of all rows has landed, and ends with the last.

    Flights land one after the other and each is read as it lands, so what is counted between two landings is
    what was decoded between them.
    """
    sampling = SamplingParams(temperature=0, ignore_eos=True)
    for prompt in prompts:
        engine.submit(Request(prompt, budget=policy, sampling=sampling))

    def count() -> int:
        stats = engine.stats()
        return stats["sampled_tokens"] + stats["forced_tokens"]

    while (stats := engine.stats())["waiting"] or stats["prefilling"] or count() < 2 * len(prompts):
        engine.step()
        if not engine.has_work:
            raise RuntimeError("the prompts were decoded before all were computed: decode more tokens")
    with ReplayClock(engine._device) as clock:
        first, before, began = count(), engine.stats(), time.perf_counter()
        while engine.has_work:
            engine.step()
        seconds = time.perf_counter() - began
        after = engine.stats()
        return Window(
            count() - first,
            seconds,
            clock.share(),
            after["host_waits"] - before["host_waits"],
            after["idle_host_waits"] - before["idle_host_waits"],
        )


def engine_config(arguments: argparse.Namespace, batch: int, horizon: int) -> EngineConfig:
    length = arguments.prompt + arguments.new + 8
    model = shapes.config(arguments.shape)
    a_token = 2 * model.num_layers * model.num_kv_heads * model.head_dim * 4  # at most: float32
    return EngineConfig(
        device=arguments.device,
        dtype=arguments.dtype,
        max_batch=batch,
        max_model_len=length,
        kv_memory=batch * (length + 32) * a_token // (4 // getattr(torch, arguments.dtype).itemsize)
        + (1 << 20),
        prefill_tokens=min(8192, arguments.prompt * batch),
        horizon=horizon,
    )


class Variant(NamedTuple):
    name: str
    config: EngineConfig
    budget: Any
    dependent: bool = False  # kernels launched before the one ahead of them ends (kernels/gpu.py)


def variants(arguments: argparse.Namespace, batch: int) -> list[Variant]:
    """Each horizon; at the last of them one thing changed at a time."""
    think = arguments.new // 2
    elastic = Budget(think=think, solve=arguments.new - think - 1)
    listed = [
        Variant(f"horizon {horizon}", engine_config(arguments, batch, horizon), elastic)
        for horizon in arguments.horizon
    ]
    last = listed[-1].config
    listed.append(Variant("not batch-invariant", replace(last, batch_invariant=False), elastic))
    listed.append(Variant("no budget", last, budgets.truncate(arguments.new)))
    if arguments.device == "cpu":
        return listed
    listed.append(Variant("dependent launch", last, elastic, dependent=True))
    for backend in ("cuda", "flashinfer"):
        config = replace(last, backend=backend, batch_invariant=backend == "cuda")
        try:
            registry.resolve(backend, "cuda", batch_invariant=config.batch_invariant)
        except RuntimeError as error:
            print(f"{backend}: not here: {error}", flush=True)
            continue
        listed.append(Variant(f"{backend} kernels", config, elastic))
    listed.append(Variant("float8 keys, values", replace(last, kv_dtype="float8_e4m3fn"), elastic))
    if batch in (arguments.batch[0], arguments.batch[-1]):
        listed.append(Variant("without graphs", replace(last, cuda_graphs=False), elastic))
    return listed


@contextmanager
def dependent_launch(on: bool) -> Iterator[None]:
    before, gpu.DEPENDENT_LAUNCH = gpu.DEPENDENT_LAUNCH, on
    try:
        yield
    finally:
        gpu.DEPENDENT_LAUNCH = before


def warm(engine: Engine, batch: int, positions: int) -> None:
    """Compile and record what a window up to `positions` meets: a few tokens at each width of page table."""
    steps, end = 2 * engine.config.horizon + 2, 256
    while end < positions:
        end = min(2 * end, positions)
        prompts = [[1] * max(1, end - steps), *[[2]] * (batch - 1)]
        sampling = SamplingParams(temperature=0, ignore_eos=True)
        engine.generate(prompts, budget=budgets.truncate(steps), sampling=sampling)


def in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"


def recorded(engine: Engine) -> int:
    return len(engine._loop._recordings.steps)


def windows(
    arguments: argparse.Namespace,
    weights: Weights,
    rates: floors.Rates,
    emit: Callable[[dict[str, Any]], None],
) -> int:
    """How many failed."""
    model = shapes.config(arguments.shape)
    middle, positions = arguments.prompt + arguments.new // 2, arguments.prompt + arguments.new
    failures = 0
    for batch in arguments.batch:
        generator = torch.Generator().manual_seed(batch)
        low = min(1000, model.vocab_size // 2)  # past the tokenizer's ids: no prompt holds a delimiter
        shape = (batch, arguments.prompt)
        prompts = torch.randint(low, model.vocab_size, shape, generator=generator).tolist()
        for name, config, policy, dependent in variants(arguments, batch):
            if time.monotonic() > arguments.until:
                print(f"batch {batch}, {name}: not measured, out of time", flush=True)
                continue
            row = {
                "bench": "decode",
                "shape": arguments.shape,
                "dtype": arguments.dtype,
                "kv_dtype": config.kv_dtype,
                "batch": batch,
                "prompt": arguments.prompt,
                "new": arguments.new,
                "variant": name,
                "horizon": config.horizon,
                "batch_invariant": config.batch_invariant,
                "cuda_graphs": config.cuda_graphs,
                "dependent_launch": dependent,
            }
            try:
                with dependent_launch(dependent), make_engine(arguments.shape, weights, config) as engine:
                    row["backends"] = engine.backends
                    warm(engine, batch, positions)
                    graphs = recorded(engine)
                    window = decode_window(engine, prompts, arguments.new, policy)
                    row["recorded_meanwhile"] = recorded(engine) - graphs
            except Exception as error:  # one variant, whatever it raises, must not cost the others
                failures += 1
                words = in_words(error)
                emit({**row, "error": words})
                print(f"{batch:5} {name:20} FAILED: {words}", flush=True)
                harness.synchronize(arguments.device)
                continue
            kv_size = 1 if config.kv_dtype.startswith("float8") else weights.dtype.itemsize
            sizes = {"size": weights.dtype.itemsize, "kv_size": kv_size}
            floor = floors.step_floor_us(model, batch, middle, rates, **sizes)
            predicted = floors.step_predicted_us(model, batch, middle, rates, **sizes)
            step_us = 1e6 * batch / window.tokens_per_s
            share = window.graph_share
            emit(
                {
                    **row,
                    "engine_tokens_per_s": round(window.tokens_per_s, 1),
                    "step_us": round(step_us, 1),
                    "floor_us": round(floor, 1),
                    "of_floor": round(floor / step_us, 3),
                    "predicted_us": round(predicted, 1),
                    "graph_share": None if share is None else round(share, 5),
                    "waits": window.waits,
                    "idle_waits": window.idle_waits,
                }
            )
            print(
                f"{batch:5} {name:20} {window.tokens_per_s:10,.0f} {step_us:9.0f} {floor:9.0f} "
                f"{floor / step_us:6.1%} {predicted:9.0f} {'' if share is None else f'{share:.2%}':>8} "
                f"{window.idle_waits} of {window.waits}",
                flush=True,
            )
    return failures


def steps(
    arguments: argparse.Namespace,
    weights: Weights,
    rates: floors.Rates,
    emit: Callable[[dict[str, Any]], None],
) -> int:
    """How many failed."""
    failures = 0
    model = shapes.config(arguments.shape)
    middle, end = arguments.prompt + arguments.new // 2, arguments.prompt + arguments.new
    device = arguments.device
    ways = [(registry.choose("auto", device), False)]
    if device == "cuda":
        ways.append((registry.choose("auto", device), True))
        ways.append((registry.choose("auto", device, batch_invariant=False), False))
        own = [op for op in ("draw", "sample", "budget") if registry.why_not_on(op, "cuda", device) is None]
        if "draw" in own:  # with its own `sample`, or the difference would be of two implementations
            ways.append((registry.choose(dict.fromkeys(own, "cuda"), device), False))
    for backends, dependent in ways:
        measured = decode_step.make(model, weights, backends, end + 1)
        name = f"{backends['linear']} {backends['draw']}{' dep.' if dependent else ''}"
        for batch in arguments.batch:
            more = {"shape": arguments.shape, "dtype": arguments.dtype, "dependent_launch": dependent}
            try:
                with dependent_launch(dependent):
                    row = measured(batch, middle, rates, seconds=arguments.seconds)
            except Exception as error:
                failures += 1
                words = in_words(error)
                emit({"bench": "step", "batch": batch, "backends": backends, **more, "error": words})
                print(f"{batch:5} {'step, ' + name:20} FAILED: {words}", flush=True)
                harness.synchronize(device)
                continue
            emit({**row, **more})
            print(
                f"{batch:5} {'step, ' + name:20} {row['tokens_per_s']:10,.0f} "
                f"{row['us']:9.0f} {row['floor_us']:9.0f} {row['of_floor']:6.1%} {row['predicted_us']:9.0f} "
                f"   budget {row['budget_us']:.2f} us ({row['budget_us_low']:.2f} to "
                f"{row['budget_us_high']:.2f}), {row['budget_share']:.2%}",
                flush=True,
            )
    return failures


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--shape", choices=list(shapes.SHAPES), help="default: 1.5B, on the CPU tiny")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 64, 256])
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--new", type=int, default=1792)
    parser.add_argument("--horizon", nargs="+", type=int, default=[8, 32])
    parser.add_argument("--seconds", type=float, default=0.3, help="of replays of a step (0.3)")
    parser.add_argument("--minutes", type=float, default=7.5, help="begin no window after that (7.5)")
    parser.add_argument("--dry", action="store_true", help="print only; append nothing")
    arguments = parser.parse_args(argv)
    arguments.shape = arguments.shape or ("tiny" if arguments.device == "cpu" else "1.5B")
    arguments.until = time.monotonic() + 60 * arguments.minutes
    device = torch.device(arguments.device)
    facts = harness.facts(arguments.device)

    def emit(row: dict[str, Any]) -> None:
        if not arguments.dry:
            harness.append({**row, **facts})

    bandwidth, matmul = ceilings(device)
    rates = floors.Rates(bandwidth, matmul, "measured")
    print(f"{facts['device']}: copy {bandwidth / 1e12:.3f} TB/s, product {matmul / 1e12:.1f} TFLOP/s")
    emit({"bench": "ceilings", "copy_bytes_per_s": bandwidth, "matmul_flop_per_s": matmul})
    length = arguments.prompt + arguments.new + 8
    weights = random_weights(arguments.shape, getattr(torch, arguments.dtype), arguments.device, length)
    print(
        f"{'batch':>5} {'what':20} {'tokens/s':>10} {'step us':>9} {'floor us':>9} {'of it':>6} "
        f"{'predicted':>9} {'graphs':>8} waits idle",
        flush=True,
    )
    failures = steps(arguments, weights, rates, emit) + windows(arguments, weights, rates, emit)
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
