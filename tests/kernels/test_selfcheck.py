"""The check of a device: what is right passes, and whatever is wrong with an op is found."""

import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from elastic_decode.kernels import registry, selfcheck
from elastic_decode.kernels.budget.layout import State
from elastic_decode.kernels.registry import OPS
from elastic_decode.kernels.selfcheck import Finding, Matrix, Shapes, check, close, same, within
from elastic_decode.kernels.testing import device_of, runnable

CPU = torch.device("cpu")
SMALL = Shapes(
    hidden_size=48,
    intermediate_size=72,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=301,
    page_size=16,
    matrices=(Matrix(128, 48, bias=True), Matrix(48, 64), Matrix(301, 48, float32_out=True)),
    qk_norm=True,
    windows=(None, 4096),
)
KINDS = {
    "float32": {},
    "bfloat16": {"dtype": torch.bfloat16, "kv_dtype": torch.bfloat16, "page_size": 1},
    "mixed": {"dtype": torch.bfloat16, "kv_dtype": torch.float32, "page_size": 5, "num_kv_heads": 1},
    "float8": {
        "dtype": torch.bfloat16,
        "kv_dtype": torch.float8_e4m3fn,
        "qk_norm": False,
        "windows": (None,),
    },
}


def row_by_row(a: np.ndarray, b: np.ndarray, product=np.matmul, **options: Any) -> np.ndarray:
    """As a GPU's tensor cores multiply, for Triton's interpreter: NumPy's products have other bits for other
    numbers of rows."""
    b = np.ascontiguousarray(b)
    return np.concatenate([product(np.ascontiguousarray(row[None]), b, **options) for row in a])


def is_interpreted(backend: str) -> bool:
    return backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"


def has_check(op: str, backend: str, kind: str) -> bool:
    if is_interpreted(backend):  # the rest is slow there, or not bfloat16; the op's own tests do it
        return kind == "float32" and op not in ("budget", "draw")
    if backend == "cpu":
        return kind != "float8"
    # test_cuda_paged_attention.py has what there is, float8 among it
    return (op, backend) != ("paged_attention", "cuda") or kind == "bfloat16"


CASES = [
    (op, name, kind) for op in OPS for name in runnable(op) for kind in KINDS if has_check(op, name, kind)
]


@pytest.mark.parametrize(("op", "backend", "kind"), CASES)
def test_what_is_right_passes(op, backend, kind, monkeypatch):
    invariant = backend not in registry.NOT_BATCH_INVARIANT.get(op, ())
    shapes = SMALL._replace(**KINDS[kind])
    if is_interpreted(backend):
        shapes = shapes._replace(windows=(None,))
        monkeypatch.setattr(np, "matmul", row_by_row)
    outcome = check(op, backend, shapes, device_of(backend), batch_invariant=invariant)
    assert outcome.ok, outcome.summary()
    assert outcome.findings >= 4
    assert outcome.worst is not None
    assert outcome.worst.ok


CUDA_OPS = [op for op in OPS if importlib.util.find_spec(f"elastic_decode.kernels.{op}.cuda") is not None]


