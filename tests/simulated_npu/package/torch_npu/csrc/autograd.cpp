// The end of a process that has run backward passes.
//
// torch keeps a Python object, the context variables, in every backward pass (`_engine_run_backward`), and autograd's
// thread for a device, which runs the pass, may be the last that holds it: it takes the GIL to let go. Where the main
// thread has meanwhile begun to end Python, CPython ends the thread inside of a destructor, and that ends the process:
// "terminate called without an active exception". The main thread waits for a pass but not for its thread, so it can
// happen on every accelerator (https://github.com/pytorch/pytorch/issues/117762); the busier the machine, the likelier.
#include "device.h"

#include <ATen/record_function.h>

#include <unistd.h>

#include <atomic>

namespace simulated_npu {
namespace {

// The process that has run a backward pass and so has autograd's threads: a fork does not inherit them.
std::atomic<pid_t> process_with_threads{0};

const auto autograd_observer = at::addGlobalCallback(
    at::RecordFunctionCallback([](const at::RecordFunction&) -> std::unique_ptr<at::ObserverContext> {
      process_with_threads = getpid();
      return nullptr;
    }).scopes({at::RecordScope::BACKWARD_FUNCTION}));

} // namespace

void wait_for_autograd() {
  if (process_with_threads != getpid()) {
    return;
  }
  // A thread lets go of a pass before it takes the next. This one comes from C++ and holds nothing of Python's.
  for (c10::DeviceIndex index = 0; index < device_count(); ++index) {
    const auto options = at::TensorOptions(c10::Device(at::kPrivateUse1, index));
    at::empty({}, options).requires_grad_().backward(at::empty({}, options));
  }
}

} // namespace simulated_npu
