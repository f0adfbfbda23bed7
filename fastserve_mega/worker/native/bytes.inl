// Products with 8-bit weights; included once per instruction set.
//
// Weights and inputs are integers of 8 bits, with a scale for every BYTE_GROUP inputs of an output
// or of a row. Sums within a group are exact; beyond it they have their order from the row alone. A
// panel is, for each group, PANEL scales and [quads of inputs][PANEL] units of four weights, each
// with 128 added, since processors multiply unsigned bytes by signed ones.

constexpr int QUADS = BYTE_GROUP / 4;

// sum + the products of four unsigned bytes with four signed ones in each lane.
INLINE Ints dot_bytes(Ints sum, Bits weights, Bits in) {
#if defined(BF16_INSTRUCTIONS)  // every such processor has VNNI
  return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)weights, (__m512i)in);
#elif defined(FMA_512) || defined(FMA_256)
  // As pairs of 16 bits: bytes 0 and 2, then 1 and 3.
  typedef int16_t Shorts __attribute__((vector_size(4 * LANES)));
  const Shorts high = (Shorts)in >> 8, low = (Shorts)((Shorts)in << 8) >> 8;
  const Bits even = weights & 0x00ff00ff, odd = (weights >> 8) & 0x00ff00ff;
#ifdef FMA_512
  sum += (Ints)_mm512_madd_epi16((__m512i)even, (__m512i)low);
  return sum + (Ints)_mm512_madd_epi16((__m512i)odd, (__m512i)high);
#else
  sum += (Ints)_mm256_madd_epi16((__m256i)even, (__m256i)low);
  return sum + (Ints)_mm256_madd_epi16((__m256i)odd, (__m256i)high);
#endif
#else
  for (int shift = 0; shift < 32; shift += 8)
    sum += (Ints)((weights >> shift) & 0xff) * ((Ints)(in << (24 - shift)) >> 24);
  return sum;
#endif
}

// A row of a product's input: bytes of all groups, and for each group its scale and what the 128
// added to the weights comes to.
struct ByteRow {
  const Unit* quads;
  const float* scales;
  const int32_t* offsets;

  ByteRow(const char* at, int groups)
      : quads(reinterpret_cast<const Unit*>(at)),
        scales(reinterpret_cast<const float*>(at + static_cast<size_t>(groups) * BYTE_GROUP)),
        offsets(reinterpret_cast<const int32_t*>(scales + groups)) {}
};

// A group of at most BYTE_GROUP inputs: their bytes, the rest 0; returns the scale.
template <class T>
static float quantize_group(const T* values, int count, int8_t* bytes, int32_t& offset) {
  float wide[BYTE_GROUP] = {}, rounded[BYTE_GROUP];
  for (int i = 0; i < count; i++) wide[i] = to_float(values[i]);
  Vec most{}, suspect{};
  for (int i = 0; i < BYTE_GROUP; i += LANES) {
    const Vec value = load(wide + i);
    most = larger(larger(value, -value), most);
    suspect += value * Vec{};  // NaN where one of them is, or an infinity
  }
  const float largest = largest_of(most);
  const Vec factor = all(largest > 0.0f ? 127.0f / largest : 0.0f), magic = all(12582912.0f);
  // When 1.5 * 2^23 was added, the lowest bits of the number are the nearest integer.
  for (int i = 0; i < BYTE_GROUP; i += LANES)
    store(rounded + i, fma(load(wide + i), factor, magic));
  int32_t sum = 0;
  for (int i = 0; i < BYTE_GROUP; i++) {
    int32_t bits;
    memcpy(&bits, rounded + i, sizeof bits);
    bytes[i] = static_cast<int8_t>(bits & 0xff);
    sum += bytes[i];
  }
  offset = -128 * sum;
  return largest / 127.0f + sum_of(suspect);
}

template <class T>
static void quantize_row(const T* row, int size, char* to) {
  const int groups = groups_of(size);
  float* scales = reinterpret_cast<float*>(to + static_cast<size_t>(groups) * BYTE_GROUP);
  int32_t* offsets = reinterpret_cast<int32_t*>(scales + groups);
  for (int group = 0; group < groups; group++) {
    const int first = group * BYTE_GROUP, left = size - first;
    scales[group] = quantize_group(row + first, left < BYTE_GROUP ? left : BYTE_GROUP,
                                   reinterpret_cast<int8_t*>(to) + first, offsets[group]);
  }
}

// The input of a product as bytes. Returns where row `rows.first` is: in a small step each thread
// has its own, so that none has to wait.
template <class T>
static const char* quantize_rows(Stage& stage, int thread, const T* x, size_t x_width, int size,
                                 const Rows& rows) {
  const size_t row_bytes = byte_row_bytes(size);
  const bool own = rows.shared && rows.count <= OWN_ROWS;
  // Others may be at another matrix, with longer rows.
  char* shared = stage.work.bytes + rows.first * stage.work.byte_row;
  char* first = own ? stage.own_bytes[thread] : shared;
  int from = 0, to = rows.count;
  if (rows.shared && !own) share(stage, thread, rows.count, from, to);
  for (int row = from; row < to; row++)
    quantize_row(x + row * x_width, size, first + row * row_bytes);
  if (!own) wait_for_others(stage, rows);
  return first;
}

