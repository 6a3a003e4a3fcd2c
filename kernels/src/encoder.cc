// Runs a packed encoder. Texts are packed end to end without padding into tiles of up to 64 tokens; a group of whole texts goes
// through all layers before the next one begins, so its activations stay in the second cache. Groups are the tasks of threads; if
// there are few, all threads work on one group together, stage by stage.
#include "encoder.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <new>
#include <vector>

#include "memory.h"
#include "path.h"
#include "status.h"
#include "team.h"

namespace {

constexpr int64_t GROUP_TOKENS = 192;  // about; a longer text is a group of its own
constexpr int SLACK = MAX_WIDTH;       // floats behind a tile that whole vectors may read

struct Text {
  int64_t row, first, count;  // tokens of the group
};

struct Token {
  int64_t id, type, position, column;
};

// Activations of some tokens in all stages. All tiles but the last have the same width; tile t begins at t * (features * width).
struct Tokens {
  int64_t tiles = 0;
  int width = 0, last_width = 0;
  float* hidden = nullptr;   // [hidden][width]
  float* query = nullptr;    // [heads * head_dim][width]; the attention's result takes its place
  float* inner = nullptr;    // [neurons][width]
  uint8_t* codes = nullptr;  // of whatever is multiplied next
  float *scale = nullptr, *low = nullptr, *high = nullptr;  // [width]
  int32_t* zero = nullptr;

  int64_t lanes() const { return (tiles - 1) * width + last_width; }
  int width_of(int64_t tile) const { return tile + 1 < tiles ? width : last_width; }
};

struct Group {
  std::vector<Text> texts;
  std::vector<Token> tokens;
  Tokens all, first;  // first: only the first token of each text, for the last layer
  float* key_value = nullptr;
  bool has_first = false;
};

struct Run {
  const Path& path;
  const sfk_encoder& e;
  const sfk_texts& t;
  std::vector<Group>& groups;
  Stage* stages = nullptr;
  mutable std::atomic<bool> out_of_memory{false};
};

int64_t panels_of(int64_t features) { return (features + PANEL - 1) / PANEL * PANEL; }

void layout(const sfk_encoder& e, Tokens* tokens, int64_t count, bool has_inner, Parts* parts) {
  const int64_t padded = (count + PANEL - 1) / PANEL * PANEL;
  tokens->tiles = (padded + MAX_WIDTH - 1) / MAX_WIDTH;
  tokens->width = static_cast<int>(std::min<int64_t>(padded, MAX_WIDTH));
  tokens->last_width = static_cast<int>(padded - (tokens->tiles - 1) * tokens->width);
  const size_t lanes = static_cast<size_t>(tokens->lanes());
  const size_t widest = static_cast<size_t>(panels_of(e.widest));
  tokens->hidden = parts->next<float>(static_cast<size_t>(panels_of(e.hidden)) * lanes + SLACK);
  tokens->query = parts->next<float>(widest * lanes + SLACK);
  tokens->inner = has_inner ? tokens->query : nullptr;  // queries are done with when the inner layer begins
  tokens->codes = parts->next<uint8_t>(widest * lanes + SLACK * 4);
  tokens->scale = parts->next<float>(lanes);
  tokens->low = parts->next<float>(lanes);
  tokens->high = parts->next<float>(lanes);
  tokens->zero = parts->next<int32_t>(lanes);
}

void layout(const sfk_encoder& e, Group* group, Parts* parts) {
  layout(e, &group->all, static_cast<int64_t>(group->tokens.size()), true, parts);
  if (group->has_first) layout(e, &group->first, static_cast<int64_t>(group->texts.size()), true, parts);
  group->key_value = parts->next<float>(static_cast<size_t>(panels_of(2 * e.widest) * group->all.lanes() + SLACK));
}

// What one thread works with on one group.
class Worker {
 public:
  Worker(const Run& run, Group& group, Team team) : run_(run), p_(run.path), e_(run.e), g_(group), team_(team) {}

  void work() {
    embed();
    const size_t count = e_.layers.size();
    for (size_t i = 0; i < count; i++) {
      const Layer& layer = e_.layers[i];
      const bool last = g_.has_first && i + 1 == count;
      Tokens& own = last ? g_.first : g_.all;
      if (layer.query) multiply(*layer.key_value, g_.all, g_.key_value, SFK_NONE, nullptr);
      if (last) pick_first();
      if (layer.query) {
        multiply(*layer.query, own, own.query, SFK_NONE, nullptr);
        attend(layer, own);
        quantize(own, own.query, layer.out->inputs, true);
        multiply(*layer.out, own, own.hidden, SFK_NONE, own.hidden);
        norm(own, layer.attention_norm);
      }
      if (layer.into) {
        multiply(*layer.into, own, own.inner, e_.activation, nullptr);
        quantize(own, own.inner, layer.down->inputs, !team_.alone());
        multiply(*layer.down, own, own.hidden, SFK_NONE, own.hidden);
        norm(own, layer.ffn_norm);
      }
    }
    if (g_.has_first && !count) pick_first();
    write();
  }

