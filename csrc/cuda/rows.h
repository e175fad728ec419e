// How threads read a row of logits and write its gradient: sixteen bytes at a time wherever it lies so.
#pragma once

#include <math.h>

#include <type_traits>

#include "arguments.h"
#include "cuda/group.h"
#include "storage.h"

namespace calguide {

// stands for the label and for places beyond the row: like a masked class, it adds nothing
constexpr float absent = -INFINITY;

// Logits below 2^97 are tame: no difference of two is beyond the range of a distance. More than that, or all of a row
// together, times this is infinite.
constexpr float tame_scale = 0x1p31f;
CALGUIDE_DEVICE bool tame(float probe) { return fabsf(probe) < INFINITY; }

// sixteen bytes of a row at a time
template <class T>
constexpr int chunk = 16 / sizeof(T);

template <class T>
struct alignas(16) Pack {
  T values[chunk<T>];
};

// whether 0 <= i < end, in one comparison
template <class Index>
CALGUIDE_DEVICE bool within(Index i, Index end) {
  using Unsigned = std::make_unsigned_t<Index>;
  return static_cast<Unsigned>(i) < static_cast<Unsigned>(end);
}

// where in the chunk that begins at `first` the label is, else none of its places
template <class T, class Index>
CALGUIDE_DEVICE int place_in_chunk(Index label, Index first) {
  return within<Index>(label - first, chunk<T>) ? static_cast<int>(label - first) : chunk<T>;
}

// One row of the logits, without its label. Chunks lie on boundaries of sixteen bytes where classes are neighbours, so
// that the first of them may begin before the row, by `lead` places. Index counts the places of a row.
template <class T, class Index = int64_t>
struct Source {
  const T* logits;
  int64_t stride;
  Index classes, label;
  int lead;
  Index whole_end;  // the chunks that begin before it, in the row, are read at once

  // capacity: places that a row has room for
  CALGUIDE_MEMBER Source(const LogitsArguments& a, int64_t b, int64_t label, Index capacity)
      : logits(static_cast<const T*>(a.logits) + b * a.row_stride),
        stride(a.class_stride),
        classes(static_cast<Index>(a.classes)),
        label(static_cast<Index>(label)),
        lead(static_cast<int>(reinterpret_cast<uintptr_t>(logits) / sizeof(T) % chunk<T>)) {
    const bool vector = stride == 1 && classes <= capacity - lead;
    whole_end = vector && classes >= chunk<T> ? classes - chunk<T> + 1 : 0;
    if (!vector) lead = 0;
  }

  // A chunk as it is in memory; zeros unless all of it is read at once.
  CALGUIDE_MEMBER Pack<T> fetch(Index first) const {
    Pack<T> pack = {};
    if (within(first, whole_end)) pack = *reinterpret_cast<const Pack<T>*>(logits + first);
    return pack;
  }

  // What fetch has left, and all in float: the other classes, and what they and the label show of the row.
  CALGUIDE_MEMBER void read(const Pack<T>& pack, Index first, float (&x)[chunk<T>], float& max, float& probe) const {
    if (within(first, whole_end)) {
#pragma unroll
      for (int j = 0; j < chunk<T>; ++j) x[j] = probed(pack.values[j], probe);
    } else {
#pragma unroll
      for (int j = 0; j < chunk<T>; ++j) x[j] = absent;
      if (first < classes) {
#pragma unroll
        for (int j = 0; j < chunk<T>; ++j) {
          if (within<Index>(first + j, classes)) x[j] = probed(logits[(first + j) * stride], probe);
        }
      }
    }
    const int own = place_in_chunk<T, Index>(label, first);
    if (own < chunk<T>) {
#pragma unroll
      for (int j = 0; j < chunk<T>; ++j) x[j] = j == own ? absent : x[j];
    }
#pragma unroll
    for (int j = 0; j < chunk<T>; ++j) max = fmaxf(max, x[j]);
  }

  // Calls body(first, x) for every chunk of a thread, so many of them on their way from memory at once.
  template <int AT_ONCE, class Body>
  CALGUIDE_MEMBER void each(Index begin, Index step, float& max, float& probe, const Body& body) const {
    for (Index first = begin; first < classes; first += AT_ONCE * step) {
      Pack<T> packs[AT_ONCE];
#pragma unroll
      for (int k = 0; k < AT_ONCE; ++k) packs[k] = fetch(first + k * step);
#pragma unroll
      for (int k = 0; k < AT_ONCE; ++k) {
        float x[chunk<T>];
        read(packs[k], first + k * step, x, max, probe);
        body(first + k * step, x);
      }
    }
  }

