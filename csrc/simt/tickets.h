// Order between blocks: one block fences and then does an atomic operation, whose result a later
// block's atomic operation sees.
#pragma once

#include "stamp.h"

namespace simt {

void record_fence(const Thread& thread);
void record_atomic(const Thread& thread, const void* address);
// True if another block's access came before the present access of `thread`.
bool published(Stamp stamp, const Thread& thread);

Index block_of(uint32_t tick);
void record_block();
void forget_blocks();

}  // namespace simt