 private:
  // Lanes are independent of each other, so stages along the lanes are split into vectors if threads share a group.
  template <class Piece>
  void by_lanes(Tokens& x, Piece piece) {
    const int most = team_.alone() ? x.width : PANEL;
    const int64_t parts = x.width / most;
    team_.each(x.tiles * parts, [&](int64_t i) {
      const int64_t tile = i / parts;
      const int lane = static_cast<int>(i % parts) * most, lanes = std::min(most, x.width_of(tile) - lane);
      if (lanes > 0) piece(tile, lane, lanes);
    });
  }

  void norm_lanes(Tokens& x, int64_t tile, int lane, int lanes, const Norm& norm) {
    const int64_t at = tile * x.width + lane;
    const int width = x.width_of(tile);
    float* hidden = x.hidden + tile * e_.hidden * x.width + lane;
    p_.layer_norm(hidden, e_.hidden, width, lanes, norm.gain, norm.shift, e_.epsilon, x.low + at, x.high + at);
    p_.grid(x.low + at, x.high + at, lanes, x.scale + at, x.zero + at);
    p_.quantize(hidden, e_.hidden, width, lanes, x.scale + at, x.zero + at, codes(x, tile, e_.hidden) + lane * 4);
  }

  static uint8_t* codes(const Tokens& x, int64_t tile, int64_t features) {
    return x.codes + tile * ((features + 3) / 4 * 4) * x.width;
  }

  void embed(int64_t id, const float* position, const float* type, float* row) {
    if (!e_.codes) return p_.embed(e_.words + id * e_.hidden, e_.word_scale[id], position, type, e_.hidden, row);
    const int64_t width = e_.hidden / e_.parts;
    for (int64_t part = 0, at = 0; part < e_.parts; part++, at += width) {
      const int64_t entry = part * e_.entries + e_.codes[id * e_.parts + part];
      p_.embed(e_.book + entry * width, e_.book_scale[entry], position + at, type ? type + at : nullptr, width, row + at);
    }
  }

  void embed() {
    Tokens& x = g_.all;
    by_lanes(x, [&](int64_t tile, int lane, int lanes) {
      static thread_local Memory memory;
      float* rows = static_cast<float*>(memory.take(static_cast<size_t>(lanes * e_.hidden) * 4));
      if (!rows) return run_.out_of_memory.store(true);
      std::memset(rows, 0, static_cast<size_t>(lanes * e_.hidden) * 4);
      for (int t = 0; t < lanes; t++) {
        const size_t index = static_cast<size_t>(tile * x.width + lane + t);
        if (index >= g_.tokens.size()) break;
        const Token& token = g_.tokens[index];
        const float* type = e_.type ? e_.type + token.type * e_.hidden : nullptr;
        embed(token.id, e_.position + token.position * e_.hidden, type, rows + t * e_.hidden);
      }
      float* hidden = x.hidden + tile * e_.hidden * x.width + lane;
      p_.transpose(reinterpret_cast<const uint32_t*>(rows), e_.hidden, reinterpret_cast<uint32_t*>(hidden), x.width_of(tile), lanes,
                   e_.hidden);
      norm_lanes(x, tile, lane, lanes, e_.embedding_norm);
    });
  }

  void norm(Tokens& x, const Norm& norm) {
    by_lanes(x, [&](int64_t tile, int lane, int lanes) { norm_lanes(x, tile, lane, lanes, norm); });
  }

  // `find`: the extremes are not known yet.
  void quantize(Tokens& x, const float* values, int64_t features, bool find) {
    by_lanes(x, [&](int64_t tile, int lane, int lanes) {
      const int64_t at = tile * x.width + lane;
      const int width = x.width_of(tile);
      const float* from = values + tile * panels_of(features) * x.width + lane;
      if (find) p_.range(from, features, width, lanes, x.low + at, x.high + at);
      p_.grid(x.low + at, x.high + at, lanes, x.scale + at, x.zero + at);
      p_.quantize(from, features, width, lanes, x.scale + at, x.zero + at, codes(x, tile, features) + lane * 4);
    });
  }

