#include <immintrin.h>

#include "path.h"

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")
#define WIDE 1
#include "vector_avx512.h"
#include "kernels.inc"

const Path AVX512VNNI_PATH = {"avx512vnni", accumulate, finish, finish_sums, grid, quantize, range, quantize_row, range_row,
                              layer_norm, attend, embed, copy, transpose, peak};
