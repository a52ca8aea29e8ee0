// Says on which devices the code of a build runs. Nothing in this file needs CUDA.
#pragma once

#include <cstdio>
#include <string>

namespace densenet_ext::cuda {

struct Capability {
  int major, minor;
};

inline bool at_least(Capability a, Capability b) {
  return a.major > b.major || (a.major == b.major && a.minor >= b.minor);
}

// Reads an architecture such as 8.0 or 9.0+PTX; `sign` becomes + if it has PTX.
inline Capability capability_of(const char* architecture, char* sign) {
  Capability built = {0, 0};
  *sign = 0;
  std::sscanf(architecture, "%d.%d%c", &built.major, &built.minor, sign);
  return built;
}

// A binary runs on devices of its major version from its minor version on, but Jetson Orin, 8.7,
// and the others of its major version do not run each other's. The driver translates PTX for every
// device that is not older.
inline bool serves(const char* architecture, Capability device) {
  char sign;
  const Capability built = capability_of(architecture, &sign);
  const auto orin = [](Capability c) { return c.major == 8 && c.minor == 7; };
  if (!at_least(device, built)) return false;
  return sign == '+' || (device.major == built.major && orin(device) == orin(built));
}

// True if one of the architectures, such as 8.0:9.0+PTX, serves the device and is not older than
// `oldest`.
inline bool served(const std::string& architectures, Capability device, Capability oldest) {
  for (size_t begin = 0, end; begin < architectures.size(); begin = end + 1) {
    end = architectures.find(':', begin);
    if (end == std::string::npos) end = architectures.size();
    const std::string one = architectures.substr(begin, end - begin);
    char sign;
    if (at_least(capability_of(one.c_str(), &sign), oldest) && serves(one.c_str(), device))
      return true;
  }
  return false;
}

}  // namespace densenet_ext::cuda
