// Session32 and Session64 of _core.pyi: their plan, weights and gradients.
#include "py_session.h"

namespace tinytrain {

template <>
void bind_session_state<TT_REAL>(SessionClass<TT_REAL>& session) {
  using S = PySession<TT_REAL>;
  session.def("plan", &S::plan)
      .def("isa", &S::isa)
      .def("resident_weight_bytes", &S::resident_weight_bytes)
      .def("prefix_shape", &S::prefix_shape)
      .def("keeps_prefix", &S::keeps_prefix)
      .def("prototypes", &S::prototypes)
      .def("set_selected", &S::set_selected, py::arg("values").noconvert())
      .def("zero_grad", &S::zero_grad)
      .def("set_in_place_rate", &S::set_in_place_rate, py::arg("learning_rate"))
      .def("gradient", &S::gradient, py::arg("index"))
      .def("flat_gradient", &S::flat_gradient)
      .def("fisher", &S::fisher)
      .def("layer", &S::layer, py::arg("number"))
      .def("arena_high_water", &S::arena_high_water)
      .def("broken_guard", &S::broken_guard);
}

}  // namespace tinytrain
