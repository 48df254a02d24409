// The budget machine: what one row does in one decode step. One source for the CPU and for CUDA: no torch, no
// STL, no allocation, every loop bounded. kernels/budget/reference.py is the same in plain Python; the tables
// are described in kernels/budget/layout.py, which numbers the words alike (a test compares).
//
// Tables are trusted as far as their offsets go. What a wrong token or program could break is checked: a draw
// outside the automaton's vocabulary, an event or phase index out of range, a replacement with nothing to
// force and zero budgets that lead in a circle all end the row with Finish::INVALID.
#pragma once
#include <math.h>

#include <cstdint>

#ifndef ELASTIC_HOST_DEVICE
#ifdef __CUDACC__
#define ELASTIC_HOST_DEVICE __host__ __device__
#else
#define ELASTIC_HOST_DEVICE
#endif
#endif

namespace elastic_decode {
namespace budget {

enum : int { MAX_PHASES = 8, MAX_EVENTS = 24, MAX_ENDS = 4 };

namespace State {
enum : int {
  FINISH = 0,
  TOKEN = 1,
  POSITION = 2,
  LIMIT = 3,
  PHASE = 4,
  USED = 5,
  LEFT = 6,
  DFA = 7,
  FORCED_AT = 8,
  FORCED_LEFT = 9,
  FORCED_NEXT = 10,
  END_REQUESTED = 11,
  THINK_END = 12,
  EVENT_COUNTS = 16
};
}
enum : int { STATE_WORDS = State::EVENT_COUNTS + MAX_EVENTS };

namespace Header {
enum : int { AUTOMATON = 0, NUM_PHASES = 1, IGNORE_EOS = 2, PHASES = 8 };
}

namespace PhaseWord {
enum : int { LABEL = 0, BUDGET = 1, CARRY = 2, ON_EXPIRE = 3, ON_EOS = 4, ENDS = 8 };
}
enum : int { PHASE_WORDS = PhaseWord::ENDS + 2 * MAX_ENDS };

namespace EventWord {
enum : int { INJECT = 0, NEXT = 1, REPLACE = 2, MAX_COUNT = 3, FALLBACK = 4, THINK_END = 5 };
}
enum : int {
  EVENT_WORDS = 8,
  EVENTS = Header::PHASES + MAX_PHASES * PHASE_WORDS,
  PROGRAM_WORDS = EVENTS + MAX_EVENTS * EVENT_WORDS
};

namespace AutomatonWord {
enum : int {
  NUM_STATES = 0,
  NUM_CLASSES = 1,
  NUM_INJECTS = 2,
  VOCAB_SIZE = 3,
  CLASS_OF = 4,
  NEXT = 5,
  MATCH = 6,
  EOS = 7,
  INJECT = 8
};
}
enum : int { AUTOMATON_WORDS = 16 };

namespace Label {
enum : int { THINK = 0, SOLVE = 1 };
}

namespace Finish {
enum : int { RUNNING = 0, EOS = 1, BUDGET = 2, LENGTH = 3, INVALID = 4, HOST = 5 };
}

namespace ThinkEnd {
enum : int { NONE = 0, NATURAL = 1, FORCED = 2, EOS = 3 };
}

namespace Flag {
enum : int { VALID = 1, FORCED = 2, SOLVE = 4, FINISH_SHIFT = 4, THINK_END_SHIFT = 8 };
}

// What a step did: `token` is -1 where nothing was emitted, `flags` are the ring entry's.
struct Emitted {
  int32_t token;
  int32_t flags;
};

// One row of the machine: its state, its program and the automaton the program names.
class Machine {
 public:
  ELASTIC_HOST_DEVICE Machine(int32_t* state, const int32_t* program, const int32_t* automata)
      : state_(state),
        program_(program),
        automata_(automata),
        automaton_(automata + program[Header::AUTOMATON]) {}

  // Begins the program in `start`; TOKEN, POSITION, LIMIT and DFA stay as they are. A start without budget
  // has fired its expiry when this returns: its forced tokens are pending, or FINISH is set.
  ELASTIC_HOST_DEVICE void enter_start(int32_t start) {
    for (int word = 0; word < STATE_WORDS; ++word) {
      const bool kept =
          word == State::TOKEN || word == State::POSITION || word == State::LIMIT || word == State::DFA;
      if (!kept) state_[word] = 0;
    }
    if (!is_phase(start)) {
      state_[State::FINISH] = Finish::INVALID;
      return;
    }
    state_[State::PHASE] = start;
    state_[State::LEFT] = phase(PhaseWord::BUDGET) < 0 ? -1 : phase(PhaseWord::BUDGET);
    go(start);
  }

