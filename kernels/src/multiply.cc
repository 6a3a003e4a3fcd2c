// One product from rows to rows: rows are quantized, turned into tiles of up to 64 tokens, multiplied panel by panel, and turned
// back. Tiles are the tasks of threads; if there are few, the panels of each tile are shared out too.
#include <atomic>
#include <cmath>
#include <cstring>

#include "memory.h"
#include "packed.h"
#include "path.h"
#include "status.h"

namespace {

struct Tile {
  uint8_t* codes;   // [quads][width][4]
  float* scale;     // [width]
  int32_t* zero;    // [width]
  float* out;       // [panels * 16][width], only for a norm
};

struct Job {
  const Path& path;
  const sfk_linear& w;
  const sfk_product& p;
  int64_t tiles, parts;  // parts: how many tasks share the panels of a tile
  int width;
  Tile* shared;  // [tiles], if parts > 1
  std::atomic<bool> out_of_memory{false};

  int64_t first_row(int64_t tile) const { return tile * width; }
  int rows(int64_t tile) const {
    int64_t left = p.rows - first_row(tile);
    return static_cast<int>(left < width ? left : width);
  }
};

Tile tile_parts(const Job& job, Parts* parts) {
  const size_t width = static_cast<size_t>(job.width);
  Tile tile{};
  tile.codes = parts->next<uint8_t>(static_cast<size_t>(job.w.quads) * width * 4);
  tile.scale = parts->next<float>(width);
  tile.zero = parts->next<int32_t>(width);
  if (job.p.norm_gain) tile.out = parts->next<float>(static_cast<size_t>(job.w.panels) * PANEL * width);
  return tile;
}

void* own_memory(size_t bytes) {
  static thread_local Memory memory;
  return memory.take(bytes);
}

void read_tile(const Job& job, int64_t index, const Tile& tile, uint8_t* staging) {
  const sfk_product& p = job.p;
  const int64_t inputs = job.w.inputs, row_bytes = job.w.quads * 4;
  std::memset(staging, 0, static_cast<size_t>(job.width * row_bytes));
  for (int t = 0; t < job.width; t++) {
    tile.scale[t] = 1.0f, tile.zero[t] = 0;
    const int64_t row = job.first_row(index) + t;
    if (t >= job.rows(index)) continue;
    if (p.x_scale) {
      tile.scale[t] = p.x_scale[p.per_row ? row : 0], tile.zero[t] = p.x_zero[p.per_row ? row : 0];
    } else {
      float low, high, scales[PANEL];
      int32_t zeros[PANEL];
      float lows[PANEL] = {}, highs[PANEL] = {};
      job.path.range_row(p.x + row * inputs, inputs, &low, &high);
      lows[0] = low, highs[0] = high;
      job.path.grid(lows, highs, PANEL, scales, zeros);
      tile.scale[t] = scales[0], tile.zero[t] = zeros[0];
    }
    if (p.x)
      job.path.quantize_row(p.x + row * inputs, inputs, tile.scale[t], tile.zero[t], staging + t * row_bytes);
    else
      std::memcpy(staging + t * row_bytes, p.x_codes + row * inputs, static_cast<size_t>(inputs));
  }
  job.path.transpose(reinterpret_cast<const uint32_t*>(staging), job.w.quads, reinterpret_cast<uint32_t*>(tile.codes), job.width,
                     job.width, job.w.quads);
}

int64_t outputs_of(const Job& job, int64_t panel) {
  int64_t left = job.w.outputs - panel * PANEL;
  return left < PANEL ? left : PANEL;
}

void write_codes(const Job& job, int64_t index, const float* y, int64_t first, int64_t count) {
  const sfk_product& p = job.p;
  float scale[MAX_WIDTH];
  int32_t zero[MAX_WIDTH];
  uint8_t codes[PANEL * MAX_WIDTH];
  for (int t = 0; t < job.width; t++) scale[t] = p.y_scale, zero[t] = p.y_zero;
  job.path.quantize(y, PANEL, job.width, job.width, scale, zero, codes);
  for (int t = 0; t < job.rows(index); t++)
    for (int64_t j = 0; j < count; j++)
      p.y_codes[(job.first_row(index) + t) * job.w.outputs + first + j] = codes[(j / 4 * job.width + t) * 4 + j % 4];
}

// One panel of results, [16][width], to the rows of the output.
void write_panel(const Job& job, int64_t index, int64_t panel, const void* y) {
  const sfk_product& p = job.p;
  const int64_t first = panel * PANEL, count = outputs_of(job, panel), at = job.first_row(index) * job.w.outputs + first;
  if (p.y_codes) return write_codes(job, index, static_cast<const float*>(y), first, count);
  uint32_t* to = p.y_sums ? reinterpret_cast<uint32_t*>(p.y_sums + at) : reinterpret_cast<uint32_t*>(p.y + at);
  job.path.transpose(static_cast<const uint32_t*>(y), job.width, to, job.w.outputs, count, job.rows(index));
}

void multiply_panels(const Job& job, int64_t index, const Tile& tile, int64_t from, int64_t to) {
  alignas(64) int32_t sums[PANEL * MAX_WIDTH];
  alignas(64) float y[PANEL * MAX_WIDTH];
  alignas(64) float residual[PANEL * MAX_WIDTH] = {};
  const sfk_product& p = job.p;
  for (int64_t panel = from; panel < to; panel++) {
    job.path.accumulate(job.w, panel, tile.codes, job.width, sums);
    if (p.y_sums) {
      job.path.finish_sums(job.w, panel, sums, job.width, tile.zero);
      write_panel(job, index, panel, sums);
      continue;
    }
    if (p.residual)
      job.path.transpose(reinterpret_cast<const uint32_t*>(p.residual + job.first_row(index) * job.w.outputs + panel * PANEL),
                         job.w.outputs, reinterpret_cast<uint32_t*>(residual), job.width, job.rows(index), outputs_of(job, panel));
    const Finish how{tile.scale, tile.zero, p.activation, p.residual ? residual : nullptr, nullptr, nullptr};
    float* out = tile.out ? tile.out + panel * PANEL * job.width : y;
    job.path.finish(job.w, panel, sums, job.width, how, out);
    if (!tile.out) write_panel(job, index, panel, out);
  }
}

void norm_tile(const Job& job, int64_t index, const Tile& tile) {
  if (!tile.out) return;
  const sfk_product& p = job.p;
  job.path.layer_norm(tile.out, job.w.outputs, job.width, job.width, p.norm_gain, p.norm_shift, p.norm_epsilon, nullptr, nullptr);
  for (int64_t panel = 0; panel < job.w.panels; panel++)
    write_panel(job, index, panel, tile.out + panel * PANEL * job.width);
}

size_t staging_bytes(const Job& job) { return static_cast<size_t>(job.width * job.w.quads * 4); }

void whole_tile(void* user, size_t index) {
  Job& job = *static_cast<Job*>(user);
  Parts count(nullptr);
  tile_parts(job, &count);
  void* memory = own_memory(count.used() + staging_bytes(job));
  if (!memory) return job.out_of_memory.store(true);
  Parts parts(memory);
  const Tile tile = tile_parts(job, &parts);
  read_tile(job, static_cast<int64_t>(index), tile, parts.next<uint8_t>(staging_bytes(job)));
  multiply_panels(job, static_cast<int64_t>(index), tile, 0, job.w.panels);
  norm_tile(job, static_cast<int64_t>(index), tile);
}

void shared_read(void* user, size_t index) {
  Job& job = *static_cast<Job*>(user);
  void* staging = own_memory(staging_bytes(job));
  if (!staging) return job.out_of_memory.store(true);
  read_tile(job, static_cast<int64_t>(index), job.shared[index], static_cast<uint8_t*>(staging));
}

void shared_multiply(void* user, size_t task) {
  Job& job = *static_cast<Job*>(user);
  if (job.out_of_memory.load()) return;
  const int64_t index = static_cast<int64_t>(task) / job.parts, part = static_cast<int64_t>(task) % job.parts;
  multiply_panels(job, index, job.shared[index], job.w.panels * part / job.parts, job.w.panels * (part + 1) / job.parts);
}

void shared_norm(void* user, size_t index) {
  Job& job = *static_cast<Job*>(user);
  if (!job.out_of_memory.load()) norm_tile(job, static_cast<int64_t>(index), job.shared[index]);
}

void for_all(const sfk_product& p, void (*task)(void*, size_t), int64_t count, void* user) {
  if (p.parallel && count > 1) return p.parallel(p.pool, task, static_cast<size_t>(count), user);
  for (int64_t i = 0; i < count; i++) task(user, static_cast<size_t>(i));
}

sfk_status check(const sfk_linear* w, const sfk_product* p) {
  if (!w || !p) return fail(SFK_BAD_ARGUMENT, "linear and product must be given");
  if (p->rows < 0) return fail(SFK_BAD_ARGUMENT, "there are %lld rows", static_cast<long long>(p->rows));
  if (!p->x == !p->x_codes) return fail(SFK_BAD_ARGUMENT, "give either x or x_codes");
  if (!p->x_scale != !p->x_zero || (p->x_codes && !p->x_scale))
    return fail(SFK_BAD_ARGUMENT, "x_scale and x_zero go together, and x_codes needs them");
  if ((p->y != nullptr) + (p->y_sums != nullptr) + (p->y_codes != nullptr) != 1)
    return fail(SFK_BAD_ARGUMENT, "give exactly one of y, y_sums and y_codes");
  if (!p->norm_gain != !p->norm_shift) return fail(SFK_BAD_ARGUMENT, "norm_gain and norm_shift go together");
  if (p->y_sums && (p->activation || p->residual || p->norm_gain))
    return fail(SFK_BAD_ARGUMENT, "sums come before activation, residual and norm");
  if (p->activation < SFK_NONE || p->activation > SFK_GELU_TANH) return fail(SFK_BAD_ARGUMENT, "no activation %d", p->activation);
  if (p->y_codes && !(p->y_scale > 0.0f && std::isfinite(p->y_scale))) return fail(SFK_BAD_ARGUMENT, "y_scale must be positive");
  return SFK_OK;
}

}  // namespace

