// Products of codes of 8 bits, summed in 32, with the instructions of one set:
//
//   Sum     partial sums            STEP    codes that are taken at a time
//   Codes   a step of a weight      OFFSET  what is added to a weight's codes before they are
//                                           multiplied, and has to be taken out of the total
//
// Included by `target.cpp` alone, inside the namespace of an instruction set.

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)

// `dpbusd` multiplies unsigned codes with signed ones: the weight becomes unsigned by adding 128.
constexpr int32_t OFFSET = 128;

#if defined(__AVX512VNNI__)

typedef __m512i Sum;
typedef __m512i Codes;
constexpr int STEP = 64, MOST_SUMS = 16;

static inline Codes unsigned_codes(__m512i v) { return _mm512_xor_si512(v, _mm512_set1_epi8(-128)); }
static inline Codes load_codes(const int8_t* p) { return unsigned_codes(_mm512_loadu_si512(p)); }
static inline Codes load_codes_part(const int8_t* p, int64_t count) {
  return unsigned_codes(_mm512_maskz_loadu_epi8(~__mmask64{0} >> (STEP - count), p));
}
static inline Sum multiply_add(Sum sum, Codes weight, const int8_t* x) {
  return _mm512_dpbusd_epi32(sum, weight, _mm512_loadu_si512(x));
}

#else

typedef __m256i Sum;
typedef __m256i Codes;
constexpr int STEP = 32, MOST_SUMS = 8;

static inline Codes load_codes(const int8_t* p) {
  return _mm256_xor_si256(_mm256_loadu_si256((const __m256i*)p), _mm256_set1_epi8(-128));
}
static inline Sum multiply_add(Sum sum, Codes weight, const int8_t* x) {
  return _mm256_dpbusd_avx_epi32(sum, weight, _mm256_loadu_si256((const __m256i*)x));
}

#endif

#elif defined(__AVX2__)

// Codes become 16 bits wide, since the products of 8 bits that AVX2 adds in pairs would saturate.
typedef __m256i Sum;
struct Codes {
  __m256i low, high;
};
constexpr int STEP = 32, MOST_SUMS = 4;
constexpr int32_t OFFSET = 0;

static inline __m256i widened(const int8_t* p) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p));
}
static inline Codes load_codes(const int8_t* p) { return {widened(p), widened(p + 16)}; }
static inline Sum multiply_add(Sum sum, Codes weight, const int8_t* x) {
  sum = _mm256_add_epi32(sum, _mm256_madd_epi16(weight.low, widened(x)));
  return _mm256_add_epi32(sum, _mm256_madd_epi16(weight.high, widened(x + 16)));
}

#elif defined(__ARM_FEATURE_DOTPROD)

typedef int32x4_t Sum;
typedef int8x16_t Codes;
constexpr int STEP = 16, MOST_SUMS = 16;
constexpr int32_t OFFSET = 0;

static inline Codes load_codes(const int8_t* p) { return vld1q_s8(p); }
static inline Sum multiply_add(Sum sum, Codes weight, const int8_t* x) {
  return vdotq_s32(sum, weight, vld1q_s8(x));
}
static inline int32_t total(Sum sum) { return vaddvq_s32(sum); }

#else

typedef Ints Sum;
typedef Ints Codes;
constexpr int STEP = 16, MOST_SUMS = 4;
constexpr int32_t OFFSET = 0;

static inline Codes load_codes(const int8_t* p) {
  Bytes v;
  __builtin_memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, Ints);
}
static inline Sum multiply_add(Sum sum, Codes weight, const int8_t* x) {
  return sum + weight * load_codes(x);
}
static inline int32_t total(Sum sum) {
  int32_t found = 0;
  for (int i = 0; i < WIDTH; ++i) found += sum[i];
  return found;
}

#endif

#if defined(__AVX2__)
static inline int32_t total(Sum sum) {
  __m128i parts[sizeof(Sum) / 16];
  __builtin_memcpy(parts, &sum, sizeof sum);
  __m128i v = parts[0];
  for (unsigned i = 1; i < sizeof(Sum) / 16; ++i) v = _mm_add_epi32(v, parts[i]);
  v = _mm_add_epi32(v, _mm_shuffle_epi32(v, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(v, _mm_shuffle_epi32(v, 0xb1)));
}
#endif

#if !defined(__AVX512VNNI__)
static inline Codes load_codes_part(const int8_t* p, int64_t count) {
  int8_t padded[STEP] = {};
  __builtin_memcpy(padded, p, count);
  return load_codes(padded);
}
#endif
