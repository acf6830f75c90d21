#include "adafactor.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "parallel.h"

namespace megaswitch {

namespace {

// Rows whose columns are added up in T before they join the double-precision sum, so that long
// columns lose no more digits than short ones. A block is also what a thread takes at once.
constexpr uint64_t kBlock = 64;
// Independent sums of a row: the compiler makes vectors of them, and rounding errors stay small.
constexpr uint64_t kLanes = 16;

template <typename T>
struct Lanes {
  T sums[kLanes] = {};

  double total() const { return std::accumulate(sums, sums + kLanes, 0.0); }
};

// Calls each(column, lane) for all columns; lane is column mod kLanes.
template <typename Each>
void for_lanes(uint64_t columns, const Each& each) {
  uint64_t column = 0;
  for (; column + kLanes <= columns; column += kLanes) {
    for (uint64_t lane = 0; lane < kLanes; ++lane) each(column + lane, lane);
  }
  for (uint64_t lane = 0; column < columns; ++column, ++lane) each(column, lane);
}

// Σ g² of a row, whose elements are added to the sums of their columns too.
template <typename T>
double add_squares(const T* __restrict g, uint64_t columns, T* __restrict column_sums) {
  Lanes<T> lanes;
  for_lanes(columns, [&](uint64_t i, uint64_t lane) {
    const T square = g[i] * g[i];
    lanes.sums[lane] += square;
    column_sums[i] += square;
  });
  return lanes.total();
}

template <typename T>
double sum_of_squares(const T* p, uint64_t columns) {
  Lanes<T> lanes;
  for_lanes(columns, [&](uint64_t i, uint64_t lane) { lanes.sums[lane] += p[i] * p[i]; });
  return lanes.total();
}

template <typename T>
double sum_of_scaled_squares(const T* g, const T* factors, uint64_t columns) {
  Lanes<T> lanes;
  for_lanes(columns, [&](uint64_t i, uint64_t lane) {
    const T scaled = g[i] * factors[i];
    lanes.sums[lane] += scaled * scaled;
  });
  return lanes.total();
}

// One matrix and the state of its update. Work memory is kept for the next matrix.
template <typename T>
class Update {
 public:
  Update(uint64_t rows, uint64_t columns, const AdafactorStep& step, unsigned threads)
      : rows_(rows), columns_(columns), step_(step), threads_(threads), row_sums_(rows),
        weight_sums_(rows), column_sums_(columns),
        block_sums_((rows + kBlock - 1) / kBlock * columns), row_factors_(rows),
        column_factors_(columns) {}

  void operator()(T* p, const T* g, T* row, T* column) {
    remember(g, row, column);
    const double mean_row = std::accumulate(row, row + rows_, 0.0) / static_cast<double>(rows_);
    for (uint64_t i = 0; i < rows_; ++i) {
      row_factors_[i] = static_cast<T>(1 / std::sqrt(static_cast<double>(row[i]) / mean_row));
    }
    for (uint64_t i = 0; i < columns_; ++i) {
      column_factors_[i] = static_cast<T>(1 / std::sqrt(static_cast<double>(column[i])));
    }
    subtract(p, g, scale(p, g));
  }

 private:
  // Moves the moments towards the mean squared gradients of rows and columns.
  void remember(const T* g, T* row, T* column) {
    std::fill(block_sums_.begin(), block_sums_.end(), T{0});
    for_rows([&](uint64_t i) {
      T* const sums = block_sums_.data() + i / kBlock * columns_;
      row_sums_[i] = add_squares(g + i * columns_, columns_, sums);
    });
    for (uint64_t i = 0; i < rows_; ++i) blend(row[i], row_sums_[i], columns_);
    std::fill(column_sums_.begin(), column_sums_.end(), 0.0);
    for (uint64_t block = 0; block < block_sums_.size(); block += columns_) {
      for (uint64_t i = 0; i < columns_; ++i) {
        column_sums_[i] += static_cast<double>(block_sums_[block + i]);
      }
    }
    for (uint64_t i = 0; i < columns_; ++i) blend(column[i], column_sums_[i], rows_);
  }

