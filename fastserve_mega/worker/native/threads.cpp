#include "threads.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>

#include "stage.h"

namespace fastserve {
namespace {

// About 100 microseconds: longer than the threads of a step wait for each other while all of them
// have a core, and short enough for a process that needs the core of one that waits.
constexpr int SPINS = 3000;

void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

void futex(std::atomic<int32_t>& word, int operation, int32_t value) {
  syscall(SYS_futex, reinterpret_cast<int32_t*>(&word), operation, value, nullptr, nullptr, 0);
}

}  // namespace

Team::Team(int size) : size_(size) {
  for (int thread = 1; thread < size; thread++) threads_.emplace_back(&Team::serve, this, thread);
}

Team::~Team() {
  stopping_ = true;
  advance(started_);
  for (auto& thread : threads_) thread.join();
}

void Team::run(Job job, void* argument) {
  job_ = job;
  argument_ = argument;
  taken_.store(0, std::memory_order_relaxed);
  if (size_ > 1) advance(started_);
  job(argument, 0);
  barrier();
}

void Team::serve(int thread) {
  for (int32_t seen = 0;; seen++) {
    wait_while(started_, seen);
    if (stopping_) return;
    job_(argument_, thread);
    barrier();
  }
}

void Team::barrier() {
  if (size_ == 1) {
    taken_.store(0, std::memory_order_relaxed);
    return;
  }
  const int32_t passed = passed_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    taken_.store(0, std::memory_order_relaxed);
    advance(passed_);
  } else {
    wait_while(passed_, passed);
  }
}

bool Team::take(int total, int chunk, int& from, int& to) {
  from = taken_.fetch_add(chunk, std::memory_order_relaxed);
  if (from >= total) return false;
  to = from + chunk < total ? from + chunk : total;
  return true;
}

void Team::wait_while(std::atomic<int32_t>& word, int32_t value) {
  for (int spins = 0; word.load(std::memory_order_acquire) == value; spins++) {
    if (spins < SPINS) {
      pause_briefly();
      continue;
    }
    // In this order, so that `advance` either sees the sleeper or has changed the word before.
    sleepers_.fetch_add(1, std::memory_order_seq_cst);
    futex(word, FUTEX_WAIT_PRIVATE, value);
    sleepers_.fetch_sub(1, std::memory_order_relaxed);
  }
}

void Team::advance(std::atomic<int32_t>& word) {
  word.fetch_add(1, std::memory_order_seq_cst);
  if (sleepers_.load(std::memory_order_seq_cst)) futex(word, FUTEX_WAKE_PRIVATE, INT_MAX);
}

void wait_for_team(Stage& stage) { stage.team->barrier(); }

bool take_chunk(Stage& stage, int total, int chunk, int& from, int& to) {
  return stage.team->take(total, chunk, from, to);
}

}  // namespace fastserve
