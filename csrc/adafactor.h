// An update of Adafactor with factored moments, for `megaswitch/optim/native_adafactor.py`. The
// arithmetic is that of `megaswitch/optim/adafactor_math.py`; the difference is that a matrix goes
// through all of it while it lies in the caches, and that nothing as large is written but itself.
#pragma once

#include <cstdint>

namespace megaswitch {

struct AdafactorStep {
  double learning_rate;
  double beta2;
  double clip_threshold;
  double epsilon1;
  double epsilon2;
  double keep;  // 1 less what weight decay takes
  bool scale_by_parameter;
};

// Updates `slices` matrices [rows, columns] one by one, each with moments of its own.
//
// p: [slices, rows, columns], changed, as are row [slices, rows] and column [slices, columns].
// g: gradients like p. No size is 0. Sums are added up in an order that depends on sizes alone, so
// that results are the same for any number of threads and for a matrix alone or among others.
template <typename T>
void adafactor(T* p, const T* g, T* row, T* column, uint64_t slices, uint64_t rows,
               uint64_t columns, const AdafactorStep& step, unsigned threads);

}  // namespace megaswitch
