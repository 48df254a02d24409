"""The budget machine: turns a step's draws into tokens, forcing delimiters when a budget is used up.

`budget_step` runs inside the batched decode step, after `sample`, and reads and writes device tables only
(layout.py). Its rules, for a row that runs:

1. A request to end the thinking (State.END_REQUESTED) fires the phase's expiry before the draw is looked at;
   it waits while tokens are being forced, and is dropped in a SOLVE phase or where the phase has no expiry.
2. While forced tokens are pending, the next one is emitted, flagged FORCED; the draw is ignored. After the
   last, the row moves to the event's next phase.
3. Otherwise the draw is looked at: the first of the phase's ends it completes, else EOS, gives the event.
   With REPLACE the draw is no token (in no count), and the event's first forced token is emitted in its
   place.
4. Otherwise the draw is emitted and counted in its phase; then its event fires, or, where it has none, the
   phase's expiry if the budget is used up.

An event that is spent (MAX_COUNT) stands aside for its FALLBACK; a fallback of -1 means that there is no
event. What an event forces depends on where the DFA stands. A phase that is entered or returned to without
budget left expires at once, so no phase ever samples more than its budget. A token's phase label is that of
the phase it was emitted in; only an EOS that ends the run is always SOLVE.
"""

from collections.abc import Callable

import torch

from .. import registry
from ..checks import check_tensor
from .layout import MAX_PHASES, PROGRAM_WORDS, STATE_WORDS


def _find(name: str, backend: str, device: torch.device) -> Callable[..., None]:
    if backend == "auto":
        backend = registry.default_backend(device.type)
    elif backend == "cpu" and device.type != "cpu":
        raise ValueError(f"backend {backend!r} needs CPU tensors, got tensors on {device}")
    return registry.implementation("budget", backend, name)


def budget_step(
    state: torch.Tensor,
    programs: torch.Tensor,
    automata: torch.Tensor,
    slots: torch.Tensor,
    token: torch.Tensor,
    logits: torch.Tensor,
    lse: torch.Tensor,
    sampling_logprob: torch.Tensor,
    temperature: torch.Tensor,
    ring_tokens: torch.Tensor,
    ring_flags: torch.Tensor,
    ring_logprobs: torch.Tensor,
    ring_sampling_logprobs: torch.Tensor,
    ring_index: torch.Tensor,
    *,
    backend: str = "auto",
) -> None:
    """One decode step of R rows; changes `state` and writes row `ring_index % L` of the ring, in place.

    Tables, int32: state [S, STATE_WORDS], programs [S, PROGRAM_WORDS], automata [any] (layout.py); slots [R]:
    each row's slot, no slot twice, -1 for an idle row. The draws, from `sample`: token int32 [R] (-1: no
    candidate), lse and sampling_logprob float32 [R]; logits float32 [R, V]: row r's raw logits, where V may
    differ from the automaton's vocabulary; temperature float32 [S], 0 = greedy. The ring: ring_tokens and
    ring_flags int32 [L, C], ring_logprobs and ring_sampling_logprobs float32 [L, C], C >= R; ring_index int32
    [1] is read, not advanced.

    Row r's entry is column r: the token, its layout.Flag bits, its log-probability logits[r, token] / T -
    lse[r] (T = 1 when greedy; -inf for a forced token >= V) and the draw's sampling_logprob (0 where forced).
    An entry without Flag.VALID has only its flags written: 0 for an idle or finished row; FINISH and
    THINK_END bits where the row finished without a token: Finish.INVALID for a draw of -1 or outside the
    automaton's vocabulary and for malformed programs, else what a request to end the thinking or a replacing
    event led to.

    Raises TypeError for a wrong dtype and ValueError for a wrong shape or device, a stride or an unknown
    backend.
    """
    device = state.device
    check_machine(state, programs, automata)
    check_tensor("slots", slots, (None,), torch.int32, device)
    rows = slots.shape[0]
    check_tensor("token", token, (rows,), torch.int32, device)
    check_tensor("logits", logits, (rows, None), torch.float32, device)
    check_tensor("lse", lse, (rows,), torch.float32, device)
    check_tensor("sampling_logprob", sampling_logprob, (rows,), torch.float32, device)
    check_tensor("temperature", temperature, (state.shape[0],), torch.float32, device)
    check_ring(
        ring_tokens, ring_flags, ring_logprobs, ring_sampling_logprobs, ring_index, rows=rows, device=device
    )
    tensors = (state, programs, automata, slots, token, logits, lse, sampling_logprob, temperature)
    ring = (ring_tokens, ring_flags, ring_logprobs, ring_sampling_logprobs, ring_index)
    if torch.compiler.is_compiling():
        torch.ops.elastic_decode.budget_step(*tensors, *ring, backend)
    else:
        _find("budget_step", backend, device)(*tensors, *ring)


def check_machine(state: torch.Tensor, programs: torch.Tensor, automata: torch.Tensor) -> None:
    """Raises for tables that break the contract of `budget_step`."""
    check_tensor("state", state, (None, STATE_WORDS), torch.int32)
    check_tensor("programs", programs, (state.shape[0], PROGRAM_WORDS), torch.int32, state.device)
    check_tensor("automata", automata, (None,), torch.int32, state.device)


