#include "emulator.h"

#include <cuda_runtime.h>
#include <link.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cuda_on_cpu {
namespace {

constexpr std::size_t kStackBytes = 256 << 10, kGuardBytes = 4096;
constexpr std::size_t kMostShared = 227 << 10, kSharedUnasked = 48 << 10;
constexpr std::uint32_t kPoison =
    0x7fffffffu;  // a NaN as float32, its halves NaN in 16 and its bytes in 8 bits

// The library's thread-local variables are the kernels' static shared memory, and this.
thread_local unsigned char anchor;

struct Copy {
  void* to;
  const void* from;
  std::size_t bytes, source_bytes;
};

// Threads that wait for each other, and where the first of them does.
struct Meeting {
  std::uint64_t generation = 0;
  const char* kind = nullptr;
  Where where{};
};

struct Barrier : Meeting {
  int arrived = 0, count = 0;
};

struct Exchange : Meeting {
  std::uint32_t mask = 0, arrived = 0;
  alignas(64) unsigned char data[2][kLanes * kMostBytesPerLane];
};

struct Fiber {
  ucontext_t start{};
  jmp_buf at{};
  unsigned char* stack = nullptr;
  bool begun = false, done = true;
  int id = 0;
  uint3 index{};
  const Meeting* waits_for = nullptr;
  std::uint64_t generation = 0;  // of what it waits for
  std::vector<Copy> open;        // asynchronous copies not yet in a group
  std::deque<std::vector<Copy>> groups;
};

struct Warp {
  std::uint32_t alive = 0;
  std::vector<std::unique_ptr<Exchange>> exchanges;
};

struct State {
  std::uint64_t seed = 0, random = 0;
  std::int64_t launches = 0;
  std::map<const void*, std::size_t> allowed;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Warp> warps;
  Barrier barriers[16];
  int alive = 0;
  Fiber* running = nullptr;
  jmp_buf scheduler{};
  ucontext_t returned{};
  std::string error;
  void (*body)(void*) = nullptr;
  void* arguments = nullptr;
  std::vector<unsigned char> shared;
  unsigned char* shared_begin = nullptr;
  std::size_t shared_bytes = 0;
};

State s;

std::uint64_t random_bits() {  // splitmix64
  std::uint64_t z = s.random += 0x9e3779b97f4a7c15u;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return z ^ z >> 31;
}

void shuffle(std::vector<int>& order) {
  if (s.seed == 0) return;
  for (std::size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random_bits() % i]);
}

std::string text(const char* name, uint3 at) {
  return std::string(name) + " (" + std::to_string(at.x) + ", " + std::to_string(at.y) + ", " +
         std::to_string(at.z) + ")";
}

std::string text(Where where) {
  return std::string(where.file) + ":" + std::to_string(where.line);
}

void poison(void* begin, std::size_t bytes) {
  for (std::size_t at = 0; at < bytes; at += sizeof kPoison) {
    std::memcpy(static_cast<unsigned char*>(begin) + at, &kPoison, std::min(sizeof kPoison, bytes - at));
  }
}

struct Range {
  unsigned char* begin;
  std::size_t bytes;
};

// Static shared memory: the thread-local segment that `anchor` lies in.
Range static_shared() {
  Range found{nullptr, 0};
  anchor = 0;
  dl_iterate_phdr(
      [](dl_phdr_info* info, std::size_t, void* data) {
        auto* begin = static_cast<unsigned char*>(info->dlpi_tls_data);
        for (int i = 0; begin && i < info->dlpi_phnum; ++i) {
          const auto& segment = info->dlpi_phdr[i];
          if (segment.p_type == PT_TLS && &anchor >= begin && &anchor < begin + segment.p_memsz) {
            *static_cast<Range*>(data) = {begin, segment.p_memsz};
          }
        }
        return 0;
      },
      &found);
  if (!found.begin) throw std::runtime_error("cuda_on_cpu: static shared memory not found");
  return found;
}

// These two leave a stack by longjmp: nothing of theirs may be needed afterwards.
__attribute__((noinline)) void to_scheduler(Fiber& fiber) {
  if (_setjmp(fiber.at) == 0) _longjmp(s.scheduler, 1);
}

