// From sums to statistics: what the two layouts share, per rank and channel, in double.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "simd.h"

namespace distbn {

using torch::headeronly::ScalarType;

// A small tensor of any dtype, or none: weight, bias, running statistics, counters.
struct Values {
  void* data = nullptr;
  ScalarType dtype = ScalarType::Float;
  int64_t row_stride = 0, stride = 0;

  explicit operator bool() const { return data != nullptr; }

  // Reads `count` values of a row; `absent` where there is no tensor.
  NOINLINE void load(int64_t row, int64_t first, int64_t count, double* out,
                     double absent = 0) const {
    if (!data) {
      std::fill_n(out, count, absent);
      return;
    }
    visit([&](auto* values) {
      values += row * row_stride + first * stride;
      with_step(stride, [=](auto step) INLINE_LAMBDA {
        for (int64_t i = 0; i < count; ++i) out[i] = double(values[i * step]);
      });
    });
  }

  NOINLINE void store(int64_t row, int64_t first, int64_t count, const double* in) const {
    visit([&](auto* values) {
      using T = std::remove_pointer_t<decltype(values)>;
      values += row * row_stride + first * stride;
      with_step(stride, [=](auto step) INLINE_LAMBDA {
        for (int64_t i = 0; i < count; ++i) values[i * step] = T(Acc<T>(in[i]));
      });
    });
  }

 private:
  template <class Work>
  INLINE void visit(const Work& work) const {
    switch (dtype) {
      case ScalarType::Double: return work(static_cast<double*>(data));
      case ScalarType::Float: return work(static_cast<float*>(data));
      case ScalarType::BFloat16: return work(static_cast<BFloat16*>(data));
      case ScalarType::Half: return work(static_cast<Half*>(data));
      default: return work(static_cast<int64_t*>(data));  // counters
    }
  }
};

// Calls work(step), with a constant where it is 1, so that the compiler makes vectors of a loop.
template <class Work>
INLINE void with_step(int64_t step, const Work& work) {
  if (step == 1) {
    work(std::integral_constant<int64_t, 1>());
  } else {
    work(step);
  }
}

// Rounding may leave a tiny negative sum of squares; a NaN stays.
inline double not_negative(double value) { return value < 0 ? 0 : value; }

// Merges the moments (mean, sum of squared deviations) of `count` other values of each channel
// into those of the `merged` before; the other moments are `step` apart: Chan, Golub and LeVeque (1979).
inline void merge_moments(int64_t channels, double merged, double* mean, double* m2, double count,
                          const double* other_mean, const double* other_m2, int64_t step) {
  const double part = count / (merged + count);
  const auto merge = [=](auto step) INLINE_LAMBDA {
    for (int64_t i = 0; i < channels; ++i) {
      const double delta = other_mean[i * step] - mean[i];
      mean[i] += delta * part;
      m2[i] += other_m2[i * step] + delta * delta * merged * part;
    }
  };
  with_step(step, merge);
}

// Channels that are worked on at a time, in arrays on the stack.
constexpr int64_t kStrip = 64;

struct ForwardStatistics {
  Values mean, rstd, weight, bias, running_mean, running_var, counters;
  double momentum, eps;  // momentum counts only without counters (cumulative average)

  // From the moments of `count` values of n channels of a rank: writes their statistics, and the
  // coefficients of y = (x - mean) * scale + shift, in that order, in rows `width` apart.
  template <class A>
  NOINLINE void finish(int64_t rank, int64_t first, int64_t n, double count, const double* m,
                       const double* m2, A* coefficients, int64_t width) const {
    for (int64_t i = 0; i < n; i += kStrip) {
      strip(rank, first + i, std::min(kStrip, n - i), count, m + i, m2 + i, coefficients + i,
            width);
    }
  }

