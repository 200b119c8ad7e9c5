#include "border.h"

namespace tinytrain {
namespace {

PYBIND11_MODULE(_core, m) {
  m.doc() = "The native training core; see tinytrain_ext.session.";
  py::register_exception_translator([](std::exception_ptr p) {
    try {
      if (p) std::rethrow_exception(p);
    } catch (const BudgetError& e) {
      const py::object type = py::module_::import("tinytrain_ext.errors").attr("BudgetExceeded");
      const py::object error = type(e.what(), e.needed_bytes);
      PyErr_SetObject(type.ptr(), error.ptr());
    } catch (const NonFinite& e) {
      py::set_error(py::module_::import("tinytrain_ext.errors").attr("NonFiniteError"), e.what());
    }
  });
  m.def("available_isas", [] {
    py::list names;
    for (const std::string& name : available_isas()) names.append(name);
    return names;
  });
  m.def("default_isa", [] { return std::string(kernels_f32().isa); });
  m.def("cpu", [] {
    const Cpu cpu = identify_cpu();
    py::dict d;
    d["brand"] = cpu.brand;
    d["midr"] = cpu.midr;
    d["hwcap"] = cpu.hwcap;
    return d;
  });
  m.def(
      "fma_peak",
      [](const std::string& isa, int64_t rounds) {
        float value = 0.999f;
        py::gil_scoped_release release;
        return kernels_f32(isa).fma_peak(rounds, &value);
      },
      py::arg("isa"), py::arg("rounds"), "Runs FMAs at full rate; returns how many multiply-adds that were.");
  m.def(
      "plan",
      [](const py::dict& request) {
        return describe(make_plan(make_graph(request), make_request(request, sizeof(float), panel_columns(kernels_f32()))));
      },
      py::arg("request"));
  bind_session<float>(m);
  bind_session<double>(m);
  bind_convolution<float>(m);
  bind_convolution<double>(m);
}

}  // namespace
}  // namespace tinytrain
