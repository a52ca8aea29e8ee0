// Order between blocks: a fence, then an atomic operation that a later block's sees.
#pragma once

#include "stamp.h"

namespace simt {

void record_fence(const Thread& thread);
void record_atomic(const Thread& thread, const void* address);
// True if another block's access came before what `thread` does now.
bool published(Stamp stamp, const Thread& thread);

Index block_of(uint32_t tick);
void record_block();
void forget_blocks();

}  // namespace simt
