// The communication backend `hccl`, which hands the host memory of its tensors to gloo; and what Python sees of this
// extension.
#include "device.h"

#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/utils/pybind.h>

#include <pybind11/stl.h>

namespace simulated_npu {
namespace {

using Tensors = std::vector<at::Tensor>;
using TensorLists = std::vector<Tensors>;
using WorkPtr = c10::intrusive_ptr<c10d::Work>;

Tensors host_views(const Tensors& tensors) {
  Tensors views;
  for (const auto& tensor : tensors) {
    TORCH_CHECK(tensor.is_privateuseone(), "simulated hccl: takes npu tensors, not one on ", tensor.device());
    views.push_back(host_view(tensor));
  }
  return views;
}

TensorLists host_views(const TensorLists& lists) {
  TensorLists views;
  for (const auto& tensors : lists) {
    views.push_back(host_views(tensors));
  }
  return views;
}

// For the collectives that see a tensor as one stretch of memory, whatever its shape; gloo would compare the shapes.
Tensors flat_host_views(const Tensors& tensors) {
  auto views = host_views(tensors);
  for (auto& view : views) {
    view = view.view(-1);
  }
  return views;
}

class ProcessGroupHccl final : public c10d::Backend {
 public:
  explicit ProcessGroupHccl(c10::intrusive_ptr<c10d::Backend> gloo)
      : Backend(gloo->getRank(), gloo->getSize()), gloo_(std::move(gloo)) {}

  const std::string getBackendName() const override {
    return "hccl";
  }

  WorkPtr broadcast(Tensors& tensors, const c10d::BroadcastOptions& options) override {
    auto views = host_views(tensors);
    return gloo_->broadcast(views, options);
  }
  WorkPtr allreduce(Tensors& tensors, const c10d::AllreduceOptions& options) override {
    auto views = host_views(tensors);
    return gloo_->allreduce(views, options);
  }
  WorkPtr allreduce_coalesced(Tensors& tensors, const c10d::AllreduceCoalescedOptions& options) override {
    auto views = host_views(tensors);
    return gloo_->allreduce_coalesced(views, options);
  }
  WorkPtr reduce(Tensors& tensors, const c10d::ReduceOptions& options) override {
    auto views = host_views(tensors);
    return gloo_->reduce(views, options);
  }
  WorkPtr allgather(TensorLists& outputs, Tensors& inputs, const c10d::AllgatherOptions& options) override {
    auto output_views = host_views(outputs);
    auto input_views = host_views(inputs);
    return gloo_->allgather(output_views, input_views, options);
  }
  WorkPtr _allgather_base(at::Tensor& output, at::Tensor& input, const c10d::AllgatherOptions& options) override {
    auto views = flat_host_views({output, input});
    return gloo_->_allgather_base(views[0], views[1], options);
  }
  WorkPtr allgather_into_tensor_coalesced(
      Tensors& outputs, Tensors& inputs, const c10d::AllgatherOptions& options) override {
    auto output_views = flat_host_views(outputs);
    auto input_views = flat_host_views(inputs);
    return gloo_->allgather_into_tensor_coalesced(output_views, input_views, options);
  }
  WorkPtr gather(TensorLists& outputs, Tensors& inputs, const c10d::GatherOptions& options) override {
    auto output_views = host_views(outputs);
    auto input_views = host_views(inputs);
    return gloo_->gather(output_views, input_views, options);
  }
  WorkPtr scatter(Tensors& outputs, TensorLists& inputs, const c10d::ScatterOptions& options) override {
    auto output_views = host_views(outputs);
    auto input_views = host_views(inputs);
    return gloo_->scatter(output_views, input_views, options);
  }
  WorkPtr reduce_scatter(Tensors& outputs, TensorLists& inputs, const c10d::ReduceScatterOptions& options) override {
    auto output_views = host_views(outputs);
    auto input_views = host_views(inputs);
    return gloo_->reduce_scatter(output_views, input_views, options);
  }
  WorkPtr _reduce_scatter_base(
      at::Tensor& output, at::Tensor& input, const c10d::ReduceScatterOptions& options) override {
    auto views = flat_host_views({output, input});
    return gloo_->_reduce_scatter_base(views[0], views[1], options);
  }
  WorkPtr reduce_scatter_tensor_coalesced(
      Tensors& outputs, Tensors& inputs, const c10d::ReduceScatterOptions& options) override {
    auto output_views = flat_host_views(outputs);
    auto input_views = flat_host_views(inputs);
    return gloo_->reduce_scatter_tensor_coalesced(output_views, input_views, options);
  }
  WorkPtr alltoall_base(
      at::Tensor& output,
      at::Tensor& input,
      std::vector<int64_t>& output_sizes,
      std::vector<int64_t>& input_sizes,
      const c10d::AllToAllOptions& options) override {
    auto views = host_views({output, input});
    return gloo_->alltoall_base(views[0], views[1], output_sizes, input_sizes, options);
  }
  WorkPtr send(Tensors& tensors, int rank, int tag) override {
    auto views = host_views(tensors);
    return gloo_->send(views, rank, tag);
  }
  WorkPtr recv(Tensors& tensors, int rank, int tag) override {
    auto views = host_views(tensors);
    return gloo_->recv(views, rank, tag);
  }
  WorkPtr barrier(const c10d::BarrierOptions&) override {
    return gloo_->barrier(c10d::BarrierOptions()); // the device ids in the options mean nothing to gloo
  }

  void setSequenceNumberForGroup() override {
    gloo_->setSequenceNumberForGroup();
  }
  uint64_t getSequenceNumberForGroup() override {
    return gloo_->getSequenceNumberForGroup();
  }

 private:
  c10::intrusive_ptr<c10d::Backend> gloo_;
};

} // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  py::module_::import("torch.distributed"); // which tells pybind11 of c10d's classes
  py::class_<ProcessGroupHccl, c10d::Backend, c10::intrusive_ptr<ProcessGroupHccl>>(module, "ProcessGroupHCCL")
      .def(py::init<c10::intrusive_ptr<c10d::Backend>>());
  module.def("device_count", [] { return int(device_count()); });
  module.def("host_view", &host_view);
  module.def("default_generator", [](int index) { return default_generator(index); });
  module.def("wait_for_autograd", &wait_for_autograd, py::call_guard<py::gil_scoped_release>());
  module.def("counts", &counts);
  module.def("reset_counts", &reset_counts);
}

} // namespace simulated_npu
