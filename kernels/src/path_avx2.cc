#include <immintrin.h>

#include "path.h"

#pragma GCC target("avx2,fma")
#define WIDE 0
#include "vector_avx2.h"
#include "kernels.inc"

const Path AVX2_PATH = {"avx2", accumulate, finish, finish_sums, grid, quantize, range, quantize_row, range_row,
                        layer_norm, attend, embed, copy, transpose, peak};
