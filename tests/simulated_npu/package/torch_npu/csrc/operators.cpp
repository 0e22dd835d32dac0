// The operators: those on storage natively, all others on the CPU, with a count of what ran where.
#include "device.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/record_function.h>
#include <torch/library.h>

#include <ATen/ops/_local_scalar_dense_native.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>

#include <algorithm>
#include <mutex>
#include <optional>
#include <string_view>

namespace simulated_npu {
namespace {

// Counting

std::mutex counts_mutex;
Counts all_counts;

void count(const char* kernel, const std::string& name) {
  std::lock_guard<std::mutex> lock(counts_mutex);
  ++all_counts[kernel][name];
}

bool on_npu(const c10::IValue& value) {
  return value.isTensor() && value.toTensor().defined() && value.toTensor().is_privateuseone();
}

// Torch calls this at every operator that is called; ours on this device are counted by the kernel that serves them.
// Those that have none reach `cpu_fallback`, which counts for itself.
std::unique_ptr<at::ObserverContext> observe(const at::RecordFunction& call) {
  const std::string_view name = call.name();
  if (name.rfind("sora_hw::", 0) != 0 && name.rfind("npu::", 0) != 0) {
    return nullptr;
  }
  const auto inputs = call.inputs();
  const auto operator_name = call.operator_name();
  if (!operator_name || std::none_of(inputs.begin(), inputs.end(), on_npu)) {
    return nullptr;
  }
  const auto op = c10::Dispatcher::singleton().findSchema(*operator_name);
  if (op->hasKernelForDispatchKey(c10::DispatchKey::PrivateUse1)) {
    count("native", std::string(name));
  } else if (
      op->hasKernelForDispatchKey(c10::DispatchKey::CompositeExplicitAutograd) ||
      op->hasKernelForDispatchKey(c10::DispatchKey::CompositeImplicitAutograd)) {
    count("composite", std::string(name));
  }
  return nullptr;
}

const auto observer = at::addGlobalCallback(
    at::RecordFunctionCallback(observe).needsInputs(true).scopes({at::RecordScope::FUNCTION}));

// The fallback

// For its lifetime the CPU's default generator holds the state of a device's, so that an operator that draws random
// numbers draws them from the device.
class DeviceRandomness {
 public:
  explicit DeviceRandomness(const at::Generator& device) : lock_(mutex()), device_(host_generator(device)) {
    saved_ = cpu_.get_state();
    cpu_.set_state(device_.get_state());
  }
  ~DeviceRandomness() {
    device_.set_state(cpu_.get_state());
    cpu_.set_state(saved_);
  }

 private:
  static std::mutex& mutex() {
    static std::mutex mutex;
    return mutex;
  }

  std::lock_guard<std::mutex> lock_;
  at::Generator cpu_ = at::detail::getDefaultCPUGenerator();
  at::Generator device_;
  at::Tensor saved_;
};

std::vector<at::Tensor> tensors_of(const c10::IValue& value) {
  if (value.isTensor()) {
    return {value.toTensor()};
  }
  if (value.isTensorList()) {
    return value.toTensorVector();
  }
  return {};
}

// As on every accelerator, operands lie on one device. A number may lie on the CPU, and so may what `x[...]` is indexed
// by: lists of optional tensors are not looked at.
std::optional<at::Device> common_device(const c10::OperatorHandle& op, c10::ArrayRef<c10::IValue> arguments) {
  std::optional<at::Device> device;
  for (const auto& argument : arguments) {
    for (const auto& tensor : tensors_of(argument)) {
      if (!tensor.defined() || (tensor.is_cpu() && tensor.dim() == 0)) {
        continue;
      }
      TORCH_CHECK(
          !device || *device == tensor.device(),
          "Expected all tensors to be on the same device, but found at least two devices, ",
          *device,
          " and ",
          tensor.device(),
          "! (operator ",
          op.operator_name(),
          ")");
      device = tensor.device();
    }
  }
  return device;
}

void cpu_fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  count("cpu_fallback", op.operator_name().name);
  const auto device = common_device(op, torch::jit::last(stack, op.schema().arguments().size()));

