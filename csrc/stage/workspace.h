// An arena for the large tensors of a stage on CPU, which keeps its pages from step to step.
//
// Mapping, clearing and unmapping a hundred megabytes a step takes more time than fusion gains. The
// arena is one range of addresses, reserved once. Blocks are placed first fit from the bottom, so
// backward's buffers go where forward's have just been freed. Pages stay until they are released;
// at most `limit` bytes of them stay while no block uses them.
#pragma once

#include <cstdint>

#include "torch_stable.h"

namespace densenet_ext {

enum class Use { kBuffer, kOther };  // a buffer is a feature buffer or a gradient buffer

// Allocates an uninitialized contiguous tensor: from the arena if it is large and on CPU, else from
// torch.
Tensor workspace(const Tensor& like, const Sizes& sizes, ScalarType type, Use use = Use::kOther);

// Allocates a tensor that must outlive the previous stage's gradient buffer. It is placed just
// above the spot where that buffer will go, first fit, assuming the tensors of `leaving` are free
// by then; if the spot is taken, a little above it, or anywhere. That buffer's size is `times` the
// size of the latest feature buffer that stays, which is the previous stage's.
Tensor workspace_aside(const Tensor& like, const Sizes& sizes, ScalarType type, int64_t times,
                       const std::vector<Tensor>& leaving);

// Memory of the arena without a tensor around it; null where the arena does not serve that size or
// has no room.
void* allocate_block(int64_t bytes);
void free_block(void* block);

struct WorkspaceUse {
  int64_t in_use;    // bytes of the blocks that tensors hold
  int64_t resident;  // bytes of the arena's pages that have been touched and not released
};
WorkspaceUse workspace_use();

// Gives all pages that no tensor uses back to the system.
void release_workspaces();

// Limits how many bytes may stay resident without being in use. With 0 a block's pages go back to
// the system as soon as it is freed.
void set_workspace_limit(int64_t bytes);

// A rehearsal runs ops to learn which memory they ask for. While a thread rehearses, its new
// tensors get addresses without memory behind them, and its kernels compute nothing.
//
// start_rehearsal forgets the previous rehearsal of this process, whose tensors must be gone.
void start_rehearsal();
void stop_rehearsal();
bool is_rehearsing();

struct RehearsalUse {
  int64_t tensors;       // bytes of the tensors that would come from torch, now
  int64_t most_tensors;  // the most of these since the last call of rehearsal_use
  int64_t most_in_all;   // the most of these and of workspaces that tensors hold, since that call
  int64_t occupied;      // bytes of the pages that workspaces have touched since the start
};
RehearsalUse rehearsal_use();

}  // namespace densenet_ext
