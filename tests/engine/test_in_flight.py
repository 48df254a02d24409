"""Horizons in flight: the engine against a device that does its work late.

`LateDevice` runs what it is given in order, but only when it likes: a random part of its queue at each
launch, all of it up to an event when the host waits for that. It reads and writes host buffers when it comes
to the copy, as DMA does. A host that relied on anything a real GPU would not have done yet decodes something
else.
"""

from __future__ import annotations

import contextlib
import random
from collections import deque
from collections.abc import Callable

import pytest
import torch

import elastic_decode.engine.build as engine_build
from elastic_decode import Budget, Engine, EngineConfig, Request, SamplingParams, budgets
from elastic_decode.engine import decode_loop, prefix_groups
from elastic_decode.engine.device import Device, Event, Staging, Work, open_device
from elastic_decode.errors import BudgetError

EOS, OPEN, CLOSE = 256, 257, 258
VOCAB = 259
POISON = 0x5A


class LateEvent:
    def __init__(self, device: LateDevice) -> None:
        self._device = device
        self.done = False

    def passed(self) -> bool:
        return self.done

    def wait(self) -> None:
        self._device.run_until(self)


class PoisonedStaging(Staging):
    """Overwrites a buffer as soon as it is free: nobody may still read it."""

    def give_back(self, buffer: torch.Tensor) -> None:
        buffer.fill_(POISON)
        super().give_back(buffer)


class LateDevice(Device):
    """See the module. `graphs`: record steps, and pad batches, as a GPU does."""

    def __init__(self, seed: int, *, graphs: bool, flights: int = 2) -> None:
        super().__init__(torch.device("cpu"), lambda nbytes: torch.full((nbytes,), POISON, dtype=torch.uint8))
        self.staging = PoisonedStaging(lambda nbytes: torch.full((nbytes,), POISON, dtype=torch.uint8))
        self.graphs = graphs
        self.flights = flights
        self.rng = random.Random(seed)
        self.queue: deque[Work | LateEvent] = deque()
        self.furthest_behind = 0

    def launch(self, work: Work) -> None:
        self.queue.append(work)
        self.furthest_behind = max(self.furthest_behind, len(self.queue))
        for _ in range(self.rng.choice((0, 0, 0, 0, 0, 1, 3))):
            self._run_one()

    def record_event(self) -> Event:
        event = LateEvent(self)
        self.queue.append(event)
        return event

    def record(self, work: Work) -> Work:
        self.launch(work)  # as a GPU does, to compile what it needs
        return lambda: self.launch(work)

    def finish(self) -> None:
        while self.queue:
            self._run_one()

    def give_back(self) -> None:
        assert not self.queue, "memory is given back under work that may still use it"

    def run_until(self, event: LateEvent) -> None:
        while not event.done:
            self._run_one()

    def _run_one(self) -> None:
        if self.queue:
            item = self.queue.popleft()
            if isinstance(item, LateEvent):
                item.done = True
            else:
                item()

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return super()._empty(shape, dtype).fill_(-77_777)


def noisy(history: list[int]) -> torch.Tensor:
    """Logits that depend on the whole history: what a wrong page or position would change."""
    generator = torch.Generator().manual_seed(hash(tuple(history)) % (1 << 31))
    logits = torch.randn(VOCAB, generator=generator)
    logits[EOS] -= 0.5
    logits[CLOSE] += 1.0
    return logits


def requests(rng: random.Random, count: int) -> list[Request]:
    """Budgets, policies, sampling options, groups and common beginnings, mixed."""
    beginnings = [[rng.randrange(256) for _ in range(length)] for length in (5, 9, 17)]
    made = []
    for index in range(count):
        prompt = rng.choice([[], *beginnings]) + [rng.randrange(256) for _ in range(rng.randint(1, 6))]
        policy = rng.choice(
            [
                Budget(think=rng.randint(0, 9), solve=rng.randint(0, 9)),
                Budget(think=rng.randint(1, 30), solve=rng.randint(1, 12)),
                budgets.truncate(rng.randint(1, 20)),
                budgets.soft_landing(think=rng.randint(1, 9), grace=4, solve=5),
                budgets.budget_forcing(think=rng.randint(3, 12), solve=4, waits=2),
            ]
        )
        options = rng.choice(
            [
                {},
                {"temperature": 0},
                {"top_k": 7, "min_tokens": 4},
                {"top_p": 0.9, "stop_token_ids": (10, 20, 30, 40)},
                {"stop": ("a", "x"), "stop_in_thinking": True},
                {"logit_bias": {65: 4.0, 66: 3.5}},
                {"presence_penalty": 0.8, "repetition_penalty": 1.3},
            ]
        )
        made.append(
            Request(
                prompt,
                budget=policy,
                sampling=SamplingParams(seed=index, **options),
                n=rng.choice([1, 1, 2, 3]),
            )
        )
    return made


