// All kernels for one instruction set, whose name is TARGET and whose flags the compiler was given.
// No header with inline functions may be included here but those of intrinsics, see `kernels.h`.

#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define TEXT_OF(name) #name
#define TEXT(name) TEXT_OF(name)
#define TABLE_OF(name) name##_kernels
#define TABLE(name) TABLE_OF(name)

namespace jaxinfer {
namespace TARGET {

#include "vectors.h"
#include "int8_dot.h"

#include "../int8_product/kernel.h"
#include "../listed_mlp/kernel.h"

}  // namespace TARGET

extern const Kernels TABLE(TARGET);
const Kernels TABLE(TARGET) = {
    TEXT(TARGET),
    TARGET::round_rows,
    TARGET::int8_product,
    TARGET::listed_hidden,
    TARGET::listed_down,
};

}  // namespace jaxinfer