def check_ring(
    ring_tokens: torch.Tensor,
    ring_flags: torch.Tensor,
    ring_logprobs: torch.Tensor,
    ring_sampling_logprobs: torch.Tensor,
    ring_index: torch.Tensor,
    *,
    rows: int,
    device: torch.device,
) -> None:
    """Raises for a ring that breaks the contract of `budget_step` or is too narrow for `rows`."""
    check_tensor("ring_tokens", ring_tokens, (None, None), torch.int32, device)
    length, width = ring_tokens.shape
    check_tensor("ring_flags", ring_flags, (length, width), torch.int32, device)
    check_tensor("ring_logprobs", ring_logprobs, (length, width), torch.float32, device)
    check_tensor("ring_sampling_logprobs", ring_sampling_logprobs, (length, width), torch.float32, device)
    check_tensor("ring_index", ring_index, (1,), torch.int32, device)
    if length < 1 or width < rows:
        raise ValueError(f"the ring is [{length}, {width}], expected at least [1, {rows}] for {rows} rows")


def decode_inputs(
    state: torch.Tensor,
    page_table: torch.Tensor,
    slots: torch.Tensor,
    page_size: int,
    token: torch.Tensor,
    position: torch.Tensor,
    seq_len: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    backend: str = "auto",
) -> None:
    """The next forward pass's inputs of R rows, written into the last four arguments, int32 [R].

    state int32 [S, STATE_WORDS], page_table int32 [S, max_pages], slots int32 [R] (-1: idle). A row that runs
    gets its last token, that token's position p, seq_len p + 1 (which is also the position of the token to be
    drawn) and slot_mapping page * page_size + p % page_size, or -1 where the table has no page for p. Idle
    and finished rows get token 0, position 0, seq_len 0 and slot_mapping -1.

    Raises TypeError for a wrong dtype, ValueError for a wrong shape, device, stride, page size or backend.
    """
    device = state.device
    check_tensor("state", state, (None, STATE_WORDS), torch.int32)
    check_tensor("page_table", page_table, (state.shape[0], None), torch.int32, device)
    check_tensor("slots", slots, (None,), torch.int32, device)
    outputs = {"token": token, "position": position, "seq_len": seq_len, "slot_mapping": slot_mapping}
    for name, tensor in outputs.items():
        check_tensor(name, tensor, slots.shape, torch.int32, device)
    if page_size < 1:
        raise ValueError(f"page_size must be >= 1, got {page_size}")
    arguments = (state, page_table, slots, page_size, token, position, seq_len, slot_mapping)
    if torch.compiler.is_compiling():
        torch.ops.elastic_decode.decode_inputs(*arguments, backend)
    else:
        _find("decode_inputs", backend, device)(*arguments)


def enter_start(
    state_row: torch.Tensor,
    program_row: torch.Tensor,
    automata: torch.Tensor,
    phase: int,
    *,
    backend: str = "auto",
) -> None:
    """Writes the state with which a row begins its program in `phase`; runs on the host, on CPU tensors.

    state_row int32 [STATE_WORDS]: TOKEN, POSITION, LIMIT and DFA (where a prompt has begun a pattern) are
    kept, every other word is written.
    program_row int32 [PROGRAM_WORDS]; automata int32 [any]: the pool that Header.AUTOMATON points into. A
    start phase without budget has fired its expiry afterwards: its forced tokens are pending or, where there
    are none, FINISH is set and the row never emits a token.

    Raises TypeError for a wrong dtype, ValueError for a wrong shape, device, stride, phase or backend.
    """
    cpu = torch.device("cpu")
    check_tensor("state_row", state_row, (STATE_WORDS,), torch.int32, cpu)
    check_tensor("program_row", program_row, (PROGRAM_WORDS,), torch.int32, cpu)
    check_tensor("automata", automata, (None,), torch.int32, cpu)
    if not 0 <= phase < MAX_PHASES:
        raise ValueError(f"phase must be in 0..{MAX_PHASES - 1}, got {phase}")
    _find("enter_start", backend, cpu)(state_row, program_row, automata, phase)


_RING = ("ring_tokens", "ring_flags", "ring_logprobs", "ring_sampling_logprobs")


@torch.library.custom_op("elastic_decode::budget_step", mutates_args=("state", *_RING))
def _budget_step_op(
    state: torch.Tensor,
    programs: torch.Tensor,
    automata: torch.Tensor,
    slots: torch.Tensor,
    token: torch.Tensor,
    logits: torch.Tensor,
    lse: torch.Tensor,
    sampling_logprob: torch.Tensor,
    temperature: torch.Tensor,
    ring_tokens: torch.Tensor,
    ring_flags: torch.Tensor,
    ring_logprobs: torch.Tensor,
    ring_sampling_logprobs: torch.Tensor,
    ring_index: torch.Tensor,
    backend: str,
) -> None:
    tensors = (state, programs, automata, slots, token, logits, lse, sampling_logprob, temperature)
    ring = (ring_tokens, ring_flags, ring_logprobs, ring_sampling_logprobs, ring_index)
    _find("budget_step", backend, state.device)(*tensors, *ring)


@torch.library.custom_op(
    "elastic_decode::decode_inputs", mutates_args=("token", "position", "seq_len", "slot_mapping")
)
def _decode_inputs_op(
    state: torch.Tensor,
    page_table: torch.Tensor,
    slots: torch.Tensor,
    page_size: int,
    token: torch.Tensor,
    position: torch.Tensor,
    seq_len: torch.Tensor,
    slot_mapping: torch.Tensor,
    backend: str,
) -> None:
    arguments = (state, page_table, slots, page_size, token, position, seq_len, slot_mapping)
    _find("decode_inputs", backend, state.device)(*arguments)


@_budget_step_op.register_fake
def _(*arguments: object) -> None:
    """Nothing to allocate: every result is written in place."""


@_decode_inputs_op.register_fake
def _(*arguments: object) -> None:
    """Nothing to allocate: every result is written in place."""
