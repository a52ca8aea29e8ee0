// The last lines of a kernel file instantiate its functions for the storage types.
#pragma once

#define DENSENET_EXT_INSTANTIATE_FOR(S, function, Arguments) \
  template void function<S>(const Arguments<S>&);

// AMX has no float64.
#define DENSENET_EXT_INSTANTIATE_AMX(function, Arguments)     \
  DENSENET_EXT_INSTANTIATE_FOR(float, function, Arguments)    \
  DENSENET_EXT_INSTANTIATE_FOR(BFloat16, function, Arguments) \
  DENSENET_EXT_INSTANTIATE_FOR(Float16, function, Arguments)

#define DENSENET_EXT_INSTANTIATE(function, Arguments) \
  DENSENET_EXT_INSTANTIATE_AMX(function, Arguments)   \
  DENSENET_EXT_INSTANTIATE_FOR(double, function, Arguments)
