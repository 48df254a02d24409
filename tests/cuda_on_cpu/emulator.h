// Runs CUDA kernels on the CPU, for tests: a thread of a block is a fiber, which runs until it waits for the
// others. emulator.cpp implements it; cuda_runtime.h builds CUDA's names on it. Kernels use those, and the
// CPU meaning of inline PTX may use warp_exchange, barrier and *_async directly.
#pragma once
#include <cstddef>
#include <cstdint>

namespace cuda_on_cpu {

constexpr int kLanes = 32;
constexpr std::size_t kMostBytesPerLane = 256;

// Where in the source a thread waits: taken from the caller by a default argument.
struct Where {
  const char* file;
  int line;
  static constexpr Where here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

// 0: blocks and threads in order, asynchronous copies as late as is legal. Otherwise all three at random:
// code that lacks a barrier or a wait then gives wrong results for some seeds.
void set_schedule(std::uint64_t seed);

// Kernels launched so far.
std::int64_t launches();

// Waits until `count` threads of the block (0: all that have not exited) came to barrier `id`, 0 .. 15. Those
// that meet must have come from the same line of source.
void barrier(int id = 0, int count = 0, Where where = Where::here());

// Every thread of the warp in `mask` that has not exited gives `bytes` bytes and receives what all gave: 32
// strides of kMostBytesPerLane bytes, valid until its next exchange under this mask. Lanes that gave nothing
// read as poison. `kind` names the operation; those that meet must be of one kind.
const unsigned char* warp_exchange(std::uint32_t mask, const void* mine, std::size_t bytes, const char* kind,
                                   Where where = Where::here());

template <typename T>
struct Lanes {
  const unsigned char* bytes;
  const T& operator[](int lane) const {
    return *reinterpret_cast<const T*>(bytes + lane * kMostBytesPerLane);
  }
};

template <typename T>
Lanes<T> warp_exchange(std::uint32_t mask, const T& mine, const char* kind, Where where = Where::here()) {
  static_assert(sizeof(T) <= kMostBytesPerLane && alignof(T) <= 64);
  return {warp_exchange(mask, &mine, sizeof(T), kind, where)};
}

int lane();  // of the running thread
int warp();

// cp.async: copies `source_bytes` of the `bytes` and zeros the rest, some time between the call and the wait.
void copy_async(void* to, const void* from, std::size_t bytes, std::size_t source_bytes,
                Where where = Where::here());
void commit_async();           // what this thread copied since the last commit is a group
void wait_async(int pending);  // until at most the `pending` latest groups of this thread are on their way

// The block's dynamic shared memory, aligned to 1024 bytes.
void* dynamic_shared();

// Stops the launch with std::runtime_error, naming kernel, block and thread.
[[noreturn]] void fail(const char* what, Where where = Where::here());

// What cudaLaunchKernelEx calls: `body(arguments)` is the kernel with its arguments.
struct Shape {
  unsigned x, y, z;
};
void run(const void* kernel, Shape grid, Shape block, std::size_t shared_bytes, void (*body)(void*),
         void* arguments);
void allow_shared(const void* kernel, std::size_t bytes);

}  // namespace cuda_on_cpu
