// Kernels of training that XLA calls: products with frozen weights that stay in their blocks and with trained ones, attention,
// and the loss's pass over a vocabulary. The pool runs one job at a time, for which XLA's own threads wait.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <vector>

#include "matrix.h"
#include "program.h"
#include "xla_ffi.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace cg;

namespace {

struct Engine {
  std::mutex mutex;  // one job at a time
  std::unique_ptr<Pool> pool;
  const Kernels* kernels = nullptr;
  WorkArrays arrays;
  Workers workers() { return {kernels, *pool, arrays}; }
};
Engine& engine = *new Engine;  // never destroyed: XLA's threads may outlive static objects

void require(bool holds, const char* rule) {
  if (!holds) throw std::invalid_argument(rule);
}
const xla::Buffer& array(const xla::Buffers& buffers, int i, int dtype, int64_t rank) {
  require(i < buffers.count, "too few arrays");
  const xla::Buffer& b = *buffers.values[i];
  require(b.dtype == dtype && b.rank == rank, "an array has another type or rank than this kernel takes");
  return b;
}
template <class T> T scalar(const xla::Call& call, const char* name) {
  for (int64_t i = 0; i < call.attributes.count; i++)
    if (!strncmp(call.attributes.names[i]->text, name, call.attributes.names[i]->length))
      return *(const T*)call.attributes.values[i]->value;
  throw std::invalid_argument(std::string("an attribute is missing: ") + name);
}
bool in_bfloat16(const xla::Call& call) { return scalar<int32_t>(call, "bfloat16"); }
Weight weight(const xla::Call& call, const xla::Buffer& blocks) {
  int type = scalar<int32_t>(call, "type");
  require(type >= 0 && type < TYPES && blocks.dims[1] % TYPE[type].bytes == 0, "blocks of this type do not fill a row");
  const int64_t columns = blocks.dims[1] / TYPE[type].bytes * TYPE[type].block;
  return {type, (const uint8_t*)blocks.data, blocks.dims[0], columns, blocks.dims[1]};
}

// x [T, K], blocks [R, row bytes], first [] -> x W^T [T, rows]; with BY_ROWS: dy [T, rows], ... -> dy W [T, K].
// W is `rows` rows of the blocks from `first` on.
template <bool BY_ROWS> void product(const xla::Call& call) {
  const xla::Buffer &x = array(call.arguments, 0, xla::F32, 2), &out = array(call.results, 0, xla::F32, 2);
  const int64_t first = *(const int32_t*)array(call.arguments, 2, xla::S32, 0).data;
  MatrixProduct m{(const float*)x.data, (float*)out.data, weight(call, array(call.arguments, 1, xla::U8, 2)), x.dims[0], first,
                  BY_ROWS ? x.dims[1] : out.dims[1], BY_ROWS, false, in_bfloat16(call)};
  require(m.first >= 0 && m.first + m.count <= m.w.rows, "rows beyond the weight's");
  require(x.dims[1] == m.depth() && out.dims[1] == m.width() && out.dims[0] == m.T, "x and the weight differ in their width");
  multiply(engine.workers(), m);
}

// A linear layer with an adapter of rank r, and its gradients. Tensors are read in place, also where their transpose is
// needed: for that, XLA would make a copy and fuse the computation of dy into it.
struct Adapted {
  Weight w, a, b;  // a [r, K], b [N, r]
  int64_t T, N, K, r;
  bool bfloat16;
  Adapted(const xla::Call& call, int first, int64_t tokens)
      : w(weight(call, array(call.arguments, first, xla::U8, 2))), a(floats(array(call.arguments, first + 1, xla::F32, 2))),
        b(floats(array(call.arguments, first + 2, xla::F32, 2))), T(tokens), N(w.rows), K(w.cols), r(a.rows),
        bfloat16(in_bfloat16(call)) {
    require(a.cols == K && b.rows == N && b.cols == r, "an adapter must fit its layer");
  }
  // c [rows, ...] (+)= x M^T for a matrix M; with `by_rows`, x M; with `a_transposed`, x^T in place of x
  void run(const float* x, int64_t rows, const Weight& matrix, bool by_rows, float* c, bool add = false,
           bool a_transposed = false) const {
    multiply(engine.workers(), {x, c, matrix, rows, 0, matrix.rows, by_rows, add, bfloat16, a_transposed});
  }
  static Weight floats(const xla::Buffer& x) {
    return {F32_T, (const uint8_t*)x.data, x.dims[0], x.dims[1], 4 * x.dims[1]};
  }
};
float* out(const xla::Call& call, int i, int64_t rows, int64_t columns) {
  const xla::Buffer& b = array(call.results, i, xla::F32, 2);
  require(b.dims[0] == rows && b.dims[1] == columns, "a result has another shape");
  return (float*)b.data;
}
// x [T, K], blocks, a, b -> y = x W^T + u b^T [T, N], u = x a^T [T, r]
void adapted(const xla::Call& call) {
  const xla::Buffer& x = array(call.arguments, 0, xla::F32, 2);
  Adapted layer(call, 1, x.dims[0]);
  require(x.dims[1] == layer.K, "x and the weight differ in their width");
  float *y = out(call, 0, layer.T, layer.N), *u = out(call, 1, layer.T, layer.r);
  layer.run((const float*)x.data, layer.T, layer.a, false, u);
  layer.run((const float*)x.data, layer.T, layer.w, false, y);
  layer.run(u, layer.T, layer.b, false, y, true);
}
// dy [T, N], x, u, blocks, a, b -> dx = dy W + du a, da = du^T x, db = dy^T u, where du = dy b
void adapted_back(const xla::Call& call) {
  const xla::Buffer &dy = array(call.arguments, 0, xla::F32, 2), &x = array(call.arguments, 1, xla::F32, 2),
                    &u = array(call.arguments, 2, xla::F32, 2);
  Adapted layer(call, 3, dy.dims[0]);
  require(dy.dims[1] == layer.N && x.dims[0] == layer.T && x.dims[1] == layer.K, "shapes of dy and x differ from the layer's");
  require(u.dims[0] == layer.T && u.dims[1] == layer.r, "the shape of x a^T differs from the adapter's");
  float *dx = out(call, 0, layer.T, layer.K), *da = out(call, 1, layer.r, layer.K), *db = out(call, 2, layer.N, layer.r);
  std::vector<float> du(layer.T * layer.r);
  layer.run((const float*)dy.data, layer.T, layer.b, true, du.data());
  layer.run((const float*)dy.data, layer.T, layer.w, true, dx);
  layer.run(du.data(), layer.T, layer.a, true, dx, true);
  layer.run(du.data(), layer.r, Adapted::floats(x), true, da, false, true);
  layer.run((const float*)dy.data, layer.N, Adapted::floats(u), true, db, false, true);
}
// A linear layer whose weight W [N, K], floats, is trained: x [T, K], W -> x W^T [T, N]
void dense(const xla::Call& call) {
  const xla::Buffer &x = array(call.arguments, 0, xla::F32, 2), &w = array(call.arguments, 1, xla::F32, 2);
  require(x.dims[1] == w.dims[1], "x and the weight differ in their width");
  float* y = out(call, 0, x.dims[0], w.dims[0]);
  multiply(engine.workers(), {(const float*)x.data, y, Adapted::floats(w), x.dims[0], 0, w.dims[0], false, false, in_bfloat16(call)});
}
// dy [T, N], x, W -> dx = dy W, dW = dy^T x
void dense_back(const xla::Call& call) {
  const xla::Buffer &dy = array(call.arguments, 0, xla::F32, 2), &x = array(call.arguments, 1, xla::F32, 2),
                    &w = array(call.arguments, 2, xla::F32, 2);
  const int64_t T = dy.dims[0], N = dy.dims[1], K = x.dims[1];
  require(x.dims[0] == T && w.dims[0] == N && w.dims[1] == K, "shapes of dy and x differ from the weight's");
  const float* d = (const float*)dy.data;
  multiply(engine.workers(), {d, out(call, 0, T, K), Adapted::floats(w), T, 0, N, true, false, in_bfloat16(call)});
  multiply(engine.workers(), {d, out(call, 1, N, K), Adapted::floats(x), N, 0, T, true, false, in_bfloat16(call), true});
}
const float* heads(const xla::Buffer& x, const AttentionInputs& s, int64_t count) {
  require(x.dims[0] == s.B && x.dims[1] == s.T && x.dims[2] == count && x.dims[3] == s.H,
          "arrays of heads differ in their shapes");
  return (const float*)x.data;
}
// From argument `first` on: q [B, T, N, H], k and v [B, T, K, H], positions and segments [B, T]
AttentionInputs attention_inputs(const xla::Call& call, int first) {
  const xla::Buffer &q = array(call.arguments, first, xla::F32, 4), &k = array(call.arguments, first + 1, xla::F32, 4);
  AttentionInputs s{};
  s.B = q.dims[0], s.T = q.dims[1], s.N = q.dims[2], s.H = q.dims[3], s.K = k.dims[2];
  require(s.K > 0 && s.N % s.K == 0, "the number of query heads must be a multiple of that of key heads");
  s.q = heads(q, s, s.N), s.k = heads(k, s, s.K), s.v = heads(array(call.arguments, first + 2, xla::F32, 4), s, s.K);
  for (int i : {0, 1}) {
    const xla::Buffer& x = array(call.arguments, first + 3 + i, xla::S32, 2);
    require(x.dims[0] == s.B && x.dims[1] == s.T, "positions and segments must be [B, T]");
    (i ? s.segments : s.positions) = (const int32_t*)x.data;
  }
  s.window = scalar<int32_t>(call, "window"), s.cap = scalar<float>(call, "cap"), s.bfloat16 = in_bfloat16(call);
  return s;
}
// attention_inputs -> out [B, T, N, H], log sum exp of the scores [B, T, N]
void attention(const xla::Call& call) {
  const AttentionInputs s = attention_inputs(call, 0);
  float* out = (float*)heads(array(call.results, 0, xla::F32, 4), s, s.N);
  attend(engine.workers(), s, out, (float*)array(call.results, 1, xla::F32, 3).data);
}
// d out, log sum exp, attention_inputs -> dq, dk, dv
void attention_back(const xla::Call& call) {
  const AttentionInputs s = attention_inputs(call, 2);
  float* gradients[3];
  for (int i : {0, 1, 2}) gradients[i] = (float*)heads(array(call.results, i, xla::F32, 4), s, i ? s.K : s.N);
  const float* d_out = heads(array(call.arguments, 0, xla::F32, 4), s, s.N);
  const float* log_sums = (const float*)array(call.arguments, 1, xla::F32, 3).data;
  attend_back(engine.workers(), s, log_sums, d_out, gradients[0], gradients[1], gradients[2]);
}
// hidden [M, D], blocks [V, row bytes], counts [V], used [] -> weighted [M, D], largest logits [M], their rows [M], sums [M].
// Only the first `used` hidden states are targets.
void softmax_over_vocabulary(const xla::Call& call) {
  const xla::Buffer &hidden = array(call.arguments, 0, xla::F32, 2), &counts = array(call.arguments, 2, xla::F32, 1);
  const Weight table = weight(call, array(call.arguments, 1, xla::U8, 2));
  const int64_t M = hidden.dims[0], D = table.cols;
  const int64_t used = std::clamp<int64_t>(*(const int32_t*)array(call.arguments, 3, xla::S32, 0).data, 0, M);
  require(hidden.dims[1] == D && counts.dims[0] == table.rows, "hidden states, the table and the counts of its rows differ");
  float *weighted = out(call, 0, M, D), *max_logit = (float*)array(call.results, 1, xla::F32, 1).data;
  int32_t* best = (int32_t*)array(call.results, 2, xla::S32, 1).data;
  float* sum = (float*)array(call.results, 3, xla::F32, 1).data;
  std::vector<SoftmaxSums> sums(M, {0, 1, 0});  // finite beyond the used targets
  const Vocabulary inputs{(const float*)hidden.data, used, table, (const float*)counts.data, scalar<float>(call, "cap"),
                          in_bfloat16(call)};
  vocabulary_softmax(engine.workers(), inputs, weighted, sums.data());
  std::fill(weighted + used * D, weighted + M * D, 0.f);
  for (int64_t m = 0; m < M; m++) max_logit[m] = sums[m].max_logit, sum[m] = sums[m].sum, best[m] = sums[m].best;
}
// ids [n], blocks [R, row bytes] -> rows of the weight as floats [n, K]
void rows(const xla::Call& call) {
  const xla::Buffer &ids = array(call.arguments, 0, xla::S32, 1), &out = array(call.results, 0, xla::F32, 2);
  Weight w = weight(call, array(call.arguments, 1, xla::U8, 2));
  const int32_t* id = (const int32_t*)ids.data;
  require(out.dims[1] == w.cols, "the result must be as wide as the weight");
  for (int64_t i = 0; i < ids.dims[0]; i++) {
    require(id[i] >= 0 && id[i] < w.rows, "rows beyond the weight's");
    engine.kernels->decode(w, id[i], 0, w.cols, (float*)out.data + i * w.cols);
  }
}

template <void (*RUN)(const xla::Call&)> xla::Error* handle(xla::Call* call) {
  if (call->extension && call->extension->type == 1) {
    xla::Version& v = ((xla::MetadataExtension*)call->extension)->metadata->version;
    v.major = 0, v.minor = 3;
    return nullptr;
  }
  int code = xla::INTERNAL;
  std::string message;
  try {
    std::lock_guard<std::mutex> lock(engine.mutex);
    RUN(*call);
    return nullptr;
  } catch (const std::invalid_argument& e) {
    code = xla::INVALID_ARGUMENT, message = e.what();
  } catch (const std::exception& e) {
    message = e.what();
  }
  xla::ErrorText text{{sizeof(xla::ErrorText), nullptr}, message.c_str(), code};
  return call->api->create_error(&text);
}

}  // namespace