__attribute__((noinline)) void to_fiber(Fiber& fiber) {
  if (_setjmp(s.scheduler) != 0) return;
  if (fiber.begun) _longjmp(fiber.at, 1);
  fiber.begun = true;
  setcontext(&fiber.start);
}

bool complete(const Barrier& b) {
  return b.arrived > 0 && b.arrived >= (b.count ? b.count : s.alive);
}

void release(Barrier& b) {
  b.arrived = 0;
  ++b.generation;
}

void release(Exchange& e, std::uint32_t arrived) {
  // Lanes that gave nothing read as poison, here and after the buffer's last use.
  for (int i = 0; i < kLanes; ++i) {
    if (!(arrived >> i & 1u)) {
      poison(e.data[e.generation & 1] + static_cast<std::size_t>(i) * kMostBytesPerLane, kMostBytesPerLane);
    }
  }
  e.arrived = 0;
  ++e.generation;
}

void wait(Fiber& fiber, const Meeting& meeting, std::uint64_t generation) {
  fiber.waits_for = &meeting;
  fiber.generation = generation;
  while (meeting.generation == generation) to_scheduler(fiber);
  fiber.waits_for = nullptr;
}

// Whoever waits for a thread that exited need not wait for it any longer.
void exit_thread(Fiber& fiber) {
  fiber.done = true;
  --s.alive;
  Warp& warp = s.warps[static_cast<std::size_t>(fiber.id / kLanes)];
  warp.alive &= ~(1u << fiber.id % kLanes);
  for (auto& e : warp.exchanges) {
    if (e->arrived && !(e->mask & warp.alive & ~e->arrived)) release(*e, e->arrived);
  }
  for (Barrier& b : s.barriers) {
    if (complete(b)) release(b);
  }
}

// A fiber outlives its block: the next one's thread of this number takes it over.
void fiber_main() {
  for (;;) {
    s.body(s.arguments);
    exit_thread(*s.running);
    to_scheduler(*s.running);
  }
}

void make_fiber(std::size_t id) {
  if (s.fibers.size() <= id) s.fibers.resize(id + 1);
  if (s.fibers[id]) return;
  auto fiber = std::make_unique<Fiber>();
  void* stack = mmap(nullptr, kStackBytes + kGuardBytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stack == MAP_FAILED) throw std::runtime_error("cuda_on_cpu: no memory for a thread's stack");
  mprotect(stack, kGuardBytes, PROT_NONE);
  fiber->stack = static_cast<unsigned char*>(stack);
  fiber->id = static_cast<int>(id);
  getcontext(&fiber->start);
  fiber->start.uc_stack.ss_sp = fiber->stack + kGuardBytes;
  fiber->start.uc_stack.ss_size = kStackBytes;
  makecontext(&fiber->start, fiber_main, 0);
  s.fibers[id] = std::move(fiber);
}

// After an error fibers stand anywhere: they are given up.
void drop_fibers() {
  for (auto& fiber : s.fibers) munmap(fiber->stack, kStackBytes + kGuardBytes);
  s.fibers.clear();
}

std::string deadlock(int threads) {
  std::string message = "deadlock:";
  std::map<std::string, int> waiting;
  for (int t = 0; t < threads; ++t) {
    const Fiber& fiber = *s.fibers[static_cast<std::size_t>(t)];
    if (fiber.done) {
      ++waiting["exited"];
    } else {
      ++waiting[std::string("wait in ") + fiber.waits_for->kind + " at " + text(fiber.waits_for->where)];
    }
  }
  for (const auto& [what, count] : waiting) message += "\n  " + std::to_string(count) + " threads " + what;
  return message;
}

// Runs those threads of a warp that can, each up to where it waits next. Whether any could.
bool run_warp(int warp, int threads, std::vector<int>& lanes) {
  bool moved = false;
  shuffle(lanes);
  for (const int lane : lanes) {
    const int t = warp * kLanes + lane;
    if (t >= threads) continue;
    Fiber& fiber = *s.fibers[static_cast<std::size_t>(t)];
    if (fiber.done || (fiber.waits_for && fiber.waits_for->generation == fiber.generation)) continue;
    moved = true;
    s.running = &fiber;
    threadIdx = fiber.index;
    to_fiber(fiber);
    if (!s.error.empty()) break;
  }
  return moved;
}