  for (auto argument = stack->end() - op.schema().arguments().size(); argument != stack->end(); ++argument) {
    if (argument->isGenerator() && argument->toGenerator().device().is_privateuseone()) {
      *argument = host_generator(argument->toGenerator());
    }
  }
  std::optional<DeviceRandomness> randomness;
  if (device && op.hasTag(at::Tag::nondeterministic_seeded)) {
    randomness.emplace(default_generator(device->index()));
  }
  // A view that came from the CPU would be a copy, and what is written into it lost: such an operator needs a kernel.
  at::native::cpu_fallback(op, stack, /*error_on_views=*/true);
}

// The operators on storage

using OptionalType = std::optional<at::ScalarType>;
using OptionalLayout = std::optional<at::Layout>;
using OptionalDevice = std::optional<at::Device>;

constexpr c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);

at::Tensor empty(
    at::IntArrayRef size,
    OptionalType type,
    OptionalLayout,
    OptionalDevice device,
    std::optional<bool>,
    std::optional<at::MemoryFormat> format) {
  const c10::DeviceGuard guard(*device);
  return at::detail::empty_generic(
      size, c10::GetAllocator(at::kPrivateUse1), kKeys, c10::dtype_or_default(type), format);
}

at::Tensor empty_strided(
    at::IntArrayRef size,
    at::IntArrayRef stride,
    OptionalType type,
    OptionalLayout,
    OptionalDevice device,
    std::optional<bool>) {
  const c10::DeviceGuard guard(*device);
  return at::detail::empty_strided_generic(
      size, stride, c10::GetAllocator(at::kPrivateUse1), kKeys, c10::dtype_or_default(type));
}

at::Tensor copy_from(const at::Tensor& self, const at::Tensor& target, bool) {
  host_view(target).copy_(host_view(self));
  return target;
}

at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& target) {
  target.resize_(self.sizes());
  return copy_from(self, target, false);
}

at::Scalar local_scalar(const at::Tensor& self) {
  return at::native::_local_scalar_dense_cpu(host_view(self));
}

// These two may allocate, and the allocator takes memory of the current device.
const at::Tensor& resize(const at::Tensor& self, at::IntArrayRef size, std::optional<at::MemoryFormat> format) {
  const c10::DeviceGuard guard(self.device());
  return at::native::resize_(self, size, format);
}

at::Tensor& set_storage(
    at::Tensor& self, at::Storage source, int64_t offset, at::IntArrayRef size, at::IntArrayRef stride) {
  const c10::DeviceGuard guard(self.device());
  return at::native::set_storage_cpu_(self, std::move(source), offset, size, stride);
}

at::Tensor& set_empty(at::Tensor& self) {
  return self.set_(at::empty({0}, self.options()));
}

void record_stream(at::Tensor&, at::Stream) {}

// Whether `parameter.data = tensor` may move a parameter between CPU and device, as `Module.to` does.
bool has_compatible_shallow_copy_type(const at::Tensor& self, const at::Tensor& from) {
  const auto dense = [](const at::Tensor& tensor) {
    return tensor.layout() == at::kStrided && (tensor.is_cpu() || tensor.is_privateuseone());
  };
  return dense(self) && dense(from);
}

} // namespace

Counts counts() {
  std::lock_guard<std::mutex> lock(counts_mutex);
  return all_counts;
}

void reset_counts() {
  std::lock_guard<std::mutex> lock(counts_mutex);
  all_counts.clear();
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&cpu_fallback>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", at::native::view);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("unfold", at::native::unfold);
  m.impl("view_as_real", at::native::view_as_real);
  m.impl("view_as_complex", at::native::view_as_complex);
  m.impl("resize_", resize);
  m.impl("set_", set_empty);
  m.impl("set_.source_Tensor", at::native::set_tensor_);
  m.impl("set_.source_Storage", at::native::set_);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", local_scalar);
  m.impl("record_stream", record_stream);
  m.impl("_has_compatible_shallow_copy_type", has_compatible_shallow_copy_type);
}

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFallthrough());
}

// The casts of autocast: torch's own lists, which CUDA uses as well.
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
#define SIMULATED_NPU_LOWER(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
#define SIMULATED_NPU_FP32(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
#define SIMULATED_NPU_FP32_OUT(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32_set_opt_dtype)
#define SIMULATED_NPU_PROMOTE(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, promote)
  AT_FORALL_LOWER_PRECISION_FP(SIMULATED_NPU_LOWER)
  AT_FORALL_FP32(SIMULATED_NPU_FP32)
  AT_FORALL_FP32_SET_OPT_DTYPE(SIMULATED_NPU_FP32_OUT)
  AT_FORALL_PROMOTE(SIMULATED_NPU_PROMOTE)
}

} // namespace simulated_npu
