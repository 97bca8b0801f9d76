// Floats to blocks.
#include <nanobind/nanobind.h>

void bind_quantise(nanobind::module_&) {}
