// Products with packed matrices, and norms; included once per instruction set.

// out[r][PANEL] = x[r] * one panel, in the order of the inputs whatever the number of rows is.
// Meanwhile `lines` cache lines per two units are fetched from `ahead` on: for few rows, which wait
// for the memory, into the nearest cache, and else into the next one, which has room for a panel.
template <class T, int ROWS>
static void multiply_rows(const Unit* x, size_t x_stride, const Unit* panel, int units, float* out,
                          const char* ahead, int lines) {
  constexpr int NEARNESS = ROWS > 4 ? 2 : 3;
  for (int column = 0; column < PANEL; column += 2 * LANES) {
    Vec sums[ROWS][2];
    for (int r = 0; r < ROWS; r++) sums[r][0] = sums[r][1] = Vec{};
    const Unit* w = panel + column;
    for (int u = 0; u < units; u++, w += PANEL) {
      if (u % 2 == 0) {
        for (int line = 0; line < lines; line++) __builtin_prefetch(ahead + 64 * line, 0, NEARNESS);
        ahead += 64 * lines;
      }
      const Bits w0 = load_units(w), w1 = load_units(w + LANES);
#pragma GCC unroll 12
      for (int r = 0; r < ROWS; r++) {
        const Bits in = broadcast(x[r * x_stride + u]);
        sums[r][0] = dot<T>(sums[r][0], w0, in);
        sums[r][1] = dot<T>(sums[r][1], w1, in);
      }
    }
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; r++) {
      store(out + r * PANEL + column, sums[r][0]);
      store(out + r * PANEL + column + LANES, sums[r][1]);
    }
    lines = 0;
  }
}

// The same for any number of rows up to MAX_ROWS: each has a kernel of its own, since a second one
// would read the panel again, and few rows at a time leave the processor waiting for its sums.
template <class T, int ROWS = MAX_ROWS>
static void multiply(int rows, const Unit* x, size_t x_stride, const Unit* panel, int units,
                     float* out, const char* ahead, int lines) {
  if (rows == ROWS) return multiply_rows<T, ROWS>(x, x_stride, panel, units, out, ahead, lines);
  if constexpr (ROWS > 1) multiply<T, ROWS - 1>(rows, x, x_stride, panel, units, out, ahead, lines);
}

// How the rows of a step are cut for products: into `count` tiles of at most `rows`.
struct Tiles {
  int total, rows, count;

  explicit Tiles(int total_rows)
      : total(total_rows),
        rows(total ? (total + needed(total) - 1) / needed(total) : 1),
        count((total + rows - 1) / rows) {}

  static int needed(int total) { return (total + MAX_ROWS - 1) / MAX_ROWS; }

  int in_tile(int tile) const {
    const int left = total - tile * rows;
    return left < rows ? left : rows;
  }

  // Cache lines that one tile fetches per two units, so that few tiles fetch a panel together.
  int lines(int tile) const { return count == 1 ? 4 : count == 2 ? 2 : tile < 4 ? 1 : 0; }
};

static void add_bias(float* rows, int count, const float* bias) {
  for (int r = 0; r < count; r++)
    for (int c = 0; c < PANEL; c += LANES) {
      float* at = rows + r * PANEL + c;
      store(at, load(at) + load(bias + c));
    }
}

// What this thread reads of a matrix first, unless another one is quicker.
static const char* first_panel(const Stage& stage, const Matrix& matrix) {
  return matrix.panel(first_of_own(stage, matrix.groups()) * matrix.group);
}

// The input of a product: rows of T, or of bytes.
struct Input {
  const char* first;
  size_t row_bytes;

  const Unit* units(int row) const { return reinterpret_cast<const Unit*>(bytes(row)); }
  const char* bytes(int row) const { return first + row * row_bytes; }
};

