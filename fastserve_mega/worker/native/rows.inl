// Rows of a step and who computes them; included once per instruction set.

template <class T>
static T* rows_of(void* buffer, size_t row, int width) {
  return static_cast<T*>(buffer) + row * width;
}

template <class T>
static const Unit* units_of(const void* buffer) {
  return static_cast<const Unit*>(buffer);
}

template <class T>
static void copy_row(T* to, const float* from, int size) {
  const int whole = size / LANES * LANES;
  for (int i = 0; i < whole; i += LANES) store(to + i, load(from + i));
  for (int i = whole; i < size; i++) set(to[i], from[i]);
}

// Rows of a step that are computed together: by all threads, who wait for each other, or by one.
struct Rows {
  int first, count;
  bool shared;
};

static void wait_for_others(Stage& stage, const Rows& rows) {
  if (rows.shared) wait_for_team(stage);
}

// The part of [0, rows) that belongs to a thread.
static void share(const Stage& stage, int thread, int rows, int& from, int& to) {
  const int64_t threads = stage.config.threads;
  from = static_cast<int>(rows * static_cast<int64_t>(thread) / threads);
  to = static_cast<int>(rows * static_cast<int64_t>(thread + 1) / threads);
}
