// How threads read a row of logits and write its gradient: sixteen bytes at a time wherever it lies so.
#pragma once

#include <math.h>

#include "arguments.h"
#include "cuda/group.h"
#include "storage.h"

namespace calguide {

// stands for the label and for places beyond the row: like a masked class, it adds nothing
constexpr float absent = -INFINITY;

// sixteen bytes of a row at a time
template <class T>
constexpr int chunk = 16 / sizeof(T);

template <class T>
struct alignas(16) Pack {
  T values[chunk<T>];
};

// where in the chunk that begins at `first` the label is, else none of its places
template <class T>
CALGUIDE_DEVICE int place_in_chunk(int64_t label, int64_t first) {
  return label >= first && label < first + chunk<T> ? static_cast<int>(label - first) : chunk<T>;
}

// One row of the logits, without its label. Chunks lie on boundaries of sixteen bytes where classes are neighbours, so
// that the first of them may begin before the row, by `lead` places.
template <class T>
struct Source {
  const T* logits;
  int64_t stride, classes, label;
  int lead;
  bool vector;

  // capacity: places that a row has room for
  CALGUIDE_MEMBER Source(const LogitsArguments& a, int64_t b, int64_t label, int64_t capacity)
      : logits(static_cast<const T*>(a.logits) + b * a.row_stride),
        stride(a.class_stride),
        classes(a.classes),
        label(label),
        lead(static_cast<int>(reinterpret_cast<uintptr_t>(logits) / sizeof(T) % chunk<T>)),
        vector(stride == 1 && classes + lead <= capacity) {
    if (!vector) lead = 0;
  }

  CALGUIDE_MEMBER bool whole(int64_t first) const { return first >= 0 && first + chunk<T> <= classes; }

  // A chunk as it is in memory; zeros unless all of it is read at once.
  CALGUIDE_MEMBER Pack<T> fetch(int64_t first) const {
    Pack<T> pack = {};
    if (vector && whole(first)) pack = *reinterpret_cast<const Pack<T>*>(logits + first);
    return pack;
  }

  // What fetch has left, and all in float: the other classes, and what they and the label show of the row.
  CALGUIDE_MEMBER void read(Pack<T>& pack, int64_t first, float (&x)[chunk<T>], float& max, float& finite_probe) const {
    unsigned others = ~0u;
    if (!vector || !whole(first)) {
      others = 0;
#pragma unroll
      for (int j = 0; j < chunk<T>; ++j) {
        if (first + j < 0 || first + j >= classes) continue;
        pack.values[j] = logits[(first + j) * stride];
        others |= 1u << j;
      }
    }
    others &= ~(1u << place_in_chunk<T>(label, first));
#pragma unroll
    for (int j = 0; j < chunk<T>; ++j) {
      const float value = load_float(pack.values[j]);
      // NaN from here on if a logit is not finite
      finite_probe += value * 0.0f;
      x[j] = (others >> j & 1u) != 0 ? value : absent;
      max = x[j] > max ? x[j] : max;
    }
  }

  // Calls body(first, x) for every chunk of a thread, so many of them on their way from memory at once.
  template <int AT_ONCE, class Body>
  CALGUIDE_MEMBER void each(int64_t begin, int64_t step, float& max, float& finite_probe, const Body& body) const {
    for (int64_t first = begin; first < classes; first += AT_ONCE * step) {
      Pack<T> packs[AT_ONCE];
#pragma unroll
      for (int k = 0; k < AT_ONCE; ++k) packs[k] = fetch(first + k * step);
#pragma unroll
      for (int k = 0; k < AT_ONCE; ++k) {
        float x[chunk<T>];
        read(packs[k], first + k * step, x, max, finite_probe);
        body(first + k * step, x);
      }
    }
  }
};

// Where a thread keeps its chunks of a row: each(body) calls body(first class, the chunk's logits) for every one of
// them. Sum is what it adds a row's terms up in: float where it has few of them. A row also knows the largest of the
// thread's logits, and whether all are finite.

template <class T, class Group, int LENGTH>
struct RegisterRow {
  template <class Real>
  using Sum = Real;
  static constexpr int64_t capacity = LENGTH, step = chunk<T> * Group::size;
  static constexpr int chunks = LENGTH / step;
  float x[chunks][chunk<T>];
  int64_t begin;
  float max = absent, finite_probe = 0.0f;

