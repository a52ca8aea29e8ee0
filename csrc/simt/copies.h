// cp.async: the copies of one thread that are on their way.
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
  int group = 0;              // that the next copy belongs to
};

}  // namespace simt