  // One decode step with the token drawn for the row (-1: there was no candidate). An idle row gives flags 0.
  ELASTIC_HOST_DEVICE Emitted step(int32_t draw) {
    if (state_[State::FINISH] != Finish::RUNNING) return {-1, 0};
    end_thinking_if_requested();

    int event = -1, token_class = 0;
    bool by_eos = false;
    if (sampling()) {
      const int32_t vocab_size = automaton_[AutomatonWord::VOCAB_SIZE];
      if (draw < 0 || draw >= vocab_size) {
        state_[State::FINISH] = Finish::INVALID;
      } else {
        token_class = automaton_[automaton_[AutomatonWord::CLASS_OF] + draw];
        event = resolve(event_of(token_class, &by_eos));
        if (event >= 0 && event_word(event, EventWord::REPLACE)) {
          fire(event, true);
          // Nothing to emit in the draw's place, and the draw is no token: a malformed program.
          if (sampling()) state_[State::FINISH] = Finish::INVALID;
        }
      }
    }
    if (state_[State::FINISH] != Finish::RUNNING) return {-1, flags(0)};

    int32_t token = draw;
    int entry = Flag::VALID | (phase(PhaseWord::LABEL) == Label::SOLVE ? Flag::SOLVE : 0);
    if (state_[State::FORCED_LEFT] > 0) {
      entry |= Flag::FORCED;
      token = automata_[state_[State::FORCED_AT]++];
      if (--state_[State::FORCED_LEFT] == 0) {
        state_[State::DFA] = 0;
        go(state_[State::FORCED_NEXT]);
      }
    } else {
      state_[State::USED] += 1;
      state_[State::DFA] = automaton_[automaton_[AutomatonWord::NEXT] + cell(token_class)];
      if (event >= 0) {
        fire(event, true);
        // EOS as an end belongs to the solution, also where it ends the run inside the thinking.
        if (by_eos && state_[State::FINISH] == Finish::EOS) entry |= Flag::SOLVE;
      } else {
        go(state_[State::PHASE]);
      }
    }

    state_[State::TOKEN] = token;
    state_[State::POSITION] += 1;
    if (state_[State::FINISH] == Finish::RUNNING && state_[State::POSITION] + 1 >= state_[State::LIMIT]) {
      state_[State::FINISH] = Finish::LENGTH;
    }
    return {token, flags(entry)};
  }

 private:
  ELASTIC_HOST_DEVICE static bool is_phase(int32_t index) { return index >= 0 && index < MAX_PHASES; }
  ELASTIC_HOST_DEVICE static bool is_event(int32_t index) { return index >= 0 && index < MAX_EVENTS; }

  ELASTIC_HOST_DEVICE int32_t phase(int word) const {
    return program_[Header::PHASES + state_[State::PHASE] * PHASE_WORDS + word];
  }

  ELASTIC_HOST_DEVICE int32_t event_word(int event, int word) const {
    return program_[EVENTS + event * EVENT_WORDS + word];
  }

  ELASTIC_HOST_DEVICE int32_t cell(int token_class) const {
    return state_[State::DFA] * automaton_[AutomatonWord::NUM_CLASSES] + token_class;
  }

  ELASTIC_HOST_DEVICE int flags(int entry) const {
    return entry | state_[State::FINISH] << Flag::FINISH_SHIFT |
           state_[State::THINK_END] << Flag::THINK_END_SHIFT;
  }

  // The row runs and no forced token is pending: the next token is a draw.
  ELASTIC_HOST_DEVICE bool sampling() const {
    return state_[State::FINISH] == Finish::RUNNING && state_[State::FORCED_LEFT] == 0;
  }

  // A request waits while tokens are being forced; it is spent once it acted, or outside the thinking.
  ELASTIC_HOST_DEVICE void end_thinking_if_requested() {
    if (!state_[State::END_REQUESTED]) return;
    const bool thinking = phase(PhaseWord::LABEL) == Label::THINK;
    if (thinking && state_[State::FORCED_LEFT] > 0) return;
    state_[State::END_REQUESTED] = 0;
    const int event = thinking ? resolve(phase(PhaseWord::ON_EXPIRE)) : -1;
    if (event >= 0) fire(event, false);
  }

