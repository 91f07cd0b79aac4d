// From sums to statistics: what the two layouts share, per rank and channel, in double.
#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstdint>

namespace distbn {

using torch::headeronly::ScalarType;

// A small tensor of any dtype, or none: weight, bias, running statistics, counters.
struct Values {
  void* data = nullptr;
  ScalarType dtype = ScalarType::Float;
  int64_t row_stride = 0, stride = 0;

  explicit operator bool() const { return data != nullptr; }

  double get(int64_t row, int64_t index) const {
    const int64_t i = row * row_stride + index * stride;
    switch (dtype) {
      case ScalarType::Double: return static_cast<const double*>(data)[i];
      case ScalarType::Float: return static_cast<const float*>(data)[i];
      case ScalarType::BFloat16: return static_cast<const c10::BFloat16*>(data)[i];
      case ScalarType::Half: return static_cast<const c10::Half*>(data)[i];
      default: return double(static_cast<const int64_t*>(data)[i]);
    }
  }

  void set(int64_t row, int64_t index, double value) const {
    const int64_t i = row * row_stride + index * stride;
    switch (dtype) {
      case ScalarType::Double: static_cast<double*>(data)[i] = value; break;
      case ScalarType::Float: static_cast<float*>(data)[i] = float(value); break;
      case ScalarType::BFloat16: static_cast<c10::BFloat16*>(data)[i] = float(value); break;
      default: static_cast<c10::Half*>(data)[i] = float(value); break;
    }
  }
};

// Rounding may leave a tiny negative sum of squares; a NaN stays.
inline double not_negative(double value) { return value < 0 ? 0 : value; }

// Count, mean and sum of squared deviations of some values.
struct Moments {
  double count = 0, mean = 0, m2 = 0;

  // Chan, Golub and LeVeque (1979).
  void merge(double other_count, double other_mean, double other_m2) {
    const double total = count + other_count;
    const double delta = other_mean - mean, part = other_count / total;
    mean += delta * part;
    m2 += other_m2 + delta * delta * count * part;
    count = total;
  }
};

// y = (x - mean) * scale + shift.
template <class A>
struct ForwardCoefficients {
  A mean, scale, shift;
};

struct ForwardStatistics {
  Values mean, rstd, weight, bias, running_mean, running_var, counters;
  double momentum, eps;  // momentum counts only without counters (cumulative average)

  template <class A>
  ForwardCoefficients<A> finish(int64_t rank, int64_t channel, const Moments& moments) const {
    const double count = moments.count;
    const double var = count > 0 ? moments.m2 / count : 0;
    const double r = 1 / std::sqrt(var + eps);
    mean.set(rank, channel, moments.mean);
    rstd.set(rank, channel, r);
    if (running_mean && count > 0) {
      const double factor = counters ? 1 / counters.get(0, rank) : momentum;
      const double unbiased = moments.m2 / (count > 1 ? count - 1 : 1);
      average(running_mean, rank, channel, moments.mean, factor);
      average(running_var, rank, channel, unbiased, factor);
    }
    return {A(moments.mean), A(weight ? r * weight.get(0, channel) : r),
            A(bias ? bias.get(0, channel) : 0)};
  }

 private:
  static void average(const Values& running, int64_t rank, int64_t channel, double batch,
                      double factor) {
    running.set(rank, channel, running.get(rank, channel) * (1 - factor) + batch * factor);
  }
};

// dx = dy * scale + (x - mean) * slope + offset.
template <class A>
struct BackwardCoefficients {
  A mean, scale, slope, offset;
};

struct BackwardStatistics {
  Values mean, rstd, weight;
  double* grad_weight;  // [V, C], summed over the ranks by the caller
  double* grad_bias;
  int64_t channels;

  // From the sums of dy and of dy * (x - mean) over `count` values.
  template <class A>
  BackwardCoefficients<A> finish(int64_t rank, int64_t channel, double count, double sum_dy,
                                 double sum_dy_x) const {
    const double r = rstd.get(rank, channel);
    grad_weight[rank * channels + channel] = sum_dy_x * r;
    grad_bias[rank * channels + channel] = sum_dy;
    const double scale = weight ? r * weight.get(0, channel) : r;
    const double divisor = count > 0 ? count : 1;
    return {A(mean.get(rank, channel)), A(scale), A(-scale * r * r * sum_dy_x / divisor),
            A(-scale * sum_dy / divisor)};
  }
};

}  // namespace distbn
