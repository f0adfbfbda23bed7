#include "threads.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <climits>

namespace fastserve {
namespace {

// Threads that each have a core meet within some microseconds; for these they spin. Where they have
// to share one, spinning keeps the others from coming: a wait that ends in sleep halves the limit,
// one that does not lets it grow again. Each step begins with hope.
constexpr int32_t FIRST_SPINS = 1500, MOST_SPINS = 4000, FEWEST_SPINS = 32;

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

// Which one of its team this thread is; the caller of `run` is the first of each.
thread_local int own_number = 0;

int begin_of_share(int number, int size, int chunks) {
  return static_cast<int>(static_cast<int64_t>(chunks) * number / size);
}

}  // namespace

Team::Team(int size) : size_(size), shares_(size) {
  try {
    for (int thread = 1; thread < size; thread++) threads_.emplace_back(&Team::serve, this, thread);
  } catch (...) {
    end();  // those that did start; one that is destroyed while it runs ends the process
    throw;
  }
}

Team::~Team() { end(); }

void Team::end() {
  stopping_ = true;
  advance(started_);
  for (auto& thread : threads_) thread.join();
}

void Team::run(Job job, void* argument) {
  job_ = job;
  argument_ = argument;
  begin_shares();
  spins_.store(FIRST_SPINS, std::memory_order_relaxed);
  if (size_ > 1) advance(started_);
  job(argument, 0);
  barrier();
}

void Team::begin_shares() {
  for (Counter& share : shares_) share.taken.store(0, std::memory_order_relaxed);
}

void Team::serve(int thread) {
  own_number = thread;
  for (int32_t seen = 0;; seen++) {
    wait_while(started_, seen);
    if (stopping_) return;
    job_(argument_, thread);
    barrier();
  }
}

void Team::barrier() {
  if (size_ == 1) return begin_shares();
  const int32_t passed = passed_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    begin_shares();
    advance(passed_);
  } else {
    wait_while(passed_, passed);
  }
}

bool Team::take(int total, int chunk, Part& part) {
  const int chunks = (total + chunk - 1) / chunk;
  for (int other = 0; other < size_; other++) {
    const int owner = (own_number + other) % size_, begin = begin_of_share(owner, size_, chunks);
    const int count = begin_of_share(owner + 1, size_, chunks) - begin;
    std::atomic<int32_t>& taken = shares_[owner].taken;
    if (taken.load(std::memory_order_relaxed) >= count) continue;
    const int number = taken.fetch_add(1, std::memory_order_relaxed);
    if (number >= count) continue;
    part.from = (begin + number) * chunk;
    part.to = std::min(part.from + chunk, total);
    part.is_last = number + 1 == count;
    return true;
  }
  return false;
}

int Team::first_of_own(int chunks) const { return begin_of_share(own_number, size_, chunks); }

void Team::wait_while(std::atomic<int32_t>& word, int32_t value) {
  const int32_t limit = spins_.load(std::memory_order_relaxed);
  for (int32_t spins = 0; word.load(std::memory_order_acquire) == value; spins++) {
    if (spins < limit) {
      pause_briefly();
      continue;
    }
    // In this order, so that `advance` either sees the sleeper or has changed the word before.
    sleepers_.fetch_add(1, std::memory_order_seq_cst);
    futex(word, FUTEX_WAIT_PRIVATE, value);
    sleepers_.fetch_sub(1, std::memory_order_relaxed);
    if (spins == limit && &word == &passed_)
      spins_.store(std::max(limit / 2, FEWEST_SPINS), std::memory_order_relaxed);
  }
  if (&word == &passed_ && spins_.load(std::memory_order_relaxed) == limit)
    spins_.store(std::min(limit + limit / 8, MOST_SPINS), std::memory_order_relaxed);
}

void Team::advance(std::atomic<int32_t>& word) {
  word.fetch_add(1, std::memory_order_seq_cst);
  if (sleepers_.load(std::memory_order_seq_cst)) futex(word, FUTEX_WAKE_PRIVATE, INT_MAX);
}

void wait_for_team(Stage& stage) { stage.team->barrier(); }

bool take_part(Stage& stage, int total, int chunk, Part& part) {
  return stage.team->take(total, chunk, part);
}

int first_of_own(const Stage& stage, int total) { return stage.team->first_of_own(total); }

void gather_rows(Stage& stage, int rows) {
  if (!rows) return;  // nor has any other rank: without samples no row goes on to the end
  const Workspace& work = stage.work;
  const int64_t count = static_cast<int64_t>(rows) * work.hidden_width;
  // Once one is lost nobody answers any more: the rest of the step is for nothing.
  if (!stage.has_lost_rank)
    stage.has_lost_rank = stage.config.gather(work.added, work.gathered, count) != 0;
}

}  // namespace fastserve
