// The memory that kernels may touch: what an operator registers while it checks its arguments.
#pragma once

#include <cstdint>

namespace simt {

// Regions live from the outermost begin to its end; what is registered outside is ignored.
void begin_operator();
void end_operator();

// Bytes of a tensor. Where regions overlap, a byte may be written if one of them is writable.
void region(const char* name, const void* data, int64_t bytes, bool writable);
// Writable and not yet written: filled with NaN, and read only after it was written.
void scratch(void* data, int64_t bytes);

}  // namespace simt
