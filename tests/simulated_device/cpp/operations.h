// Operations that a backend must have of its own: tensors are made, seen otherwise, and copied between devices.

#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/ops/_local_scalar_dense_native.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>

#include <functional>
#include <string>

#include "device.h"

namespace simulated {

// ---- what makes the host wait ----

inline std::function<void(const std::string&)> on_wait;  // told what for
inline thread_local bool in_kernel = false;              // whose own copies are the simulation's

inline void wait(const std::string& what) {
  if (!in_kernel && on_wait) on_wait(what);
}

// ---- tensors ----

inline at::Tensor on_cpu(const at::Tensor& t) {  // the same memory, seen as the CPU's
  return t.is_cpu() ? t : at::from_blob(t.data_ptr(), t.sizes(), t.strides(), t.options().device(at::kCPU));
}

inline at::Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                        std::optional<at::Device> device, std::optional<bool>,
                        std::optional<at::MemoryFormat> format) {
  const c10::DeviceGuard guard(c10::device_or_default(device));
  return at::detail::empty_generic(size, &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   c10::dtype_or_default(dtype), format);
}

inline at::Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                                std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>) {
  const c10::DeviceGuard guard(c10::device_or_default(device));
  return at::detail::empty_strided_generic(size, stride, &allocator,
                                           c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           c10::dtype_or_default(dtype));
}

inline at::Tensor as_strided(const at::Tensor& self, at::IntArrayRef size, at::IntArrayRef stride,
                             std::optional<int64_t> offset) {
  return at::native::as_strided_tensorimpl(self, size, stride, offset);
}

inline const at::Tensor& resize_(const at::Tensor& self, at::IntArrayRef size,
                                 std::optional<at::MemoryFormat> format) {
  const c10::DeviceGuard guard(self.device());
  return at::native::resize_(self, size, format);
}

inline at::Tensor reshape_alias(const at::Tensor& self, at::IntArrayRef size, at::IntArrayRef stride) {
  return at::native::_reshape_alias(self, size, stride);
}

inline at::Tensor& set_storage(at::Tensor& self, at::Storage source, int64_t offset, at::IntArrayRef size,
                               at::IntArrayRef stride) {
  return at::native::set_storage_cpu_(self, source, offset, size, stride);
}

inline at::Tensor view(const at::Tensor& self, at::IntArrayRef size) { return at::native::view(self, size); }

// ---- from device to device ----

inline at::Tensor copy_from(const at::Tensor& self, const at::Tensor& to, bool non_blocking) {
  // no memory is pinned here: CUDA waits for whatever comes back, and for what goes there unless it is told not to
  if (self.numel() && to.is_cpu()) wait("copy to the host");
  if (self.numel() && self.is_cpu() && !non_blocking) wait("copy from pageable host memory");
  auto target = on_cpu(to);
  target.copy_(on_cpu(self));
  return to;
}

inline at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& to) {
  const c10::DeviceGuard guard(to.device());
  at::native::resize_(to, self.sizes(), std::nullopt);
  on_cpu(to).copy_(on_cpu(self));
  return to;
}

inline at::Scalar local_scalar_dense(const at::Tensor& self) {
  wait("read of a number");
  return at::native::_local_scalar_dense_cpu(on_cpu(self));
}

// ---- convolutions, which PyTorch asks each backend for in one piece ----

inline at::Tensor convolution(const at::Tensor& x, const at::Tensor& w, const std::optional<at::Tensor>& b,
                              at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                              bool transposed, at::IntArrayRef output_padding, int64_t groups) {
  TORCH_CHECK(x.device() == w.device(), "Expected all tensors to be on the same device (in convolution)");
  std::optional<at::Tensor> bias = b && b->defined() ? std::optional<at::Tensor>(on_cpu(*b)) : std::nullopt;
  in_kernel = true;
  auto y = at::convolution(on_cpu(x), on_cpu(w), bias, stride, padding, dilation, transposed, output_padding, groups)
               .to(x.device());
  in_kernel = false;
  return y;
}

inline std::tuple<at::Tensor, at::Tensor, at::Tensor> convolution_backward(
    const at::Tensor& g, const at::Tensor& x, const at::Tensor& w, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation, bool transposed, at::IntArrayRef output_padding, int64_t groups,
    std::array<bool, 3> mask) {
  const int64_t out = transposed ? w.size(1) * groups : w.size(0);
  const auto dy = g.contiguous();
  in_kernel = true;
  auto [a, b, c] = at::convolution_backward(on_cpu(dy), on_cpu(x), on_cpu(w), at::IntArrayRef(out), stride, padding,
                                            dilation, transposed, output_padding, groups, mask);
  auto there = [&](const at::Tensor& t) { return t.defined() ? t.to(x.device()) : t; };
  auto gradients = std::make_tuple(there(a), there(b), there(c));
  in_kernel = false;
  return gradients;
}

}  // namespace simulated