  // A piece is some panels; the tiles go through each of them in turn, so weights are fetched once for all. Alone, the extremes of
  // activations are collected on the way.
  void multiply(const sfk_linear& w, Tokens& x, float* to, int activation, const float* residual) {
    const bool collect = team_.alone() && activation;
    if (collect) std::fill_n(x.low, x.lanes(), 0.0f), std::fill_n(x.high, x.lanes(), 0.0f);
    const int64_t parts = team_.alone() ? 1 : std::min<int64_t>(w.panels, 6 * run_.t.threads);
    team_.each(parts, [&](int64_t part) {
      for (int64_t panel = w.panels * part / parts; panel < w.panels * (part + 1) / parts; panel++)
        for (int64_t tile = 0; tile < x.tiles; tile++) multiply_panel(w, x, tile, panel, to, activation, residual, collect);
    });
  }

  void multiply_panel(const sfk_linear& w, Tokens& x, int64_t tile, int64_t panel, float* to, int activation, const float* residual,
                      bool collect) {
    alignas(64) int32_t sums[PANEL * MAX_WIDTH];
    alignas(64) float beyond[PANEL * MAX_WIDTH];
    const int width = x.width_of(tile);
    const int64_t first_lane = tile * x.width, rows = std::min<int64_t>(PANEL, w.outputs - panel * PANEL);
    const int64_t features = residual ? e_.hidden : w.panels * PANEL, at = tile * features * x.width + panel * PANEL * width;
    p_.accumulate(w, panel, codes(x, tile, w.inputs), width, sums);
    // The hidden state has no rows beyond its size: the last panel of it takes a detour.
    const bool detour = residual && rows < PANEL;
    const Finish how{x.scale + first_lane, x.zero + first_lane, activation, residual ? residual + at : nullptr,
                     collect ? x.low + first_lane : nullptr, collect ? x.high + first_lane : nullptr};
    p_.finish(w, panel, sums, width, how, detour ? beyond : to + at);
    if (detour) std::memcpy(to + at, beyond, static_cast<size_t>(rows * width) * 4);
  }

  // `count` columns of some rows of tiles with `tile_rows` rows, from column `first` on, wherever tiles cut them.
  void gather(const Tokens& x, const float* tiles, int64_t tile_rows, int64_t first_row, int64_t rows, int64_t first, int64_t count,
              float* to, int64_t to_stride) {
    for (int64_t done = 0; done < count;) {
      const int64_t tile = (first + done) / x.width, lane = (first + done) % x.width;
      const int width = x.width_of(tile), take = static_cast<int>(std::min<int64_t>(count - done, width - lane));
      p_.copy(tiles + tile * tile_rows * x.width + first_row * width + lane, width, to + done, to_stride, rows, take);
      done += take;
    }
  }

  void attend(const Layer& layer, Tokens& own) {
    const bool first = &own != &g_.all;
    const int64_t texts = static_cast<int64_t>(g_.texts.size()), d = e_.head_dim;
    const int64_t query_rows = layer.query->panels * PANEL, kv_rows = layer.key_value->panels * PANEL;
    team_.each(texts * layer.heads, [&](int64_t i) {
      const Text& text = g_.texts[static_cast<size_t>(i / layer.heads)];
      const int64_t head = i % layer.heads, keys = text.count, queries = first ? 1 : text.count;
      const int64_t begin = first ? i / layer.heads : text.first;
      const int64_t padded = (std::max(keys, queries) + PANEL - 1) / PANEL * PANEL;
      static thread_local Memory memory;
      Parts count(nullptr);
      for (int pass = 0; pass < 2; pass++) {
        Parts parts(pass ? memory.take(count.used()) : nullptr);
        float* q = parts.next<float>(static_cast<size_t>(d * padded) + SLACK);
        float* k = parts.next<float>(static_cast<size_t>(d * padded));
        float* v = parts.next<float>(static_cast<size_t>(d * padded));
        float* scores = parts.next<float>(static_cast<size_t>(keys) * MAX_WIDTH);
        float* out = parts.next<float>(static_cast<size_t>(d) * MAX_WIDTH);
        if (!pass) {
          count = parts;
          continue;
        }
        if (!q) return run_.out_of_memory.store(true);
        std::memset(q, 0, (static_cast<size_t>(d * padded) + SLACK) * 4);
        gather(own, own.query, query_rows, head * d, d, begin, queries, q, padded);
        gather(g_.all, g_.key_value, kv_rows, head * d, d, text.first, keys, k, padded);
        gather(g_.all, g_.key_value, kv_rows, (layer.heads + head) * d, d, text.first, keys, v, padded);
        for (int64_t done = 0; done < queries; done += MAX_WIDTH) {
          const int64_t take = std::min<int64_t>(MAX_WIDTH, queries - done);
          const int lanes = static_cast<int>((take + PANEL - 1) / PANEL * PANEL);
          p_.attend(q + done, static_cast<int>(padded), k, v, static_cast<int>(padded), static_cast<int>(d), static_cast<int>(keys), lanes,
                    scores, out);
          for (int64_t sent = 0; sent < take;) {
            const int64_t at = begin + done + sent, tile = at / own.width, lane = at % own.width;
            const int width = own.width_of(tile), part = static_cast<int>(std::min<int64_t>(take - sent, width - lane));
            p_.copy(out + sent, lanes, own.query + tile * query_rows * own.width + head * d * width + lane, width, d, part);
            sent += part;
          }
        }
      }
    });
  }

