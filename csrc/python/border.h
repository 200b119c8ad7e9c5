// The border to Python: check, drop the GIL, call. Policies, messages and defaults live in Python (session.py).
//
// No source may need more than 300 MB to compile (docs/aarch64.md). pybind11 alone takes 206 of them, and each bound signature adds
// 3: so what is bound is spread over sources, those that carry values compiled once for each type (TT_REAL), and conversions from
// lists and tuples, the dearest part, happen in border.cpp alone.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <array>
#include <string>
#include <vector>

#include "../session.h"

namespace tinytrain {

namespace py = pybind11;

template <class T>
using Array = py::array_t<T, py::array::c_style>;

// ValueError naming the argument, `expected` and the shape it has.
[[noreturn]] void bad_shape(const char* argument, const std::string& expected, const py::array& got);
// The same unless `array` has this shape; a negative number stands for any.
void check_shape(const char* argument, const py::array& array, const std::vector<int64_t>& shape);

Activation activation_of(const std::string& name);
Axis axis_of(const std::string& name);

// Of a `_Request` (_core.pyi). TypeError where it is none.
Graph make_graph(const py::dict& request);
PlanRequest make_request(const py::dict& request, int value_bytes, int panel_columns);
std::vector<LayerValues> layer_values(const Graph& graph, const py::sequence& weights, const py::sequence& biases);
std::vector<int32_t> channel_numbers(const py::sequence& channels);
std::array<float, 3> three_numbers(const char* argument, const py::sequence& numbers);

// Output channels of one panel of packed weights, which int8 weights are expanded by.
template <class T>
int panel_columns(const Kernels<T>& kernels) {
  return kernels.lanes * kernels.panel_vectors;
}

void check_labels(const Array<int64_t>& labels, int64_t count, int ways);

py::dict describe(const Plan& plan);

// The values of an optional array: null for None, TypeError for what is no C-contiguous array of T, ValueError for a wrong shape.
template <class T>
const T* optional_values(const char* argument, const py::object& array, const std::vector<int64_t>& shape) {
  if (array.is_none()) return nullptr;
  if (!Array<T>::check_(array)) {
    throw py::type_error(std::string(argument) + ": expected None or a C-contiguous array of " +
                         std::string(py::str(py::dtype::of<T>())));
  }
  const auto values = py::reinterpret_borrow<py::array>(array);
  check_shape(argument, values, shape);
  return static_cast<const T*>(values.data());
}

// Each specialised for float and double: session.cpp, convolution.cpp.
template <class T>
void bind_session(py::module_& m);
template <class T>
void bind_convolution(py::module_& m);

}  // namespace tinytrain
