"""Runs of the toy recipe by one process and by two, for test_ranks.py: each case leaves files in a folder.

What is slow to import is imported once, here; each rank is a fork of this process.
`python ranks.py FOLDER CASE …`
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.fsdp
import torch.distributed.tensor
import transformers.models.qwen3.modeling_qwen3  # noqa: F401
from transformers import AutoModelForCausalLM, AutoTokenizer

from elastic_decode import Budget, Engine, EngineConfig, SamplingParams
from elastic_decode.assets import tiny_model_path
from elastic_decode.errors import CheckpointError, RankError, WeightsIncomplete
from elastic_decode.rl.assemble import assemble
from elastic_decode.rl.config import load_config
from elastic_decode.rl.parallel import Replicated
from elastic_decode.rl.weight_transfer import Link, receive_weights, send_weights

TOY = Path(__file__).parents[2] / "recipes" / "toy.yaml"
# Five prompts of four samples: uneven parts, and groups without a spread are dropped. Adam's eps is far above
# float32 noise in gradients, else noise decides the direction of parameters that have next to no gradient.
SMALL = (
    "run.steps=4",
    "run.save_every=2",
    "run.keep=9",
    "evaluation=null",
    "run.eval_every=0",
    "rollout.prompts_per_step=5",
    "rollout.group_size=4",
    "grading.workers=0",
    "engine.max_batch=16",
    "engine.kv_memory=16MiB",
    "optim.updates_per_step=2",
    "optim.eps=1e-5",
    "optim.max_tokens_per_microbatch=96",
    "objective.kl=0.01",
)


def fails_on_rank_1(completions: list[Any], **columns: Any) -> list[float]:
    """A reward function."""
    if os.environ.get("RANK") == "1":
        raise ValueError("the grader is out of order")
    return [float(len(completions)) for _ in completions]


def train(folder: Path, *overrides: str) -> None:
    """A run in `folder`, gone on with where there is one. told-RANK.json has each step's metrics and tokens
    as that rank has them.
    """
    told: list[dict[str, Any]] = []

    def on_step(step: int, metrics: dict[str, float], groups: Any) -> None:
        samples = [[list(sample.token_ids) for sample in group.samples] for group in groups]
        told.append({"step": step, "metrics": metrics, "tokens": samples})

    config = load_config(TOY, [f"run.folder={folder}", *SMALL, *overrides])
    with assemble(config, on_step=[on_step]) as parts:
        parts.trainer.resume()
        parts.trainer.train()
    rank = os.environ.get("RANK", "0")
    (folder / f"told-{rank}.json").write_text(json.dumps(told))


def raises(folder: Path) -> None:
    """A run whose rank 1 fails in the middle of an update, while rank 0 waits for its gradients."""
    if os.environ["RANK"] == "1":

        def accumulating(self: Replicated, *, last: bool) -> Any:
            raise MemoryError("no room for activations")

        Replicated.accumulating = accumulating  # type: ignore[method-assign]
    train(folder)


def transfer(folder: Path) -> None:
    """Rank 0 trains nothing but sends weights of its own; rank 1 has an engine and no module."""
    rank, port = int(os.environ["RANK"]), int(os.environ["MASTER_PORT"])
    link = Link("127.0.0.1", port, rank=rank, size=2, timeout=60)
    path, config = tiny_model_path(), EngineConfig(max_batch=4, max_model_len=96, kv_memory="8MiB")
    told: dict[str, Any] = {}

    def tokens(engine: Engine) -> list[list[int]]:
        ask = {"budget": Budget(think=15, solve=3), "sampling": SamplingParams(temperature=0)}
        return [g.completions[0].token_ids for g in engine.generate(["9 1 6 = 3", "2 3 4 = 24"], **ask)]

    if rank == 0:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        with Engine.from_model(model, AutoTokenizer.from_pretrained(path), config) as engine:
            told["before"] = tokens(engine)
            torch.manual_seed(0)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1 + 0.3 * torch.randn_like(parameter))
            engine.sync_weights()
            told["after"] = tokens(engine)
        send_weights(model, link, epoch=7, bucket=200_000)
        for other in (torch.nn.Linear(3, 3), Broken(model)):
            try:
                send_weights(other, link, epoch=8, bucket=1)  # a tensor each
            except (CheckpointError, OSError) as error:
                told[type(other).__name__] = f"{type(error).__name__}: {error}"
        send_weights(model, link, epoch=9)
    else:
        with Engine.from_pretrained(path, config) as engine:
            told["before"] = tokens(engine)
            told["epoch"] = receive_weights(engine, link)
            told["after"] = tokens(engine)
            told["epochs"] = engine.stats()["weight_epoch"]
            try:
                receive_weights(engine, link)
            except CheckpointError as error:
                told["refused"] = str(error)
            told["untouched"] = tokens(engine)
            try:
                receive_weights(engine, link)
            except RankError as error:
                told["broken"] = str(error)
            try:
                tokens(engine)
            except WeightsIncomplete as error:
                told["incomplete"] = str(error)
            receive_weights(engine, link)
            told["again"] = tokens(engine)
    (folder / f"told-{rank}.json").write_text(json.dumps(told))


class Broken:
    """A model whose third parameter cannot be had."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def named_parameters(self) -> Iterator[tuple[str, Any]]:
        for number, (name, parameter) in enumerate(self.model.named_parameters()):
            yield name, parameter if number != 2 else Lost(parameter)