  // The hidden states of first tokens, with their codes, become a smaller set.
  void pick_first() {
    Tokens &from = g_.all, &to = g_.first;
    team_.each(1, [&](int64_t) {
      const int64_t quads = (e_.hidden + 3) / 4, texts = static_cast<int64_t>(g_.texts.size());
      std::memset(to.hidden, 0, static_cast<size_t>(e_.hidden * to.lanes()) * 4);
      std::memset(to.codes, 0, static_cast<size_t>(quads * 4 * to.lanes()));
      for (int64_t i = 0; i < to.lanes(); i++) {
        to.scale[i] = 1.0f, to.zero[i] = 0;
        if (i >= texts) continue;
        const int64_t at = g_.texts[static_cast<size_t>(i)].first, tile = at / from.width, lane = at % from.width;
        const int64_t to_tile = i / to.width, to_lane = i % to.width;
        to.scale[i] = from.scale[at], to.zero[i] = from.zero[at];
        const int to_width = to.width_of(to_tile), width = from.width_of(tile);
        for (int64_t k = 0; k < e_.hidden; k++)
          to.hidden[to_tile * e_.hidden * to.width + k * to_width + to_lane] =
              from.hidden[tile * e_.hidden * from.width + k * width + lane];
        for (int64_t k = 0; k < quads; k++)
          std::memcpy(codes(to, to_tile, e_.hidden) + (k * to_width + to_lane) * 4,
                      codes(from, tile, e_.hidden) + (k * width + lane) * 4, 4);
      }
    });
  }

  // Rows of the result: runs of tokens that are neighbours there too.
  void write() {
    const bool first = g_.has_first;
    const Tokens& x = first ? g_.first : g_.all;
    team_.each(static_cast<int64_t>(g_.texts.size()), [&](int64_t i) {
      const Text& text = g_.texts[static_cast<size_t>(i)];
      if (first) return write_run(x, i, 1, run_.t.hidden + text.row * e_.hidden);
      for (int64_t done = 0; done < text.count;) {
        const int64_t at = text.first + done, column = g_.tokens[static_cast<size_t>(at)].column;
        int64_t take = 1;
        while (done + take < text.count && (at + take) % x.width && g_.tokens[static_cast<size_t>(at + take)].column == column + take) take++;
        write_run(x, at, take, run_.t.hidden + (text.row * run_.t.columns + column) * e_.hidden);
        done += take;
      }
    });
  }

  void write_run(const Tokens& x, int64_t first, int64_t count, float* to) {
    const float* from = x.hidden + first / x.width * e_.hidden * x.width + first % x.width;
    p_.transpose(reinterpret_cast<const uint32_t*>(from), x.width_of(first / x.width), reinterpret_cast<uint32_t*>(to), e_.hidden, e_.hidden, count);
  }