  // The event a sampled token of this class triggers where the row stands, or -1. An end beats EOS.
  ELASTIC_HOST_DEVICE int event_of(int token_class, bool* by_eos) const {
    const uint32_t match =
        static_cast<uint32_t>(automaton_[automaton_[AutomatonWord::MATCH] + cell(token_class)]);
    for (int end = 0; match != 0 && end < MAX_ENDS; ++end) {
      const int32_t pattern = phase(PhaseWord::ENDS + 2 * end);
      if (pattern >= 0 && pattern < 32 && (match >> pattern & 1u)) {
        return phase(PhaseWord::ENDS + 2 * end + 1);
      }
    }
    *by_eos = automaton_[automaton_[AutomatonWord::EOS] + token_class] && !program_[Header::IGNORE_EOS];
    return *by_eos ? phase(PhaseWord::ON_EOS) : -1;
  }

  // The event to use in place of one that is spent; -1 (no event) where the fallbacks run out.
  ELASTIC_HOST_DEVICE int resolve(int event) const {
    for (int hop = 0; hop < MAX_EVENTS && is_event(event); ++hop) {
      const int32_t most = event_word(event, EventWord::MAX_COUNT);
      if (most < 0 || state_[State::EVENT_COUNTS + event] < most) return event;
      event = event_word(event, EventWord::FALLBACK);
    }
    return -1;
  }

  // Counts the event and forces its tokens. True where it forces none: the row then moves on at once.
  ELASTIC_HOST_DEVICE bool begin(int event) {
    state_[State::EVENT_COUNTS + event] += 1;
    const int32_t think_end = event_word(event, EventWord::THINK_END);
    if (think_end >= 0) state_[State::THINK_END] = think_end;
    const int32_t inject = event_word(event, EventWord::INJECT);
    if (inject < 0) return true;
    const int32_t* span = automaton_ + automaton_[AutomatonWord::INJECT] +
                          2 * (inject * automaton_[AutomatonWord::NUM_STATES] + state_[State::DFA]);
    if (span[1] <= 0) return true;
    state_[State::FORCED_AT] = program_[Header::AUTOMATON] + span[0];
    state_[State::FORCED_LEFT] = span[1];
    state_[State::FORCED_NEXT] = event_word(event, EventWord::NEXT);
    return false;
  }

  // Fires a resolved event. A draw's event leaves nothing half written; an expiry keeps the DFA, so that a
  // half-written close survives into a grace phase.
  ELASTIC_HOST_DEVICE void fire(int event, bool by_draw) {
    if (!begin(event)) return;
    if (by_draw) state_[State::DFA] = 0;
    go(event_word(event, EventWord::NEXT));
  }

  // Moves to phase `next` (or finishes where it is negative), then expires it while no budget is left: on a
  // phase of zero budget, and on a return to one that is used up.
  ELASTIC_HOST_DEVICE void go(int32_t next) {
    for (int fired = 0;; ++fired) {
      if (next < 0) {
        state_[State::FINISH] = -next;
        return;
      }
      if (next != state_[State::PHASE]) {
        if (!is_phase(next)) break;
        enter(next);
      }
      if (state_[State::LEFT] < 0 || state_[State::USED] < state_[State::LEFT]) return;
      const int event = resolve(phase(PhaseWord::ON_EXPIRE));
      if (event < 0) return;
      // A chain longer than there are phases goes in a circle.
      if (fired == MAX_PHASES) break;
      if (!begin(event)) return;
      next = event_word(event, EventWord::NEXT);
    }
    state_[State::FINISH] = Finish::INVALID;
  }

  ELASTIC_HOST_DEVICE void enter(int32_t next) {
    const int32_t left = state_[State::LEFT], used = state_[State::USED];
    state_[State::PHASE] = next;
    state_[State::USED] = 0;
    int32_t budget = phase(PhaseWord::BUDGET);
    if (budget >= 0 && phase(PhaseWord::CARRY)) {
      budget = left < 0 ? -1 : budget + (left > used ? left - used : 0);
    }
    state_[State::LEFT] = budget < 0 ? -1 : budget;
  }

