#pragma once
#include "slimformer_kernels.h"

// Remembers the sentence that sfk_message() gives to this thread, and returns the status.
__attribute__((format(printf, 2, 3))) sfk_status fail(sfk_status status, const char* format, ...);
