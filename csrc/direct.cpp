#undef TORCH_TARGET_VERSION // under which torch refuses its copies of pybind11 and of dlpack.h

#include "direct.h"

#include <ATen/dlpack.h> // plain C, whose layout its version says: no part of torch's ABI

#include <algorithm>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "cross_entropy.h"
#include "mse.h"
#ifdef LOSSOPS_CUDA
#include "cuda/runtime.h"
#endif

namespace lossops {
namespace {

namespace py = pybind11;

// On the CPU only small batches gain: beyond this, the ops' way of getting memory is worth more.
constexpr int64_t kMostElementsOnCpu = 1 << 17;

constexpr float kOne = 1; // an upstream gradient

// ---------------------------------------------------------------------------------------------
// Tensors, as torch shows them to C

struct Torch {
  const DLPackExchangeAPI* api; // null where there is none of this version
  PyTypeObject *tensor, *parameter;
  PyObject* is_neg;
};

const DLPackExchangeAPI* exchange_api(py::handle tensor_type) {
  constexpr const char* name = "dlpack_exchange_api";
  const py::object capsule = py::getattr(tensor_type, "__dlpack_c_exchange_api__", py::none());
  if (!PyCapsule_IsValid(capsule.ptr(), name)) return nullptr;
  const auto* api = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule.ptr(), name));
  const bool known = api->header.version.major == DLPACK_MAJOR_VERSION;
  return known && api->dltensor_from_py_object_no_sync != nullptr ? api : nullptr;
}

// Asked for first when the module is loaded: later, a thread that waits here would keep the interpreter from
// the one that looks. Never destroyed: what is kept may outlive the interpreter's modules.
const Torch& torch() {
  static const Torch* const found = [] {
    const py::object module = py::module_::import("torch"), tensor = module.attr("Tensor");
    const auto type = [](py::object t) { return reinterpret_cast<PyTypeObject*>(t.release().ptr()); };
    return new Torch{exchange_api(tensor), type(tensor), type(module.attr("nn").attr("Parameter")),
                     py::str("is_neg").release().ptr()};
  }();
  return *found;
}

std::optional<DType> dtype_of(DLDataType t) {
  if (t.lanes != 1) return std::nullopt;
  switch (t.code << 8 | t.bits) {
    case kDLFloat << 8 | 16: return DType::f16;
    case kDLBfloat << 8 | 16: return DType::bf16;
    case kDLFloat << 8 | 32: return DType::f32;
    case kDLFloat << 8 | 64: return DType::f64;
    case kDLInt << 8 | 64: return DType::i64;
    default: return std::nullopt;
  }
}

bool is_contiguous(const DLTensor& t) {
  int64_t stride = 1;
  for (int d = t.ndim; d-- > 0; stride *= t.shape[d])
    if (t.shape[d] != 1 && t.strides != nullptr && t.strides[d] != stride) return false;
  return true;
}

// Whether kernels can be queued there by the runtime's current device.
bool is_here(DLDevice device) {
#ifdef LOSSOPS_CUDA
  if (device.device_type == kDLCUDA) return device.device_id == cuda::current_device();
#endif
  return device.device_type == kDLCPU;
}

// A tensor that is nothing but its elements, one behind the other, on a device of ours.
struct Plain {
  void* data = nullptr; // null: it is not such a tensor
  DType dtype = DType::f32;
  DLDevice device{};
  int dims = 0;
  const int64_t* shape = nullptr; // the tensor's own
  int64_t elements = 1;

  // No error is left behind: what is not plain is the ops' to judge.
  explicit Plain(py::handle tensor) {
    PyTypeObject* const type = Py_TYPE(tensor.ptr());
    if ((type == torch().tensor || type == torch().parameter) && torch().api != nullptr) look_at(tensor);
    if (data != nullptr && is_neg(tensor)) data = nullptr;
  }

  // Of a tensor that was just made, or found plain: without the slower questions.
  static Plain known(py::handle tensor) {
    Plain plain;
    plain.look_at(tensor);
    return plain;
  }

  explicit operator bool() const {
    return data != nullptr;
  }
  bool is_floating() const {
    return dtype <= DType::f64;
  }
  bool is_on_gpu() const {
    return device.device_type != kDLCPU;
  }
  bool lies_with(const Plain& other) const {
    return device.device_type == other.device.device_type && device.device_id == other.device.device_id;
  }
  bool has_shape_of(const Plain& other) const {
    return dims == other.dims && std::equal(shape, shape + dims, other.shape);
  }
  bool is_like(const Plain& other) const {
    return data != nullptr && dtype == other.dtype && has_shape_of(other) && lies_with(other);
  }
  bool is_scalar() const {
    return data != nullptr && dims == 0 && is_floating();
  }
  bool is_scalar_beside(const Plain& other) const {
    return is_scalar() && lies_with(other);
  }

