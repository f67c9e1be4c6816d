// The call of XLA: rows are rounded once and multiplied with several weights.

#include <vector>

#include "../common/scratch.h"
#include "../common/targets.h"
#include "../common/threads.h"
#include "xla/ffi/api/ffi.h"

namespace jaxinfer {
namespace {

namespace ffi = xla::ffi;
using ffi::Error;
using Matrix = ffi::Buffer<ffi::F32, 2>;

// x f32[R, I], then s8[O, I] and f32[O] of each weight; results f32[R, O].
Error int8_product(ffi::ThreadPool pool, Matrix x, ffi::RemainingArgs operands,
                   ffi::RemainingRets results) {
  const int64_t rows = x.dimensions()[0], inputs = x.dimensions()[1];
  if (rows < 1 || rows > MOST_ROWS || inputs < 1 || inputs > MOST_INPUTS)
    return Error::InvalidArgument("int8_product takes 1 to 16 rows of 1 to 65536 inputs");
  if (operands.size() != 2 * results.size())
    return Error::InvalidArgument("int8_product takes codes and scales for each result");

  std::vector<Int8Weight> weights;
  int64_t outputs = 0;
  for (size_t i = 0; i < results.size(); ++i) {
    const auto codes = operands.get<ffi::Buffer<ffi::S8, 2>>(2 * i);
    const auto scale = operands.get<ffi::Buffer<ffi::F32, 1>>(2 * i + 1);
    auto result = results.get<Matrix>(i);
    if (!codes.has_value()) return codes.error();
    if (!scale.has_value()) return scale.error();
    if (!result.has_value()) return result.error();
    const int64_t size = codes->dimensions()[0];
    const auto shape = (*result)->dimensions();
    if (codes->dimensions()[1] != inputs || scale->dimensions()[0] != size || shape[0] != rows ||
        shape[1] != size)
      return Error::InvalidArgument("int8_product got operands whose shapes do not fit");
    weights.push_back({codes->typed_data(), scale->typed_data(), (*result)->typed_data(), size});
    outputs += size;
  }

  const Kernels& run = kernels();
  struct Codes;
  const int64_t stride = (inputs + STRIDE - 1) / STRIDE * STRIDE;
  float scale[MOST_ROWS];
  int32_t sums[MOST_ROWS];
  const RoundedRows rounded = {static_cast<int>(rows), inputs, stride,
                               scratch<int8_t, Codes>(rows * stride), scale, sums};
  run.round_rows(x.typed_data(), rounded);
  // Ranges run through the outputs of all weights.
  split(pool, outputs, 4, outputs * inputs, [&](int64_t first, int64_t last) {
    for (const Int8Weight& weight : weights) {
      if (first < weight.outputs && last > 0)
        run.int8_product(rounded, weight, std::max<int64_t>(first, 0),
                         std::min(last, weight.outputs));
      first -= weight.outputs, last -= weight.outputs;
    }
  });
  return Error::Success();
}

constexpr auto binding = [] {
  return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Matrix>().RemainingArgs().RemainingRets();
};

}  // namespace
}  // namespace jaxinfer

#pragma GCC visibility push(default)
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxinfer_int8_product, jaxinfer::int8_product, jaxinfer::binding());
#pragma GCC visibility pop
