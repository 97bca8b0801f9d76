#include "program.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>

namespace cg {
namespace {

constexpr int64_t STAT_ROWS = 4096;  // logits that one partial log-sum-exp covers, whatever the number of threads

template <class V> auto* at_least(V& v, size_t n) {
  if (v.size() < n) v.resize(n);
  return v.data();
}

// T rows from `start` on, which must be the first of a group if packed.
Activations view(Activations a, int64_t start, int T) {
  a.f += start * a.stride, a.T = T;
  for (auto* z : {&a.q32, &a.q256})
    if (z->q) z->q += start * a.padded, z->scales += start * (a.padded / z->block), z->sums += start * (a.padded / 16);
  if (a.pairs) a.pairs += start * a.padded;
  return a;
}

#if defined(__aarch64__)
struct ArmFeatures { bool dotprod, i8mm; };
ArmFeatures arm_features() {
#if defined(__linux__)
  constexpr unsigned long DOTPROD = 1 << 20, I8MM = 1 << 13;  // asm/hwcap.h, of which older versions lack the second
  return {(getauxval(AT_HWCAP) & DOTPROD) != 0, (getauxval(AT_HWCAP2) & I8MM) != 0};
#elif defined(__APPLE__)
  auto has = [](const char* name) {
    int value = 0;
    size_t size = sizeof value;
    return !sysctlbyname(name, &value, &size, nullptr, 0) && value;
  };
  return {has("hw.optional.arm.FEAT_DotProd"), has("hw.optional.arm.FEAT_I8MM")};
#else
  return {};
#endif
}
#endif

}  // namespace

int Adapter::row(int32_t id) const {
  auto it = std::lower_bound(ids.begin(), ids.end(), id);
  return it != ids.end() && *it == id ? (int)(it - ids.begin()) : -1;
}

const Kernels* choose_kernels(const std::string& level) {
  const Kernels* available[6] = {};
  int n = 0;
#if defined(__x86_64__)
  __builtin_cpu_init();
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
#if defined(CG_AMX)
  if (avx512 && why_no_amx().empty()) available[n++] = amx::kernels();
#endif
  if (avx512) available[n++] = avx512::kernels();
#if defined(CG_HAS_AVXVNNI)
  static const bool avxvnni = [] {  // asked once: on a virtual machine, cpuid is slow
    unsigned a = 0, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && a >> 4 & 1;
  }();
  if (avx2 && avxvnni) available[n++] = avxvnni::kernels();
#endif
  if (avx2) available[n++] = avx2::kernels();
#elif defined(__aarch64__)
  const ArmFeatures features = arm_features();
  if (features.dotprod && features.i8mm) available[n++] = neoni8mm::kernels();
  if (features.dotprod) available[n++] = neondot::kernels();
  available[n++] = neon::kernels();
#endif
  available[n++] = plain::kernels();
#if defined(CG_IMITATE_TILES)
  available[n++] = amx_imitated::kernels();
#endif
  if (level.empty() || level == "auto") return available[0];
  std::string names;
  for (int i = 0; i < n; i++) {
    if (level == available[i]->name) return available[i];
    names += std::string(i ? ", " : "") + available[i]->name;
  }
  throw std::invalid_argument("SIMD level '" + level + "' is not available on this CPU" +
                              (level == "amx" ? " (" + why_no_amx() + ")" : "") + ", which has: " + names +
                              ": set CODEGEMMA_SIMD to one of these or leave it unset");
}

// -------------------------------------------------------------------------------------------------------- recording
int Program::buffer(int64_t width) {
  buffers_.emplace_back();
  buffers_.back().width = width;
  buffers_.back().padded = (width + 255) / 256 * 256;
  return (int)buffers_.size() - 1;
}
void Program::add(std::function<int64_t()> tiles, std::function<void(int64_t, Scratch&)> work) {
  steps_.push_back({[] { return 0; }, std::move(tiles), std::move(work)});
}
void Program::embed(Weight table, int out, float scale) {
  add([this] { return batch_.T; }, [=, this](int64_t t, Scratch&) {
    const Adapter* adapter = batch_.adapters && batch_.adapters[t] >= 0 ? &adapters_[batch_.adapters[t]] : nullptr;
    int row = adapter ? adapter->row(batch_.ids[t]) : -1;
    const Activations& o = buffers_[out].a;
    k_->embed(row >= 0 ? adapter->rows : table, row >= 0 ? row : batch_.ids[t], scale, o.f + t * o.stride);
  });
}
void Program::norm(int x, const float* weight, int out, float eps, int y, const float* post) {
  buffers_[out].prepared = true;
  add([this] { return token_tiles(); }, [=, this](int64_t tile, Scratch&) {
    const Activations &ax = buffers_[x].a, &ao = buffers_[out].a;
    int t0 = packed_ ? (int)tile * 16 : (int)tile, t1 = packed_ ? t0 + 16 : t0 + 1;
    for (int t = t0; t < std::min(t1, batch_.T); t++) {
      float* row = ax.f + t * ax.stride;
      if (y >= 0) {
        float* add = buffers_[y].a.f + t * buffers_[y].a.stride;
        if (post) k_->norm(add, post, add, ax.width, eps);
        for (int64_t i = 0; i < ax.width; i++) row[i] += add[i];
      }
      k_->norm(row, weight, ao.f + t * ao.stride, ax.width, eps);
    }
    k_->quantise(ao, t0, t1);
  });
}
void Program::observe(int x, double* sums) {
  const int64_t columns = 64;
  add([=, this] { return (buffers_[x].width + columns - 1) / columns; }, [=, this](int64_t tile, Scratch&) {
    const Activations& a = buffers_[x].a;
    for (int t = 0; t < batch_.T; t++)
      for (int64_t i = tile * columns; i < std::min(a.width, (tile + 1) * columns); i++)
        sums[i] += (double)a.f[t * a.stride + i] * a.f[t * a.stride + i];
  });
}
void Program::prepare(int b) {
  if (buffers_[b].prepared) return;
  buffers_[b].prepared = true;
  add([this, b] { return buffers_[b].a.forms & ~FLOATS ? token_tiles() : 0; }, [this, b](int64_t tile, Scratch&) {
    int t0 = packed_ ? (int)tile * 16 : (int)tile;
    k_->quantise(buffers_[b].a, t0, packed_ ? t0 + 16 : t0 + 1);
  });
}
int Program::site(int in, const std::vector<Weight>& weights) {
  int index = (int)sites_.size();
  Site& s = sites_.emplace_back();
  s.in = in, s.terms.resize(weights.size());
  for (auto& w : weights) s.rows.push_back(w.rows), buffers_[in].forms |= k_->form_of(w.type);
  prepare(in);
  return index;
}
void Program::add_with_adapters(int site, std::function<int64_t()> tiles, std::function<void(int64_t, Scratch&)> work) {
  Site& s = sites_[site];
  const auto all = [=, &s] { return (int64_t)s.tasks.size() + tiles(); };
  steps_.push_back({[&s] { return (int64_t)s.tasks.size(); }, all, [=, &s, this](int64_t i, Scratch& scratch) {
    if (i >= (int64_t)s.tasks.size()) return work(i - (int64_t)s.tasks.size(), scratch);
    const AdapterTask& task = s.tasks[i];
    const int64_t r0 = (int64_t)task.slice * RANK;
    k_->product({&task.a, nullptr, task.h.f - r0, RANK}, task.x, r0, r0 + RANK, scratch);
    k_->quantise(task.h, 0, packed_ ? (task.h.T + 15) / 16 * 16 : task.h.T);
    s.pending.fetch_sub(1, std::memory_order_release);
  }});
}
int Program::product(int in, std::vector<Weight> weights, int out) {
  buffers_[out].prepared = false;
  const int index = site(in, weights);
  auto tiles_of = [this](const Weight& w) { int64_t n = k_->tile_rows(w, packed_); return (w.rows + n - 1) / n; };
  add_with_adapters(index, [=] { int64_t n = 0; for (auto& w : weights) n += tiles_of(w); return n; },
      [=, this](int64_t tile, Scratch& scratch) {
        const Activations& o = buffers_[out].a;
        int64_t column = 0;
        for (auto& w : weights) {
          int64_t n = tiles_of(w);
          if (tile < n) {
            int64_t rows = k_->tile_rows(w, packed_), r0 = tile * rows;
            const AdapterTerms added = terms(index, (int)(&w - weights.data()));
            return k_->product({&w, nullptr, o.f + column, o.stride, added}, buffers_[in].a, r0, std::min(r0 + rows, w.rows),
                               scratch);
          }
          tile -= n, column += w.rows;
        }
      });
  return index;
}
int Program::gated(int in, Weight gate, Weight up, int out) {
  buffers_[out].prepared = false;
  const int index = site(in, {gate, up});
  add_with_adapters(index, [=, this] { int64_t n = k_->tile_rows(up, packed_); return (up.rows + n - 1) / n; },
      [=, this](int64_t tile, Scratch& scratch) {
        const Activations& o = buffers_[out].a;
        int64_t rows = k_->tile_rows(up, packed_), r0 = tile * rows;
        k_->product({&up, &gate, o.f, o.stride, terms(index, 1), terms(index, 0)}, buffers_[in].a, r0,
                    std::min(r0 + rows, up.rows), scratch);
      });
  return index;
}
Program::Angles& Program::angles(double base, double scale, int width) {
  auto [entry, inserted] = angles_.try_emplace({base, scale});
  if (inserted)
    for (int i = 0; i < width / 2; i++) entry->second.frequency.push_back(std::pow(base, -2.0 * i / width) / scale);
  return entry->second;
}
void Program::split_heads(int qkv, HeadSplit h, double base, double scale, int64_t layer_offset, int64_t kv_offset) {
  Angles& angle = angles(base, scale, h.width);
  add([this] { return batch_.T; }, [=, &angle, this](int64_t t, Scratch&) {
    HeadSplit s = h;
    int position = batch_.positions[t], half = h.width / 2;
    const uint64_t* pages = batch_.pages + batch_.sequences[t] * batch_.pages_stride;
    s.row = buffers_[qkv].a.f + t * buffers_[qkv].a.stride;
    s.rope = {angle.cos.data() + t * half, angle.sin.data() + t * half};
    s.keys = (uint8_t*)pages[position / PAGE] + layer_offset, s.values = s.keys + kv_offset, s.slot = position % PAGE;
    k_->split_heads(s);
  });
}
void Program::attend(int qkv, Attention a, int out) {
  buffers_[out].prepared = false;
  AttentionTasks& tasks = attention_tasks_[a.window];
  tasks.window = a.window, tasks.heads = a.heads, tasks.kv_heads = a.kv_heads, tasks.width = a.width;
  auto inputs = [=, this] {
    Attention x = a;
    x.q = buffers_[qkv].a.f, x.q_stride = buffers_[qkv].a.stride;
    x.out = buffers_[out].a.f, x.out_stride = buffers_[out].a.stride;
    return x;
  };
  add([&tasks] { return (int64_t)tasks.attend.size(); },
      [=, this, &tasks](int64_t i, Scratch& s) { k_->attend(inputs(), tasks.attend[i], s); });
  add([&tasks] { return (int64_t)tasks.merge.size(); },
      [=, this, &tasks](int64_t i, Scratch&) { k_->merge(inputs(), tasks.merge[i], tasks.spans[i]); });
}
void Program::logits(int x, const float* weight, float eps, Weight table, float cap) {
  int in = buffer(buffers_[x].width);
  buffers_[in].forms = k_->form_of(table.type);
  buffers_[in].prepared = true;
  auto packed = [this] { return batch_.n_out >= PACKED_FROM; };
  add([=, this] { return (int64_t)(packed() ? (batch_.n_out + 15) / 16 : batch_.n_out); }, [=, this](int64_t tile, Scratch&) {
    const Activations &ax = buffers_[x].a, &ao = buffers_[in].a;
    int t0 = packed() ? (int)tile * 16 : (int)tile, t1 = packed() ? t0 + 16 : t0 + 1;
    for (int t = t0; t < std::min(t1, batch_.n_out); t++)
      k_->norm(ax.f + batch_.out_rows[t] * ax.stride, weight, ao.f + t * ao.stride, ax.width, eps);
    k_->quantise(ao, t0, t1);
  });
  add([=, this] {
        int64_t n = k_->tile_rows(table, packed());
        return batch_.n_out ? (table.rows + n - 1) / n : 0;
      },
      [=, this](int64_t tile, Scratch& s) {
        int64_t rows = k_->tile_rows(table, packed()), r0 = tile * rows;
        k_->product({&table, nullptr, batch_.logits, table.rows}, buffers_[in].a, r0, std::min(r0 + rows, table.rows), s);
      });
  // Logits of the rows that an adapter replaces.
  add([this] { return adapter_spans_.empty() ? 0 : batch_.n_out; }, [=, this](int64_t n, Scratch& s) {
    const int adapter = batch_.adapters[batch_.out_rows[n]];
    if (adapter < 0 || adapters_[adapter].ids.empty()) return;
    const auto& [sites, ids, rows] = adapters_[adapter];
    Activations x = buffers_[in].a;
    x.f += n * x.stride, x.T = 1, x.packed = false;
    std::vector<float> values(ids.size());
    k_->product({&rows, nullptr, values.data(), rows.rows}, x, 0, rows.rows, s);
    for (size_t i = 0; i < ids.size(); i++) batch_.logits[n * table.rows + ids[i]] = values[i];
  });
  int64_t parts = (table.rows + STAT_ROWS - 1) / STAT_ROWS;
  // Soft cap, then the log-sum-exp of each part.
  add([=, this] { return batch_.n_out * parts; }, [=, this](int64_t tile, Scratch&) {
    int64_t row = tile / parts, r0 = tile % parts * STAT_ROWS, n = std::min(STAT_ROWS, table.rows - r0);
    float* part = batch_.logits + row * table.rows + r0;
    if (cap > 0) k_->softcap(part, n, cap);
    Stat& stat = stats_[tile];
    k_->log_sum(part, n, &stat.largest, &stat.total, &stat.index);
    stat.index += r0;
  });
  // Merge the parts of each row.
  add([this] { return batch_.n_out; }, [=, this](int64_t row, Scratch&) {
    const Stat* stat = &stats_[row * parts];
    int64_t best = 0;
    for (int64_t i = 1; i < parts; i++) if (stat[i].largest > stat[best].largest) best = i;
    double total = 0;
    for (int64_t i = 0; i < parts; i++) total += stat[i].total * std::exp((double)stat[i].largest - stat[best].largest);
    batch_.argmax[row] = (int32_t)stat[best].index;
    batch_.log_normaliser[row] = (float)(stat[best].largest + std::log(total));
  });
  vocabulary_ = table.rows, logits_in_ = in;
}

// -------------------------------------------------------------------------------------------------------- replaying
void Program::resize(Buffer& b, int T, bool packed) {
  size_t rows = packed ? (T + 15) / 16 * 16 : T, n = rows * b.padded;
  const int forms = b.forms | (adapter_spans_.empty() ? 0 : b.adapter_forms);
  b.a = {at_least(b.f, n), b.width, b.padded, b.padded, T, packed, forms, {}, {}, nullptr};
  if (forms & BLOCKS_32) b.a.q32 = {32, at_least(b.q32, n), at_least(b.scales32, n / 32), at_least(b.sums32, n / 16)};
  if (forms & BLOCKS_256)
    b.a.q256 = {256, at_least(b.q256, n), at_least(b.scales256, n / 256), at_least(b.sums256, n / 16)};
  if (forms & PAIRS) b.a.pairs = at_least(b.pairs, n);
}
int Program::add_adapter(std::vector<LowRankSite> sites, std::vector<int32_t> ids, Weight rows) {
  auto require = [](bool holds, const char* rule) {
    if (!holds) throw std::invalid_argument(std::string("an adapter's ") + rule);
  };
  Adapter adapter{std::vector<LowRankSite>(sites_.size()), std::move(ids), rows};
  require(std::is_sorted(adapter.ids.begin(), adapter.ids.end()), "ids must ascend");
  require(adapter.ids.empty() || rows.rows == (int64_t)adapter.ids.size(), "rows must be one for each id");
  for (int32_t id : adapter.ids)
    require(id >= 0 && id < vocabulary_ && rows.cols == buffers_[logits_in_].width, "rows must be the embedding's");
  for (auto& low : sites) {
    require(low.site >= 0 && low.site < (int)sites_.size(), "site must be one of this program's");
    const Site& s = sites_[low.site];
    require(low.a.rows == RANK * (int64_t)low.slices.size() && low.a.cols == buffers_[s.in].width, "a must fit its layer");
    for (auto& [target, b] : low.slices)
      require(target >= 0 && target < (int)s.rows.size() && b.cols == RANK && b.rows == s.rows[target], "b must fit its layer");
    buffers_[s.in].adapter_forms |= k_->form_of(low.a.type);
    for (auto& slice : low.slices) h_.adapter_forms |= k_->form_of(slice.b.type);
    adapter.sites[low.site] = std::move(low);
  }
  adapters_.push_back(std::move(adapter));
  return (int)adapters_.size() - 1;
}
// Lays out each site's h = x a^T for this run, the tasks that compute it, and the terms h b^T that use it.
void Program::plan_adapters() {
  constexpr int TOKENS = 64;             // of one task
  size_t max_slices = 0, total = 0;
  for (auto& span : adapter_spans_) {
    span.h = total, total += packed_ ? (span.end - span.start + 15) / 16 * 16 : span.end - span.start;
    for (auto& low : adapters_[span.adapter].sites) max_slices = std::max(max_slices, low.slices.size());
  }
  h_.width = h_.padded = RANK;
  if (total) resize(h_, (int)(total * max_slices), packed_);
  for (size_t i = 0; i < sites_.size(); i++) {
    Site& s = sites_[i];
    s.tasks.clear();
    for (auto& terms : s.terms) terms.clear();
    for (auto& span : adapter_spans_) {
      const LowRankSite& low = adapters_[span.adapter].sites[i];
      for (int slice = 0; slice < (int)low.slices.size(); slice++) {
        const int T = span.end - span.start;
        Activations h = view(h_.a, slice * total + span.h, T);
        h.forms = k_->form_of(low.slices[slice].b.type);
        for (int t = 0; t < T; t += TOKENS) {
          const int n = std::min(TOKENS, T - t);
          s.tasks.push_back({low.a, slice, view(buffers_[s.in].a, span.start + t, n), view(h, t, n)});
        }
        s.terms[low.slices[slice].target].push_back({low.slices[slice].b, h, span.start, span.begin});
      }
    }
    s.pending = (int)s.tasks.size();
  }
}
void Program::split_attention(AttentionTasks& tasks) {
  tasks.attend.clear(), tasks.merge.clear(), tasks.spans.clear();
  const int groups = tasks.heads / tasks.kv_heads, threads = pool_->threads();
  std::vector<size_t> partial_offsets;
  size_t partials = 0;
  for (int t0 = 0; t0 < batch_.T;) {
    int t1 = t0 + 1, position = batch_.positions[t0];
    while (t1 < batch_.T && batch_.sequences[t1] == batch_.sequences[t0] && batch_.positions[t1] == position + t1 - t0) t1++;
    const bool few = t1 - t0 < PACKED_FROM;
    const int last = position + t1 - t0 - 1, first = tasks.window ? std::max(0, position - tasks.window + 1) : 0;
    const int spans = last / KEY_SPAN - first / KEY_SPAN + 1;
    // Few tokens make few tasks: then the heads of a group, and the spans, are divided among the threads.
    int per_group = std::min(groups, ROWS);
    if (few && tasks.kv_heads * spans < threads) per_group = std::max(4, (groups + threads - 1) / threads);
    const int step = std::max(1, std::min(ROWS / per_group, t1 - t0));
    for (int t = t0; t < t1; t += step)
      for (int k = 0; k < tasks.kv_heads; k++)
        for (int g = 0; g < groups; g += per_group) {
          const uint64_t* pages = batch_.pages + batch_.sequences[t0] * batch_.pages_stride;
          AttentionTask task{t, std::min(step, t1 - t), position + t - t0, pages, k, g, std::min(per_group, groups - g), -1,
                             nullptr};
          if (!few || spans == 1) { tasks.attend.push_back(task); continue; }
          tasks.merge.push_back(task), tasks.spans.push_back(spans);
          for (int s = 0; s < spans; s++) {
            task.span = first / KEY_SPAN + s;
            tasks.attend.push_back(task), partial_offsets.push_back(partials);
            partials += (size_t)task.tokens * task.heads * (tasks.width + 2);
          }
        }
    t0 = t1;
  }
  float* base = at_least(tasks.partials, partials);
  size_t next = 0, merge = 0, span = 0;
  for (auto& task : tasks.attend)
    if (task.span >= 0) {
      task.partial = base + partial_offsets[next++];
      if (span == 0) tasks.merge[merge].partial = task.partial;
      if (++span == (size_t)tasks.spans[merge]) merge++, span = 0;
    }
}
bool Program::run(const Batch& batch, const Cancel* cancel) {
  batch_ = batch, packed_ = batch.T >= PACKED_FROM;
  adapter_spans_.clear();
  for (int t = 0; batch.adapters && t < batch.T; t++) {
    if (batch.adapters[t] < 0) continue;
    if (t && batch.adapters[t] == batch.adapters[t - 1]) adapter_spans_.back().end = t + 1;
    else adapter_spans_.push_back({batch.adapters[t], t, t + 1, packed_ ? t / 16 * 16 : t, 0});
  }
  for (size_t i = 0; i < buffers_.size(); i++)
    if ((int)i == logits_in_) resize(buffers_[i], batch.n_out, batch.n_out >= PACKED_FROM);
    else resize(buffers_[i], batch.T, packed_);
  plan_adapters();
  at_least(stats_, batch.n_out * ((vocabulary_ + STAT_ROWS - 1) / STAT_ROWS));
  for (auto& [window, tasks] : attention_tasks_) split_attention(tasks);
  for (auto& [key, a] : angles_) {
    size_t half = a.frequency.size();
    at_least(a.cos, batch.T * half), at_least(a.sin, batch.T * half);
    for (int t = 0; t < batch.T; t++)
      for (size_t i = 0; i < half; i++) {
        double angle = batch.positions[t] * a.frequency[i];
        a.cos[t * half + i] = (float)std::cos(angle), a.sin[t * half + i] = (float)std::sin(angle);
      }
  }
  scratch_.resize(pool_->threads());
  const int threads = pool_->threads();
  const size_t counters = steps_.size() * (threads + 1);
  if (!claimed_) claimed_.reset(new std::atomic<int64_t>[counters]);
  for (size_t i = 0; i < counters; i++) claimed_[i] = 0;
  auto cancelled = [&] { return cancel && cancel->set.load(std::memory_order_relaxed); };
  pool_->run([&](int thread) {
    for (size_t i = 0; i < steps_.size(); i++) {
      const int64_t n = steps_[i].tiles(), urgent = steps_[i].urgent();
      if (!n) continue;
      auto work_on = [&](std::atomic<int64_t>& claimed, int64_t begin, int64_t end) {
        for (int64_t tile; !cancelled() && (tile = begin + claimed.fetch_add(1, std::memory_order_relaxed)) < end;)
          steps_[i].work(tile, scratch_[thread]);
      };
      std::atomic<int64_t>* claimed = &claimed_[i * (threads + 1)];
      work_on(claimed[threads], 0, urgent);
      for (int k = 0; k < threads; k++) {  // its own share, then what is left of the others'
        const int64_t share = (thread + k) % threads, rest = n - urgent;
        work_on(claimed[share], urgent + rest * share / threads, urgent + rest * (share + 1) / threads);
      }
      pool_->barrier();
    }
  });
  return !cancelled();
}

}  // namespace cg