  int32_t* state_;
  const int32_t* program_;
  const int32_t* automata_;
  const int32_t* automaton_;
};

// The tensors of a step over all rows; see kernels/budget/__init__.py for shapes.
struct Step {
  int32_t* state;             // [slots, STATE_WORDS]
  const int32_t* programs;    // [slots, PROGRAM_WORDS]
  const int32_t* automata;    // [any]
  const int32_t* slots;       // [rows]
  const int32_t* draws;       // [rows]
  const float* logits;        // [rows, logits_width]
  const float* lse;           // [rows]
  const float* draw_logprob;  // [rows]: sampling_logprob of the draws
  const float* temperature;   // [slots]
  int32_t* ring_tokens;       // [ring_length, ring_width], as the other three
  int32_t* ring_flags;
  float* ring_logprobs;
  float* ring_sampling_logprobs;
  const int32_t* ring_index;  // [1]
  int64_t logits_width;
  int64_t ring_length;
  int64_t ring_width;
};

// Where row `row` of a decode step has its entry of the ring.
ELASTIC_HOST_DEVICE inline int64_t ring_entry(const Step& s, int64_t row) {
  int64_t ring_row = s.ring_index[0] % s.ring_length;
  if (ring_row < 0) ring_row += s.ring_length;
  return ring_row * s.ring_width + row;
}

// Steps the machine of row `row`, whose slot's state and program these are, perhaps in faster memory, and
// writes the row's entry of the ring. An entry that holds no token has only its flags written.
ELASTIC_HOST_DEVICE inline Emitted step_slot(const Step& s, int64_t row, int64_t slot, int32_t* state,
                                             const int32_t* program) {
  const int64_t entry = ring_entry(s, row);
  Machine machine(state, program, s.automata);
  const Emitted emitted = machine.step(s.draws[row]);
  s.ring_flags[entry] = emitted.flags;
  if (!(emitted.flags & Flag::VALID)) return emitted;

  float logprob = -INFINITY;
  if (emitted.token >= 0 && emitted.token < s.logits_width) {
    const float t = s.temperature[slot];
    logprob = s.logits[row * s.logits_width + emitted.token] / (t > 0.0f ? t : 1.0f) - s.lse[row];
  }
  s.ring_tokens[entry] = emitted.token;
  s.ring_logprobs[entry] = logprob;
  s.ring_sampling_logprobs[entry] = emitted.flags & Flag::FORCED ? 0.0f : s.draw_logprob[row];
  return emitted;
}

// Row `row` of a decode step, on the tables as they lie.
ELASTIC_HOST_DEVICE inline void step_row(const Step& s, int64_t row) {
  const int64_t slot = s.slots[row];
  if (slot < 0) {
    s.ring_flags[ring_entry(s, row)] = 0;
  } else {
    step_slot(s, row, slot, s.state + slot * STATE_WORDS, s.programs + slot * PROGRAM_WORDS);
  }
}

// The tensors of decode_inputs.
struct DecodeInputs {
  const int32_t* state;       // [slots, STATE_WORDS]
  const int32_t* page_table;  // [slots, max_pages]
  const int32_t* slots;       // [rows]
  int32_t* token;             // [rows], as the other three
  int32_t* position;
  int32_t* seq_len;
  int32_t* slot_mapping;
  int64_t max_pages;
  int64_t page_size;
};

// The forward pass's input of one row: its last token, where it stands and where its KV goes. Idle rows get
// length 0 and write no KV.
ELASTIC_HOST_DEVICE inline void decode_inputs_row(const DecodeInputs& d, int64_t row) {
  const int64_t slot = d.slots[row];
  const int32_t* state = slot < 0 ? nullptr : d.state + slot * STATE_WORDS;
  if (state == nullptr || state[State::FINISH] != Finish::RUNNING) {
    d.token[row] = 0;
    d.position[row] = 0;
    d.seq_len[row] = 0;
    d.slot_mapping[row] = -1;
    return;
  }
  const int64_t position = state[State::POSITION];
  const int64_t index = position / d.page_size;
  const int64_t page = position >= 0 && index < d.max_pages ? d.page_table[slot * d.max_pages + index] : -1;
  d.token[row] = state[State::TOKEN];
  d.position[row] = static_cast<int32_t>(position);
  d.seq_len[row] = static_cast<int32_t>(position + 1);
  d.slot_mapping[row] = page < 0 ? -1 : static_cast<int32_t>(page * d.page_size + position % d.page_size);
}

}  // namespace budget
}  // namespace elastic_decode
