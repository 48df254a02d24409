// Top-k, top-p and min-p over one row's candidates, by thresholds on values: nothing is sorted.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

namespace elastic_decode {

// An array that only grows and is never initialised: pages that no row needs are never touched.
template <class T>
class Buffer {
 public:
  T* get(std::int64_t count) {
    if (count > size_) {
      data_.reset(new T[static_cast<std::size_t>(count)]);
      size_ = count;
    }
    return data_.get();
  }
  T* data() const { return data_.get(); }

 private:
  std::unique_ptr<T[]> data_;
  std::int64_t size_ = 0;
};

struct Candidates {
  std::int64_t count = 0;
  Buffer<float> values;
  Buffer<std::int32_t> ids;
  Buffer<float> weights;  // exp((value - max) / T)
};

// The k-th largest, 1 <= k <= count; `space` is overwritten.
float kth_largest(const float* values, std::int64_t count, std::int64_t k, std::vector<float>& space);

// A lower bound of the k-th largest logit from lane-wise maxima of groups [groups, 16], -FLT_MAX where they
// are too few: k disjoint sets of entries whose maxima reach it hold k entries that do.
float kth_largest_bound(const float* lane_max, std::int64_t groups, std::int64_t k,
                        std::vector<float>& space);

// The smallest value with less than `target` of weight strictly above it (the largest value where even that
// has none below).
float mass_threshold(const Candidates& candidates, double target, std::vector<std::int32_t>& space);

// The smallest value with (value - max) * inverse_t >= least_y; least_y <= 0.
float ratio_threshold(float max, float inverse_t, float least_y);

// Keeps, in order, the candidates that reach `least`. Returns the weight of those left.
double keep_from(Candidates& candidates, float least);

}  // namespace elastic_decode
