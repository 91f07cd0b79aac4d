// How a call is cut into groups and chunks, and who runs them.
//
// A group has statistics of its own: some channels of one rank (rows.h) or a block of columns of one
// rank (columns.h). Its values are reduced chunk by chunk; chunks depend on the shape alone and are
// merged in order, so the bits do not depend on the number of threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "simd.h"

namespace distbn {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// N samples of C channels of S positions, over V ranks.
struct Problem {
  int64_t samples, channels, positions, ranks;
  bool interleaved;

  int64_t size() const { return samples * channels * positions; }
};

// The samples of a rank: first, first + step, ...
struct Share {
  int64_t first, step, count;

  Share(const Problem& p, int64_t rank) {
    const int64_t q = p.samples / p.ranks, r = p.samples % p.ranks;
    count = q + (rank < r);
    first = p.interleaved ? rank : rank * q + std::min(rank, r);
    step = p.interleaved ? p.ranks : 1;
  }
};

// A part of a group: [begin, end) of each of the runs [first_run, last_run).
struct Chunk {
  int64_t first_run, last_run, begin, end;

  int64_t size() const { return (last_run - first_run) * (end - begin); }
};

// Runs of one length go several to a chunk if they are short, or several chunks to a run.
struct Cut {
  int64_t length, pieces, runs_per_chunk;

  Cut(int64_t length, int64_t target)
      : length(length),
        pieces(std::max<int64_t>(1, ceil_div(length, target))),
        runs_per_chunk(std::max<int64_t>(1, target / std::max<int64_t>(1, length))) {}
};

struct Chunks {
  int64_t runs;
  Cut cut;

  Chunks(int64_t runs, const Cut& cut) : runs(runs), cut(cut) {}

  double size() const { return double(runs) * double(cut.length); }

  int64_t count() const {
    if (size() == 0) return 0;
    return ceil_div(runs, cut.runs_per_chunk) * cut.pieces;
  }

  Chunk operator[](int64_t index) const {
    const int64_t run = index / cut.pieces * cut.runs_per_chunk, piece = index % cut.pieces;
    return {run, std::min(run + cut.runs_per_chunk, runs), cut.length * piece / cut.pieces,
            cut.length * (piece + 1) / cut.pieces};
  }
};

// Below this many values a second thread costs more than it saves.
constexpr int64_t kSerialSize = 32768;
// Values that one thread takes at a time.
constexpr int64_t kBatchSize = 16384;
// Values of one wave in a split reduction: they should still be in the cache when they are applied.
constexpr int64_t kWaveSize = int64_t(1) << 21;

// From this size on an output is written past the caches: it would not stay in them, and a line need
// not be read before it is written.
constexpr int64_t kStreamBytes = int64_t(1) << 24;

template <class T>
bool streams(const Problem& p) {
  return p.size() * int64_t(sizeof(T)) >= kStreamBytes;
}

// Calls work(begin, end) over [0, count), `batch` at a time, by whichever thread is free.
template <class Work>
void share_out(int64_t count, int64_t batch, bool parallel, const Work& work) {
  const int64_t workers = std::min<int64_t>(torch::stable::get_num_threads(), ceil_div(count, batch));
  if (!parallel || workers < 2) {
    work(int64_t(0), count);
    fence();
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    for (int64_t begin; (begin = next.fetch_add(batch)) < count;) {
      work(begin, std::min(begin + batch, count));
    }
    fence();
  });
}

// Runs a kernel of these members over its groups:
//   groups, max_chunks, partial_size (doubles), coefficient_size (values of type A), problem,
//   work_size (doubles, scratch memory of one thread)
//   group(index) -> Group, which has chunks
//   reduce(Group, Chunk, double* partial, double* work)
//   finish(Group, const double* partials, A* coefficients, double* work)
//   apply(Group, Chunk, const A* coefficients)
template <class Kernel>
class Runner {
  using A = typename Kernel::A;

 public:
  explicit Runner(const Kernel& kernel) : k_(kernel) {}

  void run() const {
    const bool parallel = k_.problem.size() >= kSerialSize;
    const int64_t workers = parallel ? torch::stable::get_num_threads() : 1;
    const int64_t rounds = ceil_div(k_.groups, workers);
    const bool balanced = rounds * workers * 8 <= k_.groups * 9;
    if (workers == 1 || balanced) {
      run_groups(parallel);
    } else {
      run_split();
    }
  }

 private:
  const Kernel& k_;

  int64_t group_size() const { return std::max<int64_t>(1, k_.problem.size() / k_.groups); }

  void run_groups(bool parallel) const {
    const int64_t batch = std::max<int64_t>(1, kBatchSize / group_size());
    share_out(k_.groups, batch, parallel, [&](int64_t begin, int64_t end) {
      std::vector<double> partials(k_.max_chunks * k_.partial_size);
      std::vector<A> coefficients(k_.coefficient_size);
      std::vector<double> work(k_.work_size);
      for (int64_t index = begin; index < end; ++index) {
        const auto group = k_.group(index);
        const int64_t count = group.chunks.count();
        for (int64_t i = 0; i < count; ++i) {
          k_.reduce(group, group.chunks[i], &partials[i * k_.partial_size], work.data());
        }
        k_.finish(group, partials.data(), coefficients.data(), work.data());
        for (int64_t i = count; i-- > 0;) {  // backwards: the last chunk is still in the cache
          k_.apply(group, group.chunks[i], coefficients.data());
        }
      }
    });
  }

  void run_split() const {
    const int64_t wave = std::clamp<int64_t>(kWaveSize / group_size(), 1, k_.groups);
    const int64_t stride = k_.max_chunks * k_.partial_size;
    std::vector<double> partials(wave * stride);
    std::vector<A> coefficients(wave * k_.coefficient_size);
    for (int64_t first = 0; first < k_.groups; first += wave) {
      const int64_t count = std::min(wave, k_.groups - first);
      each_chunk(first, count, [&](int64_t g, int64_t i, const auto& group) {
        std::vector<double> work(k_.work_size);
        k_.reduce(group, group.chunks[i], &partials[g * stride + i * k_.partial_size], work.data());
      });
      std::vector<double> work(k_.work_size);
      for (int64_t g = 0; g < count; ++g) {
        k_.finish(k_.group(first + g), &partials[g * stride],
                  &coefficients[g * k_.coefficient_size], work.data());
      }
      each_chunk(first, count, [&](int64_t g, int64_t i, const auto& group) {
        k_.apply(group, group.chunks[i], &coefficients[g * k_.coefficient_size]);
      });
    }
  }

  template <class Work>
  void each_chunk(int64_t first, int64_t count, const Work& work) const {
    const int64_t max = k_.max_chunks;
    share_out(count * max, 1, true, [&](int64_t begin, int64_t end) {
      for (int64_t index = begin; index < end; ++index) {
        const auto group = k_.group(first + index / max);
        if (index % max < group.chunks.count()) work(index / max, index % max, group);
      }
    });
  }
};

}  // namespace distbn