  CALGUIDE_MEMBER RegisterRow(const Source<T>& source, const Group& group, float*)
      : begin(group.rank() * chunk<T> - source.lead) {
    Pack<T> packs[chunks];
#pragma unroll
    for (int c = 0; c < chunks; ++c) packs[c] = source.fetch(begin + c * step);
#pragma unroll
    for (int c = 0; c < chunks; ++c) source.read(packs[c], begin + c * step, x[c], max, finite_probe);
  }

  template <class Body>
  CALGUIDE_MEMBER void each(const Body& body) const {
#pragma unroll
    for (int c = 0; c < chunks; ++c) body(begin + c * step, x[c]);
  }
};

// A thread reads back only what it wrote itself, so that this needs no barrier; sixteen bytes at a time, those of
// neighbouring threads side by side.
template <class T, class Group>
struct SharedRow {
  template <class>
  using Sum = double;
  static constexpr int64_t capacity = INT64_MAX, step = chunk<T> * Group::size;
  static constexpr int packs = chunk<T> / 4, at_once = 4;
  Pack<float>* own;
  int64_t begin, classes;
  float max = absent, finite_probe = 0.0f;

  // shared memory that a row of so many classes takes, wherever its first chunk begins
  static int64_t bytes(int64_t classes) {
    const int64_t round = at_once * step;
    return (classes + chunk<T> - 1 + round - 1) / round * round * sizeof(float);
  }

  CALGUIDE_MEMBER SharedRow(const Source<T>& source, const Group& group, float* shared)
      : own(reinterpret_cast<Pack<float>*>(shared) + group.rank()),
        begin(group.rank() * chunk<T> - source.lead),
        classes(source.classes) {
    Pack<float>* to = own;
    source.template each<at_once>(begin, step, max, finite_probe, [&](int64_t, const float (&x)[chunk<T>]) {
#pragma unroll
      for (int k = 0; k < packs; ++k, to += Group::size) *to = {x[4 * k], x[4 * k + 1], x[4 * k + 2], x[4 * k + 3]};
    });
  }

  template <class Body>
  CALGUIDE_MEMBER void each(const Body& body) const {
    const Pack<float>* from = own;
    for (int64_t first = begin; first < classes; first += step) {
      float x[chunk<T>];
#pragma unroll
      for (int k = 0; k < packs; ++k, from += Group::size) {
        const Pack<float> pack = *from;
#pragma unroll
        for (int j = 0; j < 4; ++j) x[4 * k + j] = pack.values[j];
      }
      body(first, x);
    }
  }
};

template <class T, class Group>
struct GlobalRow {
  template <class>
  using Sum = double;
  static constexpr int64_t capacity = INT64_MAX, step = chunk<T> * Group::size;
  static constexpr int at_once = 2;
  const Source<T>& source;
  int64_t begin;
  float max = absent, finite_probe = 0.0f;

  CALGUIDE_MEMBER GlobalRow(const Source<T>& source, const Group& group, float*)
      : source(source), begin(group.rank() * chunk<T> - source.lead) {
    source.template each<at_once>(begin, step, max, finite_probe, [](int64_t, const float (&)[chunk<T>]) {});
  }

  template <class Body>
  CALGUIDE_MEMBER void each(const Body& body) const {
    float seen = absent, probed = 0.0f;
    source.template each<at_once>(begin, step, seen, probed, body);
  }
};

// a chunk of the gradient, sixteen bytes at once where it lies so
template <class T>
CALGUIDE_DEVICE void store_chunk(T* grad, int64_t first, int64_t classes, const float (&g)[chunk<T>]) {
  if (first >= 0 && first + chunk<T> <= classes && reinterpret_cast<uintptr_t>(grad + first) % 16 == 0) {
    Pack<T> pack;
#pragma unroll
    for (int j = 0; j < chunk<T>; ++j) store_float(pack.values + j, g[j]);
    *reinterpret_cast<Pack<T>*>(grad + first) = pack;
  } else {
#pragma unroll
    for (int j = 0; j < chunk<T>; ++j) {
      if (first + j >= 0 && first + j < classes) store_float(grad + first + j, g[j]);
    }
  }
}

}  // namespace calguide
