// The Python face of packing and of the samplers of whole documents.
#pragma once

#include <pybind11/pybind11.h>

void bind_documents(pybind11::module_& module);
