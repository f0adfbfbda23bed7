// A team of threads with barriers that spin for a short while and then sleep.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include "stage.h"

namespace fastserve {

class Team {
 public:
  using Job = void (*)(void* argument, int thread);

  // `size` threads, of which the caller of `run` is one.
  explicit Team(int size);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int size() const { return size_; }

  // Have all threads do a job, and return when all are done.
  void run(Job job, void* argument);

  // Within a job: wait until all threads are here.
  void barrier();

  // Within a job, between two barriers: the next `chunk` of [0, total), first of this thread's own
  // share, in order, then of what others have not begun; false when nothing is left.
  bool take(int total, int chunk, Part& part);

  // Where the own share of `chunks` begins.
  int first_of_own(int chunks) const;

 private:
  void serve(int thread);
  void end();

  const int size_;
  Job job_ = nullptr;
  void* argument_ = nullptr;
  bool stopping_ = false;
  alignas(64) std::atomic<int32_t> started_{0};
  alignas(64) std::atomic<int32_t> arrived_{0};
  alignas(64) std::atomic<int32_t> passed_{0};
  alignas(64) std::atomic<int32_t> sleepers_{0};
  alignas(64) std::atomic<int32_t> spins_{0};  // at most, before a thread sleeps
  struct alignas(64) Counter {
    std::atomic<int32_t> taken{0};
  };
  std::vector<Counter> shares_;  // chunks taken of each thread's
  std::vector<std::thread> threads_;

  void begin_shares();
  void wait_while(std::atomic<int32_t>& word, int32_t value);
  void advance(std::atomic<int32_t>& word);
};

}  // namespace fastserve
