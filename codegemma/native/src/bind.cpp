// The Python bindings of the engine. The arrays of a run are checked here, adapters in program.cpp. While a
// program is recorded, the caller must pass arrays of the right length.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <chrono>
#include <cstring>
#include <stdexcept>

#include "program.h"

void bind_quantise(nanobind::module_& m);  // quantise.cpp
void bind_xla(nanobind::module_& m);       // xla.cpp
namespace cg { int64_t use_huge_pages(uint8_t* start, int64_t length); }  // huge_pages.cpp

namespace nb = nanobind;
using namespace nb::literals;
using namespace cg;

namespace {

template <class T, int N> using Array = nb::ndarray<T, nb::ndim<N>, nb::c_contig, nb::device::cpu>;
using Bytes = nb::ndarray<const uint8_t, nb::c_contig, nb::device::cpu>;

int type_of(const std::string& name) {
  for (int t = 0; t < TYPES; t++)
    if (name == TYPE[t].name) return t;
  throw std::invalid_argument("no kernel for weights of type " + name);
}
Weight weight(const std::string& type, Bytes data, int64_t rows, int64_t cols) {
  const int t = type_of(type);
  if (cols <= 0 || rows <= 0 || cols % TYPE[t].block)
    throw std::invalid_argument("a " + type + " weight needs rows of a multiple of " + std::to_string(TYPE[t].block) +
                                " columns, got " + std::to_string(rows) + " x " + std::to_string(cols));
  int64_t row_bytes = cols / TYPE[t].block * TYPE[t].bytes;
  if ((int64_t)data.nbytes() != rows * row_bytes)
    throw std::invalid_argument("a " + type + " weight of " + std::to_string(rows) + " x " + std::to_string(cols) + " takes " +
                                std::to_string(rows * row_bytes) + " bytes, got " + std::to_string(data.nbytes()));
  return {t, data.data(), rows, cols, row_bytes};
}

// x W^T for float rows x [T, K], as the program computes it.
void multiply(const Kernels* k, Pool& pool, const Weight& w, const float* x, int T, float* out) {
  int64_t P = (w.cols + 255) / 256 * 256, rows = (T + 15) / 16 * 16;
  std::vector<float> f(rows * P);
  for (int t = 0; t < T; t++) memcpy(&f[t * P], x + t * w.cols, 4 * w.cols);
  bool packed = T >= PACKED_FROM;
  int form = k->form_of(w.type), block = form == BLOCKS_256 ? 256 : 32;
  std::vector<int8_t> q(rows * P);
  std::vector<float> scales(rows * P / block);
  std::vector<int16_t> sums(rows * P / 16);
  std::vector<uint16_t> pairs(rows * P);
  Quantised z{block, q.data(), scales.data(), sums.data()};
  Activations a{f.data(), w.cols, P, P, T, packed, form, z, z, pairs.data()};
  k->quantise(a, 0, packed ? (int)rows : T);
  int64_t tile = k->tile_rows(w, packed);
  std::atomic<int64_t> next{0};
  std::vector<Scratch> scratch(pool.threads());
  pool.run([&](int thread) {
    for (int64_t r; (r = next.fetch_add(tile)) < w.rows;)
      k->product({&w, nullptr, out, w.rows}, a, r, std::min(r + tile, w.rows), scratch[thread]);
  });
}

bool run(Program& p, Array<const int32_t, 1> ids, Array<const int32_t, 1> positions, Array<const int32_t, 1> sequences,
         Array<const uint64_t, 2> pages, Array<const int32_t, 1> out_rows, Array<float, 2> logits, Array<int32_t, 1> argmax,
         Array<float, 1> normaliser, const Cancel* cancel, std::optional<Array<const int32_t, 1>> adapters) {
  int T = (int)ids.shape(0), n = (int)out_rows.shape(0);
  if (T < 1 || (int)positions.shape(0) != T || (int)sequences.shape(0) != T)
    throw std::invalid_argument("ids, positions and sequences must be equally long and not empty");
  if ((int64_t)logits.shape(1) != p.vocabulary() || (int)logits.shape(0) < n || (int)argmax.shape(0) < n ||
      (int)normaliser.shape(0) < n)
    throw std::invalid_argument("logits must be [wanted tokens, vocabulary], argmax and normaliser [wanted tokens]");
  for (int t = 0; t < T; t++) {
    int s = sequences.data()[t], position = positions.data()[t];
    if (ids.data()[t] < 0 || ids.data()[t] >= p.vocabulary())
      throw std::invalid_argument("token id " + std::to_string(ids.data()[t]) + " is outside the vocabulary of " +
                                  std::to_string(p.vocabulary()));
    if (s < 0 || s >= (int)pages.shape(0) || position < 0 || position / PAGE >= (int)pages.shape(1) ||
        !pages.data()[s * pages.shape(1) + position / PAGE])
      throw std::invalid_argument("token " + std::to_string(t) + " at position " + std::to_string(position) + " has no page");
  }
  if (adapters && (int)adapters->shape(0) != T) throw std::invalid_argument("adapters must hold one index for each token");
  for (int t = 0; adapters && t < T; t++)
    if (adapters->data()[t] < -1 || adapters->data()[t] >= p.adapters())
      throw std::invalid_argument("token " + std::to_string(t) + " has adapter index " + std::to_string(adapters->data()[t]) +
                                  ", but this program has " + std::to_string(p.adapters()) + " adapters");
  for (int i = 0; i < n; i++)
    if (out_rows.data()[i] < 0 || out_rows.data()[i] >= T) throw std::invalid_argument("a wanted token is outside the batch");
  Batch b{T, ids.data(), positions.data(), sequences.data(), pages.data(), (int64_t)pages.shape(1), n, out_rows.data(),
          logits.data(), argmax.data(), normaliser.data(), adapters ? adapters->data() : nullptr};
  nb::gil_scoped_release release;
  return p.run(b, cancel);
}

// Bytes per second that all threads together read from memory, and operations per second of the level's products.
std::pair<double, double> measure(const Kernels* k, Pool& pool) {
  const size_t bytes = 256u << 20, words = bytes / 8;
  std::vector<uint64_t> memory(words, 1);
  auto timed = [&](const std::function<void(int)>& body) {
    auto start = std::chrono::steady_clock::now();
    pool.run(body);
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  };
  std::atomic<uint64_t> keep{0};
  std::atomic<int64_t> operations{0};
  double read = 1e9, multiply = 1e9;
  for (int i = 0; i < 3; i++) {
    std::atomic<size_t> next{0};
    read = std::min(read, timed([&](int) {
      const size_t tile = 1 << 16;
      uint64_t s[8] = {};
      for (size_t start; (start = next.fetch_add(tile)) < words;)
        for (size_t j = start; j < start + tile; j += 8) {
          __builtin_prefetch(&memory[j] + 256);
          for (int l = 0; l < 8; l++) s[l] ^= memory[j + l];
        }
      keep += s[0] ^ s[1] ^ s[2] ^ s[3] ^ s[4] ^ s[5] ^ s[6] ^ s[7];
    }));
    operations = 0;
    multiply = std::min(multiply, timed([&](int) { operations += k->peak(2000000); }));
  }
  return {bytes / read, operations / multiply};
}

// Float operations per second in products of training; 0 for bfloat16 on a CPU that does not multiply it.
double measure_products(const Kernels* k, Pool& pool, bool bfloat16) {
  double best = 0;
  for (int i = 0; i < 5 && (!bfloat16 || k->matrix->has_bfloat16()); i++) {
    std::atomic<int64_t> operations{0};
    auto start = std::chrono::steady_clock::now();
    pool.run([&](int) { operations += k->matrix->peak(2000000, bfloat16); });
    best = std::max(best, operations / std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return best;
}

}  // namespace

NB_MODULE(_native, m) {
  m.attr("PAGE") = PAGE;
  m.attr("KEY_SPAN") = KEY_SPAN;
  m.attr("RANK") = RANK;
  m.attr("TYPES") = [] {
    nb::list l;
    for (auto& t : TYPE) l.append(t.name);
    return nb::tuple(l);
  }();

  nb::class_<Cancel>(m, "Cancel", "A flag that stops a run from any thread, within a tile of work.")
      .def(nb::init<>())
      .def("set", [](Cancel& c) { c.set = true; })
      .def("is_set", [](Cancel& c) { return c.set.load(); });
  nb::class_<Pool>(m, "Pool").def(nb::init<int>(), "threads"_a).def_prop_ro("threads", &Pool::threads);
  nb::class_<Weight>(m, "Weight", "Blocks of a weight as they lie in the file; the caller keeps the array alive.")
      .def("__init__", [](Weight* w, const std::string& type, Bytes data, int64_t rows, int64_t cols) {
        new (w) Weight(weight(type, data, rows, cols));
      }, "type"_a, "data"_a, "rows"_a, "cols"_a, nb::keep_alive<1, 3>());
  nb::class_<Program>(m, "Program")
      .def("__init__", [](Program* p, std::shared_ptr<Pool> pool, const std::string& level) {
        new (p) Program(pool, choose_kernels(level));
      }, "pool"_a, "level"_a)
      .def("buffer", &Program::buffer, "width"_a)
      .def("embed", &Program::embed, "table"_a, "out"_a, "scale"_a)
      .def("norm", [](Program& p, int x, Array<const float, 1> weight, int out, float eps, int add,
                      std::optional<Array<const float, 1>> post) {
        p.norm(x, weight.data(), out, eps, add, post ? post->data() : nullptr);
      }, "x"_a, "weight"_a, "out"_a, "eps"_a, "add"_a = -1, "post"_a = nb::none())
      .def("observe", [](Program& p, int x, Array<double, 1> sums) { p.observe(x, sums.data()); }, "x"_a, "sums"_a)
      .def("product", &Program::product, "x"_a, "weights"_a, "out"_a)
      .def("gated", &Program::gated, "x"_a, "gate"_a, "up"_a, "out"_a)
      .def("split_heads", [](Program& p, int qkv, int heads, int kv_heads, int width, std::optional<Array<const float, 1>> q_norm,
                             std::optional<Array<const float, 1>> k_norm, float eps, float query_scale, double base, double scale,
                             const std::string& kv_type, int64_t layer_offset, int64_t kv_offset) {
        p.split_heads(qkv, {nullptr, heads, kv_heads, width, q_norm ? q_norm->data() : nullptr,
                            k_norm ? k_norm->data() : nullptr, eps, query_scale, {}, nullptr, nullptr, 0, type_of(kv_type)},
                      base, scale, layer_offset, kv_offset);
      }, "qkv"_a, "heads"_a, "kv_heads"_a, "width"_a, "q_norm"_a.none(), "k_norm"_a.none(), "eps"_a, "query_scale"_a, "base"_a,
         "scale"_a, "kv_type"_a, "layer_offset"_a, "kv_offset"_a)
      .def("attend", [](Program& p, int qkv, int out, int heads, int kv_heads, int width, int window, float softcap,
                        const std::string& kv_type, int64_t layer_offset, int64_t kv_offset) {
        p.attend(qkv, {nullptr, 0, nullptr, 0, heads, kv_heads, width, window, softcap, type_of(kv_type), layer_offset, kv_offset},
                 out);
      }, "qkv"_a, "out"_a, "heads"_a, "kv_heads"_a, "width"_a, "window"_a, "softcap"_a, "kv_type"_a, "layer_offset"_a,
         "kv_offset"_a)
      .def("logits", [](Program& p, int x, Array<const float, 1> weight, float eps, const Weight& table, float cap) {
        p.logits(x, weight.data(), eps, table, cap);
      }, "x"_a, "weight"_a, "eps"_a, "table"_a, "cap"_a)
      .def("run", &run, "ids"_a, "positions"_a, "sequences"_a, "pages"_a, "out_rows"_a, "logits"_a, "argmax"_a, "normaliser"_a,
           "cancel"_a.none(), "adapters"_a = nb::none())
      .def("add_adapter", [](Program& p, std::vector<std::tuple<int, Weight, std::vector<std::pair<int, Weight>>>> parts,
                             std::vector<int32_t> ids, std::optional<Weight> rows) {
        std::vector<LowRankSite> sites;
        for (auto& [site, a, slices] : parts) {
          sites.push_back({site, a, {}});
          for (auto& [target, b] : slices) sites.back().slices.push_back({target, b});
        }
        return p.add_adapter(std::move(sites), std::move(ids), rows.value_or(Weight{}));
      }, "sites"_a, "ids"_a, "rows"_a.none(), "The index of an adapter; the caller keeps its arrays alive.");

  bind_quantise(m);
  bind_xla(m);
  m.def("level", [](const std::string& level) { return choose_kernels(level)->name; }, "level"_a,
        "The SIMD level of a name on this CPU; 'auto' is the best. ValueError on a level that it lacks.");
  m.def("why_no_amx", &why_no_amx, "Why this process cannot use level amx, or an empty string.");
  m.def("kv_bytes", [](const std::string& kv_type, int64_t kv_heads, int64_t width) {
    return kv_bytes(type_of(kv_type), kv_heads, width);
  }, "kv_type"_a, "kv_heads"_a, "width"_a, "Bytes of the keys of one layer in a page of that type; its values take as many.");
  m.def("multiply", [](const std::string& level, Pool& pool, const Weight& w, Array<const float, 2> x, Array<float, 2> out) {
    if ((int64_t)x.shape(1) != w.cols || (int64_t)out.shape(1) != w.rows || out.shape(0) != x.shape(0))
      throw std::invalid_argument("x must be [T, columns] and out [T, rows] of the weight");
    const Kernels* k = choose_kernels(level);
    nb::gil_scoped_release release;
    multiply(k, pool, w, x.data(), (int)x.shape(0), out.data());
  }, "level"_a, "pool"_a, "weight"_a, "x"_a, "out"_a);
  m.def("use_huge_pages", [](uint64_t start, int64_t length) {
    nb::gil_scoped_release release;
    return use_huge_pages((uint8_t*)start, length);
  }, "start"_a, "length"_a, "Moves addresses start .. start + length of a read-only memory map into huge pages, in place.");
  m.def("measure_products", [](const std::string& level, Pool& pool, bool bfloat16) {
    const Kernels* k = choose_kernels(level);
    nb::gil_scoped_release release;
    return measure_products(k, pool, bfloat16);
  }, "level"_a, "pool"_a, "bfloat16"_a);
  m.def("measure", [](const std::string& level, Pool& pool) {
    const Kernels* k = choose_kernels(level);
    nb::gil_scoped_release release;
    return measure(k, pool);
  }, "level"_a, "pool"_a,
     "Bytes per second read from memory, and operations per second in products (a multiply-add is two), of all threads.");
  m.def("dequantise", [](const std::string& level, const Weight& w, Array<float, 2> out) {
    if ((int64_t)out.shape(0) != w.rows || (int64_t)out.shape(1) != w.cols)
      throw std::invalid_argument("out must be [rows, columns]");
    const Kernels* k = choose_kernels(level);
    nb::gil_scoped_release release;
    for (int64_t r = 0; r < w.rows; r++) k->decode(w, r, 0, w.cols, out.data() + r * w.cols);
  }, "level"_a, "weight"_a, "out"_a);
}
