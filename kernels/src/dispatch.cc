// Which processor path runs: chosen once, by cpuid or by SLIMFORMER_KERNELS_PATH.
#include <atomic>
#include <chrono>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "path.h"
#include "status.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__)
#include <sys/auxv.h>
#endif

namespace {

thread_local char message[256] = "";
std::atomic<const Path*> in_use{nullptr};

#if defined(__x86_64__)
// GCC 12's __builtin_cpu_supports knows no AVX-VNNI: leaf 7, subleaf 1, bit 4 of eax.
bool has_avxvnni() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __builtin_cpu_supports("avx2") && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}

bool runs(const Path& path) {
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (&path == &AVX2_PATH) return avx2;
  if (&path == &AVXVNNI_PATH) return avx2 && has_avxvnni();
  if (&path == &AVX512VNNI_PATH || &path == &AVX512VNNI256_PATH)
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
  return true;
}
const Path* const PATHS[] = {&AVX512VNNI_PATH, &AVXVNNI_PATH, &AVX2_PATH, &SCALAR_PATH, &AVX512VNNI256_PATH};  // the best first
#elif defined(__aarch64__)
bool runs(const Path& path) { return &path != &NEON_PATH || (getauxval(AT_HWCAP) >> 20 & 1); }  // HWCAP_ASIMDDP
const Path* const PATHS[] = {&NEON_PATH, &SCALAR_PATH};
#else
bool runs(const Path&) { return true; }
const Path* const PATHS[] = {&SCALAR_PATH};
#endif

const Path* find(const char* name) {
  for (const Path* path : PATHS) {
    if (name && std::strcmp(name, path->name) != 0) continue;
    if (runs(*path)) return path;
    if (name) {
      fail(SFK_NO_SUCH_PATH, "this processor cannot run the path '%s'", name);
      return nullptr;
    }
  }
  fail(SFK_NO_SUCH_PATH, "there is no path '%.40s' for this kind of processor", name);
  return nullptr;
}

double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

}  // namespace

sfk_status fail(sfk_status status, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  return status;
}

const Path* path_in_use() {
  const Path* path = in_use.load(std::memory_order_acquire);
  if (!path) {
    const char* name = std::getenv("SLIMFORMER_KERNELS_PATH");
    path = find(name && *name ? name : nullptr);
    if (path) in_use.store(path, std::memory_order_release);
  }
  return path;
}

extern "C" {

int sfk_interface(void) { return SFK_INTERFACE; }
const char* sfk_version(void) { return SFK_VERSION; }
const char* sfk_message(void) { return message; }

const char* sfk_path(void) {
  const Path* path = path_in_use();
  return path ? path->name : nullptr;
}

sfk_status sfk_set_path(const char* name) {
  const Path* path = find(name);
  if (!path) return SFK_NO_SUCH_PATH;
  in_use.store(path, std::memory_order_release);
  return SFK_OK;
}

double sfk_peak_operations(void) {
  const Path* path = path_in_use();
  if (!path) return 0.0;
  double best = 0.0;
  for (int i = 0; i < 20; i++) {
    double start = seconds();
    double operations = path->peak(200000);
    double speed = operations / (seconds() - start);
    best = speed > best ? speed : best;
  }
  return best;
}

double sfk_peak_bytes(size_t buffer_bytes) {
  std::unique_ptr<uint64_t[]> words(new (std::nothrow) uint64_t[buffer_bytes / 8 + 1]());
  if (!words) return 0.0;
  double best = 0.0;
  for (int i = 0; i < 10; i++) {
    uint64_t sums[8] = {};
    double start = seconds();
    for (size_t j = 0; j + 8 <= buffer_bytes / 8; j += 8)
      for (int lane = 0; lane < 8; lane++) sums[lane] ^= words[j + lane];
    asm volatile("" : : "m"(sums));
    double speed = static_cast<double>(buffer_bytes) / (seconds() - start);
    best = speed > best ? speed : best;
  }
  return best;
}
}