sfk_status sfk_multiply(const sfk_linear* linear, const sfk_product* product) {
  if (sfk_status status = check(linear, product)) return status;
  const Path* path = path_in_use();
  if (!path) return SFK_NO_SUCH_PATH;
  const sfk_product& p = *product;
  if (p.rows == 0) return SFK_OK;
  const int64_t tiles = (p.rows + MAX_WIDTH - 1) / MAX_WIDTH;
  const int64_t threads = p.parallel && p.threads > 1 ? p.threads : 1;
  int64_t parts = threads > 1 && tiles < 2 * threads ? (2 * threads + tiles - 1) / tiles : 1;
  parts = parts < linear->panels ? parts : linear->panels;
  // Tiles of about the same width: 100 rows become 64 + 48 lanes, not 64 + 64.
  const int width = static_cast<int>(((p.rows + tiles - 1) / tiles + PANEL - 1) / PANEL * PANEL);
  Job job{*path, *linear, p, (p.rows + width - 1) / width, parts, width, nullptr};
  if (parts == 1) {
    for_all(p, whole_tile, job.tiles, &job);
  } else {
    Memory memory;  // not the thread's own: the tasks may run in this thread too
    Parts count(nullptr);
    count.next<Tile>(static_cast<size_t>(job.tiles));
    for (int64_t i = 0; i < job.tiles; i++) tile_parts(job, &count);
    void* bytes = memory.take(count.used());
    if (!bytes) return fail(SFK_NO_MEMORY, "no memory for %zu bytes", count.used());
    Parts split(bytes);
    job.shared = split.next<Tile>(static_cast<size_t>(job.tiles));
    for (int64_t i = 0; i < job.tiles; i++) job.shared[i] = tile_parts(job, &split);
    for_all(p, shared_read, job.tiles, &job);
    for_all(p, shared_multiply, job.tiles * parts, &job);
    if (p.norm_gain) for_all(p, shared_norm, job.tiles, &job);
  }
  if (job.out_of_memory.load()) return fail(SFK_NO_MEMORY, "no memory for the activations");
  return SFK_OK;
}
