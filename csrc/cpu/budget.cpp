#include "budget.h"

#include "cpu/ops.h"

namespace elastic_decode {

// A row is a few hundred nanoseconds: threads would cost more than they save.
void budget_step(const budget::Step& step, std::int64_t rows) {
  for (std::int64_t row = 0; row < rows; ++row) budget::step_row(step, row);
}

void decode_inputs(const budget::DecodeInputs& inputs, std::int64_t rows) {
  for (std::int64_t row = 0; row < rows; ++row) budget::decode_inputs_row(inputs, row);
}

void enter_start(std::int32_t* state_row, const std::int32_t* program_row, const std::int32_t* automata,
                 std::int32_t phase) {
  budget::Machine(state_row, program_row, automata).enter_start(phase);
}

namespace {

using namespace budget;

#define WORD(group, name) {#group "." #name, group::name}
#define CONSTANT(name) {#name, name}

const BudgetConstant kLayout[] = {
    CONSTANT(MAX_PHASES),
    CONSTANT(MAX_EVENTS),
    CONSTANT(MAX_ENDS),
    CONSTANT(STATE_WORDS),
    CONSTANT(PHASE_WORDS),
    CONSTANT(EVENT_WORDS),
    CONSTANT(EVENTS),
    CONSTANT(PROGRAM_WORDS),
    CONSTANT(AUTOMATON_WORDS),
    WORD(State, FINISH),
    WORD(State, TOKEN),
    WORD(State, POSITION),
    WORD(State, LIMIT),
    WORD(State, PHASE),
    WORD(State, USED),
    WORD(State, LEFT),
    WORD(State, DFA),
    WORD(State, FORCED_AT),
    WORD(State, FORCED_LEFT),
    WORD(State, FORCED_NEXT),
    WORD(State, END_REQUESTED),
    WORD(State, THINK_END),
    WORD(State, EVENT_COUNTS),
    WORD(Header, AUTOMATON),
    WORD(Header, NUM_PHASES),
    WORD(Header, IGNORE_EOS),
    WORD(Header, PHASES),
    WORD(PhaseWord, LABEL),
    WORD(PhaseWord, BUDGET),
    WORD(PhaseWord, CARRY),
    WORD(PhaseWord, ON_EXPIRE),
    WORD(PhaseWord, ON_EOS),
    WORD(PhaseWord, ENDS),
    WORD(EventWord, INJECT),
    WORD(EventWord, NEXT),
    WORD(EventWord, REPLACE),
    WORD(EventWord, MAX_COUNT),
    WORD(EventWord, FALLBACK),
    WORD(EventWord, THINK_END),
    WORD(AutomatonWord, NUM_STATES),
    WORD(AutomatonWord, NUM_CLASSES),
    WORD(AutomatonWord, NUM_INJECTS),
    WORD(AutomatonWord, VOCAB_SIZE),
    WORD(AutomatonWord, CLASS_OF),
    WORD(AutomatonWord, NEXT),
    WORD(AutomatonWord, MATCH),
    WORD(AutomatonWord, EOS),
    WORD(AutomatonWord, INJECT),
    WORD(Label, THINK),
    WORD(Label, SOLVE),
    WORD(Finish, RUNNING),
    WORD(Finish, EOS),
    WORD(Finish, BUDGET),
    WORD(Finish, LENGTH),
    WORD(Finish, INVALID),
    WORD(Finish, HOST),
    WORD(ThinkEnd, NONE),
    WORD(ThinkEnd, NATURAL),
    WORD(ThinkEnd, FORCED),
    WORD(ThinkEnd, EOS),
    WORD(Flag, VALID),
    WORD(Flag, FORCED),
    WORD(Flag, SOLVE),
    WORD(Flag, FINISH_SHIFT),
    WORD(Flag, THINK_END_SHIFT),
};

#undef WORD
#undef CONSTANT

}  // namespace

BudgetLayout budget_layout() {
  return {kLayout, sizeof kLayout / sizeof kLayout[0]};
}

}  // namespace elastic_decode