void run_block(int threads, std::vector<int>& warps, std::vector<int>& lanes) {
  s.alive = threads;
  if (s.warps.size() < warps.size()) s.warps.resize(warps.size());
  for (Warp& warp : s.warps) {
    warp.alive = 0;
    for (auto& e : warp.exchanges) e->arrived = 0;
  }
  for (Barrier& b : s.barriers) b = Barrier{};
  for (int t = 0; t < threads; ++t) {
    Fiber& fiber = *s.fibers[static_cast<std::size_t>(t)];
    const unsigned at = static_cast<unsigned>(t);
    fiber.index = {at % blockDim.x, at / blockDim.x % blockDim.y, at / (blockDim.x * blockDim.y)};
    fiber.done = false;
    fiber.waits_for = nullptr;
    fiber.open.clear();
    fiber.groups.clear();
    s.warps[at / kLanes].alive |= 1u << at % kLanes;
  }
  shuffle(warps);
  while (s.alive > 0) {
    // In order: every warp in its turn. At random: the first warp of an order that seldom changes runs
    // whenever it can, so that some warps are as far ahead of others as barriers let them.
    bool moved = false;
    if (s.seed != 0 && random_bits() % 64 == 0) shuffle(warps);
    for (const int warp : warps) {
      moved = run_warp(warp, threads, lanes) || moved;
      if (!s.error.empty()) return;
      if (moved && s.seed != 0) break;
    }
    if (!moved) {
      s.error = deadlock(threads);
      return;
    }
  }
}

void meet(Meeting& meeting, bool first, const char* kind, Where where) {
  if (first) {
    meeting.kind = kind;
    meeting.where = where;
  } else if (std::strcmp(meeting.kind, kind) != 0 || meeting.where.line != where.line ||
             std::strcmp(meeting.where.file, where.file) != 0) {
    const std::string message =
        std::string("is in ") + kind + ", others in " + meeting.kind + " at " + text(meeting.where);
    fail(message.c_str(), where);
  }
}

void copy(const Copy& c) {
  std::memcpy(c.to, c.from, c.source_bytes);
  std::memset(static_cast<unsigned char*>(c.to) + c.source_bytes, 0, c.bytes - c.source_bytes);
}

}  // namespace

void set_schedule(std::uint64_t seed) {
  s.seed = s.random = seed;
}

std::int64_t launches() {
  return s.launches;
}

void fail(const char* what, Where where) {
  if (!s.running) throw std::runtime_error(std::string("cuda_on_cpu: ") + what);
  s.error = text("thread", threadIdx) + " of " + text("block", blockIdx) + " at " + text(where) + " " + what;
  to_scheduler(*s.running);
  std::abort();  // the scheduler never returns here
}

int lane() {
  return s.running->id % kLanes;
}
int warp() {
  return s.running->id / kLanes;
}

void barrier(int id, int count, Where where) {
  if (id < 0 || id > 15) fail("names a barrier outside 0 .. 15", where);
  Barrier& b = s.barriers[id];
  meet(b, b.arrived == 0, "a barrier", where);
  if (b.arrived > 0 && b.count != count) fail("waits at a barrier for another number of threads", where);
  b.count = count;
  ++b.arrived;
  const std::uint64_t generation = b.generation;
  if (complete(b)) return release(b);
  wait(*s.running, b, generation);
}

const unsigned char* warp_exchange(std::uint32_t mask, const void* mine, std::size_t bytes, const char* kind,
                                   Where where) {
  Warp& warp = s.warps[static_cast<std::size_t>(cuda_on_cpu::warp())];
  const std::uint32_t bit = 1u << lane();
  if (!(mask & bit)) fail("is not in the mask that it names", where);
  auto found = std::find_if(warp.exchanges.begin(), warp.exchanges.end(),
                            [&](const auto& e) { return e->mask == mask; });
  if (found == warp.exchanges.end()) {
    warp.exchanges.push_back(std::make_unique<Exchange>());
    found = warp.exchanges.end() - 1;
    (*found)->mask = mask;
  }
  Exchange& e = **found;
  meet(e, e.arrived == 0, kind, where);
  const std::uint64_t generation = e.generation;
  unsigned char* data = e.data[generation & 1];
  std::memcpy(data + static_cast<std::size_t>(lane()) * kMostBytesPerLane, mine, bytes);
  e.arrived |= bit;
  if (!(mask & warp.alive & ~e.arrived)) {
    release(e, e.arrived);
  } else {
    wait(*s.running, e, generation);
  }
  return data;
}

