#include "document_bindings.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <memory>
#include <stdexcept>
#include <string>

#include "document_sampler.h"
#include "packing.h"

namespace py = pybind11;
using namespace megaswitch;
using Values = py::array_t<uint64_t, py::array::c_style>;

namespace {

std::vector<std::pair<uint64_t, uint64_t>> row_of(const RowIndex& index, uint64_t row) {
  std::vector<Piece> pieces;
  index.row(row, pieces);
  std::vector<std::pair<uint64_t, uint64_t>> out;
  for (const Piece& piece : pieces) out.emplace_back(piece.document, piece.part);
  return out;
}

void write_rows_to(const Pieces& pieces, const RowShape& shape,
                   const std::vector<uint64_t>& counts, Values& out) {
  uint64_t* const data = out.mutable_data();
  const auto size = static_cast<uint64_t>(out.size());
  const py::gil_scoped_release release;
  write_rows(pieces, shape, counts, data, size);
}

}  // namespace

void bind_documents(py::module_& module) {
  const auto no_gil = py::call_guard<py::gil_scoped_release>();

  py::class_<Texts>(module, "Texts")
      .def(py::init<std::shared_ptr<IndexedTokens>, bool, int64_t>(), py::arg("tokens"),
           py::kw_only(), py::arg("ends_in_eos"), py::arg("vocab_size"));

  py::class_<RowShape>(module, "RowShape")
      .def(py::init([](uint32_t encoder, uint32_t decoder, bool packed) {
             return RowShape{{encoder, decoder}, packed};
           }),
           py::kw_only(), py::arg("encoder_length"), py::arg("decoder_length"), py::arg("packed"));

  py::class_<Pieces, std::shared_ptr<Pieces>>(module, "Pieces");
  py::class_<SpanDocuments, Pieces, std::shared_ptr<SpanDocuments>>(module, "SpanDocuments")
      .def(py::init<Texts, std::vector<uint32_t>, std::vector<uint32_t>, int32_t, bool>(),
           py::arg("texts"), py::kw_only(), py::arg("noise"), py::arg("spans"),
           py::arg("sentinel_top"), py::arg("random_roll") = false);
  py::class_<PrefixDocuments, Pieces, std::shared_ptr<PrefixDocuments>>(module, "PrefixDocuments")
      .def(py::init<Texts, uint64_t>(), py::arg("texts"), py::kw_only(), py::arg("longest"));
  py::class_<TextPairs, Pieces, std::shared_ptr<TextPairs>>(module, "TextPairs")
      .def(py::init([](Texts inputs, Texts targets, uint32_t encoder, uint32_t decoder) {
             return std::make_shared<TextPairs>(inputs, targets, Room{encoder, decoder});
           }),
           py::arg("inputs"), py::arg("targets"), py::kw_only(), py::arg("encoder_length"),
           py::arg("decoder_length"));

  module.def("count_rows", &count_rows, py::arg("pieces"), py::arg("shape"), no_gil);
  module.def("write_rows", &write_rows_to, py::arg("pieces"), py::arg("shape"), py::arg("counts"),
             py::arg("out").noconvert());

  py::class_<RowIndex, std::shared_ptr<RowIndex>>(module, "RowIndex")
      .def(py::init([](const std::string& path, const py::bytes& key,
                       const std::shared_ptr<Pieces>& pieces, const RowShape& shape) {
             const std::string held = key;
             const py::gil_scoped_release release;
             return std::make_shared<RowIndex>(path, held, *pieces, shape);
           }),
           py::arg("path"), py::arg("key"), py::arg("pieces"), py::arg("shape"))
      .def_property_readonly("rows", &RowIndex::rows)
      .def_property_readonly("pieces", &RowIndex::pieces)
      .def_property_readonly("encoder_tokens", &RowIndex::encoder_tokens)
      .def_property_readonly("decoder_tokens", &RowIndex::decoder_tokens)
      .def("row", &row_of, py::arg("row"));

  py::class_<DocumentSampler, Sampler, std::shared_ptr<DocumentSampler>>(module, "DocumentSampler")
      .def(py::init<std::shared_ptr<Pieces>, std::shared_ptr<RowIndex>, const RowShape&, uint64_t,
                    bool>(),
           py::arg("pieces"), py::arg("rows"), py::arg("shape"), py::kw_only(), py::arg("seed"),
           py::arg("shuffle"))
      .def("row", &DocumentSampler::row, py::arg("sample_index"));
}
