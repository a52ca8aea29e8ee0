// The loader asks densenet_ext/_cuda for its version. That library is no Python module: torch finds
// its operators, as it finds those of densenet_ext/_C, which also reports how both were built.
#ifndef DENSENET_EXT_SIMT

extern "C" __attribute__((visibility("default"))) const char* densenet_ext_cuda_version() {
  return DENSENET_EXT_VERSION;
}

#endif
