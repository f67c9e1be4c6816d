// What every instruction set provides: one table of functions over plain pointers.
//
// The functions compute a range of outputs each, so that threads can share a product, and an output
// is always the same sum in the same order, whatever the range. Only this header crosses the border
// between files that are compiled for different instruction sets: it has no inline function, of
// which the linker would keep one copy, perhaps one that this CPU cannot run.
#pragma once

#include <stdint.h>

namespace jaxinfer {

constexpr int MOST_ROWS = 16;
constexpr int64_t MOST_INPUTS = 65536;  // sums of so many products of 8 bits fit into 32
constexpr int64_t STRIDE = 64;          // rows of codes are padded with zeros to a multiple

// Rows that were rounded to 8 bits: x[r, i] is about scale[r] * codes[r, i].
struct RoundedRows {
  int rows;
  int64_t inputs, stride;
  int8_t* codes;  // [rows, stride]
  float* scale;   // [rows]
  int32_t* sums;  // [rows], of the codes
};

struct Int8Weight {
  const int8_t* codes;  // [outputs, inputs]
  const float* scale;   // [outputs]
  float* result;        // [rows, outputs]
  int64_t outputs;
};

enum Activation { SILU, GELU, GELU_TANH, RELU };

// A weight [neurons, width] that makes neurons' values; all but `weight` may be null.
struct Projection {
  const void* weight;
  const float *scale, *bias;  // [neurons]
};

// A feed-forward block over listed blocks of neurons: listed neuron i is number
// `blocks[i / block_size] * block_size + i % block_size`. Weights are float, or int8 with scales.
struct ListedMlp {
  int rows;
  int64_t width, block_size, entries;
  bool is_int8;
  const float* x;               // [rows, width]
  RoundedRows rounded;          // what codes of 8 bits are multiplied with
  Projection up, gate;          // without a gate its weight is null
  Activation activation;
  const float* hidden_scale;    // [neurons] or null
  const void* down;             // [neurons, width]
  const int32_t* blocks;        // [entries]
  const bool* own;              // [rows, entries], which blocks a row selected, or null: all
};

// Neurons that give something to a row, and what they give.
struct Hidden {
  int64_t count;
  const int64_t* neurons;  // [count]
  const float* values;     // [count, rows]
};

struct Kernels {
  const char* name;
  void (*round_rows)(const float* x, const RoundedRows& rounded);
  void (*int8_product)(const RoundedRows& x, const Int8Weight& weight, int64_t first, int64_t last);
  // values f32[listed neurons, rows] of the listed neurons from `first` to `last`
  void (*listed_hidden)(const ListedMlp& mlp, float* values, int64_t first, int64_t last);
  // result f32[rows, width], its columns from `first` to `last`
  void (*listed_down)(
      const ListedMlp& mlp, const Hidden& hidden, float* result, int64_t first, int64_t last);
};

}  // namespace jaxinfer
