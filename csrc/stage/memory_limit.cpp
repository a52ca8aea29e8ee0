// See cgroups(7). Lines of /proc/self/cgroup are `number:controllers:path`; number 0 is version 2,
// which names no controllers. The path starts at the root of the hierarchy. In a container without
// a name space only the container's group may be mounted: then the path's folders are missing, and
// the mount point has the files. A file that is missing or cannot be understood sets no limit.
#include "memory_limit.h"

#include <algorithm>
#include <charconv>
#include <cstdio>
#include <initializer_list>
#include <limits>

namespace densenet_ext {
namespace {

constexpr int64_t kNoLimit = std::numeric_limits<int64_t>::max();

// The text of a file; empty if it cannot be read.
std::string contents(const std::string& path) {
  std::string text;
  std::FILE* const file = std::fopen(path.c_str(), "r");
  if (file == nullptr) return text;
  char buffer[4096];
  for (size_t n; (n = std::fread(buffer, 1, sizeof buffer, file)) > 0;) text.append(buffer, n);
  std::fclose(file);
  return text;
}

// The number in a file; "max" is no limit. Version 1 writes a huge number for no limit.
int64_t limit_in(const std::string& path) {
  const std::string text = contents(path);
  int64_t limit = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), limit);
  const bool whole = end == text.data() + text.size() || *end == '\n';
  return error == std::errc() && whole && limit >= 0 ? limit : kNoLimit;
}

// The least limit of a group, of the groups around it, and of that at `mount` itself.
int64_t limit_of_groups(const std::string& mount, std::string group,
                        std::initializer_list<const char*> files) {
  // A path that leads out of the name space is not mounted here.
  if (group.empty() || group[0] != '/' || (group + "/").find("/../") != std::string::npos)
    group.clear();
  int64_t limit = kNoLimit;
  for (;;) {
    for (const char* const file : files)
      limit = std::min(limit, limit_in(mount + group + "/" + file));
    if (group.empty()) return limit;
    group.erase(group.rfind('/'));
  }
}

// True if "memory" is among names with commas between them.
bool names_memory(const std::string& controllers) {
  return ("," + controllers + ",").find(",memory,") != std::string::npos;
}

}  // namespace

int64_t memory_limit(const std::string& root, int64_t most) {
  const std::string groups = contents(root + "/proc/self/cgroup"), mount = root + "/sys/fs/cgroup";
  for (size_t begin = 0, end; begin < groups.size(); begin = end + 1) {
    end = std::min(groups.find('\n', begin), groups.size());
    const std::string line = groups.substr(begin, end - begin);
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1),
                      path = line.substr(second + 1);
    if (line.compare(0, first, "0") == 0 && controllers.empty()) {
      most = std::min(most, limit_of_groups(mount, path, {"memory.max", "memory.high"}));
    } else if (names_memory(controllers)) {
      most = std::min(most, limit_of_groups(mount + "/memory", path, {"memory.limit_in_bytes"}));
    }
  }
  return most;
}

}  // namespace densenet_ext
