// "simgpu": a second kind of device made of host memory, to hold code to the rules of CUDA where there is no GPU.
//
// Its tensors are ordinary torch.Tensor on simgpu:0 or simgpu:1 (PrivateUse1). Every kernel runs on the CPU, on copies
// (at::native::cpu_fallback), but:
//   - tensors on two devices in one operation raise, unless one is a CPU scalar, or a CPU index of index and index_put;
//   - a CPU generator for a device tensor raises;
//   - what would make the host wait for a CUDA device is reported, by the operation;
//   - numpy() and the like raise, as PyTorch has it for any device that is not the CPU.
// Written against PyTorch's headers, after the operations that its own test backend (torch_openreg) registers.

#include <ATen/autocast_mode.h>
#include <ATen/native/CPUFallback.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <set>

#include "operations.h"

namespace simulated {

REGISTER_ALLOCATOR(kType, &allocator);
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

// ---- the rules ----

const std::set<std::string> kIndexing = {"aten::index", "aten::_unsafe_index", "aten::index_put", "aten::index_put_",
                                         "aten::_index_put_impl_"};
const std::set<std::string> kReading = {  // kernels whose output's size, or path, depends on values
    "aten::nonzero", "aten::equal", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive",
    "aten::masked_select", "aten::bincount", "aten::is_nonzero", "aten::histc"};

void check_devices(const std::string& name, c10::ArrayRef<c10::IValue> arguments) {
  std::optional<at::Device> device;
  bool cpu = false;
  auto look = [&](const at::Tensor& t) {
    if (!t.defined()) return;
    if (t.device().type() == kType) {
      TORCH_CHECK(!device || *device == t.device(), "Expected all tensors to be on the same device, but found at least ",
                  "two devices, ", *device, " and ", t.device(), "! (in ", name, ")");
      device = t.device();
    } else if (t.is_cpu() && (t.dim() > 0 || t.numel() != 1)) {
      cpu = true;
    }
  };
  for (const auto& value : arguments) {
    if (value.isTensor()) look(value.toTensor());
    else if (value.isTensorList()) for (const at::Tensor& t : value.toTensorVector()) look(t);
    else if (value.isOptionalTensorList()) for (const std::optional<at::Tensor>& t : value.toOptionalTensorList()) { if (t) look(*t); }
  }
  TORCH_CHECK(!(cpu && device) || kIndexing.count(name), "Expected all tensors to be on the same device, but found at ",
              "least two devices, ", *device, " and cpu! (in ", name, ")");
}

void report_waits(const std::string& name, c10::ArrayRef<c10::IValue> arguments) {
  if (kReading.count(name)) wait(name);
  if (name == "aten::repeat_interleave" && arguments.back().isNone()) wait(name + " without output_size");
  if (!kIndexing.count(name) || !arguments[0].toTensor().is_privateuseone()) return;
  bool host = false, mask = false;
  for (const std::optional<at::Tensor>& index : arguments[1].toOptionalTensorList()) {
    if (!index || !index->defined()) continue;
    host |= index->is_cpu();
    mask |= index->scalar_type() == at::kBool || index->scalar_type() == at::kByte;
  }
  // a number written under a mask is a masked_fill, which does not wait
  const bool fill = arguments.size() > 2 && arguments[2].isTensor() && arguments[2].toTensor().numel() == 1;
  if (host) wait(name + " with an index of the host");
  else if (mask && !fill) wait(name + " with a mask");
}

void kernel(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& name = op.schema().name();
  const auto count = op.schema().arguments().size();
  check_devices(name, torch::jit::last(*stack, count));
  report_waits(name, torch::jit::last(*stack, count));
  std::vector<std::pair<at::Generator, at::Generator>> generators;  // those given, and the CPU's in their place
  for (size_t i = stack->size() - count; i < stack->size(); i++) {
    if (!(*stack)[i].isGenerator()) continue;
    auto given = (*stack)[i].toGenerator();
    TORCH_CHECK(given.device().type() == kType, "Expected a 'simgpu' device type for generator but found '",
                given.device().type(), "' (in ", name, ")");
    auto twin = at::detail::createCPUGenerator();
    twin.set_state(given.get_state());
    generators.emplace_back(given, twin);
    (*stack)[i] = twin;
  }
  struct Inside {
    bool before = std::exchange(in_kernel, true);
    ~Inside() { in_kernel = before; }
  } inside;
  at::native::cpu_fallback(op, stack);
  for (auto& [given, twin] : generators) given.set_state(twin.get_state());
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&kernel>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("as_strided", as_strided);
  m.impl("resize_", resize_);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", local_scalar_dense);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("view", view);
  m.impl("convolution_overrideable", convolution);
  m.impl("convolution_backward_overrideable", convolution_backward);
}

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  KERNEL_PRIVATEUSEONE(linear, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(mm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(matmul, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(bmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(addmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(scaled_dot_product_attention, lower_precision_fp)
}

}  // namespace simulated

PYBIND11_MODULE(simulated_device, m) {
  using namespace simulated;
  static Hooks hooks;
  at::RegisterPrivateUse1HooksInterface(&hooks);
  m.attr("devices") = kDevices;
  m.def("current_device", [] { return int(current); });
  m.def("set_device", [](int index) { current = static_cast<c10::DeviceIndex>(index); });
  m.def("peak", [] { return int64_t(peak); });
  m.def("reset_peak", [] { return int64_t(peak = int64_t(held)); });
  m.def("seed", [](int index, uint64_t seed) { at::Generator(hooks.getDefaultGenerator(index)).set_current_seed(seed); });
  m.def("get_rng_state", [](int index) { return hooks.getDefaultGenerator(index).get_state(); });
  m.def("set_rng_state", [](int index, const at::Tensor& state) { at::Generator(hooks.getDefaultGenerator(index)).set_state(state); });
  m.def("report_waits_to", [](py::object call) {
    on_wait = [call](const std::string& what) {
      py::gil_scoped_acquire locked;
      call(what);
    };
  });
}