 private:
  template <class A>
  INLINE void strip(int64_t rank, int64_t first, int64_t n, double count, const double* m,
             const double* m2, A* coefficients, int64_t width) const {
    double r[kStrip], scale[kStrip], shift[kStrip];
    const double part = count > 0 ? 1 / count : 0;
    // Roots and quotients in double take four times as long, for digits that are not kept.
    for (int64_t i = 0; i < n; ++i) r[i] = double(A(1) / std::sqrt(A(m2[i] * part + eps)));
    mean.store(rank, first, n, m);
    rstd.store(rank, first, n, r);
    weight.load(0, first, n, scale, 1);
    bias.load(0, first, n, shift);
    for (int64_t i = 0; i < n; ++i) {
      const A rounded = A(m[i]);
      scale[i] *= r[i];
      coefficients[i] = rounded;
      coefficients[width + i] = A(scale[i]);
      // With what rounding took from the mean, which may be much beside a small deviation.
      coefficients[2 * width + i] = A(shift[i] - (m[i] - double(rounded)) * scale[i]);
    }
    if (!running_mean || count == 0) return;
    double factor = momentum;
    if (counters) {
      counters.load(0, rank, 1, &factor);
      factor = 1 / factor;
    }
    average(running_mean, rank, first, n, m, factor, factor);
    average(running_var, rank, first, n, m2, factor, factor / (count > 1 ? count - 1 : 1));
  }

  static INLINE void average(const Values& running, int64_t rank, int64_t first, int64_t n,
                      const double* batch, double factor, double batch_factor) {
    double values[kStrip];
    running.load(rank, first, n, values);
    for (int64_t i = 0; i < n; ++i) values[i] = values[i] * (1 - factor) + batch[i] * batch_factor;
    running.store(rank, first, n, values);
  }
};

struct BackwardStatistics {
  Values mean, rstd, weight;
  double* grad_weight;  // [V, C], summed over the ranks by the caller
  double* grad_bias;
  int64_t channels;

  // From the sums of dy and of dy * (x - mean) over `count` values: the four coefficients of
  // dx = (x - mean) * slope + dy * scale + offset, in the order mean, scale, slope, offset.
  template <class A>
  NOINLINE void finish(int64_t rank, int64_t first, int64_t n, double count, const double* sum_dy,
                       const double* sum_dy_x, A* coefficients, int64_t width) const {
    for (int64_t i = 0; i < n; i += kStrip) {
      strip(rank, first + i, std::min(kStrip, n - i), count, sum_dy + i, sum_dy_x + i,
            coefficients + i, width);
    }
  }

 private:
  template <class A>
  INLINE void strip(int64_t rank, int64_t first, int64_t n, double count, const double* sum_dy,
             const double* sum_dy_x, A* coefficients, int64_t width) const {
    double m[kStrip], r[kStrip], scale[kStrip], dw[kStrip];
    mean.load(rank, first, n, m);
    rstd.load(rank, first, n, r);
    weight.load(0, first, n, scale, 1);
    const double part = count > 0 ? 1 / count : 0;
    for (int64_t i = 0; i < n; ++i) {  // on the stack alone, so that it becomes vectors
      dw[i] = sum_dy_x[i] * r[i];
      scale[i] *= r[i];
    }
    std::copy_n(dw, n, grad_weight + rank * channels + first);
    std::copy_n(sum_dy, n, grad_bias + rank * channels + first);
    A* const rows[] = {coefficients, coefficients + width, coefficients + 2 * width,
                       coefficients + 3 * width};
    for (int64_t i = 0; i < n; ++i) rows[0][i] = A(m[i]);
    for (int64_t i = 0; i < n; ++i) rows[1][i] = A(scale[i]);
    for (int64_t i = 0; i < n; ++i) rows[2][i] = A(-scale[i] * r[i] * dw[i] * part);
    for (int64_t i = 0; i < n; ++i) rows[3][i] = A(-scale[i] * sum_dy[i] * part);
  }
};

}  // namespace distbn
