// A feed-forward block over listed neurons: their values, then what the values give to the result.
//
// Included by `common/target.cpp` alone, inside the namespace of an instruction set.

#if defined(__AVX512F__)
constexpr int MOST_FLOAT_SUMS = 16;
#else
constexpr int MOST_FLOAT_SUMS = 4;
#endif

static float activated(Activation kind, float x) {
  switch (kind) {
    case SILU: return x / (1.0f + __builtin_expf(-x));
    case GELU: return 0.5f * x * __builtin_erfcf(-0.70710678f * x);
    case GELU_TANH:
      return 0.5f * x * (1.0f + __builtin_tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
    default: return x <= 0.0f ? 0.0f : x;  // NaN stays
  }
}

// found[o][r] = the product of row `row + r` of x and of row o of a weight.
template <int OUTPUTS, int ROWS>
static inline void float_dots(
    const float* x, int row, const float* weight, int64_t width, float (&found)[OUTPUTS][ROWS]) {
  Floats sums[OUTPUTS][ROWS] = {};
  const float* rows = x + row * width;
  const int64_t whole = width / WIDTH * WIDTH;
  for (int64_t i = 0; i < whole; i += WIDTH) {
    Floats weights[OUTPUTS];
    UNROLL for (int o = 0; o < OUTPUTS; ++o) weights[o] = load(weight + o * width + i);
    UNROLL for (int r = 0; r < ROWS; ++r) {
      const Floats v = load(rows + r * width + i);
      UNROLL for (int o = 0; o < OUTPUTS; ++o) sums[o][r] += weights[o] * v;
    }
  }
  if (whole < width)
    UNROLL for (int o = 0; o < OUTPUTS; ++o) {
      const Floats w = load_part(weight + o * width + whole, width - whole);
      UNROLL for (int r = 0; r < ROWS; ++r)
        sums[o][r] += w * load_part(rows + r * width + whole, width - whole);
    }
  UNROLL for (int o = 0; o < OUTPUTS; ++o)
    UNROLL for (int r = 0; r < ROWS; ++r) found[o][r] = sum_of(sums[o][r]);
}

template <int OUTPUTS, int ROWS>
static inline void projected(
    const ListedMlp& mlp, const Projection& by, int row, int64_t neuron,
    float (&found)[OUTPUTS][ROWS]) {
  if (mlp.is_int8) {
    int32_t sums[OUTPUTS][ROWS];
    const int8_t* codes = (const int8_t*)by.weight + neuron * mlp.width;
    int8_dots<OUTPUTS, ROWS>(mlp.rounded, row, codes, sums);
    for (int o = 0; o < OUTPUTS; ++o)
      for (int r = 0; r < ROWS; ++r)
        found[o][r] = (float)sums[o][r] * (mlp.rounded.scale[row + r] * by.scale[neuron + o]);
  } else {
    const float* weight = (const float*)by.weight + neuron * mlp.width;
    float_dots<OUTPUTS, ROWS>(mlp.x, row, weight, mlp.width, found);
  }
  if (by.bias != nullptr)
    for (int o = 0; o < OUTPUTS; ++o)
      for (int r = 0; r < ROWS; ++r) found[o][r] += by.bias[neuron + o];
}

// `values` are those of the first of `OUTPUTS` neurons, which are listed as `entry`.
template <int OUTPUTS, int ROWS>
static inline void listed_tile(
    const ListedMlp& mlp, int row, int64_t entry, int64_t neuron, float* values) {
  float up[OUTPUTS][ROWS], gate[OUTPUTS][ROWS];
  projected<OUTPUTS, ROWS>(mlp, mlp.up, row, neuron, up);
  if (mlp.gate.weight != nullptr) projected<OUTPUTS, ROWS>(mlp, mlp.gate, row, neuron, gate);
  for (int o = 0; o < OUTPUTS; ++o)
    for (int r = 0; r < ROWS; ++r) {
      float value = 0.0f;
      if (mlp.own == nullptr || mlp.own[(row + r) * mlp.entries + entry]) {
        value = mlp.gate.weight == nullptr ? activated(mlp.activation, up[o][r])
                                           : activated(mlp.activation, gate[o][r]) * up[o][r];
        if (mlp.hidden_scale != nullptr) value *= mlp.hidden_scale[neuron + o];
      }
      values[o * mlp.rows + row + r] = value;
    }
}

template <int OUTPUTS>
static inline void listed_neurons(
    const ListedMlp& mlp, int64_t entry, int64_t neuron, float* values) {
  constexpr int SUMS = MOST_SUMS < MOST_FLOAT_SUMS ? MOST_SUMS : MOST_FLOAT_SUMS;
  int row = 0;
  if constexpr (SUMS / OUTPUTS >= 4)
    for (; row + 4 <= mlp.rows; row += 4) listed_tile<OUTPUTS, 4>(mlp, row, entry, neuron, values);
  for (; row < mlp.rows; ++row) listed_tile<OUTPUTS, 1>(mlp, row, entry, neuron, values);
}

static void listed_hidden(const ListedMlp& mlp, float* values, int64_t first, int64_t last) {
  for (int64_t i = first; i < last;) {
    const int64_t entry = i / mlp.block_size, end = (entry + 1) * mlp.block_size;
    const int64_t until = end < last ? end : last;
    const int64_t start = mlp.blocks[entry] * mlp.block_size - entry * mlp.block_size;
    for (; i + 4 <= until; i += 4)
      listed_neurons<4>(mlp, entry, start + i, values + i * mlp.rows);
    for (; i < until; ++i) listed_neurons<1>(mlp, entry, start + i, values + i * mlp.rows);
  }
}

// Adds what `NEURONS` neurons give to the columns from `first` to `last` of all rows.
template <int NEURONS, class Weight>
static inline void add_down(
    const ListedMlp& mlp, const int64_t* neurons, const float* values, float* result,
    int64_t first, int64_t last) {
  const Weight* weights[NEURONS];
  for (int n = 0; n < NEURONS; ++n) weights[n] = (const Weight*)mlp.down + neurons[n] * mlp.width;
  int64_t i = first;
  for (; i + WIDTH <= last; i += WIDTH) {
    Floats w[NEURONS];
    UNROLL for (int n = 0; n < NEURONS; ++n) w[n] = load(weights[n] + i);
    for (int r = 0; r < mlp.rows; ++r) {
      Floats sum = load(result + r * mlp.width + i);
      UNROLL for (int n = 0; n < NEURONS; ++n) sum += w[n] * values[n * mlp.rows + r];
      store(result + r * mlp.width + i, sum);
    }
  }
  for (; i < last; ++i)
    for (int r = 0; r < mlp.rows; ++r)
      for (int n = 0; n < NEURONS; ++n)
        result[r * mlp.width + i] += (float)weights[n][i] * values[n * mlp.rows + r];
}

template <class Weight>
static inline void all_down(
    const ListedMlp& mlp, const Hidden& hidden, float* result, int64_t first, int64_t last) {
  int64_t n = 0;
  for (; n + 4 <= hidden.count; n += 4)
    add_down<4, Weight>(
        mlp, hidden.neurons + n, hidden.values + n * mlp.rows, result, first, last);
  for (; n < hidden.count; ++n)
    add_down<1, Weight>(
        mlp, hidden.neurons + n, hidden.values + n * mlp.rows, result, first, last);
}

static void listed_down(
    const ListedMlp& mlp, const Hidden& hidden, float* result, int64_t first, int64_t last) {
  for (int r = 0; r < mlp.rows; ++r)
    __builtin_memset(result + r * mlp.width + first, 0, (last - first) * sizeof(float));
  if (mlp.is_int8) all_down<int8_t>(mlp, hidden, result, first, last);
  else all_down<float>(mlp, hidden, result, first, last);
}
