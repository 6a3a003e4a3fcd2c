#pragma GCC target("arch=armv8.2-a+dotprod")
#include <arm_neon.h>

#include "path.h"

#define WIDE 0
#define REGISTER "w"
#include "vector_neon.h"
#include "kernels.inc"

const Path NEON_PATH = {"neon", accumulate, finish, finish_sums, grid, quantize, range, quantize_row, range_row,
                        layer_norm, attend, embed, copy, transpose, peak};
