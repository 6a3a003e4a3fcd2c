#include <immintrin.h>

#include "path.h"

#pragma GCC target("avx2,fma,avxvnni")
#define WIDE 0
#define HAVE_VNNI
#define DOT _mm256_dpbusd_avx_epi32
#include "vector_avx2.h"
#include "kernels.inc"

const Path AVXVNNI_PATH = {"avxvnni", accumulate, finish, finish_sums, grid, quantize, range, quantize_row, range_row,
                           layer_norm, attend, embed, copy, transpose, peak};