 private:
  Plain() = default;

  void look_at(py::handle tensor) {
    DLTensor t;
    // An error for what wraps a tensor in a transform, or did when one was at work, or batches it.
    if (torch().api->dltensor_from_py_object_no_sync(tensor.ptr(), &t) != 0) return PyErr_Clear();
    const std::optional<DType> known = dtype_of(t.dtype);
    if (!known || !is_contiguous(t) || !is_here(t.device) || t.data == nullptr) return;
    dtype = *known;
    device = t.device;
    dims = t.ndim;
    shape = t.shape;
    for (int d = 0; d < dims; ++d) elements *= shape[d];
    if (elements > 0) data = static_cast<char*>(t.data) + t.byte_offset;
  }

  // Of a view whose memory holds the opposite sign.
  static bool is_neg(py::handle tensor) {
    const auto answer =
        py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor.ptr(), torch().is_neg));
    if (!answer) throw py::error_already_set();
    return answer.ptr() == Py_True;
  }
};

// What Python is told of a call: whether it may and should go this way, and where its tensors are. The
// numbers are lossops/_direct.py's, too.
enum Place { kNowhere, kFloatOnCpu, kOnCpu, kOnGpu };

Place place_of(const Plain& input) {
  if (input.is_on_gpu()) return kOnGpu;
  if (input.elements > kMostElementsOnCpu) return kNowhere;
  return input.dtype == DType::f32 ? kFloatOnCpu : kOnCpu;
}

// Of what lossops itself has made beforehand.
void expect(bool holds, const char* sentence) {
  if (!holds) throw std::runtime_error(sentence);
}

// Whether an upstream gradient is 1, where looking does not mean waiting.
bool is_one(py::handle grad_loss) {
  const Plain g(grad_loss);
  if (!g.is_scalar() || g.is_on_gpu()) return false;
  if (g.dtype == DType::f32) return *static_cast<const float*>(g.data) == 1;
  if (g.dtype == DType::f64) return *static_cast<const double*>(g.data) == 1;
  return *static_cast<const uint16_t*>(g.data) == (g.dtype == DType::f16 ? 0x3c00 : 0x3f80);
}

// ---------------------------------------------------------------------------------------------
// What a forward leaves to its backward

// Memory of torch's allocators.
class DeviceMemory {
 public:
  DeviceMemory() = default;
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;
  ~DeviceMemory() {
    if (tensor_ != nullptr && tensor_->deleter != nullptr) tensor_->deleter(tensor_);
  }

  char* take(DLDevice device, int64_t bytes) {
    DLTensor like{};
    like.device = device;
    like.ndim = 1;
    like.dtype = {kDLUInt, 8, 1};
    like.shape = &bytes;
    std::string error;
    const auto say = [](void* words, const char*, const char* message) {
      *static_cast<std::string*>(words) = message;
    };
    if (torch().api->managed_tensor_allocator(&like, &tensor_, &error, say) != 0) {
      tensor_ = nullptr;
      throw std::runtime_error(error);
    }
    return static_cast<char*>(tensor_->dl_tensor.data) + tensor_->dl_tensor.byte_offset;
  }

 private:
  DLManagedTensorVersioned* tensor_ = nullptr;
};

struct Kept {
  // What the backward's has to be like: whoever sets x.data, or saves tensors through hooks, may hand it
  // another.
  Plain input;
  std::vector<int64_t> shape;

  double on_host = 0; // the normalizer of a loss on the CPU
  double* normalizer = &on_host;
  char* stats = nullptr;
  std::unique_ptr<char[]> host_memory;
  DeviceMemory device_memory;

  explicit Kept(const Plain& x) : input(x), shape(x.shape, x.shape + x.dims) {
    input.shape = shape.data();
  }
};

py::capsule capsule_of(std::unique_ptr<Kept> kept) {
  return py::capsule(kept.release(), [](void* p) { delete static_cast<Kept*>(p); });
}

#ifdef LOSSOPS_CUDA

// Queues a call on torch's current stream.
template <class Call>
void queue(const Call& call, DLDevice device, void* workspace = nullptr) {
  void* stream = nullptr;
  if (torch().api->current_work_stream(device.device_type, device.device_id, &stream) != 0)
    throw py::error_already_set();
  const py::gil_scoped_release others_may_run; // where the queue is full, a launch waits
  cuda::launch(call, workspace, stream);
}