class Lost:
    def __init__(self, parameter: torch.Tensor) -> None:
        self.shape, self.dtype = parameter.shape, parameter.dtype

    def detach(self) -> torch.Tensor:
        raise OSError("a shard is gone")


FSDP = "distributed.sharding=fsdp"
BF16 = ("optim.dtype=bfloat16", "engine.dtype=bfloat16", "run.steps=1", "optim.gradient_checkpointing=true")
CASES: dict[str, tuple[int, Callable[[Path], None]]] = {
    "one": (1, train),
    "ddp": (2, train),
    "fsdp": (2, lambda folder: train(folder, FSDP)),
    "fsdp_from_one": (2, lambda folder: train(folder, FSDP)),
    "fsdp_bf16": (2, lambda folder: train(folder, FSDP, *BF16)),
    "error": (2, lambda folder: train(folder, "rewards=[{function: ranks:fails_on_rank_1}]")),
    "raises": (2, raises),
    "transfer": (2, transfer),
}


def fork(folder: Path, case: str, rank: int, size: int, port: int) -> int:
    """A process that is `rank` of `size` in `case`; error-<rank>.txt has what it raised."""
    pid = os.fork()
    if pid:
        return pid
    status = 0

    try:
        if size > 1:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        CASES[case][1](folder)
    except BaseException as error:
        (folder / f"error-{rank}.txt").write_text(f"{type(error).__name__}: {error}")
        traceback.print_exc()
        status = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main() -> None:
    sys.modules["ranks"] = sys.modules["__main__"]
    torch.set_num_threads(1)
    for case in sys.argv[2:]:
        size, started = CASES[case][0], time.perf_counter()
        folder = Path(sys.argv[1]) / case
        folder.mkdir()
        if "_from_" in case:  # where that one was after two steps
            saved = Path("checkpoints") / "step-000002"
            shutil.copytree(folder.parent / case.partition("_from_")[2] / saved, folder / saved)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        pids = [fork(folder, case, rank, size, port) for rank in range(size)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        (folder / "codes.json").write_text(json.dumps({"codes": codes}))
        seconds = time.perf_counter() - started
        print(f"{case} {codes} {seconds:.1f} s; {used.ru_utime + used.ru_stime:.1f} s of the CPU so far")


if __name__ == "__main__":
    main()
