// The Python face of the core. Only `megaswitch/native.py` imports this module; the
// types are in `megaswitch/_C.pyi`. Long work runs without the GIL.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <chrono>
#include <deque>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>

#include "document_bindings.h"
#include "indexed.h"
#include "loader.h"
#include "mixture.h"
#include "number_bindings.h"
#include "permutation.h"
#include "philox.h"
#include "sampler.h"
#include "span_corruption.h"

namespace py = pybind11;
using namespace megaswitch;
using Array = py::array_t<int64_t, py::array::c_style>;
using Ids = py::array_t<int32_t, py::array::c_style>;

namespace {

uint64_t rows_of(const Array& array, const char* name) {
  if (array.ndim() != 1) throw std::invalid_argument(std::string(name) + " must have one axis");
  return static_cast<uint64_t>(array.shape(0));
}

int32_t* matrix(Ids& array, uint64_t rows, uint64_t columns, const char* name) {
  if (array.ndim() != 2 || static_cast<uint64_t>(array.shape(0)) != rows ||
      static_cast<uint64_t>(array.shape(1)) != columns) {
    throw std::invalid_argument(std::string(name) + " has the wrong shape");
  }
  return array.mutable_data();  // throws on a read-only array
}

// Calls a member of IndexedTokens that fills one entry per element from `first`.
template <auto Member>
void fill_entries(const IndexedTokens& tokens, uint64_t first, Array& out) {
  const uint64_t count = rows_of(out, "out");
  int64_t* const data = out.mutable_data();
  const py::gil_scoped_release release;
  (tokens.*Member)(first, count, data);
}

// The five matrices of a batch, checked to have `rows` rows of the sampler's lengths.
BatchBuffers buffers(const Sampler& sampler, uint64_t rows, Ids& encoder, Ids& decoder,
                     Ids& targets, std::optional<Ids>& encoder_segments,
                     std::optional<Ids>& decoder_segments) {
  if (sampler.packs_documents() != encoder_segments.has_value() ||
      sampler.packs_documents() != decoder_segments.has_value()) {
    throw std::invalid_argument("segments go with samplers that pack documents, and only those");
  }
  const uint64_t le = sampler.encoder_length();
  const uint64_t ld = sampler.decoder_length();
  return {matrix(encoder, rows, le, "encoder_tokens"),
          matrix(decoder, rows, ld, "decoder_tokens"),
          matrix(targets, rows, ld, "decoder_targets"),
          encoder_segments ? matrix(*encoder_segments, rows, le, "encoder_segments") : nullptr,
          decoder_segments ? matrix(*decoder_segments, rows, ld, "decoder_segments") : nullptr};
}

void fill_batch(const Sampler& sampler, const Array& sample_indices, Ids& encoder, Ids& decoder,
                Ids& targets, std::optional<Ids> encoder_segments,
                std::optional<Ids> decoder_segments) {
  const uint64_t rows = rows_of(sample_indices, "sample_indices");
  const BatchBuffers out =
      buffers(sampler, rows, encoder, decoder, targets, encoder_segments, decoder_segments);
  const int64_t* const indices = sample_indices.data();
  const py::gil_scoped_release release;
  sampler.prefetch(indices, rows);  // all rows' reads are under way at once
  sampler.fill(indices, rows, out);
}

// A loader that keeps the buffers it fills alive.
class HoldingLoader {
 public:
  HoldingLoader(std::shared_ptr<Sampler> sampler, unsigned threads, unsigned capacity)
      : sampler_(sampler), loader_(std::make_unique<Loader>(sampler, threads, capacity)) {}

  ~HoldingLoader() { close(); }

  void submit(const Array& sample_indices, Ids encoder, Ids decoder, Ids targets,
              std::optional<Ids> encoder_segments, std::optional<Ids> decoder_segments) {
    const uint64_t rows = rows_of(sample_indices, "sample_indices");
    const BatchBuffers out =
        buffers(*sampler_, rows, encoder, decoder, targets, encoder_segments, decoder_segments);
    open().submit(sample_indices.data(), rows, out);
    held_.push_back({encoder, decoder, targets, py::cast(encoder_segments),
                     py::cast(decoder_segments)});
  }