 private:
  // a logit, after which the probe is infinite or NaN for good if it is so large, or is NaN
  CALGUIDE_MEMBER static float probed(T stored, float& probe) {
    const float value = load_float(stored);
    probe += value * tame_scale;
    return value;
  }
};

// Where a thread keeps its chunks of a row: each(body) calls body(first class, the chunk's logits) for every one of
// them. Sum is what it adds a row's terms up in: float where it has few of them. A row also knows the largest of the
// thread's logits, whether all are tame, and whether a class is in one of its chunks. Between passes it keeps a number
// of each class where it has registers for it: body(first class, logits, c) finds its own in Kept::of[c].

// Whether a thread whose chunks begin at `begin` and whole steps from there has class i in one of them.
template <class T, class Index>
CALGUIDE_DEVICE bool in_chunks(Index i, Index begin, Index step) {
  return i >= begin && (i - begin) % step < chunk<T>;
}

template <class T, class Group, int LENGTH>
struct RegisterRow {
  template <class Real>
  using Sum = Real;
  using Index = int;
  static constexpr int capacity = LENGTH, step = chunk<T> * Group::size, chunks = LENGTH / step;
  static constexpr bool keeps = true;
  template <class Real>
  struct Kept {
    Real of[chunks][chunk<T>];
  };
  float x[chunks][chunk<T>];
  int begin;
  float max = absent, probe = 0.0f;

  CALGUIDE_MEMBER RegisterRow(const Source<T, int>& source, const Group& group, float*)
      : begin(group.rank() * chunk<T> - source.lead) {
    Pack<T> packs[chunks];
#pragma unroll
    for (int c = 0; c < chunks; ++c) packs[c] = source.fetch(begin + c * step);
#pragma unroll
    for (int c = 0; c < chunks; ++c) source.read(packs[c], begin + c * step, x[c], max, probe);
  }

  template <class Body>
  CALGUIDE_MEMBER void each(const Body& body) const {
#pragma unroll
    for (int c = 0; c < chunks; ++c) body(begin + c * step, x[c], c);
  }

  CALGUIDE_MEMBER bool holds(Index i) const { return in_chunks<T>(i, begin, step); }
};

// A thread reads back only what it wrote itself, so that this needs no barrier; sixteen bytes at a time, those of
// neighbouring threads side by side.
template <class T, class Group>
struct SharedRow {
  template <class>
  using Sum = double;
  using Index = int64_t;
  static constexpr bool keeps = false;
  template <class Real>
  struct Kept {
    Real of[1][chunk<T>];
  };
  static constexpr int64_t capacity = INT64_MAX, step = chunk<T> * Group::size;
  static constexpr int packs = chunk<T> / 4, at_once = 4;
  Pack<float>* own;
  int64_t begin, classes;
  float max = absent, probe = 0.0f;

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
    source.template each<at_once>(begin, step, max, probe, [&](int64_t, const float (&x)[chunk<T>]) {
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
      body(first, x, 0);
    }
  }

  CALGUIDE_MEMBER bool holds(Index i) const { return in_chunks<T>(i, begin, step); }
};

template <class T, class Group>
struct GlobalRow {
  template <class>
  using Sum = double;
  using Index = int64_t;
  static constexpr bool keeps = false;
  template <class Real>
  struct Kept {
    Real of[1][chunk<T>];
  };
  static constexpr int64_t capacity = INT64_MAX, step = chunk<T> * Group::size;
  static constexpr int at_once = 2;
  const Source<T>& source;
  int64_t begin;
  float max = absent, probe = 0.0f;

  CALGUIDE_MEMBER GlobalRow(const Source<T>& source, const Group& group, float*)
      : source(source), begin(group.rank() * chunk<T> - source.lead) {
    source.template each<at_once>(begin, step, max, probe, [](int64_t, const float (&)[chunk<T>]) {});
  }

  template <class Body>
  CALGUIDE_MEMBER void each(const Body& body) const {
    float seen = absent, probed = 0.0f;
    source.template each<at_once>(begin, step, seen, probed,
                                  [&](Index first, const float (&x)[chunk<T>]) { body(first, x, 0); });
  }

  CALGUIDE_MEMBER bool holds(Index i) const { return in_chunks<T>(i, begin, step); }
};

// a row of the gradient, written by the chunks that begin at `begin` and whole steps of sixteen bytes from there
template <class T, class Index>
struct Target {
  T* grad;
  Index classes;
  Index whole_end;  // the chunks that begin before it, in the row, are written at once

  CALGUIDE_MEMBER Target(T* grad, Index begin, Index classes) : grad(grad), classes(classes) {
    const bool aligned = reinterpret_cast<uintptr_t>(grad + begin) % sizeof(Pack<T>) == 0;
    whole_end = aligned && classes >= chunk<T> ? classes - chunk<T> + 1 : 0;
  }

  CALGUIDE_MEMBER void store(Index first, const float (&g)[chunk<T>]) const {
    if (within(first, whole_end)) {
      Pack<T> pack;
#pragma unroll
      for (int j = 0; j < chunk<T>; ++j) store_float(pack.values + j, g[j]);
      // told as one store, which the compiler would take apart to share parts of it with those below
      uint4 bits;
      memcpy(&bits, &pack, sizeof bits);
      __stwb(reinterpret_cast<uint4*>(grad + first), bits);
    } else if (first < classes) {
#pragma unroll
      for (int j = 0; j < chunk<T>; ++j) {
        if (within<Index>(first + j, classes)) store_float(grad + first + j, g[j]);
      }
    }
  }
};

}  // namespace calguide
