// The shortest way into the kernels, round the dispatcher, for calls that it would cost more than the loss.
#pragma once

#include <pybind11/pybind11.h>

namespace lossops {

void define_direct(pybind11::module_& m);

} // namespace lossops
