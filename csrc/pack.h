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

// A (rows, columns) matrix in panels of columns: [panel][row][column in panel]. Panels are `panel` wide, the last one as many
// vectors as it needs; columns behind the last are zero.
template <class T>
class PackedMatrix {
 public:
  PackedMatrix() = default;
  PackedMatrix(int rows, int columns, int lanes, int panel) : offsets_(columns), widths_(columns) {
    int64_t total = 0;
    for (int first = 0, width; first < columns; first += width) {
      width = columns - first < panel ? (columns - first + lanes - 1) / lanes * lanes : panel;
      for (int c = first; c < columns && c < first + width; ++c) {
        offsets_[c] = total + (c - first);
        widths_[c] = width;
      }
      total += static_cast<int64_t>(rows) * width;
    }
    values_ = AlignedArray<T>(total);
  }
  explicit operator bool() const { return static_cast<bool>(values_); }
  const T* data() const { return values_.data(); }
  int64_t bytes() const { return values_.bytes(); }
  T& at(int64_t row, int column) { return values_.data()[offsets_[column] + row * widths_[column]]; }
  T at(int64_t row, int column) const { return values_.data()[offsets_[column] + row * widths_[column]]; }
  // The contiguous run of a row that starts at `column` and ends with its panel.
  T* run(int64_t row, int column, int* count) {
    int end = column + 1;
    const int columns = static_cast<int>(offsets_.size());
    while (end < columns && offsets_[end] == offsets_[end - 1] + 1) ++end;
    *count = end - column;
    return &at(row, column);
  }
  // A column: its value in row r is column(c)[r * stride(c)].
  T* column(int column) { return values_.data() + offsets_[column]; }
  int stride(int column) const { return widths_[column]; }

 private:
  AlignedArray<T> values_;
  std::vector<int64_t> offsets_;
  std::vector<int> widths_;
};

}  // namespace tinytrain
