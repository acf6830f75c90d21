#include "number_bindings.h"

#include <pybind11/numpy.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "adafactor.h"
#include "draws.h"

namespace py = pybind11;
using namespace megaswitch;

namespace {

template <typename T>
using Numbers = py::array_t<T, py::array::c_style>;

void check(const py::array& array, const std::vector<py::ssize_t>& shape, const char* name) {
  bool fits = array.ndim() == static_cast<py::ssize_t>(shape.size());
  py::ssize_t axis = 0;
  for (const py::ssize_t size : shape) fits = fits && array.shape(axis++) == size;
  if (!fits) throw std::invalid_argument(std::string(name) + " has the wrong shape");
}

void draw_into(const Numbers<int64_t>& keys, int64_t first, Numbers<float>& out,
               unsigned threads) {
  if (keys.ndim() != 1 || out.ndim() != 2) throw std::invalid_argument("keys [N], out [N, n]");
  check(out, {keys.shape(0), out.shape(1)}, "out");
  const auto rows = static_cast<uint64_t>(out.shape(0));
  const auto columns = static_cast<uint64_t>(out.shape(1));
  const int64_t* const from = keys.data();
  float* const to = out.mutable_data();
  const py::gil_scoped_release release;
  draw(from, rows, first, columns, threads, to);
}

template <typename T>
void adafactor_update(Numbers<T>& parameter, const Numbers<T>& gradient, Numbers<T>& row,
                      Numbers<T>& column, double learning_rate, double beta2,
                      double clip_threshold, double epsilon1, double epsilon2, double keep,
                      bool scale_by_parameter, unsigned threads) {
  const py::ssize_t axes = parameter.ndim();
  if (axes < 2) throw std::invalid_argument("parameter must have at least two axes");
  if (parameter.size() == 0) throw std::invalid_argument("parameter must not be empty");
  const py::ssize_t rows = parameter.shape(axes - 2);
  const py::ssize_t columns = parameter.shape(axes - 1);
  std::vector<py::ssize_t> shape(parameter.shape(), parameter.shape() + axes);
  check(gradient, shape, "gradient");
  shape.pop_back();
  check(row, shape, "row");
  shape.back() = columns;
  check(column, shape, "column");
  const AdafactorStep step{learning_rate, beta2, clip_threshold,    epsilon1,
                           epsilon2,      keep,  scale_by_parameter};
  T* const p = parameter.mutable_data();
  const T* const g = gradient.data();
  T* const r = row.mutable_data();
  T* const c = column.mutable_data();
  const py::ssize_t slices = parameter.size() / (rows * columns);
  const py::gil_scoped_release release;
  adafactor(p, g, r, c, static_cast<uint64_t>(slices), static_cast<uint64_t>(rows),
            static_cast<uint64_t>(columns), step, threads);
}

template <typename T>
void bind_adafactor(py::module_& module) {
  module.def("adafactor", &adafactor_update<T>, py::arg("parameter").noconvert(),
             py::arg("gradient").noconvert(), py::arg("row").noconvert(),
             py::arg("column").noconvert(), py::kw_only(), py::arg("learning_rate"),
             py::arg("beta2"), py::arg("clip_threshold"), py::arg("epsilon1"),
             py::arg("epsilon2"), py::arg("keep"), py::arg("scale_by_parameter"),
             py::arg("threads"));
}

}  // namespace

void bind_numbers(py::module_& module) {
  module.def("draw", &draw_into, py::arg("keys").noconvert(), py::arg("first"),
             py::arg("out").noconvert(), py::kw_only(), py::arg("threads"));
  bind_adafactor<float>(module);
  bind_adafactor<double>(module);
}