// What a forward on a GPU writes beside its loss: the normalizer, then the stats, then what it forgets.
template <class Forward>
void queue_forward(Forward& call, int64_t stats_bytes, DLDevice device, Kept& kept) {
  constexpr int64_t kAlignment = 16;
  const int64_t to_workspace = kAlignment + (stats_bytes + kAlignment - 1) / kAlignment * kAlignment;
  char* const memory = kept.device_memory.take(device, to_workspace + cuda::workspace_bytes(call));
  call.normalizer = kept.normalizer = reinterpret_cast<double*>(memory);
  if constexpr (std::is_base_of_v<CrossEntropyProblem, Forward>)
    call.stats = kept.stats = memory + kAlignment;
  queue(call, device, memory + to_workspace);
}

#endif

// ---------------------------------------------------------------------------------------------
// Softmax cross-entropy: the mean of a batch of class indices

bool are_batch(const Plain& logits, const Plain& target) {
  return logits && target && logits.is_floating() && logits.dims == 2 && target.dtype == DType::i64 &&
         target.dims == 1 && target.elements == logits.shape[0] && target.lies_with(logits);
}

int direct_cross_entropy(py::handle logits, py::handle target) {
  const Plain z(logits);
#ifdef LOSSOPS_CUDA
  if (z && z.is_on_gpu() && cuda::sync_checks()) return kNowhere;
#endif
  return are_batch(z, Plain(target)) ? place_of(z) : kNowhere;
}

template <class Problem>
Problem cross_entropy_problem(const Plain& logits, const Plain& target, int64_t ignore_index) {
  Problem call;
  call.use_double = logits.dtype == DType::f64;
  call.classes = logits.shape[1];
  call.rows = Positions<kCrossEntropyOperands>(logits.shape, 1);
  for (const auto operand : {kLogits, kGradLogits}) call.rows.stride[operand][0] = call.classes;
  for (const auto operand : {kTarget, kRow}) call.rows.stride[operand][0] = 1;
  call.rows.simplify();
  call.logits = {logits.data, logits.dtype, 1};
  call.target = {target.data, DType::i64, 0};
  call.ignore_index = ignore_index;
  return call;
}

// What the backward needs, or None where a class index is out of range. With grad_logits (None: without) the
// gradient too, for an upstream gradient of 1; on the CPU alone.
py::object direct_cross_entropy_forward(py::handle logits, py::handle target, py::handle loss,
                                        py::handle grad_logits, int64_t ignore_index) {
  const Plain z = Plain::known(logits), y = Plain::known(target), out = Plain::known(loss);
  expect(are_batch(z, y) && out.is_scalar_beside(z),
         "cross_entropy: expected memory for a loss of the logits");
  auto call = cross_entropy_problem<CrossEntropyForward>(z, y, ignore_index);
  call.loss = out.data;
  call.loss_dtype = out.dtype;
  auto kept = std::make_unique<Kept>(z);
  const int64_t stats_bytes = 2 * z.shape[0] * (call.use_double ? 8 : 4);
#ifdef LOSSOPS_CUDA
  if (z.is_on_gpu()) {
    cuda::note_class_indices(z.device.device_id);
    queue_forward(call, stats_bytes, z.device, *kept);
    return capsule_of(std::move(kept));
  }
#endif
  kept->host_memory.reset(new char[stats_bytes]);
  call.stats = kept->stats = kept->host_memory.get();
  call.normalizer = kept->normalizer;
  bool bad_target = false;
  call.bad_target = &bad_target;
  if (grad_logits.is_none()) {
    cpu::launch(call);
  } else {
    const Plain dz = Plain::known(grad_logits);
    expect(dz.is_like(z), "cross_entropy: expected memory for the gradient of the logits");
    CrossEntropyBackward gradient;
    static_cast<CrossEntropyProblem&>(gradient) = call;
    *call.normalizer = cpu::weigh_rows(call);
    gradient.grad_loss = &kOne;
    gradient.normalizer = call.normalizer;
    gradient.grad_logits = {dz.data, dz.dtype, 1};
    gradient.bad_target = &bad_target;
    cpu::launch(call, &gradient);
  }
  if (bad_target) return py::none();
  return capsule_of(std::move(kept));
}

