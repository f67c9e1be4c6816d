// Sixteen numbers at a time, in the vector types of GCC and Clang: the compiler takes as many
// registers as the instruction set needs for them. Lanes are added in a fixed order.
//
// Included by `target.cpp` alone, inside the namespace of an instruction set.

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef int8_t Bytes __attribute__((vector_size(16)));

constexpr int WIDTH = 16;

// In front of short loops over sums, which thus stay in registers.
#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

static inline Floats load(const float* p) {
  Floats v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

// The first `count` of fewer than 16 numbers; the other lanes are 0.
static inline Floats load_part(const float* p, int64_t count) {
  Floats v = {};
  __builtin_memcpy(&v, p, count * sizeof(float));
  return v;
}

static inline void store(float* p, Floats v) { __builtin_memcpy(p, &v, sizeof v); }

static inline Floats broadcast(float x) { return x - Floats{}; }

static inline Floats magnitude(Floats v) { return (Floats)((Ints)v & 0x7fffffff); }

// Sixteen codes of 8 bits as floating numbers, and so that templates read either kind of weight.
static inline Floats load(const int8_t* p) {
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__)
  __m256 halves[2];
  for (int i = 0; i < 2; ++i)
    halves[i] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8 * i))));
  Floats v;
  __builtin_memcpy(&v, halves, sizeof v);
  return v;
#else
  Bytes v;
  __builtin_memcpy(&v, p, sizeof v);
  return __builtin_convertvector(__builtin_convertvector(v, Ints), Floats);
#endif
}

static inline float sum_of(Floats v) {
  typedef float Half __attribute__((vector_size(32)));
  typedef float Quarter __attribute__((vector_size(16)));
  Half halves[2];
  __builtin_memcpy(halves, &v, sizeof v);
  const Half half = halves[0] + halves[1];
  Quarter quarters[2];
  __builtin_memcpy(quarters, &half, sizeof half);
  const Quarter q = quarters[0] + quarters[1];
  return (q[0] + q[2]) + (q[1] + q[3]);
}

// Lane by lane the larger one, NaN where either is.
static inline Floats larger(Floats a, Floats b) { return ((a > b) | (a != a)) ? a : b; }

static inline float largest(Floats v) {
  float found = v[0];
  for (int i = 1; i < WIDTH; ++i) found = (v[i] > found || v[i] != v[i]) ? v[i] : found;
  return found;
}

// To the nearest integer, ties to even, of numbers below 2^22 in magnitude.
static inline Floats rounded(Floats v) {
  const Floats shift = broadcast(12582912.0f);  // 1.5 * 2^23: here the last bit counts ones
  return (v + shift) - shift;
}