void copy_async(void* to, const void* from, std::size_t bytes, std::size_t source_bytes, Where where) {
  if (bytes != 4 && bytes != 8 && bytes != 16) fail("copies other than 4, 8 or 16 bytes", where);
  if (source_bytes > bytes) fail("copies more bytes than there is room for", where);
  if (reinterpret_cast<std::uintptr_t>(to) % bytes || reinterpret_cast<std::uintptr_t>(from) % bytes) {
    fail("copies between addresses that are not multiples of the size", where);
  }
  poison(to, bytes);
  const Copy c{to, from, bytes, source_bytes};
  if (s.seed != 0 && random_bits() % 2) return copy(c);
  s.running->open.push_back(c);
}

void commit_async() {
  s.running->groups.push_back(std::move(s.running->open));
  s.running->open.clear();
}

void wait_async(int pending) {
  auto& groups = s.running->groups;
  while (groups.size() > static_cast<std::size_t>(pending)) {
    for (const Copy& c : groups.front()) copy(c);
    groups.pop_front();
  }
}

void* dynamic_shared() {
  return s.shared_begin;
}

void allow_shared(const void* kernel, std::size_t bytes) {
  s.allowed[kernel] = bytes;
}

void run(const void* kernel, Shape grid, Shape block, std::size_t shared_bytes, void (*body)(void*),
         void* arguments) {
  const auto refuse = [](const std::string& why) { throw std::runtime_error("cuda_on_cpu: " + why); };
  const int threads = static_cast<int>(block.x * block.y * block.z);
  if (threads < 1 || threads > 1024 || block.z > 64)
    refuse("a block of " + std::to_string(threads) + " threads");
  if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    refuse(text("a grid of", {grid.x, grid.y, grid.z}));
  }
  const Range fixed = static_shared();
  const auto asked = s.allowed.find(kernel);
  if (shared_bytes > kMostShared ||
      (shared_bytes > kSharedUnasked && (asked == s.allowed.end() || asked->second < shared_bytes))) {
    refuse(std::to_string(shared_bytes) + " bytes of dynamic shared memory, which were not asked for");
  }
  ++s.launches;
  s.body = body;
  s.arguments = arguments;
  s.error.clear();
  for (std::size_t t = 0; t < static_cast<std::size_t>(threads); ++t) make_fiber(t);
  // Room to align, and behind the memory a stretch of poison that must stay.
  constexpr std::size_t kFence = 4096;
  s.shared.resize(shared_bytes + 1024 + kFence);
  s.shared_begin = s.shared.data() + (-reinterpret_cast<std::uintptr_t>(s.shared.data()) & 1023);
  gridDim = {grid.x, grid.y, grid.z};
  blockDim = {block.x, block.y, block.z};
  const std::size_t blocks = static_cast<std::size_t>(grid.x) * grid.y * grid.z;
  const auto in_order = [](std::size_t count) {
    std::vector<int> order(count);
    std::iota(order.begin(), order.end(), 0);
    return order;
  };
  std::vector<int> blocks_in_order = in_order(blocks), lanes = in_order(kLanes);
  std::vector<int> warps = in_order(static_cast<std::size_t>((threads + kLanes - 1) / kLanes));
  shuffle(blocks_in_order);
  std::vector<unsigned char> fence(kFence);
  poison(fence.data(), kFence);
  for (const int at : blocks_in_order) {
    const unsigned b = static_cast<unsigned>(at);
    blockIdx = {b % grid.x, b / grid.x % grid.y, b / (grid.x * grid.y)};
    poison(fixed.begin, fixed.bytes);
    poison(s.shared_begin, shared_bytes);
    std::memcpy(s.shared_begin + shared_bytes, fence.data(), kFence);
    run_block(threads, warps, lanes);
    s.running = nullptr;
    if (s.error.empty() && std::memcmp(s.shared_begin + shared_bytes, fence.data(), kFence) != 0) {
      s.error = text("block", blockIdx) + " wrote past its dynamic shared memory";
    }
    if (!s.error.empty()) {
      drop_fibers();
      refuse(s.error);
    }
  }
}

}  // namespace cuda_on_cpu
