#include "cpu/sample_filter.h"

#include <algorithm>
#include <cfloat>
#include <cstring>
#include <functional>
#include <numeric>

namespace elastic_decode {
namespace {

// Order-preserving: a < b as floats (no NaN) where key(a) < key(b). -0 counts as 0.
std::uint32_t key(float value) {
  value += 0.0f;
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

float value_of(std::uint32_t key) {
  const std::uint32_t bits = key & 0x80000000u ? key & 0x7fffffffu : ~key;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace

float kth_largest(const float* values, std::int64_t count, std::int64_t k, std::vector<float>& space) {
  space.assign(values, values + count);
  std::nth_element(space.begin(), space.begin() + (k - 1), space.end(), std::greater<float>());
  return space[static_cast<std::size_t>(k - 1)];
}

float kth_largest_bound(const float* lane_max, std::int64_t groups, std::int64_t k,
                        std::vector<float>& space) {
  if (groups * 16 < k) return -FLT_MAX;
  // Groups are merged while about 4 k sets remain: enough for a bound close to the k-th largest, few enough
  // to be quick.
  const std::int64_t merged = std::max<std::int64_t>(1, groups * 16 / (4 * k + 64));
  const std::int64_t sets = (groups + merged - 1) / merged;
  if (sets * 16 < k) return -FLT_MAX;
  space.assign(static_cast<std::size_t>(sets * 16), -FLT_MAX);
  for (std::int64_t group = 0; group < groups; ++group) {
    float* set = space.data() + group / merged * 16;
    for (int lane = 0; lane < 16; ++lane) set[lane] = std::max(set[lane], lane_max[group * 16 + lane]);
  }
  std::nth_element(space.begin(), space.begin() + (k - 1), space.end(), std::greater<float>());
  return space[static_cast<std::size_t>(k - 1)];
}

float mass_threshold(const Candidates& candidates, double target, std::vector<std::int32_t>& space) {
  constexpr int kBins = 2048;
  double mass[kBins];
  std::int32_t filled[kBins];
  const float* values = candidates.values.data();
  const float* weights = candidates.weights.data();
  space.resize(static_cast<std::size_t>(candidates.count));
  std::iota(space.begin(), space.end(), 0);
  std::uint32_t low = ~0u, high = 0;
  for (std::int64_t i = 0; i < candidates.count; ++i) {
    low = std::min(low, key(values[i]));
    high = std::max(high, key(values[i]));
  }
  double above = 0.0;
  // Each round splits low..high into bins by key, walks them from the top, and goes on inside the one that
  // reaches the target.
  for (;;) {
    int shift = 0;
    while (((high - low) >> shift) >= kBins) ++shift;
    const int bins = static_cast<int>((high - low) >> shift) + 1;
    std::fill(mass, mass + bins, 0.0);
    std::fill(filled, filled + bins, 0);
    for (const std::int32_t i : space) {
      const std::uint32_t bin = (key(values[i]) - low) >> shift;
      mass[bin] += weights[i];
      ++filled[bin];
    }
    int bin = bins - 1,
        last = -1;  // last: the lowest filled bin seen, taken where rounding keeps the sum below the target
    for (; bin >= 0; --bin) {
      if (!filled[bin]) continue;
      last = bin;
      if (above + mass[bin] >= target) break;
      above += mass[bin];
    }
    if (bin < 0) {
      bin = last;
      above -= mass[bin];
    }
    low += static_cast<std::uint32_t>(bin) << shift;
    if (shift == 0) return value_of(low);
    high = low + ((1u << shift) - 1);
    const std::uint32_t from = low, width = high - low;
    space.erase(std::remove_if(space.begin(), space.end(),
                               [&](std::int32_t i) { return key(values[i]) - from > width; }),
                space.end());
  }
}

float ratio_threshold(float max, float inverse_t, float least_y) {
  // By bisection over all floats: rounding makes the expression's inverse inexact, but it stays monotone.
  std::uint32_t low = key(-FLT_MAX), high = key(max);
  while (low < high) {
    const std::uint32_t middle = low + (high - low) / 2;
    if ((value_of(middle) - max) * inverse_t >= least_y) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return value_of(low);
}

double keep_from(Candidates& candidates, float least) {
  float* values = candidates.values.data();
  std::int32_t* ids = candidates.ids.data();
  float* weights = candidates.weights.data();
  double total = 0.0;
  std::int64_t kept = 0;
  for (std::int64_t i = 0; i < candidates.count; ++i) {
    const float value = values[i], weight = weights[i];
    const bool keep = value >= least;
    values[kept] = value;
    ids[kept] = ids[i];
    weights[kept] = weight;
    kept += keep;
    total += keep ? static_cast<double>(weight) : 0.0;
  }
  candidates.count = kept;
  return total;
}

}  // namespace elastic_decode