  void blend(T& moment, double sum, uint64_t count) const {
    const double mean = sum / static_cast<double>(count) + step_.epsilon1;
    const double before = static_cast<double>(moment);
    moment = static_cast<T>(mean + step_.beta2 * (before - mean));
  }

  // What the clipped update is multiplied by.
  double scale(const T* p, const T* g) {
    for_rows([&](uint64_t i) {
      const double factor = static_cast<double>(row_factors_[i]);
      const T* const columns = column_factors_.data();
      row_sums_[i] = sum_of_scaled_squares(g + i * columns_, columns, columns_) * factor * factor;
      if (step_.scale_by_parameter) weight_sums_[i] = sum_of_squares(p + i * columns_, columns_);
    });
    const double excess = root_mean(row_sums_) / step_.clip_threshold;
    double scale = step_.learning_rate;
    if (!(excess <= 1)) scale /= excess;  // what is not a number spreads
    if (step_.scale_by_parameter) {
      const double weights = root_mean(weight_sums_);
      scale *= weights < step_.epsilon2 ? step_.epsilon2 : weights;
    }
    return scale;
  }

  void subtract(T* p, const T* g, double scale) {
    const T keep = static_cast<T>(step_.keep);
    for_rows([&](uint64_t i) {
      T* __restrict const to = p + i * columns_;
      const T* __restrict const from = g + i * columns_;
      const T* __restrict const factors = column_factors_.data();
      const T factor = static_cast<T>(static_cast<double>(row_factors_[i]) * scale);
      for (uint64_t k = 0; k < columns_; ++k) to[k] = keep * to[k] - from[k] * factors[k] * factor;
    });
  }

  double root_mean(const std::vector<double>& row_sums) const {
    const double sum = std::accumulate(row_sums.begin(), row_sums.end(), 0.0);
    return std::sqrt(sum / static_cast<double>(rows_ * columns_));
  }

  template <typename Each>
  void for_rows(const Each& each) {
    const uint64_t blocks = (rows_ + kBlock - 1) / kBlock;
    parallel_for(blocks, rows_ * columns_, threads_, [&](uint64_t block) {
      const uint64_t end = std::min(rows_, (block + 1) * kBlock);
      for (uint64_t i = block * kBlock; i < end; ++i) each(i);
    });
  }

  uint64_t rows_;
  uint64_t columns_;
  const AdafactorStep& step_;
  unsigned threads_;
  std::vector<double> row_sums_;
  std::vector<double> weight_sums_;
  std::vector<double> column_sums_;
  std::vector<T> block_sums_;
  std::vector<T> row_factors_;
  std::vector<T> column_factors_;
};

}  // namespace

template <typename T>
void adafactor(T* p, const T* g, T* row, T* column, uint64_t slices, uint64_t rows,
               uint64_t columns, const AdafactorStep& step, unsigned threads) {
  // Threads take whole matrices where there are enough of them, else parts of one after the other.
  const bool whole = slices >= threads;
  const uint64_t parts = whole ? std::min<uint64_t>(slices, threads) : 1;
  std::vector<Update<T>> updates(parts, Update<T>(rows, columns, step, whole ? 1 : threads));
  parallel_for(parts, slices * rows * columns, whole ? threads : 1, [&](uint64_t part) {
    const uint64_t end = slices * (part + 1) / parts;
    for (uint64_t slice = slices * part / parts; slice < end; ++slice) {
      const uint64_t start = slice * rows * columns;
      updates[part](p + start, g + start, row + slice * rows, column + slice * columns);
    }
  });
}

template void adafactor(float*, const float*, float*, float*, uint64_t, uint64_t, uint64_t,
                        const AdafactorStep&, unsigned);
template void adafactor(double*, const double*, double*, double*, uint64_t, uint64_t, uint64_t,
                        const AdafactorStep&, unsigned);

}  // namespace megaswitch
