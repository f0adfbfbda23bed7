// Vectors of LANES floats, by the compiler's vector types; included once per instruction set.
// Every multiplication with an addition is written as `fma`: the compiler must not choose where to
// round once and where twice, or the same row could differ between two kernels (the build has
// -ffp-contract=off).

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

#define INLINE static inline __attribute__((always_inline))

INLINE Bits broadcast(Unit unit) { return Bits{} + unit; }
INLINE Vec all(float value) {
  Unit bits;
  memcpy(&bits, &value, sizeof bits);
  return (Vec)broadcast(bits);
}

INLINE Bits load_units(const Unit* from) {
  Bits units;
  memcpy(&units, from, sizeof units);
  return units;
}

// The first `count` lanes; the others are 0.
INLINE Bits load_some_units(const Unit* from, int count) {
  Unit units[LANES] = {};
  memcpy(units, from, sizeof(Unit) * count);
  return load_units(units);
}

INLINE Vec load(const float* from) {
  Vec values;
  memcpy(&values, from, sizeof values);
  return values;
}

INLINE Vec load(const Bfloat16* from) {
  Halves halves;
  memcpy(&halves, from, sizeof halves);
  return (Vec)(__builtin_convertvector(halves, Bits) << 16);
}

INLINE void store(float* to, Vec values) { memcpy(to, &values, sizeof values); }

INLINE void store(Bfloat16* to, Vec values) {
#ifdef BF16_INSTRUCTIONS
  const __m256bh halves = _mm512_cvtneps_pbh((__m512)values);
#else
  const Bits bits = (Bits)values;
  const Bits rounded = bits + 0x7fff + ((bits >> 16) & 1);
  const Bits kept = values == values ? rounded : (bits | 0x400000);  // a NaN stays one
  const Halves halves = __builtin_convertvector(kept >> 16, Halves);
#endif
  memcpy(to, &halves, sizeof halves);
}

INLINE float to_float(float value) { return value; }
INLINE float to_float(Bfloat16 value) {
  const Unit bits = static_cast<Unit>(value.bits) << 16;
  float wide;
  memcpy(&wide, &bits, sizeof wide);
  return wide;
}

INLINE void set(float& to, float value) { to = value; }
INLINE void set(Bfloat16& to, float value) {
  Bfloat16 halves[LANES];
  store(halves, all(value));
  to = halves[0];
}

INLINE Vec fma(Vec a, Vec b, Vec c) {
#if defined(FMA_512)
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(FMA_256)
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

INLINE Vec larger(Vec a, Vec b) { return a > b ? a : b; }
INLINE Vec smaller(Vec a, Vec b) { return a < b ? a : b; }

// sum + the products of what is in a pair of units, lower half first.
template <class T>
INLINE Vec dot(Vec sum, Bits a, Bits b) {
  if constexpr (per_unit<T>() == 1) {
    return fma((Vec)a, (Vec)b, sum);
  } else {
#ifdef BF16_INSTRUCTIONS
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
    sum = fma((Vec)(a << 16), (Vec)(b << 16), sum);
    return fma((Vec)(a & 0xffff0000), (Vec)(b & 0xffff0000), sum);
#endif
  }
}

// In pairs, always the same ones.
INLINE float sum_of(Vec values) {
  float parts[LANES];
  store(parts, values);
  for (int width = LANES / 2; width; width /= 2)
    for (int lane = 0; lane < width; lane++) parts[lane] += parts[lane + width];
  return parts[0];
}

INLINE float largest_of(Vec values) {
  float parts[LANES];
  store(parts, values);
  for (int width = LANES / 2; width; width /= 2)
    for (int lane = 0; lane < width; lane++)
      if (parts[lane + width] > parts[lane]) parts[lane] = parts[lane + width];
  return parts[0];
}

// e^x to about one unit in the last place; 0 below e^-87.
INLINE Vec exponential(Vec x) {
  const Vec lowest = all(-87.3f), to_integer = all(12582912.0f);  // 1.5 * 2^23
  const Vec inside = smaller(larger(x, lowest), all(88.0f));
  const Vec shifted = fma(inside, all(1.44269504f), to_integer);
  const Vec n = shifted - to_integer;
  Vec f = fma(n, all(-0.693145752f), inside);
  f = fma(n, all(-1.42860677e-6f), f);
  Vec p = fma(all(1.38888889e-3f), f, all(8.33333333e-3f));
  p = fma(p, f, all(4.16666667e-2f));
  p = fma(p, f, all(1.66666667e-1f));
  p = fma(p, f, all(0.5f));
  p = fma(p, f, all(1.0f));
  p = fma(p, f, all(1.0f));
  const Vec power = (Vec)(((Bits)shifted << 23) + 0x3f800000);
  return x >= lowest ? p * power : Vec{};
}

INLINE Vec hyperbolic_tangent(Vec x) {
  const Vec one = all(1.0f), twice = exponential(x + x);
  return one - all(2.0f) / (twice + one);
}

INLINE Vec sigmoid_times(Vec x, Vec gate) { return x / (all(1.0f) + exponential(-gate)); }

INLINE Vec gelu(Vec x) {
  float values[LANES];
  store(values, x);
  for (float& value : values) value = 0.5f * value * (1.0f + erff(value * 0.70710678f));
  return load(values);
}

INLINE Vec activate(Activation activation, Vec x) {
  switch (activation) {
    case GELU:
      return gelu(x);
    case GELU_TANH: {  // x * sigmoid(2 * sqrt(2 / pi) * (x + 0.044715 x^3))
      const Vec cubed = x * x * x;
      return sigmoid_times(x, all(1.59576912f) * fma(all(0.044715f), cubed, x));
    }
    case RELU:
      return larger(x, Vec{});
    default:
      return sigmoid_times(x, x);
  }
}
