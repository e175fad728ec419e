// The check of labels that a kernel's caller makes before it: they are too few for a loop of them to cost anything.
#pragma once

#include <stdint.h>

namespace calguide {

// the first row whose label is out of range, or -1
template <class Arguments>
int64_t first_bad_label(const Arguments& arguments) {
  for (int64_t b = 0; b < arguments.batch; ++b) {
    const int64_t label = arguments.labels[b * arguments.label_stride];
    if (label < 0 || label >= arguments.classes) return b;
  }
  return -1;
}

}  // namespace calguide
