// Reports the version of the library densenet_ext/_cuda to _load.py. This library is no Python
// module: it registers its ops with torch. densenet_ext/_C reports how both were built.
#ifndef DENSENET_EXT_SIMT

extern "C" __attribute__((visibility("default"))) const char* densenet_ext_cuda_version() {
  return DENSENET_EXT_VERSION;
}

#endif
