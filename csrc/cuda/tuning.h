// Choices that only a measurement can make. tools/gpu_tune.py compiles the kernels with others, times them, and says
// which of these to change; where one is, its comment names the GPU and the file in benchmarks/results that says why.
#pragma once

#include <limits.h>

// longest row of logits that a warp keeps in its registers; a longer one is a block's
#ifndef CALGUIDE_GUIDE_WARP_CLASSES
#define CALGUIDE_GUIDE_WARP_CLASSES 1024
#endif

// above so many rows, several warps share a block; fewer are spread over all multiprocessors
#ifndef CALGUIDE_GUIDE_MANY_ROWS
#define CALGUIDE_GUIDE_MANY_ROWS 2048
#endif

// so many warps
#ifndef CALGUIDE_GUIDE_WARPS
#define CALGUIDE_GUIDE_WARPS 4
#endif

// blocks of them that registers must leave room for on a multiprocessor, 0 for as the compiler sees fit; not in double,
// which would spill
#ifndef CALGUIDE_GUIDE_WARP_BLOCKS
#define CALGUIDE_GUIDE_WARP_BLOCKS 0
#endif

// threads of a block that has a row to itself
#ifndef CALGUIDE_GUIDE_THREADS
#define CALGUIDE_GUIDE_THREADS 256
#endif

// blocks of them that registers must leave room for, not in double either
#ifndef CALGUIDE_GUIDE_BLOCKS
#define CALGUIDE_GUIDE_BLOCKS 1
#endif

// bytes of shared memory that a row may take, as far as the device has them; a longer one is read anew
#ifndef CALGUIDE_GUIDE_SHARED_BYTES
#define CALGUIDE_GUIDE_SHARED_BYTES INT_MAX
#endif

// threads of a block of the step kernels
#ifndef CALGUIDE_STEP_THREADS
#define CALGUIDE_STEP_THREADS 256
#endif

// blocks for each multiprocessor, beyond which a thread takes more than four elements
#ifndef CALGUIDE_STEP_BLOCKS
#define CALGUIDE_STEP_BLOCKS 32
#endif

// fours of elements that a thread takes at most
#ifndef CALGUIDE_STEP_QUADS
#define CALGUIDE_STEP_QUADS 4
#endif

// threads of a block that shares samples out to bins
#ifndef CALGUIDE_DEPOSIT_THREADS
#define CALGUIDE_DEPOSIT_THREADS 1024
#endif

// samples below which blocks need no table of bins of their own: to clear and empty it costs more than it spares
#ifndef CALGUIDE_DEPOSIT_SHARED_SAMPLES
#define CALGUIDE_DEPOSIT_SHARED_SAMPLES 65536
#endif
