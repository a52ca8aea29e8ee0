// The last line of a kernel file: DENSENET_EXT_INSTANTIATE(function, Arguments) makes it for the
// four storage types.
#pragma once

#define DENSENET_EXT_INSTANTIATE(function, Arguments)           \
  template void function<float>(const Arguments<float>&);       \
  template void function<double>(const Arguments<double>&);     \
  template void function<BFloat16>(const Arguments<BFloat16>&); \
  template void function<Float16>(const Arguments<Float16>&);
