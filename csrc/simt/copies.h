// The copies of cp.async that one thread has issued and not yet waited for.
#pragma once

#include <cstdint>
#include <vector>

namespace simt {

struct Copy {
  unsigned char* to;
  const unsigned char* from;
  int bytes;
  int group;
  uintptr_t pc;
  uint32_t issued;  // tick
};

struct Copies {
  std::vector<Copy> pending;  // in order of issue
  int group = 0;              // group of the next copy
};

}  // namespace simt
