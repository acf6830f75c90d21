// The Python face of the routines over plain numbers: draws and Adafactor's passes.
#pragma once

#include <pybind11/pybind11.h>

void bind_numbers(pybind11::module_& module);
