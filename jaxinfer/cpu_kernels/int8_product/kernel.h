// Products of rows that are rounded to 8 bits with weights of 8 bits and a scale per output.
//
// Included by `common/target.cpp` alone, inside the namespace of an instruction set.

static float round_row(const float* x, int64_t inputs, int64_t stride, int8_t* codes) {
  const int64_t whole = inputs / WIDTH * WIDTH;
  Floats most = {};
  for (int64_t i = 0; i < whole; i += WIDTH) most = larger(magnitude(load(x + i)), most);
  if (whole < inputs) most = larger(magnitude(load_part(x + whole, inputs - whole)), most);
  float top = largest(most);
  top = top < 1e-30f ? 1e-30f : top;  // NaN stays, and makes the row's results NaN
  const float scale = top * (float)(1.0 / 127);
  const Floats divisor = broadcast(scale);
  for (int64_t i = 0; i < stride; i += WIDTH) {
    Floats v = {};
    if (i + WIDTH <= inputs) v = load(x + i);
    else if (i < inputs) v = load_part(x + i, inputs - i);
    v = v / divisor;
    v = v == v ? v : Floats{};
    const Bytes bytes = __builtin_convertvector(__builtin_convertvector(rounded(v), Ints), Bytes);
    __builtin_memcpy(codes + i, &bytes, sizeof bytes);
  }
  return scale;
}

static void round_rows(const float* x, const RoundedRows& rounded) {
  for (int row = 0; row < rounded.rows; ++row) {
    int8_t* codes = rounded.codes + row * rounded.stride;
    rounded.scale[row] = round_row(x + row * rounded.inputs, rounded.inputs, rounded.stride, codes);
    int32_t sum = 0;
    for (int64_t i = 0; i < rounded.stride; ++i) sum += codes[i];
    rounded.sums[row] = sum;
  }
}

// found[o][r] = the sum of the products of row `row + r` of x and of row o of a weight's codes.
template <int OUTPUTS, int ROWS>
static inline void int8_dots(
    const RoundedRows& x, int row, const int8_t* codes, int32_t (&found)[OUTPUTS][ROWS]) {
  Sum sums[OUTPUTS][ROWS] = {};
  const int8_t* rows = x.codes + row * x.stride;
  const int64_t whole = x.inputs / STEP * STEP;
  for (int64_t i = 0; i < whole; i += STEP) {
    Codes weights[OUTPUTS];
    UNROLL for (int o = 0; o < OUTPUTS; ++o) weights[o] = load_codes(codes + o * x.inputs + i);
    UNROLL for (int r = 0; r < ROWS; ++r)
      UNROLL for (int o = 0; o < OUTPUTS; ++o)
        sums[o][r] = multiply_add(sums[o][r], weights[o], rows + r * x.stride + i);
  }
  if (whole < x.inputs)
    UNROLL for (int o = 0; o < OUTPUTS; ++o) {
      const Codes weight = load_codes_part(codes + o * x.inputs + whole, x.inputs - whole);
      UNROLL for (int r = 0; r < ROWS; ++r)
        sums[o][r] = multiply_add(sums[o][r], weight, rows + r * x.stride + whole);
    }
  UNROLL for (int o = 0; o < OUTPUTS; ++o)
    UNROLL for (int r = 0; r < ROWS; ++r)
      found[o][r] = total(sums[o][r]) - OFFSET * x.sums[row + r];
}

template <int OUTPUTS, int ROWS>
static inline void int8_tile(const RoundedRows& x, int row, const Int8Weight& weight, int64_t first) {
  int32_t found[OUTPUTS][ROWS];
  int8_dots<OUTPUTS, ROWS>(x, row, weight.codes + first * x.inputs, found);
  for (int o = 0; o < OUTPUTS; ++o)
    for (int r = 0; r < ROWS; ++r)
      weight.result[(row + r) * weight.outputs + first + o] =
          (float)found[o][r] * (x.scale[row + r] * weight.scale[first + o]);
}

// `OUTPUTS` outputs of all rows; as many rows at a time as registers hold the sums of.
template <int OUTPUTS>
static inline void int8_outputs(const RoundedRows& x, const Int8Weight& weight, int64_t first) {
  constexpr int MOST = MOST_SUMS / OUTPUTS > 4 ? 4 : MOST_SUMS / OUTPUTS;
  int row = 0;
  if constexpr (MOST >= 4)
    for (; row + 4 <= x.rows; row += 4) int8_tile<OUTPUTS, 4>(x, row, weight, first);
  if constexpr (MOST >= 2)
    for (; row + 2 <= x.rows; row += 2) int8_tile<OUTPUTS, 2>(x, row, weight, first);
  for (; row < x.rows; ++row) int8_tile<OUTPUTS, 1>(x, row, weight, first);
}

static void int8_product(const RoundedRows& x, const Int8Weight& weight, int64_t first, int64_t last) {
  int64_t output = first;
  if (x.rows == 1 || MOST_SUMS >= 16) {
    for (; output + 4 <= last; output += 4) int8_outputs<4>(x, weight, output);
  } else {
    for (; output + 2 <= last; output += 2) int8_outputs<2>(x, weight, output);
  }
  for (; output < last; ++output) int8_outputs<1>(x, weight, output);
}
