// What the files of the simulated device share.
#pragma once

#include <ATen/ATen.h>

#include <map>
#include <string>

namespace simulated_npu {

// A CPU tensor over the memory of `tensor`, which it keeps alive. A CPU tensor is returned as it is.
at::Tensor host_view(const at::Tensor& tensor);

// The devices that this process sees. Read from the environment once, as the real runtime does.
c10::DeviceIndex device_count();

// The random state of a device; the CPU generator inside does the work.
const at::Generator& default_generator(c10::DeviceIndex index);
at::Generator host_generator(const at::Generator& device_generator);

// Returns when autograd's threads have let go of all backward passes. Without the GIL, which they may need for it.
void wait_for_autograd();

// Calls by the kernel that served them ("native", "composite", "cpu_fallback") and by operator name.
using Counts = std::map<std::string, std::map<std::string, int64_t>>;
Counts counts();
void reset_counts();

} // namespace simulated_npu
