// Weights as the kernels read them, and where each one lies.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

namespace tinytrain {

struct FreeDeleter {
  void operator()(void* p) const { std::free(p); }
};

// Zeroed memory on cache-line boundaries.
template <class T>
class AlignedArray {
 public:
  AlignedArray() = default;
  explicit AlignedArray(int64_t count) : count_(count) {
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    data_.reset(static_cast<T*>(std::aligned_alloc(64, bytes == 0 ? 64 : bytes)));
    if (!data_) throw std::bad_alloc();
    std::memset(data_.get(), 0, bytes);
  }
  T* data() { return data_.get(); }
  const T* data() const { return data_.get(); }
  int64_t count() const { return count_; }
  int64_t bytes() const { return count_ * static_cast<int64_t>(sizeof(T)); }
  explicit operator bool() const { return data_ != nullptr; }

 private:
  std::unique_ptr<T, FreeDeleter> data_;
  int64_t count_ = 0;
};

// A column of a packed matrix: rows `step` apart, or pairs of rows.
template <class T>
struct PackedColumn {
  T* values;
  int64_t step;
  int pair;  // 1: rows 2 i and 2 i + 1 lie side by side, pairs `step` apart
  T& operator[](int64_t row) const { return pair == 0 ? values[row * step] : values[row / 2 * step + row % 2]; }
  // The rows from `row` on; the usual kind by a loop of loads and stores alone: an update is little else.
  void read(int64_t row, T* to, int count) const {
    const T* from = values + row * step;
    for (int i = 0; pair == 0 && i < count; ++i, from += step) to[i] = *from;
    for (int i = 0; pair != 0 && i < count; ++i) to[i] = (*this)[row + i];
  }
  void write(int64_t row, const T* from, int count) const {
    T* to = values + row * step;
    for (int i = 0; pair == 0 && i < count; ++i, to += step) *to = from[i];
    for (int i = 0; pair != 0 && i < count; ++i) (*this)[row + i] = from[i];
  }
};

// How a kernel wants its matrix.
struct Packing {
  int lanes;   // values in a vector
  int panel;   // columns in a full panel
  bool pairs;  // see PackedMatrix
};

// A (rows, columns) matrix in panels of columns: [panel][row][column in panel]. Panels are as wide as `packing` says, the last
// one as many vectors as it needs; columns behind the last are zero. With `pairs` at most half a vector of columns behind whole
// ones is a panel of its own, half a vector wide and [pair of rows][column][row of the pair], if the number of rows is even.
template <class T>
class PackedMatrix {
 public:
  PackedMatrix() = default;
  PackedMatrix(int rows, int columns, const Packing& packing) : offsets_(columns), widths_(columns) {
    const int lanes = packing.lanes, half = lanes / 2;
    const bool pairs = packing.pairs && rows % 2 == 0 && columns % lanes > 0 && columns % lanes <= half;
    paired_from_ = pairs ? columns / lanes * lanes : columns;
    int64_t total = 0;
    for (int first = 0, width; first < columns; first += width) {
      const int rest = (first < paired_from_ ? paired_from_ : columns) - first;
      width = first == paired_from_ ? half : rest < packing.panel ? (rest + lanes - 1) / lanes * lanes : packing.panel;
      for (int c = first; c < columns && c < first + width; ++c) {
        offsets_[c] = total + (c - first) * (1 + paired(c));
        widths_[c] = width;
      }
      total += static_cast<int64_t>(rows) * width;
    }
    values_ = AlignedArray<T>(total);
  }
  explicit operator bool() const { return static_cast<bool>(values_); }
  const T* data() const { return values_.data(); }
  int64_t bytes() const { return values_.bytes(); }
  int width(int column) const { return widths_[column]; }  // of its panel
  bool paired(int column) const { return column >= paired_from_; }
  PackedColumn<T> column(int column) {
    return {values_.data() + offsets_[column], static_cast<int64_t>(widths_[column]) << paired(column), paired(column)};
  }
  T& at(int64_t row, int column) {
    const int64_t width = widths_[column];
    return values_.data()[offsets_[column] + (paired(column) ? row / 2 * (2 * width) + row % 2 : row * width)];
  }
  T at(int64_t row, int column) const { return const_cast<PackedMatrix*>(this)->at(row, column); }
  // How many values of a row from `column` on lie in its panel.
  int run_length(int column) const {
    int end = column + 1;
    while (end < static_cast<int>(offsets_.size()) && offsets_[end] == offsets_[end - 1] + 1 + paired(column)) ++end;
    return end - column;
  }
  // Those values: how many, and how far apart.
  T* run(int64_t row, int column, int* count, int* stride) {
    *count = run_length(column);
    *stride = 1 + paired(column);
    return &at(row, column);
  }

 private:
  AlignedArray<T> values_;
  std::vector<int64_t> offsets_;
  std::vector<int> widths_;
  int paired_from_ = 0;
};

}  // namespace tinytrain