def decode_all(engine: Engine, wanted: list[Request]) -> list:
    """Everything that can be compared of every completion, in order; all decoded together."""
    found: dict[int, list] = {}
    streams = []
    for n in (1, 2, 3):
        chosen = [index for index, request in enumerate(wanted) if request.n == n]
        stream = engine.rollout(
            [wanted[index].prompt for index in chosen],
            n=n,
            budget=[wanted[index].budget for index in chosen],
            sampling=[wanted[index].sampling for index in chosen],
        )
        streams.append((chosen, stream))
    while streams:
        chosen, stream = streams.pop(0)
        for generation in stream:
            found[chosen[generation.index]] = [comparable(c) for c in generation.completions]
            streams.append((chosen, stream))
            break
    stats = engine.stats()
    assert stats["free_pages"] == stats["num_pages"]
    assert stats["running"] == stats["waiting"] == 0
    return [found[index] for index in range(len(wanted))]


def comparable(completion) -> tuple:
    return (
        completion.token_ids,
        completion.logprobs,
        completion.sampling_logprobs,
        completion.forced,
        completion.phases,
        completion.think_end,
        completion.finish_reason,
        completion.think_tokens,
        completion.solve_tokens,
        completion.text,
        completion.thinking,
        completion.solution,
    )


def watch_writes(decoder) -> None:
    """Fail when a step, at the time it runs, writes anywhere but at its row's own next positions."""
    forward = decoder.forward

    def watched(ids, batch, kv_pages, *, rows=None):
        page_size = kv_pages[0][0].shape[1]
        starts, lengths = batch.query_start.tolist(), batch.seq_lens.tolist()
        tables = [
            table[: -(-length // page_size)]
            for table, length in zip(batch.page_table.tolist(), lengths, strict=True)
        ]
        slots, positions = batch.slot_mapping.tolist(), batch.positions.tolist()
        for row, length in enumerate(lengths):
            others = {page for other, table in enumerate(tables) if other != row for page in table}
            for token in range(starts[row], starts[row + 1]):
                if length == 0:
                    assert slots[token] == -1, "an idle row writes"
                    continue
                page, offset = divmod(slots[token], page_size)
                assert positions[token] == length - starts[row + 1] + token
                assert page * page_size + offset >= 0
                assert page == tables[row][positions[token] // page_size]
                assert offset == positions[token] % page_size
                assert page not in others, "a page that another row reads is written"
        return forward(ids, batch, kv_pages, rows=rows)

    decoder.forward = watched


@pytest.fixture
def late(scripted, monkeypatch) -> Callable[..., tuple[Engine, LateDevice]]:
    """`late(seed, graphs=…, **EngineConfig)` -> an engine of the scripted model on a LateDevice."""

    def make(seed: int, *, script=noisy, graphs: bool = False, device=None, **options):
        device = device or LateDevice(seed, graphs=graphs)
        monkeypatch.setattr(engine_build, "open_device", lambda name, graphs: device)
        # The narrowest recorded page table, so that these short runs meet several.
        monkeypatch.setattr(decode_loop, "SHORTEST", 16)
        made = scripted(script, **options)
        watch_writes(made.decoder)
        return made.engine, device

    return make


SIZES = {"max_batch": 5, "kv_memory": 256 * 80, "max_model_len": 120}
ROOMY = {"max_batch": 5, "kv_memory": "1MiB", "max_model_len": 512}


@pytest.fixture
def punctual(scripted, monkeypatch) -> Callable[..., Engine]:
    """The scripted model's engine on the CPU, one step at a time: what the others must equal."""

    def make(**options) -> Engine:
        monkeypatch.setattr(engine_build, "open_device", open_device)
        return scripted(noisy, **{**SIZES, **options}).engine

    return make


@pytest.mark.parametrize("graphs", [False, True], ids=["launched", "recorded"])
@pytest.mark.parametrize("horizon", [1, 2, 7, 32])
def test_horizons_in_flight_change_nothing(late, punctual, horizon, graphs):
    for seed in range(3):
        wanted = requests(random.Random(seed), 25)
        engine, device = late(seed, graphs=graphs, horizon=horizon, **SIZES)
        assert engine._device is device
        assert decode_all(engine, wanted) == decode_all(punctual(), wanted)
        assert device.furthest_behind > min(2 * horizon, 30), "the device was never late"
        stats = engine.stats()
        assert stats["idle_host_waits"] < stats["host_waits"]


@pytest.mark.parametrize("graphs", [False, True], ids=["launched", "recorded"])
def test_forks_in_flight(late, punctual, graphs):
    def curves(engine):
        found = []
        for seed in range(6):
            generations = engine.fork(
                [[1, 2, 3, seed], [9] * (seed + 1)],
                think_at=[0, 3, 4, 11, 25],
                solve=6,
                sampling=SamplingParams(seed=seed),
            )
            found += [[comparable(c) for c in generation.completions] for generation in generations]
        return found

    want = curves(punctual(**ROOMY))
    for seed, horizon in enumerate((1, 3, 8, 32)):
        engine, _ = late(seed, graphs=graphs, horizon=horizon, **ROOMY)
        assert curves(engine) == want


def test_a_step_is_enqueued_behind_every_read_while_rows_decode(late):
    engine, device = late(0, graphs=True, horizon=4, max_batch=4)
    waits = []
    count_wait = device.count_wait
    device.count_wait = lambda behind: (waits.append(behind), count_wait(behind))
    engine.generate(
        [[1, 2], [3, 4, 5]], budget=budgets.truncate(120), sampling=SamplingParams(ignore_eos=True)
    )
    assert waits == [True] * (len(waits) - 1) + [False]
    assert len(waits) == 1 + 30, "the first tokens, then a read a horizon"


def test_aborts_and_ends_of_thinking_reach_rows_under_way(late, punctual):
    """Requests that nobody touched are as ever, whatever happens to their neighbours, and pages come back."""
    for seed, horizon in ((0, 1), (1, 3), (2, 8)):
        rng = random.Random(seed)
        wanted = requests(rng, 40)
        untouched = set(range(0, 40, 3))
        alone = punctual()
        want = {index: tokens_of(alone, [wanted[index]])[0] for index in untouched}
        engine, _ = late(seed, graphs=bool(seed % 2), horizon=horizon, **SIZES)
        names = {engine.submit(request): index for index, request in enumerate(wanted)}
        got: dict[tuple[int, int], list] = {}
        while engine.has_work:
            if rng.random() < 0.3:
                engine.abort(rng.choice([name for name, index in names.items() if index not in untouched]))
            if rng.random() < 0.3:
                name = rng.choice([n for n, index in names.items() if index not in untouched])
                if not isinstance(wanted[names[name]].budget, type(budgets.truncate(1))):
                    end_thinking(engine, name)
            for event in engine.step():
                got.setdefault((names[event.request_id], event.sample), []).append(
                    (event.token_id, event.logprob, event.forced, event.phase, event.finish_reason)
                )
        for index in untouched:
            for sample in range(wanted[index].n):
                assert got[index, sample] == want[index][sample]
        stats = engine.stats()
        assert stats["free_pages"] == stats["num_pages"]


def end_thinking(engine: Engine, name: str) -> None:
    with contextlib.suppress(BudgetError):  # its policy never forces a close
        engine.end_thinking(name)


def tokens_of(engine: Engine, wanted: list[Request]) -> list[dict[int, list]]:
    found: dict[str, dict[int, list]] = {engine.submit(request): {} for request in wanted}
    while engine.has_work:
        for event in engine.step():
            found[event.request_id].setdefault(event.sample, []).append(
                (event.token_id, event.logprob, event.forced, event.phase, event.finish_reason)
            )
    return list(found.values())


def test_an_end_of_thinking_takes_effect_within_the_flights_under_way(late):
    engine, _ = late(3, script=lambda history: ord("."), horizon=4, max_batch=2)
    name = engine.submit(Request([1, 2], budget=Budget(think=200, solve=3)))
    events = []
    while len(events) < 20:
        events += engine.step()
    engine.end_thinking(name)
    seen = len(events)
    while engine.has_work:
        events += engine.step()
    forced = next(index for index, event in enumerate(events) if event.forced)
    assert forced <= seen + 2 * 4, "at most two horizons had been launched"
    assert [event.phase for event in events[-3:]] == ["solve"] * 3


# ---- the tests above would notice ----


class CarelessStaging(PoisonedStaging):
    """Hands a buffer out again as soon as its copy has been enqueued."""

    def lend(self, buffer: torch.Tensor) -> None:
        self.give_back(buffer)


class ImpatientEvent(LateEvent):
    def wait(self) -> None:
        """Does not."""


def outcome(engine: Engine, wanted: list[Request]) -> object:
    """What was decoded, or how it failed."""
    try:
        return decode_all(engine, wanted)
    except Exception as error:  # garbage can fail anywhere
        return f"{type(error).__name__}: {error}"


def test_a_staging_buffer_reused_too_early_is_noticed(late, punctual):
    wanted = requests(random.Random(0), 25)
    device = LateDevice(0, graphs=True)
    device.staging = CarelessStaging(lambda nbytes: torch.full((nbytes,), POISON, dtype=torch.uint8))
    engine, _ = late(0, device=device, horizon=4, backend="reference", **SIZES)  # whose indices are checked
    assert outcome(engine, wanted) != decode_all(punctual(), wanted)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_result_read_before_its_event_is_noticed(late, punctual):
    wanted = requests(random.Random(0), 25)
    device = LateDevice(0, graphs=True)

    def record_event() -> Event:
        event = ImpatientEvent(device)
        device.queue.append(event)
        return event

    device.record_event = record_event  # type: ignore[method-assign]
    engine, _ = late(0, device=device, horizon=4, backend="reference", **SIZES)  # whose indices are checked
    assert outcome(engine, wanted) != decode_all(punctual(), wanted)


# ---- shapes of recorded steps ----


def test_a_step_is_recorded_once_a_shape(late):
    engine, _ = late(0, graphs=True, horizon=2, max_batch=5, max_model_len=120)
    prompts = [[1, 2, 3], [4, 5], [6], [7, 8]]
    for _ in range(2):
        engine.generate(prompts, budget=Budget(think=20, solve=20), sampling=SamplingParams(seed=1))
        shapes = set(engine._loop._recordings.steps)
    rows = {shape[0] for shape in shapes}
    assert rows <= {1, 2, 4, 5}
    before = dict(engine._loop._recordings.steps)
    engine.generate(prompts, budget=Budget(think=20, solve=20), sampling=SamplingParams(seed=1))
    assert {id(step) for step in engine._loop._recordings.steps.values()} == {
        id(step) for step in before.values()
    }


def test_few_recorded_steps_are_kept_if_so_told(late, punctual, monkeypatch):
    wanted = requests(random.Random(1), 25)
    want = decode_all(punctual(), wanted)
    monkeypatch.setattr(decode_loop, "MOST_RECORDED", 2)
    engine, _ = late(1, graphs=True, horizon=3, **SIZES)
    assert decode_all(engine, wanted) == want
    assert len(engine._loop._recordings.steps) == 2


def test_warmup_records_every_shape(late):
    engine, _ = late(0, graphs=True, max_batch=20, max_model_len=100)
    engine.warmup()
    shapes = {shape[:2] for shape in engine._loop._recordings.steps}
    assert shapes == {(rows, width) for rows in (1, 2, 4, 8, 16, 20) for width in (4, 8, 16, 25)}
    recorded = set(engine._loop._recordings.steps)
    engine.generate([[1, 2]] * 7, budget=Budget(think=30, solve=30))
    assert set(engine._loop._recordings.steps) == recorded


def test_a_request_with_a_few_more_options_than_before_records_nothing_anew(late):
    """The tensors of bans and biases, whose width steps are recorded and kernels compiled for, grow by
    doubling."""
    engine, _ = late(0, graphs=True)
    versions = []
    for count in (1, 2, 3, 4, 5):
        sampling = SamplingParams(logit_bias=dict.fromkeys(range(count), 1.0))
        engine.generate([1, 2, 3], budget=budgets.truncate(4), sampling=sampling)
        versions.append(engine._loop._batch.version)
    assert versions == [1, 1, 1, 1, 2]


def test_the_bundled_model_late_and_recorded(monkeypatch):
    """A real decoder: float32 tokens and log-probabilities equal those of the CPU's engine."""
    from elastic_decode.tasks import countdown

    prompts = [problem.chat for problem in countdown.sample("test", 12, 0)]
    results = []
    for device in (None, LateDevice(1, graphs=True), LateDevice(2, graphs=False)):
        if device is not None:
            monkeypatch.setattr(engine_build, "open_device", lambda name, graphs, device=device: device)
        config = EngineConfig(dtype="float32", horizon=5 if device else 1, max_batch=6, kv_memory="64MiB")
        with Engine.from_pretrained(bundled_folder(), config) as engine:
            generations = engine.generate(
                prompts, n=2, budget=Budget(think=20, solve=4), sampling=SamplingParams(seed=3)
            )
            results.append([[comparable(c) for c in g.completions] for g in generations])
    assert results[0] == results[1] == results[2]


def bundled_folder():
    from elastic_decode.cli import options

    return options.checkpoint("tiny")


def test_rows_that_share_pages_are_grouped(late, punctual, monkeypatch):
    """Row order and groups change nothing; what a group is said to share, its page tables share."""
    wanted = [
        Request(
            [1 + index % 3] * 30 + [index],
            budget=Budget(think=9 + index, solve=7),
            sampling=SamplingParams(seed=index),
            n=1 + index % 3,
        )
        for index in range(12)
    ]
    options = {"max_batch": 9, "kv_memory": "1MiB", "max_model_len": 120}
    want = decode_all(punctual(**options), wanted)
    monkeypatch.setattr(prefix_groups, "WORTHWHILE", 8)
    for graphs in (False, True):
        engine, _ = late(4, graphs=graphs, horizon=3, **options)
        engine._loop._groups_prefixes = True
        decoder = engine._loop._decoder
        forward, sizes = decoder.forward, []

        def checked(ids, batch, kv_pages, *, rows=None, forward=forward, sizes=sizes):
            if batch.shared is not None:
                starts, lengths = (tensor.tolist() for tensor in batch.shared)
                assert len(starts) == len(batch.seq_lens) + 1
                assert len(lengths) == len(batch.seq_lens)
                assert starts[0] == 0
                assert starts[-1] == len(batch.seq_lens)
                for start, end, length in zip(starts, starts[1:], lengths, strict=False):
                    assert start <= end
                    if length:
                        shared = batch.page_table[start:end, : length // 4]
                        assert length % 4 == 0
                        assert (shared == shared[0]).all()
                        assert all(n == 0 or n > length for n in batch.seq_lens[start:end].tolist())
                        sizes.append(end - start)
            return forward(ids, batch, kv_pages, rows=rows)

        decoder.forward = checked
        assert decode_all(engine, wanted) == want
        assert max(sizes) >= 3


@pytest.mark.parametrize("graphs", [False, True], ids=["launched", "recorded"])
def test_sleep_waits_for_what_is_under_way_and_forgets_recorded_steps(late, punctual, graphs):
    wanted = requests(random.Random(5), 12)
    engine, device = late(5, graphs=graphs, horizon=4, **SIZES)
    for _ in range(2):
        assert decode_all(engine, wanted) == decode_all(punctual(), wanted)
        assert bool(engine._loop._recordings.steps) == graphs
        engine.sleep()
        assert not device.queue
        assert not engine._loop._recordings.steps
        engine.wake()
