// AVX-512's dot product on 8 lanes. Never chosen by itself: it is the code of the AVX-VNNI path, testable where that one cannot run.
#include <immintrin.h>

#include "path.h"

#pragma GCC target("avx2,fma,avx512f,avx512vl,avx512vnni")
#define WIDE 0
#define HAVE_VNNI
#define DOT _mm256_dpbusd_epi32
#include "vector_avx2.h"
#include "kernels.inc"

const Path AVX512VNNI256_PATH = {"avx512vnni256", accumulate, finish, finish_sums, grid, quantize, range, quantize_row, range_row,
                                 layer_norm, attend, embed, copy, transpose, peak};
