#include "cpu/plain_tensor.h"

#include <algorithm>

namespace calguide {
namespace {

namespace py = pybind11;

// DLPack's DLPackExchangeAPI of major version 1; what is not called here is a plain pointer.
struct ExchangeTable {
  uint32_t major, minor;
  void *older, *allocate, *share, *receive;
  int (*read)(PyObject* object, DlTensor* tensor);
};

// Of the program's one torch: set once, when the backend is imported, and kept as long as the process is.
const ExchangeTable* table = nullptr;
PyTypeObject* classes[2] = {};
PyObject *is_neg = nullptr, *empty_like = nullptr;

// Learns to read torch's tensors. False if this version of torch has no table to read them with.
bool know_plain_tensors(const py::module_& torch) {
  const py::object tensor = torch.attr("Tensor"), parameter = torch.attr("nn").attr("Parameter");
  const py::object capsule = py::getattr(tensor, "__dlpack_c_exchange_api__", py::none());
  constexpr const char* name = "dlpack_exchange_api";
  if (!PyCapsule_IsValid(capsule.ptr(), name)) return false;
  const auto* found = static_cast<const ExchangeTable*>(PyCapsule_GetPointer(capsule.ptr(), name));
  if (found->major != 1 || found->read == nullptr) return false;
  table = found;
  is_neg = py::object(tensor.attr("is_neg")).release().ptr();
  empty_like = py::object(torch.attr("empty_like")).release().ptr();
  classes[0] = reinterpret_cast<PyTypeObject*>(tensor.inc_ref().ptr());
  classes[1] = reinterpret_cast<PyTypeObject*>(parameter.inc_ref().ptr());
  return true;
}

bool negated(PyObject* tensor) {
  return py::reinterpret_steal<py::object>(PyObject_CallOneArg(is_neg, tensor)).ptr() != Py_False;
}

// and none of its sizes is 0
bool contiguous(const DlTensor& tensor) {
  int64_t expected = 1;
  for (int i = tensor.ndim - 1; i >= 0; --i) {
    if (tensor.shape[i] == 0 || (tensor.shape[i] != 1 && tensor.strides[i] != expected)) return false;
    expected *= tensor.shape[i];
  }
  return true;
}

}  // namespace

bool PlainTensor::read(PyObject* object) {
  if (Py_TYPE(object) != classes[0] && Py_TYPE(object) != classes[1]) return false;
  if (table->read(object, &tensor_) != 0) {
    // a layout or a device that DLPack has no words for
    PyErr_Clear();
    return false;
  }
  object_ = object;
  constexpr int32_t cpu = 1;
  // a storage may have been emptied under its tensor
  if (tensor_.device_type != cpu || tensor_.data == nullptr || tensor_.strides == nullptr) return false;
  tensor_.data = static_cast<char*>(tensor_.data) + tensor_.byte_offset;
  return contiguous(tensor_) && !negated(object);
}

py::object PlainTensor::read_result(PyObject* object, const PlainTensor& like) {
  PyObject* const result = object == Py_None ? PyObject_CallOneArg(empty_like, like.object_) : Py_NewRef(object);
  if (result == nullptr) throw py::error_already_set();
  auto owned = py::reinterpret_steal<py::object>(result);
  return read(result) && has_shape_of(like) ? owned : py::object();
}

int64_t PlainTensor::elements() const {
  int64_t product = 1;
  for (int i = 0; i < ndim(); ++i) product *= size(i);
  return product;
}

bool PlainTensor::has_shape(std::initializer_list<int64_t> shape) const {
  return std::equal(shape.begin(), shape.end(), tensor_.shape, tensor_.shape + ndim());
}

bool PlainTensor::has_shape_of(const PlainTensor& other) const {
  return std::equal(tensor_.shape, tensor_.shape + ndim(), other.tensor_.shape, other.tensor_.shape + other.ndim());
}

int PlainTensor::storage() const {
  enum { floating = 2, bfloat = 4 };
  const int code = tensor_.type_code, bits = tensor_.type_bits;
  if (code == bfloat) return storage_bfloat16;
  if (code != floating) return -1;
  return bits == 32 ? storage_float32 : bits == 16 ? storage_float16 : -1;
}

void bind_plain_tensor(py::module_& module) { module.def("know_plain_tensors", &know_plain_tensors); }

}  // namespace calguide
