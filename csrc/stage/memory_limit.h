// The memory that Linux's control groups leave to this process: a container's limit, or a batch
// system's.
#pragma once

#include <cstdint>
#include <string>

namespace densenet_ext {

// The least limit of the groups that this process is in and of all groups around them, in versions
// 1 and 2; `most` if there is no lower one. `root` is put before /proc and /sys: empty except in
// tests.
int64_t memory_limit(const std::string& root, int64_t most);

}  // namespace densenet_ext