// False where the tensors are no longer what the forward was given, or, on the CPU, a class index is out of
// range: then the gradient is not written, or not to be used.
bool direct_cross_entropy_backward(py::handle grad_loss, py::handle logits, py::handle target,
                                   py::handle grad_logits, int64_t ignore_index, const py::capsule& capsule) {
  const Kept& kept = *capsule.get_pointer<Kept>();
  const Plain g(grad_loss), z(logits), y(target), dz(grad_logits);
  if (!are_batch(z, y) || !z.is_like(kept.input) || !g.is_scalar_beside(z) || !dz.is_like(z)) return false;
  auto call = cross_entropy_problem<CrossEntropyBackward>(z, y, ignore_index);
  call.stats = kept.stats;
  call.grad_loss = g.data;
  call.grad_loss_dtype = g.dtype;
  call.normalizer = kept.normalizer;
  call.grad_logits = {dz.data, dz.dtype, 1};
#ifdef LOSSOPS_CUDA
  if (z.is_on_gpu()) return queue(call, z.device), true;
#endif
  bool bad_target = false;
  call.bad_target = &bad_target;
  cpu::launch(call);
  return !bad_target;
}

// ---------------------------------------------------------------------------------------------
// Mean squared error: the mean of two tensors of one shape and dtype

bool are_alike(const Plain& input, const Plain& target) {
  return input && input.is_floating() && target.is_like(input);
}

int direct_mse(py::handle input, py::handle target) {
  const Plain x(input);
  return are_alike(x, Plain(target)) ? place_of(x) : kNowhere;
}

template <class Problem>
Problem mse_problem(const Plain& input, const Plain& target) {
  Problem call;
  call.use_double = input.dtype == DType::f64;
  call.elements = Positions<kMSEOperands>(&input.elements, 1);
  for (const auto operand : {kInput, kTargetElement, kOut, kOutTarget}) call.elements.stride[operand][0] = 1;
  call.elements.simplify();
  call.input = {input.data, input.dtype};
  call.target = {target.data, target.dtype};
  return call;
}

// As above: what the backward needs, and with grad_input (None: without) the gradient.
py::capsule direct_mse_forward(py::handle input, py::handle target, py::handle loss, py::handle grad_input) {
  const Plain x = Plain::known(input), y = Plain::known(target), out = Plain::known(loss);
  expect(are_alike(x, y) && out.is_scalar_beside(x), "mse_loss: expected memory for a loss of the input");
  auto call = mse_problem<MSEForward>(x, y);
  call.out = {out.data, out.dtype};
  auto kept = std::make_unique<Kept>(x);
#ifdef LOSSOPS_CUDA
  if (x.is_on_gpu()) {
    queue_forward(call, 0, x.device, *kept);
    return capsule_of(std::move(kept));
  }
#endif
  *kept->normalizer = static_cast<double>(x.elements);
  call.normalizer = kept->normalizer;
  if (grad_input.is_none()) {
    cpu::launch(call);
  } else {
    const Plain dx = Plain::known(grad_input);
    expect(dx.is_like(x), "mse_loss: expected memory for the gradient of the input");
    MSEBackward gradient;
    static_cast<MSEProblem&>(gradient) = call;
    gradient.grad = {const_cast<float*>(&kOne), DType::f32};
    gradient.normalizer = kept->normalizer;
    gradient.grad_input = {dx.data, dx.dtype};
    cpu::launch(call, &gradient);
  }
  return capsule_of(std::move(kept));
}

bool direct_mse_backward(py::handle grad_loss, py::handle input, py::handle target, py::handle grad_input,
                         const py::capsule& capsule) {
  const Kept& kept = *capsule.get_pointer<Kept>();
  const Plain g(grad_loss), x(input), y(target), dx(grad_input);
  if (!are_alike(x, y) || !x.is_like(kept.input) || !g.is_scalar_beside(x) || !dx.is_like(x)) return false;
  auto call = mse_problem<MSEBackward>(x, y);
  call.grad = {g.data, g.dtype};
  call.normalizer = kept.normalizer;
  call.grad_input = {dx.data, dx.dtype};
#ifdef LOSSOPS_CUDA
  if (x.is_on_gpu()) return queue(call, x.device), true;
#endif
  cpu::launch(call);
  return true;
}

} // namespace

void define_direct(py::module_& m) {
  torch();
  m.def("is_one", &is_one, "Whether a tensor is a 1, plain and on the CPU.");
  m.def("direct_cross_entropy", &direct_cross_entropy);
  m.def("direct_cross_entropy_forward", &direct_cross_entropy_forward);
  m.def("direct_cross_entropy_backward", &direct_cross_entropy_backward);
  m.def("direct_mse", &direct_mse);
  m.def("direct_mse_forward", &direct_mse_forward);
  m.def("direct_mse_backward", &direct_mse_backward);
}

} // namespace lossops
