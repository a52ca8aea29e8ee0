// The memory that kernels may touch. An operator registers it while it checks its arguments.
#pragma once

#include <cstdint>

namespace simt {

// Regions live from the outermost begin_operator to its end_operator. A region that is registered
// outside is ignored.
void begin_operator();
void end_operator();

// Registers the bytes of a tensor. Where regions overlap, a byte may be written if one of them is
// writable.
void region(const char* name, const void* data, int64_t bytes, bool writable);
// Registers scratch memory: it is filled with NaN, and must be written before it is read.
void scratch(void* data, int64_t bytes);

}  // namespace simt
