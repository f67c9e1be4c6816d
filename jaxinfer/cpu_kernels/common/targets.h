// Which instruction set computes.
#pragma once

#include "kernels.h"

namespace jaxinfer {

// The kernels in use: of the best set that this CPU has, unless another was chosen.
const Kernels& kernels();

// More threads than this never share a call; 0 is no limit.
int thread_limit();

}  // namespace jaxinfer
