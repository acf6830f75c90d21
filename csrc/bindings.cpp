// The Python face of the data core. Only `megaswitch/data/native.py` imports this module; the
// types are in `megaswitch/_C.pyi`. Long work runs without the GIL.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <stdexcept>
#include <string>

#include "indexed.h"
#include "permutation.h"
#include "philox.h"
#include "span_corruption.h"

namespace py = pybind11;
using namespace megaswitch;
using Array = py::array_t<int64_t, py::array::c_style>;

namespace {

uint64_t rows_of(const Array& array, const char* name) {
  if (array.ndim() != 1) throw std::invalid_argument(std::string(name) + " must have one axis");
  return static_cast<uint64_t>(array.shape(0));
}

int64_t* matrix(Array& array, uint64_t rows, uint64_t columns, const char* name) {
  if (array.ndim() != 2 || static_cast<uint64_t>(array.shape(0)) != rows ||
      static_cast<uint64_t>(array.shape(1)) != columns) {
    throw std::invalid_argument(std::string(name) + " has the wrong shape");
  }
  return array.mutable_data();  // throws on a read-only array
}

void read_tokens(const IndexedTokens& tokens, uint64_t start, Array& out) {
  const uint64_t count = rows_of(out, "out");
  int64_t* const data = out.mutable_data();
  const py::gil_scoped_release release;
  tokens.read(start, count, data);
}

void fill_batch(const SpanSampler& sampler, const Array& sample_indices, Array& encoder,
                Array& decoder, Array& targets) {
  const uint64_t rows = rows_of(sample_indices, "sample_indices");
  const SpanLayout& layout = sampler.layout();
  const BatchBuffers out{matrix(encoder, rows, layout.encoder_length, "encoder_tokens"),
                         matrix(decoder, rows, layout.decoder_length, "decoder_tokens"),
                         matrix(targets, rows, layout.decoder_length, "decoder_targets")};
  const int64_t* const indices = sample_indices.data();
  const py::gil_scoped_release release;
  sampler.fill(indices, rows, out);
}

py::tuple corrupt_sample(const Array& raw, const SpanLayout& layout, uint64_t seed,
                         uint64_t sample_index) {
  layout.check();
  if (rows_of(raw, "raw") != layout.raw_length) throw std::invalid_argument("raw: wrong length");
  Array encoder(static_cast<py::ssize_t>(layout.encoder_length));
  Array decoder(static_cast<py::ssize_t>(layout.decoder_length));
  Array targets(static_cast<py::ssize_t>(layout.decoder_length));
  SpanScratch scratch;
  corrupt(raw.data(), layout, seed, sample_index, scratch, encoder.mutable_data(),
          decoder.mutable_data(), targets.mutable_data());
  return py::make_tuple(encoder, decoder, targets);
}

Array permute(const Array& positions, uint64_t size, uint64_t seed, uint64_t epoch) {
  if (size == 0 || size > uint64_t{1} << 62) throw std::invalid_argument("size out of range");
  const uint64_t count = rows_of(positions, "positions");
  Array out(static_cast<py::ssize_t>(count));
  const int64_t* const in = positions.data();
  int64_t* const data = out.mutable_data();
  const py::gil_scoped_release release;
  const Permutation order(size, seed, epoch);
  for (uint64_t i = 0; i < count; ++i) {
    if (in[i] < 0 || static_cast<uint64_t>(in[i]) >= size) {
      throw std::out_of_range("a position outside the permutation");
    }
    data[i] = static_cast<int64_t>(order(static_cast<uint64_t>(in[i])));
  }
  return out;
}

py::tuple as_tuple(TokenSpan span) { return py::make_tuple(span.start, span.count); }

}  // namespace

PYBIND11_MODULE(_C, module) {
  py::register_exception<DataError>(module, "DataError", PyExc_ValueError);

  py::class_<IndexedTokens, std::shared_ptr<IndexedTokens>>(module, "IndexedTokens")
      .def(py::init<const std::string&>(), py::arg("prefix"),
           py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("type_code",
                             [](const IndexedTokens& t) { return static_cast<int>(t.type()); })
      .def_property_readonly("num_tokens", &IndexedTokens::num_tokens)
      .def_property_readonly("num_documents", &IndexedTokens::num_documents)
      .def("document", [](const IndexedTokens& t, uint64_t i) { return as_tuple(t.document(i)); })
      .def("read", &read_tokens, py::arg("start"), py::arg("out").noconvert())
      .def("id_range", &IndexedTokens::id_range, py::arg("budget"),
           py::call_guard<py::gil_scoped_release>());

  py::class_<SpanLayout>(module, "SpanLayout")
      .def(py::init<uint32_t, uint32_t, uint32_t, uint64_t, uint64_t, int64_t>(), py::kw_only(),
           py::arg("raw_length"), py::arg("noise_tokens"), py::arg("spans"),
           py::arg("encoder_length"), py::arg("decoder_length"), py::arg("sentinel_top"));

  py::class_<SpanSampler>(module, "SpanSampler")
      .def(py::init<std::shared_ptr<IndexedTokens>, const SpanLayout&, uint64_t, int64_t, uint64_t,
                    uint32_t, bool>(),
           py::arg("tokens"), py::arg("layout"), py::kw_only(), py::arg("seed"),
           py::arg("vocab_size"), py::arg("samples_per_epoch"), py::arg("offset_choices"),
           py::arg("shuffle"))
      .def("sample_start", &SpanSampler::sample_start, py::arg("sample_index"))
      .def("fill", &fill_batch, py::arg("sample_indices").noconvert(),
           py::arg("encoder_tokens").noconvert(), py::arg("decoder_tokens").noconvert(),
           py::arg("decoder_targets").noconvert());

  module.def("corrupt", &corrupt_sample, py::arg("raw").noconvert(), py::arg("layout"),
             py::kw_only(), py::arg("seed"), py::arg("sample_index"));
  module.def("permute", &permute, py::arg("positions").noconvert(), py::kw_only(),
             py::arg("size"), py::arg("seed"), py::arg("epoch"));
  module.def("philox4x32", &philox4x32, py::arg("counter"), py::arg("key"));
}
