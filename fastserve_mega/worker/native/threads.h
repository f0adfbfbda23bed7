// A team of threads with barriers that spin for a short while and then sleep.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

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

  // Within a job, between two barriers: the next part of [0, total); false when nothing is left.
  bool take(int total, int chunk, int& from, int& to);

 private:
  void serve(int thread);

  const int size_;
  Job job_ = nullptr;
  void* argument_ = nullptr;
  bool stopping_ = false;
  alignas(64) std::atomic<int32_t> started_{0};
  alignas(64) std::atomic<int32_t> arrived_{0};
  alignas(64) std::atomic<int32_t> passed_{0};
  alignas(64) std::atomic<int32_t> taken_{0};
  alignas(64) std::atomic<int32_t> sleepers_{0};
  alignas(64) std::atomic<int32_t> spins_{0};  // at most, before a thread sleeps
  std::vector<std::thread> threads_;

  void wait_while(std::atomic<int32_t>& word, int32_t value);
  void advance(std::atomic<int32_t>& word);
};

}  // namespace fastserve