// `input` times some groups of a matrix, of which each is read once for all rows.
template <class T, class Take>
static void multiply_groups(const Stage& stage, const Matrix& matrix, const float* bias,
                            const Part& groups, const Input& input, const Rows& rows, Take take) {
  const Tiles tiles(rows.count);
  const int end = groups.to * matrix.group, to_next = tiles.count == 1 ? 1 : matrix.group;
  const char* following = groups.is_last ? first_panel(stage, *matrix.next) : matrix.panel(end);
  alignas(64) float out[MAX_ROWS * PANEL];
  for (int step = groups.from * tiles.count; step < groups.to * tiles.count; step++) {
    const int tile = step % tiles.count, first = tile * tiles.rows;
    const int count = tiles.in_tile(tile), lines = tiles.lines(tile);
    for (int n = 0, panel = step / tiles.count * matrix.group; n < matrix.group; n++, panel++) {
      const int next = panel + to_next;
      const char* ahead =
          next < end ? matrix.panel(next) : following + (next - end) * matrix.panel_bytes;
      if (matrix.byte_groups) {
        ahead += static_cast<size_t>(tile) * matrix.byte_groups * 64 * lines_of_group(lines);
        multiply_bytes(count, input.bytes(first), input.row_bytes, matrix.panel(panel),
                       matrix.byte_groups, out, ahead, lines);
      } else {
        ahead += static_cast<size_t>(tile) * matrix.units * 32 * lines;
        multiply<T>(count, input.units(first), input.row_bytes / sizeof(Unit), matrix.units_at(panel),
                    matrix.units, out, ahead, lines);
      }
      if (bias) add_bias(out, count, bias + panel * PANEL);
      take(panel, rows.first + first, count, out);
    }
  }
}

// x [rows][width] times a matrix; `take(panel, first row, rows, results)` gets the results of a
// panel, bias included. The panels of a group come one after the other for the same rows and on the
// same thread.
template <class T, class Take>
static void multiply_matrix(Stage& stage, int thread, const Matrix& matrix, const float* bias,
                            const T* x, int width, const Rows& rows, Take take) {
  Input input{reinterpret_cast<const char*>(x), width * sizeof(T)};
  if (matrix.byte_groups)
    input = {quantize_rows(stage, thread, x, width, matrix.inputs, rows),
             byte_row_bytes(matrix.inputs)};
  Part groups{0, matrix.groups(), true};
  if (!rows.shared)
    return multiply_groups<T>(stage, matrix, bias, groups, input, rows, take);
  while (take_part(stage, matrix.groups(), 1, groups))
    multiply_groups<T>(stage, matrix, bias, groups, input, rows, take);
}

// The feed-forward layer's first matrix and its activation. A gated one has panels of gate and of
// the other projection in turns.
template <class T>
static void activate_rows(const Stage& stage, int panel, int first, int count, const float* out,
                          float* gates) {
  const auto activation = static_cast<Activation>(stage.config.activation);
  const int width = stage.work.ffn_width, gated = stage.config.gated;
  T* activated = static_cast<T*>(stage.work.activated);
  for (int r = 0; r < count; r++) {
    T* row = activated + static_cast<size_t>(first + r) * width + (gated ? panel / 2 : panel) * PANEL;
    for (int c = 0; c < PANEL; c += LANES) {
      const Vec value = load(out + r * PANEL + c);
      float* gate = gates + r * PANEL + c;
      if (!gated)
        store(row + c, activate(activation, value));
      else if (panel % 2)
        store(row + c, load(gate) * value);
      else
        store(gate, activate(activation, value));
    }
  }
}

// x / sqrt(mean(x^2) + epsilon) * weight, or LayerNorm.
template <class T>
static void normalize(const StageConfig& config, const float* x, const float* const* norm, int size,
                      T* out) {
  const float *weight = norm[0], *bias = norm[1];
  const int whole = size / LANES * LANES;
  float mean = 0.0f;
  if (config.norm == LAYER_NORM) {
    Vec sum{};
    for (int k = 0; k < whole; k += LANES) sum += load(x + k);
    mean = sum_of(sum);
    for (int k = whole; k < size; k++) mean += x[k];
    mean /= size;
  }
  Vec squares{};
  for (int k = 0; k < whole; k += LANES) {
    const Vec value = load(x + k) - all(mean);
    squares = fma(value, value, squares);
  }
  float square = sum_of(squares);
  for (int k = whole; k < size; k++) square += (x[k] - mean) * (x[k] - mean);
  const float scale = 1.0f / sqrtf(square / size + config.norm_epsilon);
  for (int k = 0; k < whole; k += LANES) {
    Vec value = (load(x + k) - all(mean)) * all(scale) * load(weight + k);
    if (bias) value += load(bias + k);
    store(out + k, value);
  }
  for (int k = whole; k < size; k++) {
    const float value = (x[k] - mean) * scale * weight[k];
    set(out[k], bias ? value + bias[k] : value);
  }
}