@pytest.mark.parametrize(
    ("op", "kv_dtype"),
    [*((op, torch.bfloat16) for op in CUDA_OPS), ("paged_attention", torch.float8_e4m3fn)],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_cuda_sources_on_the_cpu_pass(op, kv_dtype, cuda_on_cpu):
    cuda_on_cpu.set_schedule(3)
    shapes = SMALL._replace(dtype=torch.bfloat16, kv_dtype=kv_dtype, vocab_size=2100, head_dim=64)
    outcome = check(op, "cuda", shapes, CPU)
    assert outcome.ok, outcome.summary()


# ---- broken implementations ----


def outputs(
    op: str, name: str | None, arguments: tuple[Any, ...], options: dict[str, Any]
) -> list[torch.Tensor]:
    """What the call writes, as views with a row of the batch in each place of dimension 0."""
    if op == "sample":
        return list(options["out"])
    if name == "decode_inputs":
        return list(arguments[4:8])
    if name == "budget_step":
        *ring, index = arguments[9:14]
        return [each[int(index) % len(each), : len(arguments[3])] for each in ring]
    if op == "draw":
        *ring, index = arguments[5]
        return [each[int(index), : len(arguments[1])] for each in ring]
    return [options["out"]]


def next_float(x: torch.Tensor) -> torch.Tensor:
    return torch.nextafter(x, torch.full_like(x, torch.inf))


def wrong_by_a_row(before: torch.Tensor, after: torch.Tensor) -> None:
    after.copy_(after.roll(1, 0))


def holding_a_nan(before: torch.Tensor, after: torch.Tensor) -> None:
    if after.is_floating_point() and after.numel():
        after.view(-1)[after.numel() // 2] = torch.nan


def missing_its_last_row(before: torch.Tensor, after: torch.Tensor) -> None:
    if len(after) > 1:
        after[-1] = before[-1]


def other_bits_alone(before: torch.Tensor, after: torch.Tensor) -> None:
    if after.is_floating_point() and len(after) == 1:
        after.copy_(next_float(after))


def other_bits_in_large_batches(before: torch.Tensor, after: torch.Tensor) -> None:
    if after.is_floating_point() and len(after) > 1:
        after[-1:].copy_(next_float(after[-1:]))


FAULTS = [
    wrong_by_a_row,
    holding_a_nan,
    missing_its_last_row,
    other_bits_alone,
    other_bits_in_large_batches,
]


@pytest.fixture
def breaking(monkeypatch) -> Iterator[Callable[..., None]]:
    """`breaking(wrap)`: implementations are `wrap(op, name, function)` from here on."""
    real = registry.implementation

    def install(wrap: Callable[..., Callable[..., Any]]) -> None:
        monkeypatch.setattr(
            registry, "implementation", lambda op, backend, name=None: wrap(op, name, real(op, backend, name))
        )

    return install


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("op", OPS)
def test_a_fault_is_found(op, fault, breaking):
    def wrap(op: str, name: str | None, function: Callable[..., Any]) -> Callable[..., Any]:
        def broken(*arguments: Any, **options: Any) -> None:
            written = outputs(op, name, arguments, options) if op != "draw" else []
            before = [each.clone() for each in written]
            function(*arguments, **options)
            if op == "draw":  # the ring has moved on
                written = outputs(op, name, arguments, options)
                before = [torch.full_like(each, -77) for each in written]
            for old, new in zip(before, written, strict=True):
                fault(old, new)

        return broken

    breaking(wrap)
    outcome = check(op, "cpu", SMALL, CPU)
    assert not outcome.ok
    assert outcome.problem is None
    assert outcome.worst is not None
    assert not outcome.worst.ok


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize("op", ["rope", "paged_attention", "budget"])
def test_a_wrong_page_is_found(op, kind, breaking):
    shapes = SMALL._replace(**KINDS[kind])

    def wrap(op: str, name: str | None, function: Callable[..., Any]) -> Callable[..., Any]:
        def broken(*arguments: Any, **options: Any) -> Any:
            given = list(arguments)
            if op == "rope":
                slots = given[3].clone()
                slots[slots >= shapes.page_size] -= shapes.page_size
                given[3] = slots
            if op == "paged_attention":  # one entry of the last row
                given[3] = given[3].clone()
                given[3][-1, 0] = (given[3][-1, 0] + 1) % len(given[1])
            result = function(*given, **options)
            if name == "decode_inputs":
                given[7][given[7] >= 0] += shapes.page_size
            return result

        return broken

    breaking(wrap)
    outcome = check(op, "cpu", shapes, CPU)
    assert not outcome.ok
    assert outcome.problem is None


@pytest.mark.parametrize("op", ["paged_attention", "draw"])
def test_what_is_wrong_in_a_large_batch_only_is_found(op, breaking):
    """Kernels cut up a batch that fills the GPU otherwise than a small one."""

    def wrap(op: str, name: str | None, function: Callable[..., Any]) -> Callable[..., Any]:
        def broken(*arguments: Any, **options: Any) -> Any:
            result = function(*arguments, **options)
            rows = len(arguments[4] if op == "paged_attention" else arguments[1])
            if rows > 12 and op == "paged_attention":
                options["out"][-1] += 1.0
            elif rows > 12:
                arguments[4].state[-1, State.USED] += 1
            return result

        return broken

    breaking(wrap)
    outcome = check(op, "cpu", SMALL, CPU)
    assert not outcome.ok
    assert outcome.problem is None
    assert outcome.worst is not None
    assert "times" in outcome.worst.what


def test_a_stray_write_is_found(breaking):
    def wrap(op: str, name: str | None, function: Callable[..., Any]) -> Callable[..., Any]:
        def broken(*arguments: Any, **options: Any) -> Any:
            result = function(*arguments, **options)
            arguments[4][0, 0] = 1.0  # k_cache; no token has slot 0
            return result

        return broken

    breaking(wrap)
    outcome = check("rope", "cpu", SMALL, CPU)
    assert not outcome.ok
    assert "no other slot" in outcome.summary()


def test_a_machine_that_forgets_a_state_word_is_found(breaking):
    def wrap(op: str, name: str | None, function: Callable[..., Any]) -> Callable[..., Any]:
        def broken(*arguments: Any) -> None:
            state = arguments[4].state if op == "draw" else arguments[0]
            before = state[:, State.USED].clone()
            function(*arguments)
            if name != "decode_inputs":
                state[:, State.USED] = before

        return broken

    breaking(wrap)
    for op in ("budget", "draw"):
        outcome = check(op, "cpu", SMALL, CPU)
        assert "state" in outcome.summary()
        assert not outcome.ok


IGNORED = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "seed": 0,
    "sample_index": 0,
    "repetition": 1.0,
    "presence": 0.0,
    "frequency": 0.0,
    "ban_until": 0,
    "bias_values": 0.0,
    "prompt_mask": 0,
}


@pytest.mark.parametrize("field", IGNORED)
@pytest.mark.parametrize("op", ["sample", "draw"])
def test_an_option_that_is_ignored_is_found(op, field, breaking):
    def wrap(op: str, name: str | None, function: Callable[..., Any]) -> Callable[..., Any]:
        def broken(*arguments: Any, **options: Any) -> None:
            given = list(arguments)
            value = getattr(given[3], field)
            if value is not None:
                given[3] = given[3]._replace(**{field: torch.full_like(value, IGNORED[field])})
            function(*given, **options)

        return broken

    breaking(wrap)
    for vocab in (SMALL.vocab_size, 20_011):
        assert not check(op, "cpu", SMALL._replace(vocab_size=vocab), CPU).ok, vocab


@pytest.mark.parametrize(
    ("op", "changes"),
    [
        ("linear", {2: None}),  # the bias
        ("rms_norm", {"residual": None}),
        ("rms_norm", {2: 1e-5}),  # eps
        ("rope", {"q_weight": None}),
        ("rope", {"k_weight": None}),
        ("rope", {"eps": 1e-5}),
        ("paged_attention", {"window": None}),
        ("paged_attention", {"window": 64}),
        ("paged_attention", {"scale": 0.2}),
    ],
)
def test_an_argument_that_is_ignored_is_found(op, changes, breaking):
    def wrap(op: str, name: str | None, function: Callable[..., Any]) -> Callable[..., Any]:
        def broken(*arguments: Any, **options: Any) -> None:
            given = [changes.get(i, value) for i, value in enumerate(arguments)]
            function(*given, **options | {k: v for k, v in changes.items() if isinstance(k, str)})

        return broken

    breaking(wrap)
    for kind in ("float32", "bfloat16"):
        assert not check(op, "cpu", SMALL._replace(**KINDS[kind]), CPU).ok, kind


def test_an_exception_is_the_outcomes_problem(breaking):
    def wrap(op: str, name: str | None, function: Callable[..., Any]) -> Callable[..., Any]:
        def broken(*arguments: Any, **options: Any) -> None:
            raise RuntimeError("CUDA error: an illegal memory access\nCompile with ...")

        return broken

    breaking(wrap)
    outcome = check("linear", "cpu", SMALL, CPU)
    assert not outcome.ok
    assert outcome.summary() == "RuntimeError: CUDA error: an illegal memory access"


def test_a_backend_that_cannot_run_is_a_problem():
    outcome = check("rope", "flashinfer", SMALL, CPU)
    assert not outcome.ok
    assert "no flashinfer implementation" in outcome.summary()


def test_without_invariance_only_closeness_is_asked(breaking):
    def wrap(op: str, name: str | None, function: Callable[..., Any]) -> Callable[..., Any]:
        def loose(*arguments: Any, **options: Any) -> None:
            function(*arguments, **options)
            other_bits_alone(options["out"], options["out"])

        return loose

    breaking(wrap)
    for op in ("linear", "paged_attention"):
        assert not check(op, "cpu", SMALL, CPU).ok
        assert check(op, "cpu", SMALL, CPU, batch_invariant=False).ok


def test_the_callers_default_device_is_left_alone():
    with torch.device("meta"):
        for op in OPS:
            assert check(op, "cpu", SMALL, CPU).ok
        assert torch.empty(1).device.type == "meta"


def test_the_callers_random_numbers_are_left_alone():
    torch.manual_seed(1)
    want = torch.rand(3)
    torch.manual_seed(1)
    for op in OPS:
        check(op, "cpu", SMALL, CPU)
    assert torch.equal(torch.rand(3), want)


def test_findings():
    nan, inf = float("nan"), float("inf")
    x = torch.tensor([1.0, nan, inf])
    assert close("x", x, x.double(), x).error == 0
    assert not close("x", torch.tensor([1.0, 2.0, inf]), x.double(), x).ok
    assert not close("x", torch.tensor([nan, nan, inf]), x.double(), x).ok
    assert not close("x", torch.tensor([1.0, nan, -inf]), x.double(), x).ok
    assert close("x", x.bfloat16(), x.double(), x).error == inf
    assert same("x", x, x.clone()).ok
    assert same("x", torch.tensor([0.0]), torch.tensor([-0.0])).error == 1
    assert within("x", torch.tensor([1.0, nan]), torch.tensor([1.1, nan]), rtol=0, atol=0.05).error > 1.9
    assert not within("x", torch.tensor([nan]), torch.tensor([1.0]), rtol=0, atol=1).ok
    assert not Finding("x", nan, 1.0).ok


def test_a_weight_too_large_for_the_memory_is_checked_in_part(monkeypatch):
    from elastic_decode.kernels.linear import selfcheck as of_linear

    monkeypatch.setattr(of_linear, "_most_elements", lambda device, dtype: 100 * 48)
    found = list(
        of_linear.checks(
            lambda: registry.implementation("linear", "cpu"),
            SMALL,
            selfcheck.Random(CPU),
            batch_invariant=True,
        )
    )
    assert all(finding.ok for finding in found)
    assert any("100 x 48 (of 301 x 48: memory)" in finding.what for finding in found)
