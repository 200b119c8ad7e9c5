// Session32 and Session64 of _core.pyi: construction and passes.
#include "py_session.h"

namespace tinytrain {

template <>
void bind_session_state(SessionClass<TT_REAL>& session);

template <>
void bind_session<TT_REAL>(py::module_& m) {
  using S = PySession<TT_REAL>;
  SessionClass<TT_REAL> session(m, sizeof(TT_REAL) == 4 ? "Session32" : "Session64");
  session
      .def(py::init<const py::dict&, const py::sequence&, const py::sequence&, const py::sequence&, const py::sequence&,
                    const std::string&>(),
           py::arg("request"), py::kw_only(), py::arg("weights"), py::arg("biases"), py::arg("mean"), py::arg("std"),
           py::arg("isa"))
      .def("prefix", &S::prefix, py::arg("images"), py::arg("augmentation"), py::arg("out").noconvert())
      .def("embed", &S::embed, py::arg("images"), py::arg("prefix"), py::arg("augmentation"))
      .def("set_prototypes", &S::set_prototypes, py::arg("images"), py::arg("prefix"), py::arg("labels").noconvert(),
           py::arg("ways"), py::arg("keep"))
      .def("update_prototypes", &S::update_prototypes)
      .def("kept_features", &S::kept_features)
      .def("proto_backward", &S::proto_backward, py::arg("images"), py::arg("prefix"), py::arg("labels").noconvert(),
           py::arg("augmentation"), py::arg("scale"), py::arg("weight"))
      .def("backward", &S::backward, py::arg("images"), py::arg("prefix"), py::arg("grad_features").noconvert(),
           py::arg("augmentation"))
      .def("forward", &S::forward, py::arg("images"), py::arg("prefix"))
      .def("backward_saved", &S::backward_saved, py::arg("images"), py::arg("saved").noconvert(),
           py::arg("grad_features").noconvert())
      .def("step", &S::step, py::arg("learning_rate"), py::arg("momentum"));
  bind_session_state<TT_REAL>(session);
}

}  // namespace tinytrain
