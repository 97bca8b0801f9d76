// What a SIMD level offers to the program that runs a model: one table of functions, chosen once at run time.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <new>
#include <vector>

namespace cg {

constexpr int PAGE = 64;       // tokens in a page of the key/value cache
constexpr int KEY_SPAN = 256;   // keys that one attention partial covers, aligned to absolute positions
constexpr int ROWS = 32;       // query rows (tokens x heads) that one attention task takes
constexpr int PACKED_FROM = 6; // from this many tokens on, products run with tokens in the lanes

enum Type : int { F32_T, F16_T, BF16_T, Q4_0_T, Q4_1_T, Q5_0_T, Q5_1_T, Q8_0_T, Q4_K_T, Q5_K_T, Q6_K_T,
                  IQ4_NL_T, MXFP4_T, Q2_K_T, Q3_K_T, IQ4_XS_T, TYPES };
enum Form : int { FLOATS = 1, BLOCKS_32 = 2, BLOCKS_256 = 4, PAIRS = 8 };  // how a product reads activations
struct TypeInfo { const char* name; int block, bytes; };        // weights in a block, and its size in bytes
constexpr TypeInfo TYPE[TYPES] = {
    {"F32", 1, 4},    {"F16", 1, 2},    {"BF16", 1, 2},   {"Q4_0", 32, 18},   {"Q4_1", 32, 20},   {"Q5_0", 32, 22},
    {"Q5_1", 32, 24}, {"Q8_0", 32, 34}, {"Q4_K", 256, 144}, {"Q5_K", 256, 176}, {"Q6_K", 256, 210},
    {"IQ4_NL", 32, 18}, {"MXFP4", 32, 17}, {"Q2_K", 256, 84}, {"Q3_K", 256, 110}, {"IQ4_XS", 256, 136}};
// By numerics v1; a level with numerics of its own has its own.
inline Form form_of(int type) { return TYPE[type].block == 1 ? FLOATS : TYPE[type].block == 32 ? BLOCKS_32 : BLOCKS_256; }

struct Weight {
  int type;
  const uint8_t* data;
  int64_t rows, cols, row_bytes;
};

// Quantised activations of T tokens. `sums` are the exact sums of 16 consecutive integers of q each.
// By rows (few tokens):   q [T, P]            scales [T, P/block]         sums [T, P/16]
// Packed (many tokens):   q [T/16, P/4, 16, 4]  scales [T/16, P/block, 16]  sums [T/16, P/32, 16, 2]
// Level neoni8mm packs q as [T/16, P/8, 16, 8].
struct Quantised {
  int block;
  int8_t* q;
  float* scales;
  int16_t* sums;
};
struct Activations {
  float* f;                 // [T, stride], zero from `width` to `padded`
  int64_t width, padded, stride;
  int T;
  bool packed;
  int forms;
  Quantised q32, q256;
  uint16_t* pairs;          // bfloat16: [T, P], or packed [T/16, P/2, 16, 2]; P is a multiple of 32
};

// A vector that begins at a cache line: a load that crosses two lines costs two.
template <class T> struct LineAllocator {
  using value_type = T;
  LineAllocator() = default;
  template <class U> LineAllocator(const LineAllocator<U>&) {}
  T* allocate(size_t n) { return (T*)::operator new(n * sizeof(T), std::align_val_t(64)); }
  void deallocate(T* p, size_t) { ::operator delete(p, std::align_val_t(64)); }
  bool operator==(const LineAllocator&) const = default;
};
template <class T> using Lines = std::vector<T, LineAllocator<T>>;
struct Scratch { Lines<uint8_t> tile, gate; };  // memory of one thread, which grows as needed

// What an adapter adds to a product: h b^T, for the tokens from `first` to the end of h. Row 0 of h is token `start`.
// b has 32 columns: one block per row where it is stored in blocks.
struct AdapterTerm {
  Weight b;
  Activations h;
  int start, first;
};
void wait_for_zero(const std::atomic<int>& pending);  // until other threads have finished their tasks (pool.cpp)
struct AdapterTerms {
  const AdapterTerm* data = nullptr;
  size_t count = 0;
  const std::atomic<int>* pending = nullptr;  // tasks that still compute parts of h
};

// One product: rows r0 .. r1 of a weight (in the gated form also of `gate`) times every token, to out[t, r].
struct Product {
  const Weight* w;
  const Weight* gate;       // if set: out = gelu(gate x) * (w x)
  float* out;               // already at the first column of this weight
  int64_t stride;
  AdapterTerms terms{}, gate_terms{};
  int add_from = -1;        // if set: the product is added to out, for tokens from this one on
};

// Bytes that the keys of one layer take in a page of the cache; the values behind them take as many. Both are arrays [kv heads,
// PAGE, width] of `kv_type`; in bfloat16 they lie in tiles, for which the width is padded (tile_attention.h).
constexpr int64_t kv_bytes(int kv_type, int64_t kv_heads, int64_t width) {
  return kv_heads * PAGE * (kv_type == BF16_T ? (width + 31) / 32 * 32 : width) * TYPE[kv_type].bytes;
}

struct Rope {
  const float *cos, *sin;   // [H/2]
};
struct HeadSplit {          // one token: QK-norm, rotary positions, and the keys and values into their page
  float* row;               // q [N, H] | k [K, H] | v [K, H]
  int heads, kv_heads, width;
  const float *q_norm, *k_norm;
  float eps, query_scale;
  Rope rope;
  uint8_t *keys, *values;   // of this layer in the token's page
  int slot;                 // of the token in its page
  int kv_type;              // F32_T, F16_T or, in tiles, BF16_T
};
struct Attention {
  const float* q;           // [T, stride]
  int64_t q_stride;
  float* out;               // [T, N * H]
  int64_t out_stride;
  int heads, kv_heads, width;
  int window;               // 0: none
  float softcap;            // 0: none
  int kv_type;              // F32_T, F16_T or, in tiles, BF16_T
  int64_t layer_offset, kv_offset;  // bytes within a page: this layer's keys; from keys to values
};
struct AttentionTask {
  int token, tokens;        // consecutive tokens of one sequence
  int position;             // of the first
  const uint64_t* pages;    // of the sequence
  int kv_head;
  int first_head, heads;    // of the query heads that the kv head serves: the first, and how many
  int span;                 // of KEY_SPAN keys: this one alone, as a partial; -1: all, merged and divided
  float* partial;           // [rows, H + 2]: values, maximum, sum
};

// One product of training: c [T, width] = a [T, depth] B. B is made of rows first .. first + count of w: their transpose
// (x W^T), or with `by_rows` the rows themselves (dy W, the transpose of what a linear layer does). `add`: c += a B.
// `bfloat16`: factors are rounded to bfloat16, and two consecutive ones of a sum share a slot of 32 bits.
// `a_transposed`: a is stored as [depth, T].
struct MatrixProduct {
  const float* a;
  float* c;
  Weight w;
  int64_t T, first, count;
  bool by_rows, add = false, bfloat16 = false, a_transposed = false;
  int64_t a_stride = 0, c_stride = 0;  // between rows; 0: contiguous
  int64_t slots(int64_t rows) const { return bfloat16 ? (rows + 1) / 2 : rows; }  // 32-bit slots for that many rows of B
  int64_t depth() const { return by_rows ? count : w.cols; }
  int64_t width() const { return by_rows ? w.cols : count; }
  int64_t a_row() const { return a_stride ? a_stride : a_transposed ? T : depth(); }
  int64_t c_row() const { return c_stride ? c_stride : width(); }
};
// The keys that a query sees in training: those of its segment, at its position or less than `window` below.
struct Keys {
  const int32_t *positions, *segments;  // padded to whole vectors; positions of the padding are above all others
  int64_t count;
  int32_t position, segment, window;    // of the query; window 0: all
  float cap;                            // of the scores; 0: none
};
// Of one target over a vocabulary: the largest logit, its row, and the sum of counts * exp(logit - max).
struct SoftmaxSums {
  float max_logit = -1e30f, sum = 0;
  int32_t best = 0;
};
struct MatrixKernels {
  // Rows of A are padded to a multiple of `row_multiple`. A panel has `panel` columns. A slab has `slots` rows of B or, with
  // bfloat16, pairs of rows.
  int row_multiple, panel, slots;
  bool (*has_bfloat16)();   // whether the CPU multiplies pairs of bfloat16
  int64_t (*strip)(const MatrixProduct&);  // columns that decode_strip fills
  void (*decode_strip)(const MatrixProduct&, int64_t r0, int64_t depth, int64_t j0, float* panels);
  void (*gather_rows)(const MatrixProduct&, int64_t r0, int64_t depth, int64_t t0, int64_t t1, float* out);
  void (*multiply_rows)(const MatrixProduct&, int64_t r0, int64_t depth, const float* rows, int64_t t0, int64_t t1,
                        const float* panels, int64_t j0, int64_t j1);
  int64_t (*peak)(int64_t rounds, bool bfloat16);
  // Replaces the scores of a query by exp(score - max), 0 for hidden keys; returns the maximum and the sum.
  void (*softmax)(const Keys&, float* scores, float* max_score, float* sum);
  // Adds logits of one target to `sums`, and turns them into counts * exp(logit - max) * slope of the soft cap. Returns the
  // factor by which earlier sums shrink, as the maximum has grown. n is a multiple of the vector width.
  float (*online_softmax)(float* logits, const float* counts, int64_t n, int64_t first, float cap, SoftmaxSums& sums);
  // Replaces scores by weights, and the gradients of the weights by those of the scores.
  void (*softmax_backward)(const Keys&, float* scores, float* d_weights, float log_sum);
};

struct Kernels {
  const char* name;
  void (*embed)(const Weight&, int64_t row, float scale, float* out);
  void (*norm)(const float* x, const float* weight, float* out, int64_t n, float eps);
  Form (*form_of)(int type);  // of the activations that a product with such weights reads
  void (*quantise)(const Activations&, int t0, int t1);  // rows t0 .. t1; whole groups if packed
  void (*product)(const Product&, const Activations&, int64_t r0, int64_t r1, Scratch&);
  int64_t (*tile_rows)(const Weight&, bool packed);  // rows of the weight in a tile, which one thread takes at a time
  void (*split_heads)(const HeadSplit&);
  void (*attend)(const Attention&, const AttentionTask&, Scratch&);
  void (*merge)(const Attention&, const AttentionTask&, int spans);  // partials in ascending order
  void (*softcap)(float* x, int64_t n, float cap);
  void (*log_sum)(const float* x, int64_t n, float* largest, float* total, int64_t* index);
  void (*decode)(const Weight&, int64_t row, int64_t first, int64_t n, float* out);  // whole blocks of one row
  int64_t (*peak)(int64_t rounds);  // only multiplies, as products do, and returns the number of operations: a benchmark
  const MatrixKernels* matrix;
};

namespace amx { const Kernels* kernels(); extern const MatrixKernels matrix_kernels; }
namespace amx_imitated { const Kernels* kernels(); extern const MatrixKernels matrix_kernels; }  // a build for tests
namespace avx512 { const Kernels* kernels(); extern const MatrixKernels matrix_kernels; }
namespace avxvnni { const Kernels* kernels(); extern const MatrixKernels matrix_kernels; }
namespace avx2 { const Kernels* kernels(); extern const MatrixKernels matrix_kernels; }
namespace neoni8mm { const Kernels* kernels(); extern const MatrixKernels matrix_kernels; }
namespace neondot { const Kernels* kernels(); extern const MatrixKernels matrix_kernels; }
namespace neon { const Kernels* kernels(); extern const MatrixKernels matrix_kernels; }
namespace plain { const Kernels* kernels(); extern const MatrixKernels matrix_kernels; }

}  // namespace cg