void bind_xla(nb::module_& m) {
  m.def("xla_handlers", [](const std::string& level, int threads) {
    require(threads > 0, "threads must be at least 1");
    nb::gil_scoped_release release;
    std::lock_guard<std::mutex> lock(engine.mutex);
    engine.kernels = choose_kernels(level), engine.pool = std::make_unique<Pool>(threads);
    nb::gil_scoped_acquire acquire;
    nb::dict handlers;
    handlers["codegemma_product"] = nb::capsule((void*)handle<product<false>>);
    handlers["codegemma_product_t"] = nb::capsule((void*)handle<product<true>>);
    handlers["codegemma_adapted"] = nb::capsule((void*)handle<adapted>);
    handlers["codegemma_adapted_back"] = nb::capsule((void*)handle<adapted_back>);
    handlers["codegemma_dense"] = nb::capsule((void*)handle<dense>);
    handlers["codegemma_dense_back"] = nb::capsule((void*)handle<dense_back>);
    handlers["codegemma_attention"] = nb::capsule((void*)handle<attention>);
    handlers["codegemma_attention_back"] = nb::capsule((void*)handle<attention_back>);
    handlers["codegemma_vocabulary_softmax"] = nb::capsule((void*)handle<softmax_over_vocabulary>);
    handlers["codegemma_rows"] = nb::capsule((void*)handle<rows>);
    return handlers;
  }, "level"_a, "threads"_a, "The handlers for XLA by name. All run on this many threads from now on.");
}
