// The call of XLA: values of the listed neurons, then the result's columns.

#include "../common/scratch.h"
#include "../common/targets.h"
#include "../common/threads.h"
#include "xla/ffi/api/ffi.h"

namespace jaxinfer {
namespace {

namespace ffi = xla::ffi;
using ffi::Error;
using Matrix = ffi::Buffer<ffi::F32, 2>;

// What may be missing, in the order of its bits in `present` and of the operands.
enum Optional { GATE, OWN, UP_BIAS, GATE_BIAS, UP_SCALE, GATE_SCALE, HIDDEN_SCALE, OPTIONALS };

template <class Buffer>
bool has_shape(const Buffer& buffer, int64_t rows, int64_t columns) {
  const auto shape = buffer.dimensions();
  return shape.size() == 2 && shape[0] == rows && shape[1] == columns;
}

bool is_vector(const ffi::AnyBuffer& buffer, int64_t size) {
  return buffer.element_type() == ffi::F32 && buffer.dimensions().size() == 1 &&
         buffer.dimensions()[0] == size;
}

// Fills in what `operands` hold; an empty text if they fit.
const char* take(ffi::RemainingArgs operands, int64_t present, int64_t neurons,
                 ffi::DataType weights, ListedMlp& mlp) {
  size_t next = 0;
  for (int i = 0; i < OPTIONALS; ++i) {
    if (!(present >> i & 1)) continue;
    const auto found = operands.get<ffi::AnyBuffer>(next++);
    if (!found.has_value()) return "listed_mlp got fewer operands than it was promised";
    const void* data = found->untyped_data();
    if (i == GATE) {
      if (found->element_type() != weights || !has_shape(*found, neurons, mlp.width))
        return "listed_mlp got a gate that is not like up";
      mlp.gate.weight = data;
    } else if (i == OWN) {
      if (found->element_type() != ffi::PRED || !has_shape(*found, mlp.rows, mlp.entries))
        return "listed_mlp takes own as bool[rows, entries]";
      mlp.own = static_cast<const bool*>(data);
    } else {
      if (!is_vector(*found, neurons)) return "listed_mlp takes a float32 per neuron";
      const float* numbers = static_cast<const float*>(data);
      if (i == UP_BIAS) mlp.up.bias = numbers;
      if (i == GATE_BIAS) mlp.gate.bias = numbers;
      if (i == UP_SCALE) mlp.up.scale = numbers;
      if (i == GATE_SCALE) mlp.gate.scale = numbers;
      if (i == HIDDEN_SCALE) mlp.hidden_scale = numbers;
    }
  }
  if (next != operands.size()) return "listed_mlp got more operands than it was promised";
  if (mlp.is_int8 && (!mlp.up.scale || (mlp.gate.weight && !mlp.gate.scale)))
    return "listed_mlp takes scales with codes of 8 bits";
  return nullptr;
}

// The neurons that give something to any row, in order; `values` moves to the front.
Hidden compacted(const ListedMlp& mlp, int64_t listed, float* values, int64_t* neurons) {
  int64_t count = 0;
  for (int64_t i = 0; i < listed; ++i) {
    const float* from = values + i * mlp.rows;
    const int64_t block = mlp.blocks[i / mlp.block_size];
    bool gives = false;
    for (int r = 0; r < mlp.rows; ++r) gives |= from[r] != 0.0f;  // NaN too
    if (!gives) continue;
    if (count != i) std::copy(from, from + mlp.rows, values + count * mlp.rows);
    neurons[count++] = block * mlp.block_size + i % mlp.block_size;
  }
  return {count, neurons, values};
}

// x f32[R, D], up and down [F, D] of one type, blocks s32[L], live s32[]; the result f32[R, D].
Error listed_mlp(ffi::ThreadPool pool, Matrix x, ffi::AnyBuffer up, ffi::AnyBuffer down,
                 ffi::Buffer<ffi::S32, 1> blocks, ffi::Buffer<ffi::S32, 0> live,
                 ffi::RemainingArgs operands, ffi::Result<Matrix> result, int64_t block_size,
                 int64_t activation, int64_t present) {
  const int64_t rows = x.dimensions()[0], width = x.dimensions()[1];
  if (rows < 1 || rows > MOST_ROWS || width < 1 || width > MOST_INPUTS)
    return Error::InvalidArgument("listed_mlp takes 1 to 16 rows of 1 to 65536 inputs");
  const auto type = up.element_type();
  const int64_t neurons = up.dimensions().size() == 2 ? up.dimensions()[0] : 0;
  if ((type != ffi::F32 && type != ffi::S8) || down.element_type() != type ||
      !has_shape(up, neurons, width) || !has_shape(down, neurons, width) ||
      !has_shape(*result, rows, width) || block_size < 1 || neurons % block_size != 0 ||
      activation < SILU || activation > RELU)
    return Error::InvalidArgument("listed_mlp got operands whose shapes or types do not fit");

  ListedMlp mlp = {};
  mlp.rows = static_cast<int>(rows), mlp.width = width, mlp.block_size = block_size;
  mlp.entries = blocks.dimensions()[0], mlp.is_int8 = type == ffi::S8;
  mlp.x = x.typed_data(), mlp.up.weight = up.untyped_data(), mlp.down = down.untyped_data();
  mlp.blocks = blocks.typed_data(), mlp.activation = static_cast<Activation>(activation);
  if (const char* fault = take(operands, present, neurons, type, mlp))
    return Error::InvalidArgument(fault);

  const int64_t used = live.typed_data()[0];
  if (used < 0 || used > mlp.entries)
    return Error::InvalidArgument("listed_mlp got a count that is no part of its list");
  for (int64_t i = 0; i < used; ++i)
    if (mlp.blocks[i] < 0 || mlp.blocks[i] >= neurons / block_size)
      return Error::InvalidArgument("listed_mlp got a block that is not there");

  struct Codes;
  struct Values;
  struct Neurons;
  const Kernels& run = kernels();
  const int64_t listed = used * block_size, stride = (width + STRIDE - 1) / STRIDE * STRIDE;
  float scale[MOST_ROWS];
  int32_t sums[MOST_ROWS];
  if (mlp.is_int8) {
    mlp.rounded = {mlp.rows, width, stride, scratch<int8_t, Codes>(rows * stride), scale, sums};
    run.round_rows(mlp.x, mlp.rounded);
  }
  float* values = scratch<float, Values>(listed * rows + 1);
  const int64_t bytes = width * (mlp.is_int8 ? 1 : 4);
  split(pool, listed, 4, listed * bytes * (mlp.gate.weight ? 2 : 1),
        [&](int64_t first, int64_t last) { run.listed_hidden(mlp, values, first, last); });
  const Hidden hidden = compacted(mlp, listed, values, scratch<int64_t, Neurons>(listed + 1));
  split(pool, width, 64, hidden.count * bytes, [&](int64_t first, int64_t last) {
    run.listed_down(mlp, hidden, (*result).typed_data(), first, last);
  });
  return Error::Success();
}

constexpr auto binding = [] {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<Matrix>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::Buffer<ffi::S32, 1>>()
      .Arg<ffi::Buffer<ffi::S32, 0>>()
      .RemainingArgs()
      .Ret<Matrix>()
      .Attr<int64_t>("block_size")
      .Attr<int64_t>("activation")
      .Attr<int64_t>("present");
};

}  // namespace
}  // namespace jaxinfer

#pragma GCC visibility push(default)
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxinfer_listed_mlp, jaxinfer::listed_mlp, jaxinfer::binding());
#pragma GCC visibility pop