  const Run& run_;
  const Path& p_;
  const sfk_encoder& e_;
  Group& g_;
  Team team_;
};

// Lays the group out in this thread's memory and takes it through all layers.
void run_alone(void* user, size_t index) {
  Run& run = *static_cast<Run*>(user);
  Group& group = run.groups[index];
  static thread_local Memory memory;
  Parts count(nullptr);
  layout(run.e, &group, &count);
  void* bytes = memory.take(count.used());
  if (!bytes) return run.out_of_memory.store(true);
  Parts parts(bytes);
  layout(run.e, &group, &parts);
  Worker(run, group, Team()).work();
}

void run_together(void* user, size_t) {
  Run& run = *static_cast<Run*>(user);
  Worker(run, run.groups[0], Team(run.stages)).work();
}

sfk_status read_texts(const sfk_encoder& e, const sfk_texts& t, std::vector<Group>* groups, int64_t threads) {
  int64_t total = 0;
  for (int64_t i = 0; i < t.rows * t.columns; i++) total += !t.mask || t.mask[i] != 0;
  // As many tokens for each group, and as many groups for each thread; few groups become one that all threads share.
  int64_t count = (total + GROUP_TOKENS - 1) / GROUP_TOKENS;
  if (threads > 1) count = count < 2 * threads ? 1 : (count + threads - 1) / threads * threads;
  const int64_t target = count ? (total + count - 1) / count : 0;
  for (int64_t row = 0; row < t.rows; row++) {
    Text text{row, 0, 0};
    int64_t words = 0;  // of this row so far that are not the id of padding, whether the mask lets them be read or not
    for (int64_t column = 0; column < t.columns; column++) {
      const int64_t i = row * t.columns + column;
      const int64_t id = t.ids[i], type = t.types ? t.types[i] : 0;
      const bool padding = e.positions_by_id && id == e.first_position - 1;  // its position is the one before the first
      const int64_t position = e.first_position + (!e.positions_by_id ? column : padding ? -1 : words++);
      if (t.mask && !t.mask[i]) continue;
      if (id < 0 || id >= e.vocabulary)
        return fail(SFK_BAD_ARGUMENT, "token id %lld lies outside of the vocabulary of %lld", static_cast<long long>(id),
                    static_cast<long long>(e.vocabulary));
      if (type < 0 || type >= std::max<int64_t>(1, e.types))
        return fail(SFK_BAD_ARGUMENT, "token type %lld lies outside of the %lld types", static_cast<long long>(type),
                    static_cast<long long>(e.types));
      if (position >= e.positions)
        return fail(SFK_BAD_ARGUMENT, "a text is longer than the %lld positions of the model",
                    static_cast<long long>(e.positions - e.first_position));
      if (!text.count) {
        if (e.first_only && column) break;  // its first column is padding: there is nothing to give
        const bool full = groups->empty() || static_cast<int64_t>(groups->back().tokens.size()) >= target;
        if (full) groups->emplace_back();
        text.first = static_cast<int64_t>(groups->back().tokens.size());
      }
      groups->back().tokens.push_back({id, type, position, column});
      text.count++;
    }
    if (text.count) groups->back().texts.push_back(text);
  }
  for (Group& group : *groups) group.has_first = e.first_only;
  return SFK_OK;
}

sfk_status run_texts(const sfk_encoder& e, const sfk_texts& t, const Path& path) {
  const int64_t threads = t.parallel && t.threads > 1 ? t.threads : 1;
  std::vector<Group> groups;
  if (sfk_status status = read_texts(e, t, &groups, threads)) return status;
  std::memset(t.hidden, 0, static_cast<size_t>(t.rows * (e.first_only ? 1 : t.columns) * e.hidden) * 4);
  if (groups.empty()) return SFK_OK;
  sfk_texts texts = t;
  texts.threads = static_cast<int>(threads);
  Run run{path, e, texts, groups};
  if (threads > 1 && groups.size() == 1) {
    static thread_local Memory memory;
    Parts count(nullptr);
    layout(e, &groups[0], &count);
    void* bytes = memory.take(count.used());
    if (!bytes) return fail(SFK_NO_MEMORY, "no memory for %zu bytes", count.used());
    Parts parts(bytes);
    layout(e, &groups[0], &parts);
    std::vector<Stage> stages(4 + e.layers.size() * 12);
    run.stages = stages.data();
    t.parallel(t.pool, run_together, static_cast<size_t>(threads), &run);
  } else if (threads > 1) {
    t.parallel(t.pool, run_alone, groups.size(), &run);
  } else {
    for (size_t i = 0; i < groups.size(); i++) run_alone(&run, i);
  }
  return run.out_of_memory.load() ? fail(SFK_NO_MEMORY, "no memory for the activations") : SFK_OK;
}

}  // namespace

extern "C" sfk_status sfk_encoder_run(const sfk_encoder* encoder, const sfk_texts* texts) {
  if (!encoder || !texts || !texts->ids || !texts->hidden || texts->rows < 0 || texts->columns < 0)
    return fail(SFK_BAD_ARGUMENT, "encoder, ids and hidden must be given");
  if (texts->rows == 0 || texts->columns == 0) return SFK_OK;
  const Path* path = path_in_use();
  if (!path) return SFK_NO_SUCH_PATH;
  try {
    return run_texts(*encoder, *texts, *path);
  } catch (const std::bad_alloc&) {
    return fail(SFK_NO_MEMORY, "no memory for the texts");
  }
}