// Cache lines to fetch per group, when there are `lines` per two quads, and some for the scales.
static int lines_of_group(int lines) { return lines * (QUADS / 2) + (lines + 1) / 2; }

// As `multiply_rows`, of bytes.
template <int ROWS>
static void multiply_byte_rows(const char* x, size_t row_bytes, const char* panel, int groups,
                               float* out, const char* ahead, int lines) {
  for (int column = 0; column < PANEL; column += 2 * LANES) {
    Vec sums[ROWS][2];
    for (int r = 0; r < ROWS; r++) sums[r][0] = sums[r][1] = Vec{};
    for (int group = 0; group < groups; group++) {
      const char* at = panel + group * BYTE_GROUP_BYTES;
      const float* scales = reinterpret_cast<const float*>(at) + column;
      const Unit* w = reinterpret_cast<const Unit*>(at + sizeof(float) * PANEL) + column;
      const int fetched = lines_of_group(lines);
      for (int line = 0; line < fetched; line++) __builtin_prefetch(ahead + 64 * line, 0, 2);
      ahead += 64 * fetched;
      Ints exact[ROWS][2];
      for (int r = 0; r < ROWS; r++) {
        const Ints offset = Ints{} + ByteRow(x + r * row_bytes, groups).offsets[group];
        exact[r][0] = exact[r][1] = offset;
      }
      for (int quad = 0; quad < QUADS; quad++, w += PANEL) {
        const Bits w0 = load_units(w), w1 = load_units(w + LANES);
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; r++) {
          const Unit* quads = reinterpret_cast<const Unit*>(x + r * row_bytes) + group * QUADS;
          const Bits in = broadcast(quads[quad]);
          exact[r][0] = dot_bytes(exact[r][0], w0, in);
          exact[r][1] = dot_bytes(exact[r][1], w1, in);
        }
      }
      const Vec s0 = load(scales), s1 = load(scales + LANES);
      for (int r = 0; r < ROWS; r++) {
        const Vec scale = all(ByteRow(x + r * row_bytes, groups).scales[group]);
        sums[r][0] = fma(__builtin_convertvector(exact[r][0], Vec), s0 * scale, sums[r][0]);
        sums[r][1] = fma(__builtin_convertvector(exact[r][1], Vec), s1 * scale, sums[r][1]);
      }
    }
    for (int r = 0; r < ROWS; r++) {
      store(out + r * PANEL + column, sums[r][0]);
      store(out + r * PANEL + column + LANES, sums[r][1]);
    }
    lines = 0;
  }
}

template <int ROWS = MAX_ROWS>
static void multiply_bytes(int rows, const char* x, size_t row_bytes, const char* panel, int groups,
                           float* out, const char* ahead, int lines) {
  if (rows == ROWS)
    return multiply_byte_rows<ROWS>(x, row_bytes, panel, groups, out, ahead, lines);
  if constexpr (ROWS > 1)
    multiply_bytes<ROWS - 1>(rows, x, row_bytes, panel, groups, out, ahead, lines);
}

// Lay out rows [outputs][inputs] of a matrix as every `step`-th panel from `first` on.
template <class T>
static void pack_bytes(char* to, const void* from, int outputs, int inputs, int first, int step) {
  const int groups = groups_of(inputs);
  const size_t panel_bytes = static_cast<size_t>(groups) * BYTE_GROUP_BYTES;
  for (int output = 0; output < outputs; output++) {
    char* panel = to + (output / PANEL * step + first) * panel_bytes;
    const T* row = static_cast<const T*>(from) + static_cast<size_t>(output) * inputs;
    for (int group = 0; group < groups; group++, panel += BYTE_GROUP_BYTES) {
      const int begin = group * BYTE_GROUP, left = inputs - begin, lane = output % PANEL;
      int8_t bytes[BYTE_GROUP];
      int32_t unused;
      reinterpret_cast<float*>(panel)[lane] =
          quantize_group(row + begin, left < BYTE_GROUP ? left : BYTE_GROUP, bytes, unused);
      char* quads = panel + sizeof(float) * PANEL + 4 * lane;
      for (int i = 0; i < BYTE_GROUP; i++)
        quads[i / 4 * 4 * PANEL + i % 4] = static_cast<char>(bytes[i] + 128);
    }
  }
}

// A row of such a matrix as floats: the embedding of a token.
static void unpack_bytes(const Matrix& matrix, int row, float* out) {
  const char* panel = matrix.panel(row / PANEL);
  for (int k = 0; k < matrix.inputs; k++) {
    const char* group = panel + k / BYTE_GROUP * BYTE_GROUP_BYTES;
    const float scale = reinterpret_cast<const float*>(group)[row % PANEL];
    const char* quad = group + sizeof(float) * PANEL + 4 * (k % BYTE_GROUP / 4 * PANEL + row % PANEL);
    out[k] = scale * static_cast<float>(static_cast<uint8_t>(quad[k % 4]) - 128);
  }
}