  // Returns once the oldest batch is filled. Waits in short pieces, as signals are Python's to
  // handle and storage may be very slow.
  void next() {
    std::exception_ptr error;
    for (bool ready = false; !ready;) {
      {
        Loader& loader = open();
        const py::gil_scoped_release release;
        ready = loader.next(std::chrono::milliseconds(100), error);
      }
      if (!ready && PyErr_CheckSignals() != 0) throw py::error_already_set();
    }
    held_.pop_front();
    if (error) std::rethrow_exception(error);
  }

  void close() {
    std::unique_ptr<Loader> loader = std::move(loader_);
    {
      const py::gil_scoped_release release;
      loader.reset();
    }
    held_.clear();
  }

 private:
  Loader& open() {
    if (loader_ == nullptr) throw std::invalid_argument("the loader is closed");
    return *loader_;
  }

  std::shared_ptr<Sampler> sampler_;
  std::deque<std::array<py::object, 5>> held_;
  std::unique_ptr<Loader> loader_;
};

py::tuple locate(const MixtureOrder& order, const Array& sample_indices) {
  const uint64_t count = rows_of(sample_indices, "sample_indices");
  Array sources(static_cast<py::ssize_t>(count));
  Array positions(static_cast<py::ssize_t>(count));
  const int64_t* const in = sample_indices.data();
  int64_t* const source = sources.mutable_data();
  int64_t* const position = positions.mutable_data();
  {
    const py::gil_scoped_release release;
    for (uint64_t i = 0; i < count; ++i) {
      if (in[i] < 0) throw std::invalid_argument("negative sample index");
      const MixturePlace place = order.locate(static_cast<uint64_t>(in[i]));
      source[i] = static_cast<int64_t>(place.source);
      position[i] = static_cast<int64_t>(place.position);
    }
  }
  return py::make_tuple(sources, positions);
}

std::shared_ptr<MixtureOrder> mixture_order(
    uint64_t seed, uint64_t block,
    const std::vector<std::pair<uint64_t, std::vector<uint64_t>>>& segments) {
  std::vector<MixtureSegment> list;
  for (const auto& [start, quotas] : segments) list.push_back({start, quotas});
  return std::make_shared<MixtureOrder>(seed, block, list);
}

std::shared_ptr<MixtureSampler> mixture_sampler(
    const std::vector<std::shared_ptr<Sampler>>& sources, std::shared_ptr<MixtureOrder> order) {
  return std::make_shared<MixtureSampler>(
      std::vector<std::shared_ptr<const Sampler>>(sources.begin(), sources.end()), order);
}

py::tuple corrupt_sample(const Array& raw, const SpanLayout& layout, uint64_t seed,
                         uint64_t sample_index) {
  layout.check();
  if (rows_of(raw, "raw") != layout.raw_length) throw std::invalid_argument("raw: wrong length");
  Ids encoder(static_cast<py::ssize_t>(layout.encoder_length));
  Ids decoder(static_cast<py::ssize_t>(layout.decoder_length));
  Ids targets(static_cast<py::ssize_t>(layout.decoder_length));
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

py::tuple document(const IndexedTokens& tokens, uint64_t index) {
  tokens.begin_visits();
  const TokenSpan span = tokens.document(index);
  tokens.check_not_cut();
  return py::make_tuple(span.start, span.count);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  py::register_exception<DataError>(module, "DataError", PyExc_ValueError);

  py::class_<IndexedTokens, std::shared_ptr<IndexedTokens>>(module, "IndexedTokens")
      .def(py::init([](const std::string& prefix, bool pread) {
             return std::make_shared<IndexedTokens>(prefix, pread ? Access::kPread : Access::kMmap);
           }),
           py::arg("prefix"), py::kw_only(), py::arg("pread") = false,
           py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("type_code",
                             [](const IndexedTokens& t) { return static_cast<int>(t.type()); })
      .def_property_readonly("num_tokens", &IndexedTokens::num_tokens)
      .def_property_readonly("num_sequences", &IndexedTokens::num_sequences)
      .def_property_readonly("num_documents", &IndexedTokens::num_documents)
      .def("document", &document, py::arg("index"))
      .def("document_lengths", &fill_entries<&IndexedTokens::document_lengths>, py::arg("first"),
           py::arg("out").noconvert())
      .def("sequence_lengths", &fill_entries<&IndexedTokens::sequence_lengths>, py::arg("first"),
           py::arg("out").noconvert())
      .def("document_starts", &fill_entries<&IndexedTokens::document_starts>, py::arg("first"),
           py::arg("out").noconvert())
      .def("read", &fill_entries<&IndexedTokens::read>, py::arg("start"),
           py::arg("out").noconvert())
      .def("id_range", &IndexedTokens::id_range, py::arg("budget"),
           py::call_guard<py::gil_scoped_release>());

  py::class_<SpanLayout>(module, "SpanLayout")
      .def(py::init<uint32_t, uint32_t, uint32_t, uint64_t, uint64_t, int64_t, bool>(),
           py::kw_only(), py::arg("raw_length"), py::arg("noise_tokens"), py::arg("spans"),
           py::arg("encoder_length"), py::arg("decoder_length"), py::arg("sentinel_top"),
           py::arg("random_roll") = false);

  py::class_<Sampler, std::shared_ptr<Sampler>>(module, "Sampler")
      .def_property_readonly("encoder_length", &Sampler::encoder_length)
      .def_property_readonly("decoder_length", &Sampler::decoder_length)
      .def_property_readonly("packs_documents", &Sampler::packs_documents)
      .def("fill", &fill_batch, py::arg("sample_indices").noconvert(),
           py::arg("encoder_tokens").noconvert(), py::arg("decoder_tokens").noconvert(),
           py::arg("decoder_targets").noconvert(),
           py::arg("encoder_segments").noconvert() = py::none(),
           py::arg("decoder_segments").noconvert() = py::none());

  py::class_<SpanSampler, Sampler, std::shared_ptr<SpanSampler>>(module, "SpanSampler")
      .def(py::init<std::shared_ptr<IndexedTokens>, const SpanLayout&, uint64_t, int64_t, uint64_t,
                    uint32_t, bool>(),
           py::arg("tokens"), py::arg("layout"), py::kw_only(), py::arg("seed"),
           py::arg("vocab_size"), py::arg("samples_per_epoch"), py::arg("offset_choices"),
           py::arg("shuffle"))
      .def("sample_start", &SpanSampler::sample_start, py::arg("sample_index"));

  py::class_<MixtureOrder, std::shared_ptr<MixtureOrder>>(module, "MixtureOrder")
      .def(py::init(&mixture_order), py::arg("seed"), py::arg("block"), py::arg("segments"))
      .def("locate", &locate, py::arg("sample_indices").noconvert())
      .def("seen", &MixtureOrder::seen, py::arg("count"),
           py::call_guard<py::gil_scoped_release>());

  py::class_<MixtureSampler, Sampler, std::shared_ptr<MixtureSampler>>(module, "MixtureSampler")
      .def(py::init(&mixture_sampler), py::arg("sources"), py::arg("order"));

  py::class_<HoldingLoader>(module, "Loader")
      .def(py::init<std::shared_ptr<Sampler>, unsigned, unsigned>(), py::arg("sampler"),
           py::kw_only(), py::arg("threads"), py::arg("capacity"))
      .def("submit", &HoldingLoader::submit, py::arg("sample_indices").noconvert(),
           py::arg("encoder_tokens").noconvert(), py::arg("decoder_tokens").noconvert(),
           py::arg("decoder_targets").noconvert(),
           py::arg("encoder_segments").noconvert() = py::none(),
           py::arg("decoder_segments").noconvert() = py::none())
      .def("next", &HoldingLoader::next)
      .def("close", &HoldingLoader::close);

  bind_documents(module);
  bind_numbers(module);

  module.def("corrupt", &corrupt_sample, py::arg("raw").noconvert(), py::arg("layout"),
             py::kw_only(), py::arg("seed"), py::arg("sample_index"));
  module.def("permute", &permute, py::arg("positions").noconvert(), py::kw_only(),
             py::arg("size"), py::arg("seed"), py::arg("epoch"));
  module.def("philox4x32", &philox4x32, py::arg("counter"), py::arg("key"));
}
