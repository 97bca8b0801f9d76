// A model as a list of steps over buffers, recorded once by the Python layer loop and replayed here for any number of
// tokens without the interpreter. All threads go through the steps together, with a barrier between steps. Each thread
// claims the tiles of its own share of a step in order, so that it reads weights as one stream, and then helps the others.
#pragma once
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "kernels.h"
#include "pool.h"

namespace cg {

// "" or "auto": the best level that this CPU has. Throws on one that it lacks.
const Kernels* choose_kernels(const std::string& level);
const std::string& why_no_amx();  // why this process cannot use AMX, or "" if it can

struct Cancel {
  std::atomic<bool> set{false};
};

// T tokens of one or several sequences. Consecutive tokens of one sequence stand together, in ascending position.
struct Batch {
  int T;
  const int32_t *ids, *positions, *sequences;
  const uint64_t* pages;     // [sequences, pages_stride]: addresses
  int64_t pages_stride;
  int n_out;
  const int32_t* out_rows;   // indices in the batch of the tokens whose logits are wanted
  float* logits;             // [n_out, V]
  int32_t* argmax;           // [n_out]
  float* log_normaliser;     // [n_out]: log sum exp of the logits
  const int32_t* adapters = nullptr;  // [T]: index of each token's adapter, -1: none; null: no token has one
};

constexpr int RANK = 32;     // adapters are computed in slices of this many ranks: one block of Q8_0

// What an adapter adds at one site: slice s of h = x a^T (columns from RANK * s on) times b^T goes to output `target`.
struct LowRankSlice { int target; Weight b; };
struct LowRankSite { int site; Weight a; std::vector<LowRankSlice> slices; };
struct Adapter {
  std::vector<LowRankSite> sites;  // by site; no slices where the adapter changes nothing
  std::vector<int32_t> ids;    // of replaced rows of the embedding, ascending; their values are `rows`
  Weight rows;
  int row(int32_t id) const;   // -1: not replaced
};

class Program {
 public:
  Program(std::shared_ptr<Pool> pool, const Kernels* kernels) : pool_(pool), k_(kernels) {}

  int buffer(int64_t width);
  void embed(Weight table, int out, float scale);
  // out = norm(x) * weight. If y >= 0, x += y before that, or x += norm(y) * post if there is a post norm.
  void norm(int x, const float* weight, int out, float eps, int y, const float* post);
  void observe(int x, double* sums);  // sums [width] += x * x, over the tokens
  // Both return a site: a step to whose outputs adapters can add. Its targets are numbered as the weights are; in `gated`,
  // gate is 0 and up 1.
  int product(int in, std::vector<Weight> weights, int out);
  int gated(int in, Weight gate, Weight up, int out);
  void split_heads(int qkv, HeadSplit heads, double base, double scale, int64_t layer_offset, int64_t kv_offset);
  void attend(int qkv, Attention attention, int out);
  void logits(int x, const float* weight, float eps, Weight table, float cap);

  int64_t vocabulary() const { return vocabulary_; }
  // Returns the index for Batch::adapters. Throws where a shape does not fit. Not to be called during a run.
  int add_adapter(std::vector<LowRankSite> sites, std::vector<int32_t> ids, Weight rows);
  int adapters() const { return (int)adapters_.size(); }
  bool run(const Batch& batch, const Cancel* cancel);  // false: cancelled, and what the pages hold of the new tokens is void

 private:
  struct Buffer {
    int64_t width, padded;
    int forms = 0, adapter_forms = 0;  // forms that products read, and those that adapters read in addition
    bool prepared = false;   // while recording: whether the contents have been quantised at this step
    Lines<float> f, scales32, scales256;
    Lines<int8_t> q32, q256;
    Lines<int16_t> sums32, sums256;
    Lines<uint16_t> pairs;
    Activations a;
  };
  struct Step {
    std::function<int64_t()> urgent;  // how many of the first tiles others wait for: all threads claim these first
    std::function<int64_t()> tiles;
    std::function<void(int64_t tile, Scratch&)> work;
  };
  struct AttentionTasks {    // how attention of one window is split; the split never changes a result
    int window, heads, kv_heads, width;
    std::vector<AttentionTask> attend, merge;
    std::vector<int> spans;  // of each merge
    std::vector<float> partials;
  };
  struct AdapterTask { Weight a; int slice; Activations x, h; };
  struct Site {
    int in;
    std::vector<int64_t> rows;           // of each target
    std::vector<AdapterTask> tasks;      // of this run: h = x a^T
    std::atomic<int> pending{0};         // tasks that are not done
    std::vector<std::vector<AdapterTerm>> terms;  // of this run, by target
  };
  // begin .. end: tokens of one adapter; start: the first token of begin's packed group; h: where its rows begin in h_.
  struct AdapterSpan { int adapter, begin, end, start; size_t h; };
  struct Angles { std::vector<double> frequency; std::vector<float> cos, sin; };  // cos, sin: [T, H/2] of the batch

  void add(std::function<int64_t()> tiles, std::function<void(int64_t, Scratch&)> work);
  void prepare(int b);       // records a step that quantises a buffer, unless its writer has done it
  void resize(Buffer& b, int T, bool packed);
  int site(int in, const std::vector<Weight>& weights);
  // A step of a site: its adapters' tasks, then the tiles of the product, which wait for the tasks before adding h b^T.
  void add_with_adapters(int site, std::function<int64_t()> tiles, std::function<void(int64_t, Scratch&)> work);
  void plan_adapters();
  AdapterTerms terms(int site, int target) const {
    const Site& s = sites_[site];
    return {s.terms[target].data(), s.terms[target].size(), &s.pending};
  }
  Angles& angles(double base, double scale, int width);
  void split_attention(AttentionTasks& tasks);
  int token_tiles() const { return packed_ ? (batch_.T + 15) / 16 : batch_.T; }

  std::shared_ptr<Pool> pool_;
  const Kernels* k_;
  std::deque<Buffer> buffers_;
  std::vector<Step> steps_;
  std::map<std::pair<double, double>, Angles> angles_;
  std::map<int, AttentionTasks> attention_tasks_;  // by window
  std::deque<Adapter> adapters_;
  std::deque<Site> sites_;
  std::vector<AdapterSpan> adapter_spans_;
  Buffer h_;                 // of all adapter spans at one site, slice by slice
  Batch batch_;
  bool packed_ = false;
  int logits_in_ = -1;       // the buffer of the inputs of the logits
  int64_t vocabulary_ = 0;
  std::vector<Scratch> scratch_;
  std::unique_ptr<std::atomic<int64_t>[]> claimed_;  // [steps, threads + 1]: tiles of each thread's share; urgent ones
  struct Stat { float largest, total; int64_t index; };
  std::vector<Stat> stats_;  // [n_out, parts] of the logits
};

}  // namespace cg
